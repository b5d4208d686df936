"""Forward passes: which sequences go through the encoder together, what becomes of their rows, and how they travel."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt
import torch

SHORTEST = 0.8  # of a batch, beside its longest sequence: padding is wasted work, many small batches are too
# The row of a sequence from the states of its tokens; for `cls`, that of the special token stands before them.
POOLED: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "mean": lambda states: states.mean(0, keepdim=True),
    "cls": lambda states: states[:1],
    "last": lambda states: states[-1:],
}


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


class Transfer:
    """Rows on their way from the device to the CPU, so that the next forward pass need not wait for them.

    Pickled, they have arrived.
    """

    def __init__(self, rows: torch.Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        if rows.device.type == "cuda":
            self._rows = torch.empty(rows.shape, dtype=rows.dtype, pin_memory=True)
            self._rows.copy_(rows, non_blocking=True)
            self._event = torch.cuda.current_stream(rows.device).record_event()
        else:
            self._rows = rows.cpu()

    def __getstate__(self) -> tuple[npt.NDArray[np.float32]]:
        return (self.array(),)

    def __setstate__(self, rows: tuple[npt.NDArray[np.float32]]) -> None:
        self._event, self._rows = None, torch.from_numpy(rows[0])

    def array(self) -> npt.NDArray[np.float32]:
        """Waits for them."""
        if self._event is not None:
            self._event.synchronize()
        return np.asarray(self._rows.numpy())


def misaligned(text: str, tokens: int) -> str:
    """The error message for a text that does not have one token per character."""
    shown = text if len(text) <= 30 else text[:27] + "..."
    found = f"found {tokens} tokens for the {len(text)} of '{shown}'"
    return f"token-level tasks need one token per character, {found}; use a checkpoint with a character tokenizer"
