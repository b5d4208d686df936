"""Distributed checkpoints: written by two ranks under DDP, FSDP2 and Lightning, opened in this process."""

from __future__ import annotations

import pickle
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint.state_dict_saver as dcp
from transformers import AutoTokenizer, EsmForMaskedLM

from pipeline.__main__ import main
from pipeline.checkpoints.names import step_of
from pipeline.checkpoints.opening import open_encoder
from pipeline.encoders.description import DESCRIPTION, describe
from pipeline.encoders.options import EncoderOptions
from pipeline.errors import CheckpointError
from tests.support.lab import VALUE, Lab, every_metric, furnished, own_signals
from tests.support.programs import run_two_ranks
from tests.support.sharded import in_training

TEXTS = ["MKVLAAGIVG", "ACD", "WWWWWWW"]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory, model_folder: Callable[..., Path]) -> Path:
    """A folder with what each of two ranks wrote; see `tests/support/sharded.py`."""
    folder = tmp_path_factory.mktemp("sharded")
    shutil.copytree(model_folder("esm"), folder / "esm")
    codes = run_two_ranks("tests.support.sharded", [str(folder), str(folder / "esm")], folder)
    assert codes == [0, 0], (folder / "rank-0.log").read_text()[-3000:] + (folder / "rank-1.log").read_text()[-3000:]
    return folder


def options(folder: Path) -> EncoderOptions:
    return EncoderOptions(device="cpu", architecture=str(folder / "esm"))


@pytest.mark.parametrize(
    ("name", "step"), [("fsdp2", 7), ("async", 7), ("bf16", None), ("ddp", None), ("lightning.ckpt", 2)]
)
def test_hidden_states_are_those_of_the_training(written: Path, name: str, step: int | None) -> None:
    path = str(written / name)
    encoder = open_encoder(path, options(written))
    expected = in_training(written, name.removesuffix(".ckpt")).hidden_states(TEXTS)
    for ours, theirs in zip(encoder.hidden_states(TEXTS), expected, strict=True):
        assert torch.equal(ours, theirs)
    assert step_of(path, encoder) == step


