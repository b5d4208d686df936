"""The protocol of encoders."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Protocol

import torch
from torch import Tensor

from pipeline.encoders.in_step import InStep
from pipeline.errors import CheckpointError


class Elsewhere(Protocol):
    """Where an encoder is that is not in this process."""

    def __call__(self, work: Callable[[Any, Any], Any], items: Iterable[Any]) -> Iterator[Any]:
        """What `work(encoder, item)` gives there for each item, in order, as it comes."""


class Encoder(Protocol):
    """What the pipeline needs of a model. A class that is derived from it needs only what has no default here.

    Attributes:
        hidden_size: width of a hidden state.
        device: where the model is; the batch plan belongs to the kind of device.
        digest: changes when a hidden state may change: weights, tokenizer, options, precision.
        max_seq_length: most characters of a sequence, special tokens already counted; None for no limit.
        precision: of the arithmetic: `fp32`, `bf16` or `fp16`, or the name that a trainer has for it.
        pooling: what the embedding of a sequence is: `mean` of its real tokens' states, `last`, that of its last real
            token, or `cls`, that of the special token before it; see `states_from_first`.
        packs: whether sequences of unequal length in a batch cost no padding.
        reusable: whether `digest` covers all that a hidden state depends on; else no embedding is used again.
        notes: lines for whoever reads the result.
        made_with: how the checkpoint was measured in training, if it holds that; see `embed.made_with`.
        step: of the training, if the checkpoint holds it.
        in_step: runs the passes of a model whose weights are in parts on several ranks; else None.
        elsewhere: has work done where the encoder is, if that is in other processes; else None.
    """

    hidden_size: int
    device: torch.device
    digest: str
    max_seq_length: int | None = None
    precision: str = "its own"
    pooling: str = "mean"
    packs: bool = False
    reusable: bool = True
    notes: Sequence[str] = ()
    made_with: Mapping[str, Any] = MappingProxyType({})
    step: int | None = None
    in_step: InStep | None = None
    elsewhere: Elsewhere | None = None

    def hidden_states(self, sequences: Sequence[str]) -> list[Tensor]:
        """The hidden states of the real tokens of each sequence, float32, each of shape (tokens, hidden_size)."""
        ...

    def per_character(self, sequence: str, states: Tensor) -> Tensor:  # noqa: ARG002
        """The states of each character of a sequence, from those of its tokens: by default a character is a token."""
        return states

    def states_from_first(self, sequences: Sequence[str]) -> list[Tensor]:  # noqa: ARG002
        """As `hidden_states`, with that of the special token before each sequence in front: (1 + tokens, hidden_size).

        Raises:
            CheckpointError: there is no such token.
        """
        raise no_first(f"a {type(self).__name__} has no states_from_first(sequences)")

    def count_unknown(self, sequences: Sequence[str]) -> list[tuple[int, int]]:
        """For each sequence, how many of its tokens are unknown, and how many it has: by default one per character."""
        return [(0, len(sequence)) for sequence in sequences]

    def untrained(self, seed: int) -> Encoder | None:  # noqa: ARG002
        """The same architecture with random weights drawn from `seed`; None where it cannot be made anew."""
        return None

    def why_unknown(self, sequence: str) -> str:  # noqa: ARG002
        """What a user can do about a sequence of unknown tokens alone, to follow an error message; may be empty."""
        return ""


class HasHiddenStates(Protocol):
    """The least that an object must have to be measured as an encoder; see `CustomEncoder`."""

    @property
    def hidden_size(self) -> int:
        """Width of a hidden state."""
        ...

    def hidden_states(self, sequences: list[str], /) -> Iterable[Tensor]:
        """One float tensor of shape (tokens, hidden_size) per sequence, special tokens out."""
        ...


def no_first(reason: str) -> CheckpointError:
    """The error where there is no state for the pooling `cls`."""
    what = "cls is the state of the special token before the sequence"
    return CheckpointError(f"pooling: {what}, but {reason}; set pooling to mean or last")
