"""Unknown tokens: how many each sequence has, and an error where an encoder cannot take one at all."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from pipeline.data.defects import Defects, Place, shown
from pipeline.encoders.forward import misaligned
from pipeline.encoders.protocol import Encoder
from pipeline.errors import CheckpointError
from pipeline.load import Examples


def count_unknown(
    texts: Mapping[bytes, str], aligned: Collection[bytes], encoder: Encoder, examples: Sequence[Examples]
) -> dict[bytes, int]:
    """The number of unknown tokens of each sequence; those in `aligned` must have one token per character.

    It is known before anything is embedded, so that an encoder that cannot serve a task fails at once.

    Raises:
        DataError: sequences have unknown tokens alone; it names the first of them.
        CheckpointError: a sequence in `aligned` has another number of tokens.
    """
    counts: dict[bytes, int] = {}
    alien, other = set[str](), list[str]()
    keys = list(texts)
    for begin in range(0, len(keys), 1024):
        chunk = keys[begin : begin + 1024]
        for key, (unknown, tokens) in zip(chunk, encoder.count_unknown([texts[key] for key in chunk]), strict=True):
            counts[key] = unknown
            if unknown == tokens:
                alien.add(texts[key])
            elif key in aligned and tokens != len(texts[key]):
                other = other or [misaligned(texts[key], tokens)]
    if alien:
        _refuse(alien, encoder, examples)
    for message in other:
        raise CheckpointError(message)
    return counts


def _refuse(alien: Collection[str], encoder: Encoder, examples: Sequence[Examples]) -> None:
    """Raises DataError for sequences of unknown tokens alone, with file and line of the first rows that have one."""
    defects, known = Defects(), set[tuple[Path | int, str]]()
    for task, name, part in ((one.task, name, part) for one in examples for name, part in one.parts.items()):
        in_memory, column = not task.dataset_path, f"column '{task.sequence_column}'"
        for text, stands in zip(part.sequences, part.rows, strict=True):
            file, _, row = stands.rpartition(":")
            path = Path(f"frames['{name}']") if in_memory else Path(task.dataset_path) / name / file
            key = (id(part) if in_memory else path, row)  # tasks may share a file; texts alone are train and test
            if text not in alien or key in known:
                continue
            why = "" if known else encoder.why_unknown(text) or _in_capitals(text, encoder)
            known.add(key)
            problem = f": {column}: expected a sequence with characters the encoder knows, found {shown(text)}{why}"
            remedies = ("", "") if why else ("; correct or remove these rows", "; correct or remove the row")
            kind = defects.kind("unknown", "cells", *remedies)
            kind.add(Place(path, int(row), in_memory=in_memory), problem, shown(text))
    defects.refuse()


def _in_capitals(text: str, encoder: Encoder) -> str:
    """That the encoder knows a sequence in capital letters, to follow an error message; empty where it does not."""
    ((unknown, tokens),) = encoder.count_unknown([text.upper()])
    return "; it knows capital letters: upper-case the column" if unknown < tokens else ""
