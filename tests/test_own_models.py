"""Models of classes of the user's own: measured in training as they are, and opened again through `model_factory`."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from transformers import AutoTokenizer, EsmForMaskedLM, T5ForConditionalGeneration, T5Model

from pipeline import (
    EncoderOptions,
    LiveModel,
    Store,
    open_encoder,
    setup_dwnstr_task_validation_callbacks,
    untouched,
    validate,
)
from pipeline.config.task import Task
from pipeline.config.yaml_file import to_yaml
from pipeline.encoders.description import DESCRIPTION, portable
from pipeline.errors import CheckpointError, ConfigError
from tests.support import own_model
from tests.support.data import planted_task
from tests.support.lab import every_metric, newest_run
from tests.support.models import RESIDUES
from tests.support.own_model import OwnForMaskedLM, OwnTokenizer, make_module
from tests.support.programs import ROOT
from tests.support.training import Busy, Recorder, section, trainer

FACTORY = "tests.support.own_model.OwnForMaskedLM"


@pytest.fixture
def task(tmp_path: Path) -> Task:
    return planted_task(tmp_path / "data", num_epochs=2)


@pytest.fixture
def module() -> own_model.OwnModule:
    return make_module()


def metrics_of(encoder: Any, task: Task, folder: Path) -> dict[str, float]:
    (scores,) = validate(encoder, task, Store(folder))
    return scores.metrics


def expected_states(model: nn.Module, sequence: str) -> torch.Tensor:
    """What the model's own code gives for one sequence alone, shape (length, hidden_size)."""
    tokens = OwnTokenizer()(sequence, return_tensors="pt")
    with torch.no_grad():
        states: torch.Tensor = model(**tokens).hidden_states[-1][0, 1:-1]
    return states


