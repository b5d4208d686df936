"""Weights are read beside objects of any class, and nothing that a file names is run."""

from __future__ import annotations

import argparse
import contextlib
import enum
import functools
import io
import os
import pickle
import zipfile
from collections import OrderedDict, defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf
from torch import nn

from pipeline.checkpoints.unpickle import StandIn, read_tensors
from pipeline.errors import CheckpointError

WEIGHTS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2, dtype=torch.bfloat16)}


class Words(list[str]):
    """A list of one's own."""


class Settings(dict[str, Any]):
    """A dictionary of one's own."""


class Colour(enum.Enum):
    RED = 1


@dataclass(frozen=True)
class Point:
    x: int


class Slotted:
    __slots__ = ("x",)

    def __init__(self) -> None:
        self.x = 1


class Hostile:
    """Pickles to a call."""

    def __init__(self, call: Any, *arguments: Any) -> None:
        self.call, self.arguments = call, arguments

    def __reduce__(self) -> Any:
        return self.call, self.arguments


OBJECTS = {
    "list": Words(["a"]),
    "dict": Settings(lr=1),
    "enum": Colour.RED,
    "dataclass": Point(1),
    "slots": Slotted(),
    "class": Slotted,
    "function": os.getcwd,
    "partial": functools.partial(print, "x"),
    "method": Point(1).__eq__,
    "omegaconf": OmegaConf.create({"a": [1, 2]}),
    "namespace": argparse.Namespace(lr=1),
    "path": Path("x"),
    "numpy": np.float64(1),
    "array": np.arange(3),
    "module": nn.Linear(2, 2),
    "optimizer": torch.optim.Adam([nn.Parameter(torch.ones(1))]),
    "set": {Colour.RED},
    "key": {Point(1): 2},
    "default": defaultdict(Settings),
}


def saved(path: Path, content: Any, **options: Any) -> Path:
    torch.save(content, path, **options)
    return path


@pytest.mark.parametrize("name", OBJECTS)
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old"])
def test_weights_beside_an_object(name: str, zipped: bool, tmp_path: Path) -> None:
    path = saved(
        tmp_path / "a.ckpt",
        {"hyper_parameters": {"one": OBJECTS[name]}, "state_dict": OrderedDict(WEIGHTS), "global_step": 7},
        _use_new_zipfile_serialization=zipped,
    )
    content = read_tensors(path)
    assert content["global_step"] == 7
    assert content["state_dict"].keys() == WEIGHTS.keys()
    assert all(torch.equal(content["state_dict"][key], value) for key, value in WEIGHTS.items())


def test_a_stand_in_knows_its_class(tmp_path: Path) -> None:
    found = read_tensors(saved(tmp_path / "a", {"one": Point(1), "two": [Settings(a=1)]}))
    assert isinstance(found["one"], StandIn)
    for value, name in (found["one"], "Point"), (found["two"][0], "Settings"):
        assert (type(value).__module__, type(value).__qualname__) == ("tests.test_unpickle", name)


CALLS = {
    "system": (os.system, "touch planted"),
    "eval": (eval, "open('planted', 'w')"),
    "exec": (exec, "open('planted', 'w')"),
    "open": (open, "planted", "w"),
    "getattr": (getattr, Hostile(__import__, "os"), "system"),
    "import": (__import__, "planted"),
    "mkdir": (os.mkdir, "planted"),
    "load": (torch.load, "inner"),
    "bytes": (torch.storage._load_from_bytes, pickle.dumps(Hostile(os.mkdir, "planted"))),
    "partial": (functools.partial(os.mkdir, "planted"),),
    "numpy": (np.load, "inner", None, True),
}


@pytest.mark.parametrize("name", CALLS)
def test_nothing_that_a_file_names_is_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of these leaves a file or folder behind where a pickle is trusted."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "planted.py").write_text("open('planted', 'w')")
    saved(tmp_path / "inner", Hostile(os.mkdir, "planted"))
    path = saved(tmp_path / "a.ckpt", {"x": [Hostile(*CALLS[name])], "state_dict": WEIGHTS})
    content = read_tensors(path)
    assert all(torch.equal(content["state_dict"][key], value) for key, value in WEIGHTS.items())
    assert not (tmp_path / "planted").exists()


def test_the_trusted_way_does_run_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So the test above can fail."""
    monkeypatch.chdir(tmp_path)
    path = saved(tmp_path / "a.ckpt", {"x": Hostile(os.mkdir, "planted")})
    read_tensors(path, trust=True)
    assert (tmp_path / "planted").exists()


def test_a_torchscript_archive_is_refused(tmp_path: Path) -> None:
    """Its loading may run what it holds."""
    path = saved(tmp_path / "a.ckpt", {"x": Point(1)})
    with zipfile.ZipFile(path, "a") as archive:
        (name,) = [one for one in archive.namelist() if one.endswith("data.pkl")]
        archive.writestr(name.replace("data.pkl", "constants.pkl"), b"")
    with pytest.raises(CheckpointError, match=r"is damaged, or no file of torch.save"):
        read_tensors(path)


@given(st.binary(max_size=200), st.integers(0, 400))
def test_damage_raises_nothing_else(noise: bytes, place: int) -> None:
    """Whatever bytes a file holds, it is read, or refused."""
    buffer = io.BytesIO()
    torch.save({"x": Point(1), "state_dict": WEIGHTS}, buffer)
    whole = buffer.getvalue()
    path = Path(os.environ.get("TMPDIR", "/tmp")) / f"downstream-damage-{os.getpid()}"
    for content in (noise, whole[:place], whole[:place] + noise + whole[place + len(noise) :]):
        path.write_bytes(content)
        with contextlib.ExitStack() as stack:
            stack.callback(path.unlink)
            stack.enter_context(contextlib.suppress(CheckpointError))
            read_tensors(path)


@pytest.mark.parametrize("content", [b"", b"\x80", b"PK\x03\x04", b"q", b"X", 100 * b"("])
def test_damage_is_said_in_one_line(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.ckpt").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"^ckpt: '.*a.ckpt' is damaged, or no file of torch.save \(.*\)$"):
        read_tensors(tmp_path / "a.ckpt")
