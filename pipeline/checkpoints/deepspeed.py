"""A DeepSpeed checkpoint, ZeRO 0 to 3: a folder with files of each rank, and `latest` beside it, which names it.

    latest                                                   "global_step300"
    global_step300/
      mp_rank_00_model_states.pt                             ZeRO 0 to 2: the module's weights, whole
      zero_pp_rank_R_mp_rank_00_model_states.pt              ZeRO 3: buffers, and parts of frozen weights
      [bf16_]zero_pp_rank_R_mp_rank_00_optim_states.pt       ZeRO 1 to 3: parts of the float32 weights

Where the optimizer has weights in float32, those are taken, as DeepSpeed's own `zero_to_fp32.py` does, which lies in
the folder and is never run. Files are mapped into memory: of the optimizer's states only weights are read.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.checkpoints.stored import Format, Stored, Weights
from pipeline.checkpoints.unpickle import read_tensors
from pipeline.checkpoints.zero import InParts, Vectors, in_groups, of_each
from pipeline.encoders.description import DESCRIPTION
from pipeline.encoders.internals import uncompiled
from pipeline.encoders.options import EncoderOptions
from pipeline.errors import CheckpointError

FILES = "*_states.pt"
FILE = re.compile(r"(?:bf16_)?(zero_pp_rank_(\d+)_)?mp_rank_(\d+)_(model|optim)_states\.pt")
WEIGHT_FILES = ("*.safetensors", "pytorch_model*.bin")  # of a Hugging Face folder that has whole weights, too
LATEST, SCRIPT = "latest", "zero_to_fp32.py"
WRAPPER = "_forward_module."  # begins the names of weights from Lightning before 2.1
# Where a rank's optimizer keeps its parts of float32 weights: in ZeRO 1 and 2, and in ZeRO 3.
OPTIMIZER, OF_GROUPS, OF_EACH = "optimizer_state_dict", "single_partition_of_fp32_groups", "fp32_flat_groups"
REMEDY = "copy the whole folder again, or take another checkpoint"


@dataclass(frozen=True)
class _Files:
    """The files of a checkpoint, by rank; ZeRO 0 to 2 have one file of the model."""

    folder: Path
    model: Mapping[int, Path]
    optim: Mapping[int, Path]
    is_zero_3: bool


def _holds(path: Path) -> bool:
    """Whether a folder has files of ranks, or `latest` with such a folder or DeepSpeed's script beside it.

    A folder of Hugging Face's trainer may have whole weights beside those of DeepSpeed: then it is opened as such.
    """
    if not path.is_dir():
        return False
    if (path / "config.json").is_file() and any(any(path.glob(kind)) for kind in WEIGHT_FILES):
        return False
    if any(path.glob(FILES)) or any(path.glob("layer_*states.pt")):
        return True
    return (path / LATEST).is_file() and ((path / SCRIPT).is_file() or any(path.glob(f"*/{FILES}")))


def _read(source: str, options: EncoderOptions, factory: Any) -> Stored:
    files = _find(Path(source))
    content = _content(files.model[0], "module", options)
    found = {_plain(name): value for name, value in _weights(files, content, options).items()}

    def fill(tensors: Mapping[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            value = found[name]
            tensor.copy_(value.whole() if isinstance(value, InParts) else value)

    state = {name: _outline(value) for name, value in found.items()}
    description = content.get(DESCRIPTION)
    description = description if isinstance(description, Mapping) else {}
    places = [place for place in (files.folder, files.folder.parent) if (place / "config.json").is_file()]
    if places and not description and options.architecture is None:
        options = replace(options, architecture=str(places[0]))
    step = content.get("global_step", content.get("global_steps"))  # the first is Lightning's
    return Weights(source, state, description, step, fill).fill(options, factory)


def _find(folder: Path) -> _Files:
    """The files of ranks in a folder, or in that which `latest` names.

    Raises:
        CheckpointError: they are not there, or are of a model that is split in other ways, too.
    """
    if not any(folder.glob("*states.pt")):
        folder = _latest(folder)
    _refuse_others(folder)
    named = [(match, path) for path in folder.glob(FILES) if (match := FILE.fullmatch(path.name))]
    by_kind = {
        kind: {int(match[2] or 0): path for match, path in named if match[4] == kind} for kind in ("model", "optim")
    }
    files = _Files(folder, by_kind["model"], by_kind["optim"], any(m[1] and m[4] == "model" for m, _ in named))
    if 0 not in files.model:
        raise CheckpointError(f"ckpt: '{folder}': expected a file of rank 0, *rank_00_model_states.pt; {REMEDY}")
    return files


def _latest(folder: Path) -> Path:
    """The folder that `latest` names."""
    path = folder / LATEST
    try:
        name = path.read_text(encoding="utf-8").strip()
    except (OSError, ValueError) as error:
        raise CheckpointError(f"ckpt: '{path}' cannot be read ({error}); name the checkpoint's own folder") from error
    if name in ("", "..") or Path(name).name != name or not (folder / name).is_dir():
        beside = sorted(found.parent.name for found in folder.glob(f"*/{FILES}"))
        remedy = f"name another: '{folder / beside[-1]}'" if beside else REMEDY
        raise CheckpointError(f"ckpt: '{path}': expected the name of a folder beside it, found {name[:60]!r}; {remedy}")
    return folder / name


def _refuse_others(folder: Path) -> None:
    """Raises CheckpointError for a model in pipeline stages, of model-parallel ranks, or of experts."""
    names = sorted(path.name for path in folder.glob("*states.pt"))
    others = {
        "pipeline stages": [name for name in names if name.startswith("layer_") and "expert" not in name],
        "experts": [name for name in names if "expert" in name or name.startswith("expp_")],
        "model-parallel ranks": [name for name in names if (match := FILE.fullmatch(name)) and int(match[3])],
    }
    for what, found in others.items():
        if found:
            remedy = "export the model as a Hugging Face folder where it was trained"
            raise CheckpointError(f"ckpt: '{folder}' has a model in {what} ({found[0]}), which are not read; {remedy}")
    if (folder / "zero").is_dir():
        remedy = "take the checkpoint that it was made from"
        raise CheckpointError(f"ckpt: '{folder}' is a universal checkpoint, which is not read; {remedy}")


def _weights(files: _Files, content: Mapping[str, Any], options: EncoderOptions) -> dict[str, Any]:
    """All weights by name: tensors as they are stored, or where their parts are."""
    module = dict(content["module"])
    if files.is_zero_3:  # the others are empty there
        buffers = set(content.get("buffer_names") or ())
        module = {name: value for name, value in module.items() if name in buffers}
    shapes = content.get("param_shapes")
    if not files.is_zero_3 and not shapes:  # ZeRO 0
        return module
    groups = [shapes] if isinstance(shapes, Mapping) else list(shapes or [])  # the former in early releases
    if not groups or not all(isinstance(group, Mapping) for group in groups):
        expected = "expected param_shapes, the shapes of weights by name, in it"
        raise CheckpointError(f"ckpt: '{files.model[0]}': {expected}, found {shapes!r:.60}; {REMEDY}")
    parts = _in_optimizers(files, groups, content, options)
    found = {**module, **_frozen(files, content, options), **parts}
    for alias, name in dict(content.get("shared_params") or {}).items():
        if name in found:
            found[alias] = found[name]
    return found


def _in_optimizers(
    files: _Files, shapes: Sequence[Any], content: Mapping[str, Any], options: EncoderOptions
) -> dict[str, InParts]:
    """The trained weights, whose parts the optimizers of all ranks have."""
    first = _content(files.optim[0], OPTIMIZER, options)[OPTIMIZER] if 0 in files.optim else {}
    count = first.get("partition_count", content.get("dp_world_size"))
    count = max(count) if isinstance(count, (list, tuple)) and count else count
    if not isinstance(count, int) or count < 1:
        raise CheckpointError(f"ckpt: '{files.folder}': expected the number of ranks, found {count!r:.60}; {REMEDY}")
    _check_ranks(files.optim, count, f"ckpt: '{files.folder}': *_optim_states.pt")
    if files.is_zero_3:
        _check_ranks(files.model, count, f"ckpt: '{files.folder}': *_model_states.pt")
    ranks = [_vectors(files, rank, len(shapes), options) for rank in range(count)]
    try:
        return (of_each if files.is_zero_3 else in_groups)(ranks, shapes)
    except (ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"ckpt: '{files.folder}': optimizer states: {error}; {REMEDY}") from error


def _check_ranks(files: Mapping[int, Path], count: int, where: str) -> None:
    """Raises CheckpointError unless there is a file for each rank of so many, and no other."""
    lacking, others = sorted(set(range(count)) - set(files)), sorted(set(files) - set(range(count)))
    if lacking or others:
        some = f"rank {lacking[0]} is missing" if lacking else f"rank {others[0]} is of another checkpoint"
        raise CheckpointError(f"{where}: expected files of {count} ranks, found {len(files)}: {some}; {REMEDY}")


def _vectors(files: _Files, rank: int, groups: int, options: EncoderOptions) -> Vectors:
    """The parts of float32 weights that the optimizer of a rank has."""
    path, key = files.optim[rank], OF_EACH if files.is_zero_3 else OF_GROUPS
    found = _content(path, OPTIMIZER, options)[OPTIMIZER].get(key)
    fits = isinstance(found, (list, tuple)) and all(isinstance(one, Tensor) and one.dim() == 1 for one in found)
    if not fits or (not files.is_zero_3 and len(found) != groups):
        what = "vectors" if files.is_zero_3 else f"{groups} vectors"
        other = f"{len(found)}" if fits else f"a {type(found).__name__}"
        raise CheckpointError(f"ckpt: '{path}': {key}: expected {what}, found {other}; {REMEDY}")
    vectors: Vectors = [one.detach() for one in found]
    return vectors


def _frozen(files: _Files, content: Mapping[str, Any], options: EncoderOptions) -> dict[str, Any]:
    """Weights that no optimizer has: whole, and in ZeRO 3 a part of each in the file of each rank."""
    shapes, key = content.get("frozen_param_shapes") or {}, "frozen_param_fragments"
    if not shapes:
        return {}
    paths = [files.model[rank] for rank in sorted(files.model)]
    ranks = [content, *(_content(path, "module", options) for path in paths[1:])]
    fragments = [rank.get(key) or {} for rank in ranks]
    names = [name for name in shapes if all(isinstance(one.get(name), Tensor) for one in fragments)]
    if not files.is_zero_3:
        return {name: fragments[0][name] for name in names}
    spans = {name: tuple(([one[name].detach()], 0, one[name].numel()) for one in fragments) for name in names}
    return {name: InParts(tuple(shapes[name]), spans[name]) for name in names}


def _content(path: Path, key: str, options: EncoderOptions) -> Mapping[str, Any]:
    """What a rank's file holds, tensors mapped into memory. Raises CheckpointError where `key` is no mapping in it."""
    content = read_tensors(path, options.trust_pickle, mapped=True)
    if not isinstance(content, Mapping) or not isinstance(content.get(key), Mapping):
        raise CheckpointError(f"ckpt: '{path}': expected a file of DeepSpeed with {key}, found none; {REMEDY}")
    return content


def _outline(value: Any) -> Any:
    """Its shape, for weights in parts; others as they are."""
    return torch.empty(value.shape, device="meta") if isinstance(value, InParts) else value


def _plain(name: str) -> str:
    """A weight's name in the model that the user wrote."""
    return uncompiled(name).removeprefix(WRAPPER)


DEEPSPEED = Format(_holds, _read)
