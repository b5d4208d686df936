"""Stored weights to the model that they belong to: none may be missing, left over, or of another shape."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from pipeline.checkpoints.unpickle import StandIn, class_of
from pipeline.encoders.weights import left_over, unexpected
from pipeline.errors import CheckpointError


def fill(encoder: nn.Module, state: Mapping[str, Any], prefix: str, source: str, remedy: str) -> None:
    """Loads the stored weights whose names begin with `prefix`.

    Args:
        encoder: the model that is filled.
        state: the stored weights; every one of the encoder's is there.
        prefix: see `matching_prefix`.
        source: names the checkpoint in messages.
        remedy: what to do where the checkpoint holds more than the encoder has.

    Raises:
        CheckpointError: a weight has another shape, is no tensor, or is not one of the encoder's.
    """
    left = unexpected(encoder, state, prefix)
    if left:
        raise CheckpointError(left_over(source, encoder, left, remedy))
    own = encoder.state_dict()
    stored = {key: state[prefix + key] for key in own if prefix + key in state}
    for key, value in stored.items():
        if isinstance(value, StandIn):
            raise CheckpointError(
                f"ckpt: '{source}': '{prefix}{key}': expected a tensor, found a {class_of(value)}, which is not read; "
                "set trust_pickle=true if you trust whoever wrote it"
            )
        if isinstance(value, Tensor) and value.shape != own[key].shape:
            expected, found = tuple(own[key].shape), tuple(value.shape)
            raise CheckpointError(f"ckpt: '{source}': '{prefix}{key}': expected the shape {expected}, found {found}")
    encoder.load_state_dict(stored, strict=False)
