"""Seconds and peak memory against the number of rows, of `embed` and `train_head`, each in a process of its own.

    python benchmarks/memory.py [--rows 200 2000 20000] [--memory-budget 10MB] [--json FILE]

Sequences have about 100 tokens; the encoder is a fake one of width 256, so that 20,000 rows are 2 GB of embeddings and
the encoder's own work does not cover anything up. The cost of a row is compared between the first and the second step;
memory is anonymous memory, the largest beside that of a tenth of the rows. With the small budget, heads train on rows
that are read from disk.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from timing import write
from torch import Tensor

from pipeline import Store, Task
from pipeline.config.fields import parse_bytes
from pipeline.embed import embed
from pipeline.encoders.protocol import Encoder
from pipeline.load import load
from pipeline.train_head import train_head

WIDTH = 256
STAGES = "embed", "train_head"
LETTERS = "ACDEFGHIKLMNPQRSTVWY"


class FakeEncoder(Encoder):
    """Random hidden states."""

    digest = "benchmark"
    device = torch.device("cpu")

    def __init__(self, hidden_size: int = WIDTH) -> None:
        """They have this width."""
        self.hidden_size = hidden_size

    def hidden_states(self, sequences: Sequence[str]) -> list[Tensor]:
        """See `pipeline.Encoder`."""
        return [torch.randn(len(sequence), self.hidden_size) for sequence in sequences]


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
        baselines=False,
    )


class Peak:
    """The most anonymous memory of this process, in MB, looked at every 5 ms; pages of files do not count."""

    def __init__(self) -> None:
        """Looks from now on."""
        self.most = 0.0
        threading.Thread(target=self._look, daemon=True).start()

    def _look(self) -> None:
        while True:
            status = Path("/proc/self/status").read_text()
            self.most = max(self.most, int(status.split("RssAnon:")[1].split()[0]) / 1000)
            time.sleep(0.005)


def stage(name: str, folder: Path, budget: str) -> None:
    """Runs one stage and prints its seconds and the peak memory of this process."""
    task, store = task_in(folder), Store(folder / "store", memory_bytes=parse_bytes(budget))
    examples, peak, began = load(task), Peak(), time.perf_counter()
    (embeddings,) = embed([examples], FakeEncoder(), store)
    if name == "train_head":
        began = time.perf_counter()
        train_head(embeddings, store, torch.device("cpu"))
    seconds = time.perf_counter() - began
    print(json.dumps({"seconds": seconds, "peak_mb": peak.most}))


def measure(rows: int, budget: str) -> dict[str, dict[str, float]]:
    """Both stages at a number of rows."""
    found = {}
    with tempfile.TemporaryDirectory() as name:
        write_task(Path(name), rows)
        for one in STAGES:
            command = [sys.executable, __file__, "--stage", one, "--folder", name, "--memory-budget", budget]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            found[one] = json.loads(output.splitlines()[-1])
    return found


def main() -> None:
    """Measures at each number of rows and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs=3, default=[200, 2000, 20000])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory-budget", default="10MB")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--stage", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.stage:
        stage(options.stage, options.folder, options.memory_budget)
        return
    sizes = sorted(options.rows, reverse=True)  # the first touches memory that a virtual machine has to be given
    measure(sizes[0], options.memory_budget)
    rounds = [{rows: measure(rows, options.memory_budget) for rows in sizes} for _ in range(options.rounds)]
    results = {
        rows: {
            name: {key: statistics.median(one[rows][name][key] for one in rounds) for key in ("seconds", "peak_mb")}
            for name in STAGES
        }
        for rows in options.rows
    }
    view = Table(
        "", *(f"{rows} rows: s" for rows in results), "cost of a row", *(f"{rows}: MB" for rows in results), "MB"
    )
    one, ten, hundred = options.rows
    for name in STAGES:
        seconds = [results[rows][name]["seconds"] for rows in results]
        peaks = [results[rows][name]["peak_mb"] for rows in results]
        first, then = (seconds[1] - seconds[0]) / (ten - one), (seconds[2] - seconds[1]) / (hundred - ten)
        growth = f"{then / first - 1:+.1%}", f"{peaks[2] / peaks[1] - 1:+.1%}"
        view.add_row(name, *(f"{s:.2f}" for s in seconds), growth[0], *(f"{mb:.0f}" for mb in peaks), growth[1])
    Console(width=110).print(view)
    write(results, options.json)


if __name__ == "__main__":
    main()
