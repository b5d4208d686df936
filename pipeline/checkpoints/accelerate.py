"""A folder that accelerate's `save_state` wrote: weights beside the states of optimizer and random generators."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from pipeline.checkpoints.bare import by_name, read_file, read_index, safetensors_weights, weights_of
from pipeline.checkpoints.distributed import DISTRIBUTED
from pipeline.checkpoints.names import RANDOM_STATES
from pipeline.checkpoints.stored import Format, Stored
from pipeline.checkpoints.unpickle import read_tensors
from pipeline.encoders.options import EncoderOptions
from pipeline.encoders.protocol import Encoder
from pipeline.errors import CheckpointError

# The model's files; those of a second model have a number behind their name. Under FSDP it is a folder, or whole.
WEIGHTS = re.compile(
    r"(model(_\d+)?\.safetensors|pytorch_model(_\d+)?\.bin)(\.index\.json)?|pytorch_model_fsdp((_\d+)?\.bin|_\d+)"
)
OF_RANKS = "pytorch_model_fsdp*_rank*.bin"  # parts, where FSDP is told to write each rank's own


def _holds(path: Path) -> bool:
    return path.is_dir() and any(path.glob(RANDOM_STATES))


def _read(source: str, options: EncoderOptions, factory: Any) -> Stored | Encoder:
    parts = sorted(path.name for path in Path(source).glob(OF_RANKS))
    if parts:
        what, remedy = f"has weights in parts, by rank ({parts[0]})", "save with SHARDED_STATE_DICT or FULL_STATE_DICT"
        raise CheckpointError(f"ckpt: '{source}' {what}, which are not read; {remedy}")
    named = sorted(path for path in Path(source).iterdir() if WEIGHTS.fullmatch(path.name))
    found = [path for path in named if path.is_dir() == (not path.suffix)]
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        remedy = "give the file or folder of the model to be measured" if found else "take another checkpoint"
        raise CheckpointError(f"ckpt: '{source}': expected the weights of one model, found {names}; {remedy}")
    (path,) = found
    if path.is_dir():
        return DISTRIBUTED.read(str(path), options, factory)
    if path.suffix != ".json":
        return read_file(path, source, options).fill(options, factory)
    files = read_index(path)
    if path.name.startswith("model"):
        return safetensors_weights(files, source, options.weights).fill(options, factory)
    shards = [by_name(read_tensors(file, options.trust_pickle), str(file)) for file in sorted(set(files.values()))]
    content = {name: value for shard in shards for name, value in shard.items()}
    return weights_of(content, source, options.weights).fill(options, factory)


ACCELERATE = Format(_holds, _read)
