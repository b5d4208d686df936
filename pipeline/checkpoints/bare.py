"""A file of weights, alone or beside other things: safetensors, or what `torch.save` wrote, whatever it is called."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.checkpoints.stored import Format, Stored, Weights
from pipeline.checkpoints.unpickle import StandIn, read_tensors
from pipeline.encoders.checks import TAKE_ITS_OWN
from pipeline.encoders.description import DESCRIPTION
from pipeline.encoders.internals import uncompiled, uncompiled_state
from pipeline.encoders.options import EncoderOptions
from pipeline.errors import CheckpointError

TORCH = (b"PK\x03\x04", b"\x80\x02")  # how a file of `torch.save` begins: a zip archive; a pickle, before torch 1.6
EMA = re.compile(r"(^|[._])(ema|averaged|averaging|shadow|swa)", re.IGNORECASE)  # in names of averages over a training
STEPS = ("step", "global_step", "iteration", "iter", "iter_num", "num_steps")
# Of safetensors; what is not here is rare.
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64}
DTYPES |= {"I32": torch.int32, "I8": torch.int8, "BOOL": torch.bool}
DTYPES |= {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}
DEPTH = 3  # of mappings within mappings, down to the weights


def is_safetensors(path: Path) -> bool:
    """Whether a file begins as safetensors do: the length of a header of JSON, and that."""
    with path.open("rb") as file:
        first = file.read(9)
    return len(first) == 9 and first[8:] == b"{" and int.from_bytes(first[:8], "little") < path.stat().st_size


def weights_of(content: Any, source: str, wanted: str | None) -> Weights:
    """The weights in what `torch.save` wrote.

    Args:
        content: what the file holds.
        source: names the checkpoint in messages.
        wanted: the name of one of several sets of weights, or `ema`; by default those that are no average.

    Raises:
        CheckpointError: there are no weights, or no such set.
    """
    sets = dict(_sets(by_name(content, source), ""))
    if not sets:
        unnamed = "; shadow_params have no names: save them with a state_dict's" if "shadow_params" in content else ""
        raise CheckpointError(f"ckpt: '{source}': expected weights by name, found {_listed(content)}{unnamed}")
    chosen = choose(sets, source, wanted)
    state = {f"{name}.{key}".lstrip("."): value for name, found in chosen.items() for key, value in found.items()}
    if len(chosen) == 1:  # names are as the training has them, to which a description belongs
        (state,) = map(dict, chosen.values())
    steps = (content.get(key) for key in STEPS)
    step = next((step for step in steps if isinstance(step, int) and not isinstance(step, bool)), None)
    return Weights(source, uncompiled_state(state), content.get(DESCRIPTION) or {}, step)


def by_name(content: Any, source: str) -> Mapping[Any, Any]:
    """What `torch.save` wrote. Raises CheckpointError where it is no mapping."""
    if isinstance(content, StandIn):
        kind = f"{type(content).__module__}.{type(content).__qualname__}"
        raise CheckpointError(
            f"ckpt: '{source}' holds a whole {kind}, whose code would have to run; save its state_dict() instead"
        )
    if not isinstance(content, Mapping):
        raise CheckpointError(f"ckpt: '{source}': expected weights by name, found a {type(content).__name__}")
    return content


def choose(sets: Mapping[str, Any], source: str, wanted: str | None) -> dict[str, Any]:
    """The sets of weights to look for the encoder in: the one that is asked for, or all that are no averages.

    Raises:
        CheckpointError: there is no such set, or several are averages.
    """
    if wanted is None:
        return {name: found for name, found in sets.items() if not EMA.search(name)} or dict(sets)
    fitting = [name for name in sets if name == wanted]
    if wanted == "ema":
        fitting = fitting or [name for name in sets if EMA.search(name)]
    if len(fitting) == 1:
        return {fitting[0]: sets[fitting[0]]}
    names = ", ".join(name or "weights without a name" for name in sets)
    raise CheckpointError(f"ckpt: '{source}': weights: expected one set that '{wanted}' names, found {names}")


def _sets(content: Mapping[Any, Any], name: str, depth: int = DEPTH) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The mappings of names to tensors, by where they are; the state of an optimizer has numbers for names."""
    if any(isinstance(value, Tensor) and isinstance(key, str) and "." in key for key, value in content.items()):
        yield name, content
        return
    for key, value in content.items():
        if isinstance(key, str) and isinstance(value, Mapping) and depth and key != DESCRIPTION:
            yield from _sets(value, f"{name}.{key}".lstrip("."), depth - 1)


