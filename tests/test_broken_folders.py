"""Broken folders of Hugging Face and accelerate: the command line says so in one line, runs nothing, writes nothing.

Each is refused before there is a run: with exit code 2, a line that says why, and the folder as it was.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator  # type: ignore[import-untyped]
from mlflow import MlflowClient
from safetensors.torch import load_file, save_file
from transformers import EsmForMaskedLM

from pipeline.__main__ import main
from tests.support.lab import VALUE, Lab, furnished, own_signals

MODEL, INDEX, PICKLED = "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"
QUERY = "esm.encoder.layer.1.attention.self.query.weight"
Spoil = Callable[[Path], Any]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Code that runs writes `ran` to this folder, which is not the checkpoint's."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    with own_signals():
        yield
    assert not (tmp_path / "ran").exists()


class Code:
    """Unpickled as pickle would, it makes a file."""

    def __reduce__(self) -> Any:
        return Path.touch, (Path("ran"),)


@pytest.fixture(scope="module")
def unspoilt(tmp_path_factory: pytest.TempPathFactory, model_folder: Callable[..., Path]) -> dict[str, Path]:
    """Checkpoints that open, of Hugging Face and of accelerate, whole and in shards."""
    top = tmp_path_factory.mktemp("unspoilt")
    whole, in_shards = top / "accelerate", top / "accelerate shards"
    accelerator: Any = Accelerator(cpu=True)
    model = accelerator.prepare(EsmForMaskedLM.from_pretrained(model_folder("esm")))
    accelerator.save_state(str(whole))
    shutil.copytree(whole, in_shards)
    (in_shards / MODEL).unlink()
    accelerator.save_model(model, str(in_shards), max_shard_size="40KB")
    accelerator.free_memory()
    made = {"whole": model_folder("esm"), "shards": model_folder("esm", max_shard_size="40KB")}
    return {**made, whole.name: whole, in_shards.name: in_shards}


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("model-0*.safetensors"))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def edit(change: Callable[[dict[str, Any]], Any], name: str = MODEL) -> Spoil:
    """Writes other weights, as they were or by pickle."""

    def spoil(folder: Path) -> None:
        state = change(load_file(folder / MODEL))
        (folder / MODEL).unlink()
        torch.save(state, folder / name) if name == PICKLED else save_file(state, folder / name, {"format": "pt"})

    return spoil


def cut_pickle(folder: Path) -> None:
    edit(dict, PICKLED)(folder)
    cut(folder / PICKLED)


def without(state: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in state.items() if name != QUERY}


def doubled(state: dict[str, Any]) -> dict[str, Any]:
    """Weights of another model, of twice the width."""
    return {name: value.repeat(*([2] * value.dim())) for name, value in state.items()}


def filled(number: float) -> Spoil:
    return edit(lambda state: {**state, QUERY: torch.full((32, 32), number)})


def reindex(change: Callable[[dict[str, Any]], Any]) -> Spoil:
    """Changes which file the index says that each weight is in."""

    def spoil(folder: Path) -> None:
        index = json.loads((folder / INDEX).read_text())
        change(index["weight_map"])
        (folder / INDEX).write_text(json.dumps(index))

    return spoil


def moved(prefix: str) -> Spoil:
    """A shard is elsewhere, where the index says that it is."""

    def spoil(folder: Path) -> None:
        shard = shards(folder)[1]
        new = prefix.format(folder=folder.parent) + shard.name
        shutil.copy(shard, folder.parent)
        reindex(lambda files: files.update({name: new for name, file in files.items() if file == shard.name}))(folder)

    return spoil


def with_code(folder: Path) -> None:
    """A class of its own beside the weights."""
    (folder / "own.py").write_text("open('ran', 'w')")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Config", "AutoModel": "own.Model"}}
    (folder / "config.json").write_text(json.dumps(config))


def removed(*patterns: str) -> Spoil:
    def spoil(folder: Path) -> None:
        for pattern in patterns:
            for path in folder.glob(pattern):
                path.unlink()

    return spoil


def write(name: str, content: str) -> Spoil:
    return lambda folder: (folder / name).write_text(content)


def into_folder(folder: Path) -> None:
    (folder / MODEL).unlink()
    (folder / MODEL).mkdir()


IN_SHARDS: dict[str, tuple[Spoil, str]] = {
    "missing shard": (lambda folder: shards(folder)[1].unlink(), f"{INDEX}' names model-00002-of-"),
    "truncated shard": (lambda folder: cut(shards(folder)[1]), ".safetensors' is damaged (Error while deserializing"),
    "empty shard": (lambda folder: shards(folder)[1].write_bytes(b""), ".safetensors' is damaged (Error while des"),
    "index is no JSON": (write(INDEX, "{"), f"{INDEX}' is no index of shards"),
    "index is a list": (write(INDEX, "[]"), f"{INDEX}' is no index of shards"),
    "index has no files": (write(INDEX, "{}"), f"{INDEX}' is no index of shards"),
    "index names no file": (reindex(dict.clear), "expected names of files beside it, found none"),
    "index names a number": (reindex(lambda files: files.update({QUERY: 7})), "files beside it, found '7'"),
    "shard outside": (moved("../"), "expected names of files beside it, found '../model-00002-of-"),
    "shard at a path": (moved("{folder}/"), "expected names of files beside it, found '/"),
}
BOTH: dict[str, tuple[Spoil, str]] = {
    "truncated": (lambda folder: cut(folder / MODEL), f"{MODEL}' is damaged (Error while deserializing header"),
    "empty file": (write(MODEL, ""), f"{MODEL}' is damaged"),
    "text": (write(MODEL, "these are no weights"), f"{MODEL}' is damaged"),
    "not a number": (filled(torch.nan), "layer.1.attention.self.query.weight': expected finite numbers, found 1024 of"),
    "infinite": (filled(-torch.inf), "layer.1.attention.self.query.weight': expected finite numbers, found 1024 of"),
    "code for a weight": (edit(lambda state: {**state, QUERY: Code()}, PICKLED), "found a builtins.getattr"),
    "code for all": (edit(lambda _: Code(), PICKLED), "holds a whole builtins.getattr, whose code would have to run"),
    "pickled list": (edit(lambda _: [1], PICKLED), "expected weights by name, found a list"),
    "pickle is cut": (cut_pickle, f"{PICKLED}' is damaged"),
    "other weights": (edit(doubled), "expected the shape ("),
    "empty folder": (removed("*"), "expected one checkpoint in '{ckpt}', found none"),
}
HUGGING_FACE: dict[str, tuple[Spoil, str]] = {
    "weight missing": (edit(without), "lacks weights of the"),
    "code beside a weight": (
        edit(lambda state: {**state, "x": Code()}, PICKLED),
        "expected tensors, found a builtins",
    ),
    "half written": (lambda folder: (folder / MODEL).rename(folder / "tmp_model"), "no file named model.safetensors"),
    "weights are a folder": (into_folder, "no file named model.safetensors"),
    "no configuration": (removed("config.json"), "expected one checkpoint in '{ckpt}', found none"),
    "configuration is no JSON": (write("config.json", "esm"), "config.json': expected a JSON object, found no JSON"),
    "configuration alone": (removed("*.safetensors", "*token*", "vocab.txt"), "no file named model.safetensors"),
    "no tokenizer": (removed("*token*", "vocab.txt"), "cannot be loaded: "),
    "code in the folder": (with_code, "is of a class of its own, in own.py, which is not run; set trust_remote_code"),
}
ACCELERATE: dict[str, tuple[Spoil, str]] = {
    "weight missing": (edit(without), "found one that lacks"),
    "half written": (removed(MODEL), "expected the weights of one model, found none"),
    "two models": (
        lambda folder: shutil.copy(folder / MODEL, folder / "model_1.safetensors"),
        "found model",
    ),
    "no random states": (removed("random_states_*"), "expected one checkpoint in '{ckpt}', found none"),
    "parts by rank": (
        lambda folder: (folder / MODEL).rename(folder / "pytorch_model_fsdp_rank0.bin"),
        "has weights in parts, by rank (pytorch_model_fsdp_rank0.bin), which are not read; save with SHARDED_STATE",
    ),
    "weights are a folder": (into_folder, "expected the weights of one model, found none"),
}
ACCELERATE_SHARDS: dict[str, tuple[Spoil, str]] = {
    "index lacks a weight": (reindex(lambda files: files.pop(QUERY)), "found one that lacks encoder.layer.1"),
    "weight in another shard": (
        reindex(lambda files: files.update({QUERY: min({*files.values()} - {files[QUERY]})})),
        f"lacks '{QUERY}', which the index has in it",
    ),
    "no index": (removed(INDEX), "expected the weights of one model, found none"),
}
OF_KIND = {
    "whole": BOTH | HUGGING_FACE,
    "shards": IN_SHARDS,
    "accelerate": BOTH | ACCELERATE,
    "accelerate shards": IN_SHARDS | ACCELERATE_SHARDS,
}
CASES = [
    pytest.param(kind, *case, id=f"{kind}: {name}") for kind, cases in OF_KIND.items() for name, case in cases.items()
]


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory, model_folder: Callable[..., Path], empty_database: Path) -> Lab:
    folder = tmp_path_factory.mktemp("lab")
    shutil.copy(empty_database, folder / "mlflow.db")
    return furnished(folder, model_folder, f"sqlite:///{folder}/mlflow.db")


def digest(folder: Path) -> list[tuple[str, str]]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return [(str(path.relative_to(folder)), hashlib.sha256(path.read_bytes()).hexdigest()) for path in files]


@pytest.mark.parametrize(("kind", "spoil", "expected"), CASES)
def test_a_broken_folder_is_one_line(
    kind: str,
    spoil: Spoil,
    expected: str,
    tmp_path: Path,
    unspoilt: dict[str, Path],
    lab: Lab,
    tracking: str,
    capsys: Any,
) -> None:
    folder = Path(shutil.copytree(unspoilt[kind], tmp_path / "folder"))
    spoil(folder)
    before = digest(folder)
    architecture = {"architecture": str(lab.ckpt)} if kind.startswith("accelerate") else {}
    command = lab.command(VALUE, **architecture, store=str(tmp_path / "store"))
    assert main([command[0], f"--ckpt={folder}", *command[2:]]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert expected.replace("{ckpt}", str(folder)) in errors[0]
    assert str(folder) in errors[0]
    assert MlflowClient().search_runs(["0"]) == []
    assert digest(folder) == before
    assert [path for path in (tmp_path / "store").rglob("*") if path.is_file() and path.name != "lock"] == []
