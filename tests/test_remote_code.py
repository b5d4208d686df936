"""Folders of models whose class is in a file beside the weights: run where it is trusted, by name, and never else."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import dynamic_module_utils

from pipeline.__main__ import main
from pipeline.checkpoints.opening import open_encoder
from pipeline.encoders.live import LiveModel
from pipeline.encoders.options import EncoderOptions
from pipeline.errors import CheckpointError
from tests.support.lab import VALUE, furnished, own_signals
from tests.support.remote_esm import RemoteConfig, RemoteForMaskedLM, RemoteTokenizer

CPU = EncoderOptions(device="cpu")
TRUSTED = EncoderOptions(device="cpu", trust_remote_code=True)


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Where transformers copies such code to; the home folder is left alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        patch.setattr(sys, "path", list(sys.path))
        yield


@pytest.fixture
def remote(tmp_path: Path, model_folder: Callable[..., Path]) -> tuple[Path, RemoteForMaskedLM]:
    """A folder as a trainer writes it, and the model in memory."""
    given = json.loads((model_folder("esm") / "config.json").read_text())
    given = {key: value for key, value in given.items() if key not in ("model_type", "architectures", "dtype")}
    classes: list[tuple[Any, str]] = [(RemoteConfig, "AutoConfig"), (RemoteForMaskedLM, "AutoModelForMaskedLM")]
    for kind, name in [*classes, (RemoteTokenizer, "AutoTokenizer")]:
        kind.register_for_auto_class(name)
    torch.manual_seed(5)
    model = RemoteForMaskedLM(RemoteConfig(gain=1.5, **given))
    path = tmp_path / "checkpoint-30"
    model.save_pretrained(path, max_shard_size="60KB")
    make_tokenizer: Any = RemoteTokenizer
    make_tokenizer(str(model_folder("esm") / "vocab.txt")).save_pretrained(path)
    (path / "trainer_state.json").write_text('{"global_step": 30}')
    return path, model


def imported() -> set[str]:
    return {name for name in sys.modules if name.startswith("transformers_modules.")}


def test_nothing_runs_unless_it_is_trusted_by_name(remote: tuple[Path, Any]) -> None:
    path, _ = remote
    before = imported()
    with pytest.raises(
        CheckpointError, match=r"is of a class of its own, in remote_esm.py, which is not run; set trust_"
    ):
        open_encoder(str(path), CPU)
    assert imported() == before


def test_hidden_states_are_those_of_the_training(remote: tuple[Path, Any]) -> None:
    path, model = remote
    assert len(list(path.glob("*.safetensors"))) > 1
    encoder = open_encoder(str(path), TRUSTED)
    make_tokenizer: Any = RemoteTokenizer
    live = LiveModel(model.eval(), tokenizer=make_tokenizer(str(path / "vocab.txt"))).encoder(model, CPU)
    assert torch.equal(encoder.hidden_states(["MKVLA"])[0], live.hidden_states(["MKVLA"])[0])
    assert encoder.reusable


def test_the_digest_is_of_the_code_too(remote: tuple[Path, Any]) -> None:
    path, _ = remote
    first = open_encoder(str(path), TRUSTED).digest
    file = path / "remote_esm.py"
    file.write_text(file.read_text().replace("* self.own_gain", "* self.own_gain * 2"))
    changed = open_encoder(str(path), TRUSTED)
    assert changed.digest != first


def test_bare_weights_take_the_code_of_their_architecture(remote: tuple[Path, Any], tmp_path: Path) -> None:
    path, model = remote
    torch.save({"model": model.state_dict()}, tmp_path / "weights.pt")
    options = EncoderOptions(device="cpu", architecture=str(path))
    with pytest.raises(CheckpointError, match="set trust_remote_code=true"):
        open_encoder(str(tmp_path / "weights.pt"), options)
    trusted = EncoderOptions(device="cpu", architecture=str(path), trust_remote_code=True)
    encoder = open_encoder(str(tmp_path / "weights.pt"), trusted)
    assert torch.equal(encoder.hidden_states(["MKV"])[0], open_encoder(str(path), TRUSTED).hidden_states(["MKV"])[0])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path: (path / "remote_esm.py").unlink(), "cannot be loaded"),
        (lambda path: (path / "remote_esm.py").write_text("def broken(:"), "cannot be loaded"),
        (lambda path: (path / "remote_esm.py").write_text("raise RuntimeError('no')"), "cannot be loaded"),
        (lambda path: next(path.glob("model-00002*")).unlink(), "which is not there; copy all shards"),
        (
            lambda path: rewrite(path, {"AutoConfig": "remote_esm.RemoteConfig"}),
            "expected an AutoModel, found AutoConfig",
        ),
        (lambda path: rewrite(path, "remote_esm"), "auto_map: expected the names of classes"),
    ],
)
def test_what_is_broken_is_an_error_of_one_line(
    spoil: Callable[[Path], Any], message: str, remote: tuple[Path, Any]
) -> None:
    path, _ = remote
    spoil(path)
    with pytest.raises(CheckpointError) as caught:
        open_encoder(str(path), TRUSTED)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def rewrite(path: Path, auto_map: Any) -> None:
    """Changes what `config.json` says of the code."""
    file = path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "auto_map": auto_map}))


def test_the_command_line_takes_it_and_the_run_says_so(
    remote: tuple[Path, Any], tmp_path: Path, model_folder: Callable[..., Path], tracking: str, capsys: Any
) -> None:
    path, _ = remote
    with own_signals():
        lab = furnished(tmp_path / "lab", model_folder, tracking)
        command = lab.command(VALUE)
        assert main([command[0], f"--ckpt={path}", *command[2:]]) == 2
        assert "set trust_remote_code=true" in capsys.readouterr().err
        command = lab.command(VALUE, trust_remote_code=True)
        assert main([command[0], f"--ckpt={path}", *command[2:]]) == 0
    run = lab.parents()[0]
    assert run.data.params["cfg.trust_remote_code"] == "True"
    assert run.info.run_name.startswith("checkpoint-30")


MEASURED = "the class of transformers is measured, which may be another model; trust_remote_code=true runs it"
SWAPPED = """
from transformers import EsmModel
class Swapped(EsmModel):
    def __init__(self, config):
        super().__init__(config, add_pooling_layer=False)
    def forward(self, input_ids=None, **options):
        return super().forward(input_ids=input_ids.where(input_ids != 20, 4), **options)  # M as if it were L
