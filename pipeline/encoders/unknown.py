"""Unknown tokens: how many each sequence has, and an error where an encoder cannot take one at all."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from pipeline.data.defects import Place
from pipeline.encoders.forward import misaligned
from pipeline.encoders.protocol import Encoder
from pipeline.errors import CheckpointError, DataError
from pipeline.load import Examples


def count_unknown(
    texts: Mapping[bytes, str], aligned: Collection[bytes], encoder: Encoder, examples: Sequence[Examples]
) -> dict[bytes, int]:
    """The number of unknown tokens of each sequence; those in `aligned` must have one token per character.

    It is known before anything is embedded, so that an encoder that cannot serve a task fails at once.
    """
    counts: dict[bytes, int] = {}
    keys = list(texts)
    for begin in range(0, len(keys), 1024):
        chunk = keys[begin : begin + 1024]
        for key, (unknown, tokens) in zip(chunk, encoder.count_unknown([texts[key] for key in chunk]), strict=True):
            if unknown == tokens:
                raise _all_unknown(texts[key], examples, encoder.why_unknown(texts[key]))
            if key in aligned and tokens != len(texts[key]):
                raise CheckpointError(misaligned(texts[key], tokens))
            counts[key] = unknown
    return counts


def _all_unknown(text: str, examples: Sequence[Examples], why: str) -> DataError:
    """The error for a sequence of unknown tokens alone, with the file and line of the first row that has it."""
    rows = ((one.task, name, part) for one in examples for name, part in one.parts.items() if text in part.sequences)
    task, name, part = next(rows)
    file, _, row = part.rows[part.sequences.index(text)].rpartition(":")
    in_memory = not task.dataset_path
    path = Path(f"frames['{name}']") if in_memory else Path(task.dataset_path) / name / file
    where = Place(path, int(row), in_memory=in_memory).text()
    shown = text if len(text) <= 60 else text[:57] + "..."
    column = f"column '{task.sequence_column}'"
    return DataError(f"{where}: {column}: expected a sequence with characters the encoder knows, found {shown!r}{why}")