def _listed(content: Mapping[Any, Any]) -> str:
    return ", ".join(str(key) for key in list(content)[:5]) or "nothing"


def safetensors_weights(files: Mapping[str, Path], source: str, wanted: str | None = None) -> Weights:
    """Weights in files of safetensors, read when the model is filled.

    Args:
        files: the file of each weight, by its name there.
        source: names the checkpoint in messages.
        wanted: see `weights_of`; the sets are told apart by the first parts of the names.

    Raises:
        CheckpointError: see `choose`; and where a file is damaged, or lacks a weight.
    """
    names = {uncompiled(name): name for name in files}
    averages = {name: "ema" if EMA.search(name.partition(".")[0]) else "" for name in names}
    chosen = choose({kind: kind for kind in dict.fromkeys(averages.values())}, source, wanted)
    names = {short: name for short, name in names.items() if averages[short] in chosen}
    shapes: dict[str, Tensor] = {}
    step: int | None = None
    for path in sorted(set(files.values())):
        with opened_safetensors(path) as opened:
            lacking = sorted({name for name, file in files.items() if file == path} - set(opened.keys()))
            if lacking:
                raise CheckpointError(
                    f"ckpt: '{path}' lacks '{lacking[0]}', which the index has in it; copy all shards"
                )
            own = {short: name for short, name in names.items() if files[name] == path}
            parts = {short: opened.get_slice(name) for short, name in own.items()}
            shapes |= {short: _outline(part) for short, part in parts.items()}
            told = [(opened.metadata() or {}).get(key, "") for key in STEPS]
            step = next((int(text) for text in told if text.isdecimal()), step)

    def fill_tensors(tensors: Mapping[str, Tensor]) -> None:
        for path in sorted({files[names[short]] for short in tensors}):
            with opened_safetensors(path) as opened:
                for short, tensor in tensors.items():
                    if files[names[short]] == path:
                        tensor.copy_(opened.get_tensor(names[short]))

    return Weights(source, shapes, {}, step, fill_tensors)


def dtype_of(part: Any) -> torch.dtype:
    """The dtype of a tensor in a file of safetensors; the bytes themselves where torch has no such dtype."""
    return DTYPES.get(part.get_dtype(), torch.uint8)


def _outline(part: Any) -> Tensor:
    return torch.empty(part.get_shape(), dtype=dtype_of(part), device="meta")


@contextmanager
def opened_safetensors(path: Path) -> Iterator[Any]:
    """An open file of safetensors. Raises CheckpointError where it is damaged."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as opened:
            yield opened
    except SafetensorError as error:
        raise CheckpointError(f"ckpt: '{path}' is damaged ({error}); take another checkpoint") from error


def read_index(path: Path) -> dict[str, Path]:
    """The file of each weight, from the index of shards that transformers and accelerate write.

    Raises:
        CheckpointError: it is damaged, or a shard is not there, or not within the folder.
    """
    try:
        listed = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        files = {str(name): path.parent / str(file) for name, file in listed.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"ckpt: '{path}' is no index of shards ({error}); take another checkpoint") from error
    outside = sorted(str(file) for name, file in listed.items() if Path(str(file)).name != file)
    if outside or not files:
        found = f"'{outside[0]}'" if outside else "none"
        raise CheckpointError(f"ckpt: '{path}': expected names of files beside it, found {found}; {TAKE_ITS_OWN}")
    missing = sorted({file.name for file in files.values() if not file.is_file()})
    if missing:
        raise CheckpointError(f"ckpt: '{path}' names {', '.join(missing[:3])}, which is not there; copy all shards")
    return files


def read_file(path: Path, source: str, options: EncoderOptions) -> Weights:
    """The weights in a file of either kind. Raises CheckpointError as above, and where the file is damaged."""
    if not is_safetensors(path):
        return weights_of(read_tensors(path, options.trust_pickle), source, options.weights)
    with opened_safetensors(path) as opened:
        files = dict.fromkeys(opened.keys(), path)
    return safetensors_weights(files, source, options.weights)


def _holds(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        first = file.read(4)
    return first.startswith(TORCH) or is_safetensors(path)


def _read(source: str, options: EncoderOptions, factory: Any) -> Stored:
    return read_file(Path(source), source, options).fill(options, factory)


BARE = Format(_holds, _read)