"""


def test_code_for_a_type_that_transformers_knows(
    tmp_path: Path, model_folder: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    """Not run, which is said once, or where it is trusted, run; code of a tokenizer alone makes no other model."""
    path = Path(shutil.copytree(model_folder("esm"), tmp_path / "swapped"))
    (path / "swapped.py").write_text(SWAPPED)
    rewrite(path, {"AutoModel": "swapped.Swapped"})
    encoder = open_encoder(str(model_folder("esm")), CPU)
    plain, swapped = (encoder.hidden_states([text])[0] for text in ("MKV", "LKV"))
    before = imported()
    assert torch.equal(open_encoder(str(path), CPU).hidden_states(["MKV"])[0], plain)
    assert imported() == before
    assert [MEASURED in one.message for one in caplog.records].count(True) == 1
    caplog.clear()
    found = open_encoder(str(path), TRUSTED).hidden_states(["MKV"])[0]
    assert torch.allclose(found, swapped, atol=1e-5)
    assert not torch.allclose(found, plain, atol=1e-2)
    rewrite(path, {"AutoTokenizer": ["swapped.Tokenizer", None]})
    assert torch.equal(open_encoder(str(path), TRUSTED).hidden_states(["MKV"])[0], plain)
    assert MEASURED not in caplog.text
