"""The whole path, from CSV files to scores: ours with nothing stored, ours with everything stored, the reference's.

    python benchmarks/validation.py [--proteins FOLDER] [--molecules FOLDER] [--target COLUMN] [--json FILE]

A token-level task (secondary structure, ConvNet) and a sequence-level one (a number for each molecule, MLP), ten epochs
of training. *Warm* has the embeddings stored, and trains the head; *warm, head too* has that stored as well. The
reference reads the files, embeds train and test, trains ten epochs and scores the test part.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import reference
import torch
from timing import in_turn, report, write
from work import chosen, parser

from pipeline import HuggingFaceEncoder, Store, Task, validate
from pipeline.data.parts import Part
from pipeline.load import Examples, load


def theirs(encoder: HuggingFaceEncoder, task: Task) -> float:
    """The reference's procedure; the accuracy, or the mean squared error."""
    examples = load(task, encoder.max_seq_length)
    states = {name: reference.embed(encoder, part.sequences) for name, part in examples.parts.items()}
    token, classes = task.level == "token", examples.targets[0].outputs
    head = reference.ConvNet(encoder.hidden_size, classes) if token else reference.mlp(encoder.hidden_size, 1)
    data = {name: data_of(examples, part, states[name], encoder) for name, part in examples.parts.items()}
    training = reference.epochs(head, data["train"], 1e-3)
    for _ in range(task.num_epochs):
        next(training)
    return reference.score(head.eval(), data["test"])


def data_of(
    examples: Examples, part: Part, states: list[torch.Tensor], encoder: HuggingFaceEncoder
) -> reference.TokenData | reference.ValueData:
    """The reference's data set of a part."""
    if examples.task.level == "sequence":
        pooled = torch.stack([state.mean(0) for state in states])
        return reference.ValueData(pooled, torch.from_numpy(part.values[0]))
    ends = np.cumsum(part.counts)[:-1]
    labels, masks = np.split(part.values[0], ends), np.split(part.masks[0], ends)
    longest = (encoder.max_seq_length or 1022) + 2
    return reference.TokenData(states, labels, masks, examples.targets[0].outputs, longest)


def ours(encoder: HuggingFaceEncoder, task: Task, root: Path, forget: str) -> None:
    """`validate`, when what is stored in `forget` is gone; the weights are digested again."""
    encoder.__dict__.pop("digest", None)
    if forget:
        shutil.rmtree(root if forget == "everything" else root / forget, ignore_errors=True)
    validate(encoder, task, Store(root))


def measure(options: argparse.Namespace, kind: str, root: Path) -> dict[str, object]:
    """The table of a kind."""
    encoder, task, examples = chosen(options, kind)
    ways: dict[str, Callable[[], object]] = {
        "cold": partial(ours, encoder, task, root, "everything"),
        "warm": partial(ours, encoder, task, root, "heads"),
        "warm, head too": partial(ours, encoder, task, root, ""),
        "reference": lambda: str(theirs(encoder, task)),
    }
    ours(encoder, task, root, "")  # imports what is imported when it is needed
    rows = len(examples.train) + len(examples.test)
    results = {}
    seconds = in_turn(ways, options.rounds)
    for base in ("cold", "warm", "warm, head too"):
        pair = {base: seconds[base], "reference": seconds["reference"]}
        results[base] = report(f"{rows} {kind}, {torch.get_num_threads()} threads", pair, base)
    return {kind: results}


def main() -> None:
    """Prints the tables."""
    options = parser(__doc__).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        results = [measure(options, kind, Path(folder) / kind) for kind in ("molecules", "proteins")]
    write(results, options.json)


if __name__ == "__main__":
    main()