def test_a_training_of_somebodys_own_model(
    task: Task, module: Any, tmp_path: Path, tracking: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The two lines in a script, and no other change; then its `.ckpt` from the command line, in a new process."""
    (callback,) = setup_dwnstr_task_validation_callbacks(section(tmp_path, task, on_error="raise"))
    keep = pl.callbacks.ModelCheckpoint(tmp_path / "kept", "{step}", monitor="step", mode="max", save_top_k=-1)
    with caplog.at_level("INFO", "pipeline"):
        trainer(tmp_path, [callback, keep]).fit(module, own_model.loader(), own_model.loader(shuffle=False))
    assert (
        "OwnForMaskedLM runs as it is: tests.support.own_model.OwnForMaskedLM is not a class of transformers"
        in caplog.text
    )
    assert [step for step, _ in callback.curve] == [4, 8]  # type: ignore[attr-defined]
    (tmp_path / "task.yaml").write_text(to_yaml(section(tmp_path / "cli", task)))
    for step, metrics in callback.curve:  # type: ignore[attr-defined]
        ckpt = str(tmp_path / "kept" / f"step={step}.ckpt")
        for factory in (FACTORY, "tests.support.own_model.make_function"):
            encoder = open_encoder(ckpt, EncoderOptions(model_factory=factory))
            assert metrics_of(encoder, task, tmp_path / f"{factory} {step}") == metrics
        command = [sys.executable, "-m", "pipeline", "main", f"--ckpt={ckpt}", f"--config={tmp_path / 'task.yaml'}"]
        refused = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert refused.returncode == 2
        expected = (
            f"error: ckpt: '{ckpt}' holds a {FACTORY}, which is no class of transformers; set model_factory to it"
        )
        assert refused.stderr.splitlines()[-1].startswith(expected)
        done = subprocess.run([*command, f"--overrides=model_factory={FACTORY}"], cwd=ROOT, check=False)
        assert done.returncode == 0
        run = newest_run()
        assert metrics.items() <= every_metric(run).items()


def test_the_training_is_bit_for_bit_what_it_is_without(task: Task, tmp_path: Path, tracking: str) -> None:
    """Also where the model keeps tables and counts in plain attributes, which a measurement in between would change."""
    found = []
    for name, options in (("without", {}), ("with", {"on_start": True, "on_end": True, "on_error": "raise"})):
        task.max_seq_length = 64
        config = section(tmp_path / name, task, **options)
        callbacks = setup_dwnstr_task_validation_callbacks(config) if options else []
        module, recorder = make_module(), Recorder()
        fit = trainer(tmp_path / name, [*callbacks, recorder], precision="bf16-true", val_check_interval=1)
        fit.fit(module, own_model.loader(), own_model.loader(shuffle=False))
        kept = [(one.calls, one.table) for one in module.modules() if isinstance(one, own_model.Gate)]
        found.append((recorder, kept))
    (recorder, kept), (other, others) = found
    assert recorder.states == other.states
    assert recorder.end == other.end
    assert [calls for calls, _ in kept] == [calls for calls, _ in others]
    tables = [(a, b) for (_, a), (_, b) in zip(kept, others, strict=True)]
    assert all(torch.equal(a, b) if a is not None and b is not None else a is b for a, b in tables)
    assert any(a is not None for a, _ in tables)


def test_hidden_states_are_the_models_own(module: Any) -> None:
    module.eval()
    encoder = LiveModel(module).encoder(module)
    sequences = ["MKVA", "L" * 30, RESIDUES]
    for sequence, states in zip(sequences, encoder.hidden_states(sequences), strict=True):
        torch.testing.assert_close(states, expected_states(module.model, sequence), rtol=1e-5, atol=1e-5)
    assert encoder.max_seq_length == 64
    assert encoder.hidden_size == 32


def test_weights_of_another_dtype_are_run_as_float32(module: Any) -> None:
    module.eval()
    module.to(torch.float64)
    before = copy.deepcopy(module.state_dict())
    with untouched(module):
        states = LiveModel(module).encoder(module, EncoderOptions(precision="fp32")).hidden_states(["MKVA"])[0]
    assert module.state_dict().keys() == before.keys()
    assert all(torch.equal(module.state_dict()[name], value) for name, value in before.items())
    torch.testing.assert_close(states, expected_states(module.model.float(), "MKVA"), rtol=1e-5, atol=1e-5)


def test_a_model_of_transformers_that_somebody_changed_runs_as_it_is(model_folder: Any, caplog: Any) -> None:
    """A layer replaced, weights added, or a forward pass of its own: its configuration does not say so."""

    class Scaled(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, states: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = 2 * self.inner(states)
            return result

    folder = model_folder("esm")
    plain = Busy(folder).eval()
    for change in ("layer", "weights", "forward"):
        module = copy.deepcopy(plain)
        layer = module.model.esm.encoder.layer[0].attention.self
        if change == "layer":
            layer.query = Scaled(layer.query)
        elif change == "weights":
            layer.extra = nn.Linear(2, 2)
        else:
            inner = layer.query.forward
            layer.query.forward = lambda states, inner=inner: 3 * inner(states)
        caplog.clear()
        with caplog.at_level("INFO", "pipeline"):
            live = LiveModel(module)
        assert "EsmForMaskedLM runs as it is" in caplog.text
        assert live.runs_module
        (states,) = live.encoder(module).hidden_states(["MKVACDEF"])
        (other,) = LiveModel(plain).encoder(plain).hidden_states(["MKVACDEF"])
        assert torch.allclose(states, other, atol=1e-4) == (change == "weights")


def test_a_checkpoint_with_weights_that_its_class_does_not_have(model_folder: Any, tmp_path: Path) -> None:
    """Neither a folder nor a `.ckpt` is measured without its changes."""
    folder = model_folder("esm")
    model = EsmForMaskedLM.from_pretrained(folder)
    model.esm.encoder.layer[1].adapter = nn.Linear(2, 2)
    model.save_pretrained(tmp_path / "folder")
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "folder")
    state = {f"model.{name}": value for name, value in model.state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "a.ckpt")
    for ckpt, architecture in ((tmp_path / "folder", None), (tmp_path / "a.ckpt", str(folder))):
        with pytest.raises(CheckpointError, match=r"does not have: encoder.layer.1.adapter.bias, .*model_factory="):
            open_encoder(str(ckpt), EncoderOptions(architecture=architecture))


def test_a_folder_of_somebodys_own_class(module: Any, tmp_path: Path) -> None:
    """Written with `save_pretrained`, and a tokenizer of transformers beside it."""
    module.eval().model.save_pretrained(tmp_path / "own")
    portable(module.tokenizer).save_pretrained(tmp_path / "own")
    encoder = open_encoder(str(tmp_path / "own"), EncoderOptions(model_factory=FACTORY))
    (states,) = encoder.hidden_states(["MKVA"])
    torch.testing.assert_close(states, expected_states(module.model, "MKVA"), rtol=1e-5, atol=1e-5)
    with pytest.raises(CheckpointError, match="own_esm"):
        open_encoder(str(tmp_path / "own"))


def test_a_factory_that_does_not_fit(task: Task, module: Any, tmp_path: Path) -> None:
    live = LiveModel(module)
    torch.save({"state_dict": module.state_dict(), DESCRIPTION: live.description}, tmp_path / "a.ckpt")
    torch.save({"state_dict": module.state_dict()}, tmp_path / "silent.ckpt")
    path = str(tmp_path / "a.ckpt")
    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        (
            {"model_factory": "tests.support.own_model.Nothing"},
            ConfigError,
            "model_factory: 'tests.support.own_model.Nothing'",
        ),
        (
            {"model_factory": "tests.support.own_model.RESIDUES"},
            ConfigError,
            "expected a class or a function, found a str",
        ),
        ({"model_factory": "builtins.dict"}, CheckpointError, "builtins.dict: expected an nn.Module, found dict"),
        ({"model_factory": FACTORY, "infer_target": "tests.support.training.FromModule"}, ConfigError, "not both"),
        ({"model_factory": FACTORY, "layer": 9}, ConfigError, "layer: expected -3 to 2"),
    ]
    for options, kind, message in cases:
        with pytest.raises(kind, match=message):
            open_encoder(path, EncoderOptions(**options))
    with pytest.raises(CheckpointError, match="called with no configuration: the checkpoint holds none"):
        open_encoder(str(tmp_path / "silent.ckpt"), EncoderOptions(model_factory=FACTORY))
    first = open_encoder(path, EncoderOptions(model_factory=FACTORY, layer=1)).hidden_states(["MKVA"])[0]
    with torch.no_grad():
        tokens = OwnTokenizer()("MKVA", return_tensors="pt")
        expected = module.eval().model(**tokens).hidden_states[1][0, 1:-1]
    torch.testing.assert_close(first, expected, rtol=1e-5, atol=1e-5)


def test_weights_of_another_shape_or_missing(module: Any, tmp_path: Path) -> None:
    description = LiveModel(module).description
    state = module.state_dict()
    cut = {**state, "model.esm.gate.up.weight": torch.zeros(3, 3)}
    torch.save({"state_dict": cut, DESCRIPTION: description}, tmp_path / "cut.ckpt")
    with pytest.raises(
        CheckpointError, match=r"'model.esm.gate.up.weight': expected the shape \(32, 8\), found \(3, 3\); .* set arch"
    ):
        open_encoder(str(tmp_path / "cut.ckpt"), EncoderOptions(model_factory=FACTORY))
    less = {name: value for name, value in state.items() if "gate.up" not in name}
    torch.save({"state_dict": less, DESCRIPTION: description}, tmp_path / "less.ckpt")
    with pytest.raises(CheckpointError, match=r"found one that lacks esm\.gate.up.bias, esm.gate.up.weight"):
        open_encoder(str(tmp_path / "less.ckpt"), EncoderOptions(model_factory=FACTORY))


def test_a_tokenizer_of_ones_own_is_written_as_one_of_transformers() -> None:
    own = OwnTokenizer()
    written = portable(own)
    assert type(written).__module__.startswith("transformers.")
    for text in ("MKVA", RESIDUES, "MXZ", "mk*"):
        assert written(text)["input_ids"] == own(text)["input_ids"]


def test_the_class_is_said_where_a_model_has_its_own_method(task: Task, tmp_path: Path, model_folder: Any) -> None:
    class WithStates(OwnForMaskedLM):
        def hidden_states(self, sequences: list[str]) -> list[torch.Tensor]:
            return [expected_states(self, sequence) for sequence in sequences]

    module = WithStates(own_model.make_config())
    description = LiveModel(module).description
    torch.save({"state_dict": module.state_dict(), DESCRIPTION: description}, tmp_path / "a.ckpt")
    with pytest.raises(CheckpointError, match=r"holds a tests.test_own_models.*WithStates, which is no class of"):
        open_encoder(str(tmp_path / "a.ckpt"))


def test_what_a_factory_makes_is_in_the_key(task: Task, tmp_path: Path) -> None:
    """Two factories with the same weights: nothing of the one is reused for the other."""
    torch.save({"state_dict": own_model.make_scaled_by_one().state_dict()}, tmp_path / "a.ckpt")
    encoders: list[Any] = [
        open_encoder(
            str(tmp_path / "a.ckpt"), EncoderOptions(model_factory=f"tests.support.own_model.make_scaled_by_{name}")
        )
        for name in ("one", "two", "one")
    ]
    assert encoders[0].digest == encoders[2].digest != encoders[1].digest
    assert all(one.reusable for one in encoders)
    assert torch.equal(2 * encoders[0].hidden_states(["MKV"])[0], encoders[1].hidden_states(["MKV"])[0])
    first, second = own_model.make_scaled_by_one(), own_model.make_scaled_by_two()
    assert LiveModel(first).encoder(first).digest != LiveModel(second).encoder(second).digest


class Remembers(OwnForMaskedLM):
    """Keeps losses and outputs of its forward passes in plain containers, as models with routers do."""

    losses: list[float]
    seen: dict[str, Any]
    last: Any

    def forward(self, input_ids: torch.Tensor, attention_mask: Any = None, **options: Any) -> Any:
        output = super().forward(input_ids, attention_mask, **options)
        vars(self).setdefault("losses", []).append(float(output.logits.detach().mean()))
        vars(self).setdefault("seen", {"counts": [], "shapes": set()})
        self.seen["counts"].append(len(self.losses))
        self.seen["shapes"].add(tuple(input_ids.shape))
        self.last = output
        return output


def test_containers_that_a_forward_pass_fills_are_as_before() -> None:
    module: Any = own_model.make_module()
    module.model.__class__ = Remembers
    module.model(**own_model.Collate(module.tokenizer)(["MKVACDEF"]))
    kept = copy.deepcopy({name: getattr(module.model, name) for name in ("losses", "seen")})
    last, inner = module.model.last, module.model.seen["counts"]
    with untouched(module):
        LiveModel(module).encoder(module).hidden_states(["MKV", "ACDEFGHI"])
        assert len(module.model.losses) > 1
    assert {name: getattr(module.model, name) for name in kept} == kept
    assert module.model.last is last
    assert module.model.seen["counts"] is inner


def test_t5_with_its_decoder_is_rebuilt(model_folder: Any, tmp_path: Path) -> None:
    """Its encoder is what its configuration says, and a `.ckpt` describes itself."""
    folder = model_folder("prott5", slow=True)
    for kind in (T5ForConditionalGeneration, T5Model):
        module: Any = nn.Module()
        module.net = kind.from_pretrained(folder)
        module.tokenizer = AutoTokenizer.from_pretrained(folder)
        live = LiveModel(module)
        assert not live.runs_module
        torch.save({"state_dict": module.state_dict(), DESCRIPTION: live.description}, tmp_path / "a.ckpt")
        (stored,) = open_encoder(str(tmp_path / "a.ckpt")).hidden_states(["MKVA"])
        assert torch.equal(stored, live.encoder(module).hidden_states(["MKVA"])[0])


def test_a_changed_model_of_transformers_says_so_in_its_checkpoint(model_folder: Any, tmp_path: Path) -> None:
    module: Any = Busy(model_folder("esm"))
    module.model.esm.encoder.layer[1].adapter = nn.Linear(2, 2)
    live = LiveModel(module)
    torch.save({"state_dict": module.state_dict(), DESCRIPTION: live.description}, tmp_path / "a.ckpt")
    with pytest.raises(
        CheckpointError, match=r"that was changed from what its configuration says; set model_factory to the function"
    ):
        open_encoder(str(tmp_path / "a.ckpt"))


def test_hooks_that_do_not_run_are_said(model_folder: Any, caplog: pytest.LogCaptureFixture) -> None:
    module = Busy(model_folder("esm"))
    module.model.esm.encoder.layer[0].register_forward_hook(lambda *_: None)
    with caplog.at_level("INFO", "pipeline"):
        LiveModel(module)
    assert "1 forward hooks in EsmForMaskedLM do not run when it is measured" in caplog.text


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation", "experts_implementation"])
def test_no_implementation_is_fetched_from_a_hub(key: str, model_folder: Any, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(model_folder("esm"), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, key: "someone/kernel"}))
    with pytest.raises(CheckpointError, match="of transformers' own, found 'someone/kernel'"):
        open_encoder(str(folder))
