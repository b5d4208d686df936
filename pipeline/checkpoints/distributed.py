"""A folder of `torch.distributed.checkpoint`: `.metadata` and `*.distcp`, from DDP, FSDP and FSDP2, Lightning's too.

It is read in one process, without a process group, and no more of it than the encoder has. torch itself unpickles
`.metadata` as it is; here it is read with a list of the classes that it holds.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor

from pipeline.checkpoints.stored import Format, Stored, Weights
from pipeline.checkpoints.unpickle import ALLOWED, read_tensors
from pipeline.encoders.description import DESCRIPTION
from pipeline.encoders.internals import uncompiled
from pipeline.encoders.options import EncoderOptions
from pipeline.errors import CheckpointError

METADATA = ".metadata"
LIGHTNING = "meta.pt"  # what Lightning has beside the tensors: hyper-parameters, the step, our description
STEPS = ("step", "global_step", "iteration")
# What `.metadata` may name beside plain containers and dtypes, by module, in torch 2.0 to 2.13.
CLASSES = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed._shard.sharded_tensor.metadata": {"MEM_FORMAT_ENCODING", "TensorProperties"},
}


def _holds(path: Path) -> bool:
    return path.is_dir() and ((path / METADATA).is_file() or any(path.glob("*.distcp")))


def _read(source: str, options: EncoderOptions, factory: Any) -> Stored:
    folder = Path(source)
    metadata = _read_metadata(folder)
    _check_files(folder, metadata)
    lightning = folder / LIGHTNING
    beside = read_tensors(lightning, options.trust_pickle) if lightning.is_file() else {}
    names = {name: uncompiled(name) for name in metadata.state_dict_metadata}
    if lightning.is_file():
        names = _of_module(names)
    stored = _tensors(names, metadata, source)
    shapes = {short: _outline(metadata, name) for short, name in stored.items()}

    def fill_tensors(tensors: Mapping[str, Tensor]) -> None:
        _fill({stored[short]: tensor for short, tensor in tensors.items()}, folder, metadata)

    step = beside.get("global_step") if beside else _step(folder, metadata)
    return Weights(source, shapes, beside.get(DESCRIPTION) or {}, step, fill_tensors).fill(options, factory)


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module.startswith("pathlib") and name in ("PosixPath", "WindowsPath"):
            return PurePosixPath  # of where the checkpoint was written
        if name in CLASSES.get(module, ()) or name in ALLOWED.get(module, ()):
            return super().find_class(module, name)
        raise CheckpointError(f"expected the classes of torch.distributed.checkpoint, found {module}.{name}")


def _read_metadata(folder: Path) -> Any:
    """The content of `.metadata`. Raises CheckpointError where it is not there yet, damaged, or names other classes."""
    path = folder / METADATA
    if not path.is_file():
        what = f"'{folder}' holds .distcp files and no {METADATA}, which is written last"
        raise CheckpointError(f"ckpt: {what}: the save was interrupted, or is not done; take another checkpoint")
    try:
        metadata = _Unpickler(io.BytesIO(path.read_bytes())).load()
        if not isinstance(metadata.storage_data, dict):
            raise TypeError(f"expected where each tensor is stored, found {type(metadata.storage_data).__name__}")
        return metadata
    except CheckpointError as error:
        raise CheckpointError(f"ckpt: '{path}' is not read: {error}; save the checkpoint anew") from None
    except Exception as error:  # damaged bytes may raise anything
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise CheckpointError(f"ckpt: '{path}' is damaged ({reason}); take another checkpoint") from error


def _check_files(folder: Path, metadata: Any) -> None:
    """Raises CheckpointError where a file is missing or shorter than it has to be: then the save was not finished."""
    ends: dict[str, int] = {}
    for stored in metadata.storage_data.values():
        ends[stored.relative_path] = max(ends.get(stored.relative_path, 0), stored.offset + stored.length)
    for name, end in sorted(ends.items()):
        path = folder / name
        if not path.resolve().is_relative_to(folder.resolve()):
            raise CheckpointError(f"ckpt: '{folder}': expected its files within the folder, found '{name}'")
        size = path.stat().st_size if path.is_file() else None
        if size is None or size < end:
            found = "no such file" if size is None else f"{size} bytes"
            remedy = "the save was interrupted, or not all files were copied; take another checkpoint"
            raise CheckpointError(f"ckpt: '{path}': expected at least {end} bytes, found {found}: {remedy}")


def _of_module(names: Mapping[str, str]) -> dict[str, str]:
    """The names within the LightningModule, of those that are its weights."""
    inside = [prefix for prefix in ("state_dict.", "model.") if any(name.startswith(prefix) for name in names)]
    prefix = inside[0] if inside else ""
    return {name: short.removeprefix(prefix) for name, short in names.items() if name.startswith(prefix)}


def _tensors(names: Mapping[str, str], metadata: Any, source: str) -> dict[str, str]:
    """The stored names of the tensors, by their names in the model.

    Raises:
        CheckpointError: a tensor is not whole, or two have one name.
    """
    places = {(index.fqn, index.offset) for index in metadata.storage_data}
    stored: dict[str, str] = {}
    for name, short in names.items():
        tensor = metadata.state_dict_metadata[name]
        if not hasattr(tensor, "size"):
            continue
        where = f"ckpt: '{source}': '{name}'"
        chunks = {tuple(chunk.offsets): tuple(chunk.sizes) for chunk in tensor.chunks}
        held, all_of_it = sum(map(prod, chunks.values())), prod(tensor.size)
        if held != all_of_it or any((name, torch.Size(offset)) not in places for offset in chunks):
            found = f"expected all of its {all_of_it} numbers, found where {held} are stored"
            raise CheckpointError(f"{where}: {found}, or not their places; take another checkpoint")
        if short in stored:
            raise CheckpointError(f"{where} and '{stored[short]}' are both '{short}'; save the model once")
        stored[short] = name
    return stored


def _outline(metadata: Any, name: str) -> Tensor:
    """A tensor of the stored shape and dtype, without its values."""
    stored = metadata.state_dict_metadata[name]
    dtype = getattr(getattr(stored, "properties", None), "dtype", torch.float32)
    return torch.empty(tuple(stored.size), dtype=dtype, device="meta")


def _fill(tensors: dict[str, Tensor], folder: Path, metadata: Any) -> None:
    """Reads stored tensors of these names and of the same shapes, in place, chunk by chunk."""
    from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
    from torch.distributed.checkpoint.filesystem import FileSystemReader

    class Reader(FileSystemReader):
        def read_metadata(self, *_: Any, **__: Any) -> Any:
            return metadata

    reader, planner = Reader(folder), DefaultLoadPlanner()
    planner.set_up_planner(tensors, metadata, is_coordinator=True)
    reader.set_up_storage_reader(metadata, is_coordinator=True)
    (plan,) = planner.create_global_plan([reader.prepare_local_plan(planner.create_local_plan())])
    (plan,) = reader.prepare_global_plan([plan])
    reader.read_data(planner.finish_plan(plan), planner).wait()


def _step(folder: Path, metadata: Any) -> int | None:
    """The step that is stored beside the weights; None where there is none, or several that differ."""
    steps = set(_steps(folder, metadata))
    return steps.pop() if len(steps) == 1 else None


def _steps(folder: Path, metadata: Any) -> Iterator[int]:
    for name, what in metadata.state_dict_metadata.items():
        *parts, last = name.split(".")
        if last not in STEPS or len(parts) > 2 or any(part.startswith(("opt", "sched", "lr_")) for part in parts):
            continue
        if hasattr(what, "size"):
            value = torch.zeros(what.size, dtype=torch.float64)
            _fill({name: value}, folder, metadata)
        else:
            value = _object(folder, metadata, name)
        found = value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
        if isinstance(found, (int, float)) and not isinstance(found, bool) and found == int(found):
            yield int(found)


def _object(folder: Path, metadata: Any, name: str) -> Any:
    """A stored object that is no tensor; of classes that are not known, a stand-in."""
    (stored,) = (where for index, where in metadata.storage_data.items() if index.fqn == name)
    with (folder / stored.relative_path).open("rb") as file:
        file.seek(stored.offset)
        return read_tensors(io.BytesIO(file.read(stored.length)))


DISTRIBUTED = Format(_holds, _read)
