"""A Lightning `.ckpt`: a file of `torch.save` with weights under `state_dict`, whatever the file is called."""

from __future__ import annotations

import pickletools
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.checkpoints.bare import is_safetensors, weights_of
from pipeline.checkpoints.stored import Format, Stored, Weights
from pipeline.checkpoints.unpickle import read_tensors
from pipeline.encoders.description import DESCRIPTION
from pipeline.encoders.internals import uncompiled_state
from pipeline.encoders.options import EncoderOptions
from pipeline.errors import CheckpointError


def _holds(path: Path) -> bool:
    """Whether a file names a `state_dict`, or is called `.ckpt`: then reading it raises the error to show."""
    if not path.is_file() or path.suffix == ".ckpt":
        return path.is_file() and not is_safetensors(path)
    try:
        with zipfile.ZipFile(path) as archive:
            (pickled,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
            return any(value == "state_dict" for _, value, _ in pickletools.genops(archive.read(pickled)))
    except (OSError, ValueError, zipfile.BadZipFile):
        return False


def _read(source: str, options: EncoderOptions, factory: Any) -> Stored:
    content = read_tensors(source, options.trust_pickle)
    if options.weights is not None or (isinstance(content, Mapping) and "state_dict" not in content):
        return weights_of(content, source, options.weights).fill(options, factory)
    if not isinstance(content, Mapping):
        raise CheckpointError(f"ckpt: '{source}': expected a Lightning .ckpt, found a {type(content).__name__}")
    state, description = uncompiled_state(content.get("state_dict", {})), content.get(DESCRIPTION) or {}
    return Weights(source, state, description, content.get("global_step")).fill(options, factory)


LIGHTNING = Format(_holds, _read)
