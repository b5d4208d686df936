"""Training heads on one thread and on all, on a machine at rest and on one that others keep busy.

    python benchmarks/threads.py [--busy 2] [--rounds 5] [--json FILE]

Heads of random embeddings, per epoch, and how many threads `fit` takes for them. `--busy` starts so many programs that
compute all the time.
"""

from __future__ import annotations

import argparse
import multiprocessing
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from heads import Random
from rich.console import Console
from timing import in_turn, report, write

from pipeline import Store, Task
from pipeline.data.parts import Part, Target
from pipeline.embed import Embeddings, embed
from pipeline.heads import fit, threads
from pipeline.load import Examples
from pipeline.train_head import make_head

CPU = torch.device("cpu")
RESIDUES = 100  # of a sequence of a token-level task
SIZES = (  # level, width, batch size, sequences
    ("sequence", 64, 32, 2000),
    ("sequence", 320, 32, 1500),
    ("sequence", 320, 128, 3000),
    ("sequence", 1280, 32, 600),
    ("sequence", 1280, 128, 1200),
    ("token", 320, 8, 80),
    ("token", 320, 32, 160),
)


def examples(level: str, batch_size: int, count: int) -> Examples:
    """A number for each random sequence, or for each of its residues."""
    generator = np.random.default_rng(0)
    texts = ["".join(row) for row in generator.choice(list("ACDEFGHIKL"), (count, RESIDUES))]
    lengths = np.full(count, RESIDUES, np.int64)
    counts = lengths if level == "token" else np.ones(count, np.int64)
    units = int(counts.sum())
    values, masks = generator.standard_normal(units), np.ones(units, bool)
    part = Part(texts, texts, counts, [values], [masks], 0, lengths)
    settings: dict[str, Any] = {"level": level, "num_epochs": 1, "batch_size": batch_size}
    task = Task(task_name="t", dataset_path="", task_type="regression", target_column=["y"], **settings)
    return Examples(task, (Target("y", None, 1),), part, part)


def on(least_work: float, embeddings: Embeddings) -> None:
    """An epoch of a fresh head, with a thread for each `least_work` floating-point operations of a step."""
    threads.FLOPS_PER_THREAD = least_work
    task, width = embeddings.examples.task, embeddings.table.hidden_size
    fit.fit([make_head(task, width, embeddings.examples.targets, CPU)], [1], embeddings, CPU)


def work(_number: int) -> None:
    """Computes until it is ended."""
    while True:
        sum(range(10**6))


def measure(sizes: Sequence[tuple[str, int, int, int]], rounds: int) -> list[dict[str, Any]]:
    """A table for each size."""
    rule, results = threads.FLOPS_PER_THREAD, []
    for level, width, batch_size, count in sizes:
        data = examples(level, batch_size, count)
        with tempfile.TemporaryDirectory() as folder:
            (embeddings,) = embed([data], Random(width), Store(Path(folder)))
            threads.FLOPS_PER_THREAD = rule
            taken = threads.threads_of(make_head(data.task, width, data.targets, CPU), data)
            ways = {"one thread": partial(on, np.inf, embeddings), "all": partial(on, 1.0, embeddings)}
            title = f"{level}, width {width}, batches of {batch_size}: {taken} of {torch.get_num_threads()} taken"
            results.append(report(title, in_turn(ways, rounds, warm=True), "one thread"))
    return results


def main() -> None:
    """Prints the tables."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--busy", type=int, default=0, help="programs that keep the processors busy meanwhile")
    arguments.add_argument("--rounds", type=int, default=5)
    arguments.add_argument("--json", type=Path)
    options = arguments.parse_args()
    others = [multiprocessing.Process(target=work, args=(number,), daemon=True) for number in range(options.busy)]
    for one in others:
        one.start()
    Console().print(f"{options.busy} other programs compute")
    write(measure(SIZES, options.rounds), options.json)
    for one in others:
        one.terminate()


if __name__ == "__main__":
    main()
