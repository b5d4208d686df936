"""What the journal costs a training: how long each call lasts with a server that is up, killed, or silent.

    python benchmarks/tracking.py [--steps 400] [--json FILE]

Trains the demonstration's model with `JournalLogger`, logging at every step and measuring four times, once per kind of
server, and prints for each the number of calls, their median, 99th percentile and longest, and how long the training
took. Needs `pip install -e '.[test]'`; the servers are those of the tests.
"""

from __future__ import annotations

import argparse
import functools
import json
import logging
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from examples.pretrain import Settings, pretrain, read_sequences  # noqa: E402
from pipeline import read_config  # noqa: E402
from pipeline.tracking.journal_run import JournalRun  # noqa: E402
from pipeline.training.lightning_package import pl  # noqa: E402
from pipeline.training.loggers import JournalLogger  # noqa: E402
from tests.support import servers  # noqa: E402

CALLS = {
    JournalLogger: ("log_metrics", "log_hyperparams", "finalize", "save"),
    JournalRun: ("metrics", "artifact", "text", "data", "parameters", "tags", "checkpoint", "end"),
}


def timed(method: Callable[..., Any], seconds: list[float]) -> Callable[..., Any]:
    """The method, whose calls are timed."""

    @functools.wraps(method)
    def call(*args: Any, **options: Any) -> Any:
        began = time.perf_counter()
        try:
            return method(*args, **options)
        finally:
            seconds.append(time.perf_counter() - began)

    return call


def train(folder: Path, steps: int, uri: str, at_half: Callable[[], None]) -> tuple[float, list[float], int, int]:
    """A training; its seconds, those of each call, and how many records were written and sent when it ended."""
    seconds: list[float] = []
    for kind, names in CALLS.items():
        for name in names:
            setattr(kind, name, timed(getattr(kind, name), seconds))
    options = f"store={folder}/store dataset.num_epochs=1"
    config = read_config(ROOT / "configs/pretrain.yaml", options)
    sequences = read_sequences(ROOT / "sample/data/unlabelled/train", "x000")
    logger = JournalLogger("benchmark", tracking_uri=uri, journal=folder / "journal.jsonl")
    began = time.perf_counter()
    pretrain(sequences, folder / "out", Settings(steps=steps, validations=4), config, [logger], [Half(steps, at_half)])
    spent = time.perf_counter() - began
    written = (folder / "journal.jsonl").read_bytes()
    sent = folder / "journal.sent"
    offset = int(sent.read_text()) if sent.exists() else 0
    return spent, seconds, written.count(b"\n"), written[:offset].count(b"\n")


class Half(pl.Callback):
    """Logs at every step, and does something in the middle of the training."""

    def __init__(self, steps: int, act: Callable[[], None]) -> None:
        self.step, self.act = steps // 2, act

    def on_train_batch_start(self, trainer: Any, *_args: Any) -> None:
        """See `pl.Callback`."""
        trainer.logger.log_metrics({"a": 0.1, "b": 0.2, "c": 0.3}, trainer.global_step)
        if trainer.global_step == self.step:
            self.act()


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    for name in ("pipeline", "pytorch_lightning"):
        logging.getLogger(name).setLevel(logging.ERROR)
    usual = {kind: {name: getattr(kind, name) for name in names} for kind, names in CALLS.items()}
    found = []
    for kind in ("up", "killed", "silent"):
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            server = servers.MlflowServer(folder)
            with servers.silent() as silent:
                if kind != "silent":
                    server.start()
                uri = silent if kind == "silent" else server.uri
                at_half = server.kill if kind == "killed" else lambda: None
                spent, seconds, written, sent = train(folder, options.steps, uri, at_half)
            server.kill()
        for kind_of_call, methods in usual.items():
            for name, method in methods.items():
                setattr(kind_of_call, name, method)
        seconds.sort()
        found.append(
            {
                "server": kind,
                "training_s": spent,
                "calls": len(seconds),
                "median_ms": 1000 * statistics.median(seconds),
                "p99_ms": 1000 * seconds[int(0.99 * (len(seconds) - 1))],
                "longest_ms": 1000 * seconds[-1],
                "records": written,
                "sent_at_the_end": sent,
            }
        )
    view = Table(title="Calls of the tracker during a training")
    for name in found[0]:
        view.add_column(name, justify="right")
    for row in found:
        view.add_row(*(f"{value:.2f}" if isinstance(value, float) else str(value) for value in row.values()))
    Console().print(view)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
