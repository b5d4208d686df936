"""Files of weights, alone or beside other things, and accelerate's folders: written by the real libraries, opened."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator  # type: ignore[import-untyped]
from safetensors.torch import save_file
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import AutoTokenizer, EsmForMaskedLM

from pipeline.checkpoints.names import expand, name_of, step_of
from pipeline.checkpoints.opening import open_encoder
from pipeline.encoders.description import DESCRIPTION, describe
from pipeline.encoders.options import EncoderOptions
from pipeline.encoders.protocol import Encoder
from pipeline.errors import CheckpointError

TEXTS = ["MKVLAAGIVG", "ACD"]


@pytest.fixture
def esm(model_folder: Callable[..., Path]) -> Path:
    return model_folder("esm")


@pytest.fixture
def model(esm: Path) -> Any:
    return EsmForMaskedLM.from_pretrained(esm)


def opened(path: Path, esm: Path, **options: Any) -> Encoder:
    return open_encoder(str(path), EncoderOptions(device="cpu", architecture=str(esm), **options))


def same(encoder: Encoder, other: Path | Encoder) -> bool:
    """Whether two encoders give the same hidden states to the last bit."""
    if isinstance(other, Path):
        other = open_encoder(str(other), EncoderOptions(device="cpu"))
    pairs = zip(encoder.hidden_states(TEXTS), other.hidden_states(TEXTS), strict=True)
    return all(torch.equal(ours, theirs) for ours, theirs in pairs)


def renamed(state: dict[str, Any], before: str) -> dict[str, Any]:
    return {before + name: value for name, value in state.items()}


def wrapped(state: dict[str, Any]) -> dict[str, Any]:
    """As FSDP and activation checkpointing name the weights of layers."""
    inside, deeper = "encoder.layer.0.", "encoder.layer.0._fsdp_wrapped_module._checkpoint_wrapped_module."
    return {f"_fsdp_wrapped_module.{name.replace(inside, deeper)}": value for name, value in state.items()}


CONTENTS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "alone": lambda state: state,
    "ddp": lambda state: renamed(state, "module."),
    "compiled": lambda state: renamed(state, "_orig_mod."),
    "both": lambda state: renamed(state, "module._orig_mod."),
    "inside": lambda state: renamed(state, "model."),
    "fsdp": wrapped,
    "model": lambda state: {"model": state, "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}}, "step": 7},
    "model_state_dict": lambda state: {"model_state_dict": renamed(state, "module."), "global_step": 7, "loss": 0.5},
    "nested": lambda state: {"train": {"net": {"weights": state}}, "args": {"lr": 0.1}, "iteration": 7},
    "encoder alone": lambda state: {name[4:]: value for name, value in state.items() if name.startswith("esm.")},
}


@pytest.mark.parametrize("content", CONTENTS)
@pytest.mark.parametrize("kind", ["zip", "pickle", "safetensors"])
def test_weights_are_found_by_their_names(content: str, kind: str, tmp_path: Path, esm: Path, model: Any) -> None:
    stored = CONTENTS[content](model.state_dict())
    path = tmp_path / "weights.anything"
    if kind == "safetensors":
        if not all(isinstance(value, torch.Tensor) for value in stored.values()):
            pytest.skip("safetensors hold tensors alone")
        save_file({name: value.clone() for name, value in stored.items()}, path)
    else:
        torch.save(stored, path, _use_new_zipfile_serialization=kind == "zip")
    encoder = opened(path, esm)
    assert same(encoder, esm)
    assert encoder.step == (7 if any(one in content for one in ("model", "nested")) else None)


def test_a_half_of_float32_is_kept_as_it_was_rounded(tmp_path: Path, esm: Path, model: Any) -> None:
    half = {name: value.to(torch.bfloat16) for name, value in model.state_dict().items()}
    save_file(half, tmp_path / "half.safetensors", {"step": "12"})
    torch.save({name: value.float() for name, value in half.items()}, tmp_path / "rounded.pt")
    encoder = opened(tmp_path / "half.safetensors", esm)
    assert same(encoder, opened(tmp_path / "rounded.pt", esm))
    assert encoder.step == 12


def test_what_describes_itself_needs_no_architecture(tmp_path: Path, esm: Path, model: Any) -> None:
    description = describe(model, AutoTokenizer.from_pretrained(esm), "")
    torch.save({"model": model.state_dict(), DESCRIPTION: description}, tmp_path / "checkpoint.pt")
    assert same(open_encoder(str(tmp_path / "checkpoint.pt"), EncoderOptions(device="cpu")), esm)


def test_a_module_of_the_users_own_is_filled(tmp_path: Path) -> None:
    from pipeline.encoders.live import LiveModel
    from tests.support.own_model import make_module

    module: Any = make_module(seed=3)
    torch.save({"model": module.state_dict()}, tmp_path / "own.pt")
    options = EncoderOptions(device="cpu", model_factory="tests.support.own_model.make_module")
    live = LiveModel(module.eval()).encoder(module, EncoderOptions(device="cpu"))
    assert same(open_encoder(str(tmp_path / "own.pt"), options), live)


@pytest.fixture
def averaged(tmp_path: Path, esm: Path, model: Any) -> Path:
    """A file with a model, and its average as torch's own `AveragedModel` has it."""
    average: Any = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    average.update_parameters(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01)
    average.update_parameters(model)
    torch.save({"model": model.state_dict(), "model_ema": average.state_dict(), "step": 3}, tmp_path / "both.pt")
    torch.save(model.state_dict(), tmp_path / "model.pt")
    torch.save(average.module.state_dict(), tmp_path / "average.pt")
    return tmp_path


