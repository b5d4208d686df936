"""Peak memory against the number of rows, of `embed` and `train_head`, each in a process of its own.

    python benchmarks/memory.py [--rows 2000 20000] [--memory-budget 1GB] [--json FILE]

Sequences have about 100 tokens; the encoder is a fake one of width 256, so that 20,000 rows are 2 GB of embeddings and
the encoder's own memory does not cover anything up. Peak is `ru_maxrss`: everything resident, the page cache of mapped
files included.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from pipeline import Store, Task
from pipeline.config import parse_bytes
from pipeline.embed import embed
from pipeline.load import load
from pipeline.train_head import train_head

WIDTH = 256
LETTERS = "ACDEFGHIKLMNPQRSTVWY"


class FakeEncoder:
    """Random hidden states of width 256."""

    hidden_size = WIDTH
    max_seq_length: int | None = None
    digest = "benchmark"
    device = torch.device("cpu")

    def hidden_states(self, sequences: Sequence[str]) -> list[Tensor]:
        """See `pipeline.Encoder`."""
        return [torch.randn(len(sequence), WIDTH) for sequence in sequences]

    def count_unknown(self, sequences: Sequence[str]) -> list[tuple[int, int]]:
        """See `pipeline.Encoder`."""
        return [(0, len(sequence)) for sequence in sequences]


def write_task(folder: Path, rows: int) -> Task:
    """A token-level task of `rows` train sequences of 80 to 120 residues, and 10 test ones."""
    source = random.Random(0)
    for part, count in (("train", rows), ("test", 10)):
        (folder / part).mkdir(parents=True)
        with (folder / part / "x000.csv").open("w") as stream:
            stream.write("sequence,label\n")
            for _ in range(count):
                sequence = "".join(source.choices(LETTERS, k=source.randint(80, 120)))
                stream.write(f"{sequence},{''.join(source.choices('HEC', k=len(sequence)))}\n")
    return task_in(folder)


def task_in(folder: Path) -> Task:
    """The task that `write_task` wrote."""
    return Task(
        level="token",
        task_type="classification",
        dataset_path=str(folder),
        target_column=["label"],
        num_epochs=1,
    )


def stage(name: str, folder: Path, budget: str) -> None:
    """Runs one stage and prints the peak memory of this process in MB, and the embeddings' size."""
    store = Store(folder / "store", memory_bytes=parse_bytes(budget))
    (embeddings,) = embed([load(task_in(folder))], FakeEncoder(), store)
    if name == "train_head":
        train_head(embeddings, store, torch.device("cpu"))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 if sys.platform == "linux" else 1024) / 1000
    stored = sum(shard.rows for shard in embeddings.shelf.shards()) * WIDTH * 4 / 1e6
    print(json.dumps({"peak_mb": round(peak), "embeddings_mb": round(stored)}))


def measure(rows: int, budget: str) -> dict[str, dict[str, float]]:
    """The peaks of both stages at a number of rows."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_task(folder, rows)
        results = {}
        for one in ("embed", "train_head"):
            command = [sys.executable, __file__, "--stage", one, "--folder", name, "--memory-budget", budget]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            results[one] = json.loads(output.splitlines()[-1])
        return results


def main() -> None:
    """Measures at each number of rows and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[2000, 20000])
    parser.add_argument("--memory-budget", default="1GB")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--stage", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.stage:
        stage(options.stage, options.folder, options.memory_budget)
        return
    results = {rows: measure(rows, options.memory_budget) for rows in options.rows}
    print(f"{'rows':>8} {'embeddings MB':>14} {'embed MB':>9} {'train_head MB':>14}")
    for rows, found in results.items():
        embedding, training = found["embed"], found["train_head"]
        print(f"{rows:>8} {embedding['embeddings_mb']:>14} {embedding['peak_mb']:>9} {training['peak_mb']:>14}")
    first, last = results[options.rows[0]], results[options.rows[-1]]
    growth = {name: last[name]["peak_mb"] / first[name]["peak_mb"] - 1 for name in first}
    print("growth: " + ", ".join(f"{name} {share:+.1%}" for name, share in growth.items()))
    if options.json:
        options.json.write_text(json.dumps({"results": results, "growth": growth}, indent=1))


if __name__ == "__main__":
    main()
