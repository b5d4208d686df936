"""What the pipeline needs of a model: the protocol of encoders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor


class Encoder(Protocol):
    """What the pipeline needs of a model.

    Attributes:
        hidden_size: width of a hidden state.
        max_seq_length: most characters of a sequence, special tokens already counted; None for no limit.
        digest: changes when a hidden state may change: weights, tokenizer, options, precision.
        device: where the model is; the batch plan belongs to the kind of device.

        precision: its arithmetic, such as `fp32`.
        notes: warnings for whoever reads the result.
        made_with: what a checkpoint says of how it was measured in training; see `made_with` in `embed`.

    It may have an attribute `packs`, true where sequences of unequal length in a batch cost no padding.
    """

    hidden_size: int
    max_seq_length: int | None
    device: torch.device
    precision: str
    notes: Sequence[str]
    made_with: Mapping[str, Any]

    @property
    def digest(self) -> str:
        """See above; an attribute will do."""
        ...

    def hidden_states(self, sequences: Sequence[str]) -> list[Tensor]:
        """The last hidden states of the real tokens of each sequence, float32, each of shape (tokens, hidden_size)."""
        ...

    def count_unknown(self, sequences: Sequence[str]) -> list[tuple[int, int]]:
        """For each sequence, how many of its tokens are unknown, and how many it has."""
        ...
