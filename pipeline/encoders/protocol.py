"""The protocol of encoders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Protocol

import torch
from torch import Tensor


class Encoder(Protocol):
    """What the pipeline needs of a model. A class that is derived from it needs only what has no default here.

    Attributes:
        hidden_size: width of a hidden state.
        device: where the model is; the batch plan belongs to the kind of device.
        digest: changes when a hidden state may change: weights, tokenizer, options, precision.
        max_seq_length: most characters of a sequence, special tokens already counted; None for no limit.
        precision: of the arithmetic: `fp32`, `bf16` or `fp16`, or the name that a trainer has for it.
        packs: whether sequences of unequal length in a batch cost no padding.
        reusable: whether `digest` covers all that a hidden state depends on; else no embedding is used again.
        notes: lines for whoever reads the result.
        made_with: how the checkpoint was measured in training, if it holds that; see `embed.made_with`.
        step: of the training, if the checkpoint holds it.
    """

    hidden_size: int
    device: torch.device
    digest: str
    max_seq_length: int | None = None
    precision: str = "its own"
    packs: bool = False
    reusable: bool = True
    notes: Sequence[str] = ()
    made_with: Mapping[str, Any] = MappingProxyType({})
    step: int | None = None

    def hidden_states(self, sequences: Sequence[str]) -> list[Tensor]:
        """The hidden states of the real tokens of each sequence, float32, each of shape (tokens, hidden_size)."""
        ...

    def per_character(self, sequence: str, states: Tensor) -> Tensor:  # noqa: ARG002
        """The states of each character of a sequence, from those of its tokens: by default a character is a token."""
        return states

    def count_unknown(self, sequences: Sequence[str]) -> list[tuple[int, int]]:
        """For each sequence, how many of its tokens are unknown, and how many it has: by default one per character."""
        return [(0, len(sequence)) for sequence in sequences]

    def untrained(self, seed: int) -> Encoder | None:  # noqa: ARG002
        """The same architecture with random weights drawn from `seed`; None where it cannot be made anew."""
        return None

    def why_unknown(self, sequence: str) -> str:  # noqa: ARG002
        """What a user can do about a sequence of unknown tokens alone, to follow an error message; may be empty."""
        return ""