def save(folder: Path, model: Path, content: Callable[[Any], dict[str, Any]] = lambda m: m.state_dict()) -> Path:
    """Saved in this process, without a process group."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is a single process
        dcp.save(content(EsmForMaskedLM.from_pretrained(model)), checkpoint_id=folder)
    return folder


def test_a_description_makes_a_lightning_folder_open_by_itself(
    tmp_path: Path, model_folder: Callable[..., Path]
) -> None:
    """What the callback adds to a checkpoint is in `meta.pt`."""
    esm = model_folder("esm")
    path = save(tmp_path / "step=5.ckpt", esm, lambda model: {"state_dict": {"model": model.state_dict()}})
    description = describe(EsmForMaskedLM.from_pretrained(esm), AutoTokenizer.from_pretrained(esm), "model.")
    torch.save({"global_step": 5, DESCRIPTION: description}, path / "meta.pt")
    encoder = open_encoder(str(path), EncoderOptions(device="cpu"))
    assert encoder.step == 5
    assert torch.equal(
        encoder.hidden_states(TEXTS)[0], open_encoder(str(esm), EncoderOptions(device="cpu")).hidden_states(TEXTS)[0]
    )


def test_a_module_of_the_users_own_is_filled(tmp_path: Path, model_folder: Callable[..., Path]) -> None:
    from tests.support.own_model import make_module

    module = make_module(seed=3)
    path = save(tmp_path / "own", model_folder("esm"), lambda _: {"model": module.state_dict()})
    encoder = open_encoder(str(path), EncoderOptions(device="cpu", model_factory="tests.support.own_model.make_module"))
    live = open_live(module)
    assert torch.equal(encoder.hidden_states(["MKVLA"])[0], live.hidden_states(["MKVLA"])[0])


def open_live(module: Any) -> Any:
    from pipeline.encoders.live import LiveModel

    return LiveModel(module.eval()).encoder(module, EncoderOptions(device="cpu"))


def test_a_training_that_has_ranks_of_its_own_is_not_disturbed(written: Path) -> None:
    """It opens without a collective: with a process group of one rank of two, one would wait for ever."""
    codes = run_two_ranks(
        "tests.support.opens_alone", [str(written / "fsdp2"), str(written / "esm")], written, wait_for=(0,)
    )
    assert codes[0] == 0, (written / "rank-0.log").read_text()[-2000:]


def test_the_command_line_measures_it(tmp_path: Path, model_folder: Callable[..., Path], tracking: str) -> None:
    with own_signals():
        lab: Lab = furnished(tmp_path / "lab", model_folder, tracking)
        path = save(tmp_path / "step=9", lab.ckpt, lambda model: {"model": model.state_dict(), "step": 9})
        command = lab.command(VALUE, architecture=str(lab.ckpt))
        assert main(command) == 0
        assert main([command[0], f"--ckpt={path}", *command[2:]]) == 0
    second, first = lab.parents()
    measured = [every_metric(run) for run in (first, second)]
    assert measured[0] == measured[1]
    assert measured[0]


class Evil:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("was-here"),))


def rewrite(path: Path, change: Callable[[Any], Any]) -> None:
    """Changes the content of `.metadata`."""
    file = path / ".metadata"
    file.write_bytes(pickle.dumps(change(pickle.loads(file.read_bytes()))))


def shorter(path: Path) -> None:
    """Cuts the end of the shard off."""
    file = next(path.glob("*.distcp"))
    file.write_bytes(file.read_bytes()[:-100])


def outside(metadata: Any) -> Any:
    for stored in metadata.storage_data.values():
        stored.relative_path = "../" + stored.relative_path
    return metadata


def evil(metadata: Any) -> Any:
    metadata.planner_data["x"] = Evil()
    return metadata


def reshaped(metadata: Any) -> Any:
    name = next(name for name in metadata.state_dict_metadata if name.endswith("word_embeddings.weight"))
    metadata.state_dict_metadata[name].size = torch.Size([7, 32])
    return metadata


def no_chunks(metadata: Any) -> Any:
    name = next(name for name in metadata.state_dict_metadata if name.endswith("word_embeddings.weight"))
    metadata.state_dict_metadata[name].chunks.clear()
    return metadata


def no_places(metadata: Any) -> Any:
    name = next(name for name in metadata.state_dict_metadata if name.endswith("word_embeddings.weight"))
    metadata.storage_data = {index: where for index, where in metadata.storage_data.items() if index.fqn != name}
    return metadata


def under_two_names(model: Any) -> dict[str, Any]:
    state = model.state_dict()
    return {**state, **{f"_orig_mod.{name}": value + 1 for name, value in state.items()}}


def not_finite(model: Any) -> dict[str, Any]:
    state = model.state_dict()
    return {name: value * torch.nan if name.endswith("query.weight") else value for name, value in state.items()}


def without(part: str) -> Callable[[Any], dict[str, Any]]:
    return lambda model: {name: value for name, value in model.state_dict().items() if part not in name}


def with_another(model: Any) -> dict[str, Any]:
    return {**model.state_dict(), "esm.encoder.layer.0.attention.gate.weight": torch.ones(2)}


def twice(model: Any) -> dict[str, Any]:
    return {"model": model.state_dict(), "ema": model.state_dict()}


BROKEN: dict[str, tuple[Callable[[Any], dict[str, Any]] | None, Callable[[Path], Any], str]] = {
    "no metadata": (None, lambda path: (path / ".metadata").unlink(), "holds .distcp files and no .metadata"),
    "half written": (None, lambda path: (path / ".metadata").rename(path / ".metadata.tmp"), "which is written last"),
    "empty metadata": (None, lambda path: (path / ".metadata").write_bytes(b""), "is damaged"),
    "text": (None, lambda path: (path / ".metadata").write_text("a text"), "is damaged"),
    "cut metadata": (
        None,
        lambda path: (path / ".metadata").write_bytes((path / ".metadata").read_bytes()[:900]),
        "is damaged",
    ),
    "another pickle": (None, lambda path: (path / ".metadata").write_bytes(pickle.dumps([1])), "is damaged"),
    "missing shard": (None, lambda path: next(path.glob("*.distcp")).unlink(), "no such file: the save was"),
    "truncated": (None, shorter, "the save was interrupted, or not all files were copied"),
    "code": (None, lambda path: rewrite(path, evil), "expected the classes of torch.distributed.checkpoint, found"),
    "elsewhere": (None, lambda path: rewrite(path, outside), "expected its files within the folder"),
    "no bytes": (
        None,
        lambda path: next(path.glob("*.distcp")).write_bytes(bytes(next(path.glob("*.distcp")).stat().st_size)),
        "cannot be loaded",
    ),
    "misshapen": (None, lambda path: rewrite(path, reshaped), "expected all of its 224 numbers, found where 1056"),
    "missing weight": (without("layer.1.attention.self.query.weight"), lambda path: None, "lacks"),
    "another model": (lambda _: torch.nn.Linear(3, 4).state_dict(), lambda path: None, "found none"),
    "left over": (with_another, lambda path: None, "holds weights that a EsmModel does not have"),
    "two sets": (twice, lambda path: None, "found several"),
    "no chunks": (None, lambda path: rewrite(path, no_chunks), "found where 0 are stored"),
    "no places": (None, lambda path: rewrite(path, no_places), "or not their places"),
    "two names": (under_two_names, lambda path: None, "are both 'esm"),
    "not finite": (not_finite, lambda path: None, "expected finite numbers"),
    "nothing": (lambda _: {"step": 3}, lambda path: None, "found none"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_broken_is_an_error_of_one_line(
    case: str, tmp_path: Path, model_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    content, spoil, message = BROKEN[case]
    esm = model_folder("esm")
    path = save(tmp_path / "saved", esm, *([content] if content else []))
    spoil(path)
    with pytest.raises(CheckpointError) as caught:
        open_encoder(str(path), EncoderOptions(device="cpu", architecture=str(esm)))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "was-here").exists()


def test_a_folder_that_does_not_say_what_model_it_holds(tmp_path: Path, model_folder: Callable[..., Path]) -> None:
    path = save(tmp_path / "saved", model_folder("esm"))
    with pytest.raises(CheckpointError, match="does not say what model it holds; set architecture"):
        open_encoder(str(path), EncoderOptions(device="cpu"))