def test_an_average_is_taken_by_name_alone(averaged: Path, esm: Path) -> None:
    path = averaged / "both.pt"
    model, average = opened(averaged / "model.pt", esm), opened(averaged / "average.pt", esm)
    assert not same(model, average)
    assert same(opened(path, esm), model)
    assert same(opened(path, esm, weights="ema"), average)
    assert same(opened(path, esm, weights="model_ema"), average)
    assert same(opened(path, esm, weights="model"), model)
    assert opened(path, esm, weights="ema").step == 3


def test_an_average_that_is_not_there_is_an_error_with_the_names(averaged: Path, esm: Path) -> None:
    with pytest.raises(CheckpointError, match="expected one set that 'swa' names, found model, model_ema"):
        opened(averaged / "both.pt", esm, weights="swa")
    torch.save({"ema_1": {"a.b": torch.ones(1)}, "ema_2": {"a.b": torch.ones(1)}}, averaged / "two.pt")
    with pytest.raises(CheckpointError, match="expected one set that 'ema' names, found ema_1, ema_2"):
        opened(averaged / "two.pt", esm, weights="ema")


def test_a_pattern_names_files_of_a_kind(tmp_path: Path, esm: Path, model: Any) -> None:
    for step in (20, 3):
        torch.save({"model": model.state_dict()}, tmp_path / f"step_{step}.pt")
    (tmp_path / "notes.txt").write_text("")
    found = expand(f"{tmp_path}/step_*.pt")
    assert [name_of(path) for path in found] == ["step_3", "step_20"]
    assert step_of(found[0], opened(Path(found[0]), esm)) == 3


def save_state(folder: Path, model: Any, **options: Any) -> Path:
    accelerator = Accelerator(cpu=True)
    optimizer = torch.optim.AdamW(model.parameters())
    accelerator.prepare(model, optimizer)
    accelerator.save_state(str(folder), **options)
    accelerator.free_memory()
    return folder


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
def test_a_folder_of_accelerate(safe: bool, tmp_path: Path, esm: Path, model: Any) -> None:
    path = save_state(tmp_path / "checkpoint_3", model, safe_serialization=safe)
    assert (path / "optimizer.bin").is_file()
    assert same(opened(path, esm), esm)


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
def test_shards_of_accelerate(safe: bool, tmp_path: Path, esm: Path, model: Any) -> None:
    path = save_state(tmp_path / "state", model, safe_serialization=safe)
    for file in [*path.glob("*.safetensors"), *path.glob("pytorch_model*.bin")]:
        file.unlink()
    Accelerator(cpu=True).save_model(model, str(path), max_shard_size="40KB", safe_serialization=safe)
    assert len(list(path.glob("*of*"))) > 1
    assert same(opened(path, esm), esm)
    next(path.glob("*of*")).unlink()
    with pytest.raises(CheckpointError, match="which is not there; copy all shards"):
        opened(path, esm)


def test_two_models_of_accelerate_are_told_apart_by_the_user(tmp_path: Path, esm: Path, model: Any) -> None:
    path = save_state(tmp_path / "state", model)
    shutil.copy(path / "model.safetensors", path / "model_1.safetensors")
    with pytest.raises(CheckpointError, match=r"expected the weights of one model, found model.safetensors, model_1"):
        opened(path, esm)
    assert same(opened(path / "model_1.safetensors", esm), esm)


class Evil:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("was-here"),))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def without(state: dict[str, Any], part: str) -> dict[str, Any]:
    return {name: value for name, value in state.items() if part not in name}


def with_random_states(path: Path) -> None:
    """A folder of accelerate without the model's file."""
    path.unlink()
    path.mkdir()
    (path / "random_states_0.pkl").write_bytes(b"")


def with_index(path: Path) -> None:
    """A folder of accelerate whose index is no index."""
    with_random_states(path)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": 3}))


