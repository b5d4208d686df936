"""What intervals cost beside the heads of the same measurement: at most a tenth of their time is wanted.

    python benchmarks/intervals.py --data FOLDER [--sets NAME ...] [--limit 1000] [--rounds 3] [--json FILE]

FOLDER holds the data sets of `signal_models.py`. Embeddings are those of models of random weights (2 layers, width 96),
in memory. *Heads* are trained with the settings of `configs/` (lr 1e-3, 20 epochs, the default number of seeds).
*Intervals* are all that a measurement in a training works out: of every metric of head and probe, and the paired
changes of the headline metric since the start and the best. Seconds are CPU seconds, on any number of threads.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from signal_models import SETS, Set
from timing import in_turn, report, write
from work import make_bart, make_esm

from pipeline import Store
from pipeline.embed import Embeddings, embed
from pipeline.load import load
from pipeline.score import Scores, score
from pipeline.statistics.intervals import changes, intervals
from pipeline.statistics.predictions import from_table
from pipeline.train_head import train_head

CPU = torch.device("cpu")


def prepared(one: Set, data: Path, limit: int) -> tuple[Embeddings, Callable[[], float], Callable[[], float]]:
    """The embeddings of a set, and what trains its heads and works out its intervals; each gives its CPU seconds."""
    task = one.task(data, limit or None, None, num_epochs=20, optim={"name": "adam", "lr": 1e-3}, baselines=False)
    encoder = (make_bart if one.smiles else make_esm)(2, 96, 6)
    with tempfile.TemporaryDirectory() as folder:
        (embeddings,) = embed([load(task, encoder.max_seq_length)], encoder, Store(Path(folder)))
        scores = score(embeddings, train_head(embeddings, Store(Path(folder)), CPU))

    def heads() -> float:
        with tempfile.TemporaryDirectory() as folder:
            began = time.process_time()
            train_head(embeddings, Store(Path(folder)), CPU)
            return time.process_time() - began

    return embeddings, heads, lambda: every_interval(scores)


def every_interval(scores: Scores) -> float:
    """CPU seconds of the intervals and the changes of all targets, of head and probe."""
    began = time.process_time()
    for target in scores.examples.targets:
        for probe in (False, True):
            predictions = from_table(scores.table, target.name, probe)
            intervals(predictions)
            (headline,) = (one.name for one in scores.results if one.is_headline and one.probe == probe)
            for _ in ("start", "best"):
                changes(predictions, from_table(scores.table, target.name, probe), only=headline)
    return time.process_time() - began


def main() -> None:
    """Prints a table for each set."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--sets", nargs="+", default=[one.name for one in SETS])
    parser.add_argument("--limit", type=int, default=1000, help="most train sequences; 0 for all")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    results = []
    for one in SETS:
        if one.name in options.sets:
            embeddings, heads, every = prepared(one, options.data, options.limit)
            parts = embeddings.examples
            title = f"{one.name}: {len(parts.train)} train, {len(parts.test)} test, {parts.task.num_seeds} seeds"
            seconds = in_turn({"heads": heads, "intervals": every}, options.rounds, warm=True)
            results.append(report(title, seconds, "heads"))
    write(results, options.json)


if __name__ == "__main__":
    main()
