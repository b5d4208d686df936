"""Forward passes: which sequences go through the encoder together, and how what it gives reaches the CPU."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from pipeline.encoders.protocol import Encoder
from pipeline.errors import CheckpointError

SHORTEST = 0.8  # of a batch, beside its longest sequence: padding is wasted work, many small batches are too


def batches(
    sequences: dict[bytes, str], max_tokens: int, max_sequences: int, packed: bool = False
) -> Iterator[list[bytes]]:
    """The batch plan: keys of sequences that go through the encoder together.

    Longest first, equal lengths by key: a function of the set of sequences and the two limits alone. Taking away the
    first batches leaves the others as they were, so a run that was killed goes on with the same batches.

    Args:
        sequences: text by key.
        max_tokens: most tokens of a batch, padding counted; a longer sequence goes alone.
        max_sequences: most sequences of a batch.
        packed: whether the encoder takes them without padding.
    """
    batch: list[bytes] = []
    longest = tokens = 0
    for key in sorted(sequences, key=lambda key: (-len(sequences[key]), key)):
        length = len(sequences[key])
        longest = longest or length
        tokens = tokens + length if packed else (len(batch) + 1) * longest
        full = len(batch) == max_sequences or tokens > max_tokens
        if batch and (full or (not packed and length < SHORTEST * longest)):
            yield batch
            batch, longest, tokens = [], length, length
        batch.append(key)
    if batch:
        yield batch


@dataclass(frozen=True)
class Batch:
    """What a forward pass gave: by pooling, keys, rows of each sequence, and the rows themselves."""

    rows: dict[str, tuple[list[bytes], list[int], Transfer]]
    tokens: int
    residues: int


class Transfer:
    """Rows on their way from the device to the CPU, so that the next forward pass need not wait for them."""

    def __init__(self, rows: torch.Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        if rows.device.type == "cuda":
            self._rows = torch.empty(rows.shape, dtype=rows.dtype, pin_memory=True)
            self._rows.copy_(rows, non_blocking=True)
            self._event = torch.cuda.current_stream(rows.device).record_event()
        else:
            self._rows = rows.cpu()

    def array(self) -> npt.NDArray[np.float32]:
        """Waits for them."""
        if self._event is not None:
            self._event.synchronize()
        return np.asarray(self._rows.numpy())


def forward(
    batch: list[bytes], union: dict[bytes, str], missing: dict[str, dict[bytes, str]], encoder: Encoder
) -> Batch:
    """The rows of a batch that the shelves lack; pooled ones are averaged where the encoder is."""
    states = dict(zip(batch, encoder.hidden_states([union[key] for key in batch]), strict=True))
    found = {}
    for pooling, lacking in missing.items():
        keys = [key for key in batch if key in lacking]
        for key in keys if pooling == "none" else []:
            if len(states[key]) != len(union[key]):
                raise CheckpointError(misaligned(union[key], len(states[key])))
        rows = [states[key].mean(0, keepdim=True) if pooling == "mean" else states[key] for key in keys]
        if keys:
            found[pooling] = (keys, [len(row) for row in rows], Transfer(torch.cat(rows)))
    return Batch(found, sum(map(len, states.values())), sum(len(union[key]) for key in batch))


def one_behind(batches: Iterable[Batch]) -> Iterator[Batch]:
    """Each batch once the next is under way: a GPU computes that while this one is written."""
    before = None
    for batch in batches:
        if before is not None:
            yield before
        before = batch
    if before is not None:
        yield before


def misaligned(text: str, tokens: int) -> str:
    """What is wrong where a text does not have one token per character."""
    shown = text if len(text) <= 30 else text[:27] + "..."
    found = f"found {tokens} tokens for the {len(text)} of '{shown}'"
    return f"token-level tasks need one token per character, {found}; use a checkpoint with a character tokenizer"