QUERY = "esm.encoder.layer.1.attention.self.query.weight"
BROKEN: dict[str, tuple[Callable[[dict[str, Any]], Any] | None, Callable[[Path], Any], str]] = {
    "empty": (None, lambda path: path.write_bytes(b""), "expected a model folder or a file of weights"),
    "text": (None, lambda path: path.write_text("some text"), "expected a model folder or a file of weights"),
    "truncated": (None, cut, "is damaged"),
    "zip": (None, lambda path: path.write_bytes(b"PK\x03\x04" + bytes(60)), "is damaged"),
    "list": (lambda state: list(state.values()), lambda path: None, "expected weights by name, found a list"),
    "no weights": (lambda _: {"step": 3}, lambda path: None, "expected weights by name, found step"),
    "unnamed": (lambda state: {"shadow_params": [*state.values()]}, lambda path: None, "have no names"),
    "another": (lambda _: {"a.weight": torch.ones(3)}, lambda path: None, "expected one set of weights"),
    "missing": (lambda state: without(state, QUERY), lambda path: None, "lacks"),
    "left over": (
        lambda state: {**state, "esm.encoder.layer.1.gate.weight": torch.ones(2)},
        lambda path: None,
        "holds weights that a EsmModel does not have",
    ),
    "misshapen": (lambda state: {**state, QUERY: torch.ones(3, 32)}, lambda path: None, "expected the shape (32, 32)"),
    "not a number": (
        lambda state: {**state, QUERY: torch.full((32, 32), torch.nan)},
        lambda path: None,
        "expected finite numbers",
    ),
    "infinite": (
        lambda state: {**state, QUERY: torch.full((32, 32), -torch.inf)},
        lambda path: None,
        "expected finite numbers",
    ),
    "two": (lambda state: {"a": state, "b": state}, lambda path: None, "found several"),
    "code": (lambda state: {**state, "x": Evil(), QUERY: Evil()}, lambda path: None, "which is not read"),
    "index": (None, with_index, "is no index of shards"),
    "accelerate without weights": (
        None,
        with_random_states,
        "expected the weights of one model, found none",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_broken_is_an_error_of_one_line(
    case: str, tmp_path: Path, esm: Path, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    content, spoil, message = BROKEN[case]
    path = tmp_path / "weights.pt"
    torch.save(content(model.state_dict()) if content else model.state_dict(), path)
    spoil(path)
    with pytest.raises(CheckpointError) as caught:
        opened(path, esm)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "was-here").exists()


def test_a_whole_module_is_refused_and_does_not_run(tmp_path: Path, esm: Path, model: Any) -> None:
    torch.save(model, tmp_path / "whole.pt")
    with pytest.raises(CheckpointError, match=r"holds a whole .*EsmForMaskedLM, .* save its state_dict\(\) instead"):
        opened(tmp_path / "whole.pt", esm)


def test_truncated_safetensors(tmp_path: Path, esm: Path, model: Any) -> None:
    path = tmp_path / "weights.safetensors"
    save_file({name: value.clone() for name, value in model.state_dict().items()}, path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="is damaged"):
        opened(path, esm)


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("name", ["weights.safetensors", "weights.pt", "folder"])
def test_quantised_weights_are_refused(dtype: torch.dtype, name: str, tmp_path: Path, esm: Path, model: Any) -> None:
    """Their scales are not read: as they are, they would be other weights."""
    state = {name: value.clone() for name, value in model.state_dict().items()}
    state[QUERY] = state[QUERY].to(dtype)
    path = tmp_path / name
    if name == "folder":
        shutil.copytree(esm, path)
        state.pop("lm_head.decoder.weight")
        save_file(state, path / "model.safetensors", {"format": "pt"})
    elif name == "weights.pt":
        torch.save({"model": state}, path)
    else:
        save_file(state, path)
    kind = str(dtype).removeprefix("torch.")
    with pytest.raises(
        CheckpointError, match=f"query.weight': expected .* found {kind}: quantised weights have scales"
    ):
        opened(path, esm)


@pytest.mark.parametrize("kind", ["safetensors", "pt"])
def test_a_file_out_of_a_folder_may_have_names_of_tensorflow(esm: Path, model: Any, tmp_path: Path, kind: str) -> None:
    """transformers 5 writes `LayerNorm.gamma` where the module has `LayerNorm.weight`."""
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    ends = {name: next((one for one in old if name.endswith(one)), "") for name in model.state_dict()}
    state = {name.removesuffix(ends[name]) + old.get(ends[name], ""): one for name, one in model.state_dict().items()}
    assert any(name.endswith("gamma") for name in state)
    path = tmp_path / f"model.{kind}"
    if kind == "pt":
        torch.save(state, path)
    else:
        save_file({name: one.clone() for name, one in state.items()}, path)
    assert same(opened(path, esm), esm)
