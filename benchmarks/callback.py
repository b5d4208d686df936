"""What measuring costs a training: the demonstration with and without the callback, in turn.

    python benchmarks/callback.py [--steps 300] [--validations 3] [--rounds 3] [--json FILE]

*Stall* is what one measurement adds to the training's wall-clock time: embedding all sequences of the two tasks of
`configs/pretrain.yaml` with the weights of the moment, training two heads, scoring them, and handing the results to the
journal. Pictures are drawn unless `--no-figures`.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path

from rich.console import Console
from timing import in_turn, report, write

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from examples.pretrain import Settings, pretrain, read_sequences
from pipeline import Config, read_config


def train(config: Config, settings: Settings, sequences: list[str]) -> None:
    """The demonstration's training, from scratch."""
    with tempfile.TemporaryDirectory() as folder:
        pretrain(sequences, Path(folder) / "out", settings, replace(config, store=f"{folder}/store"))


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--validations", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-figures", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    config = read_config("configs/pretrain.yaml", f"logging.figures={str(not options.no_figures).lower()}")
    settings = Settings(steps=options.steps, validations=options.validations)
    sequences = read_sequences(Path("sample/data/unlabelled/train"), "x000")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{folder}/mlflow.db"
        ways = {
            "without": partial(train, replace(config, enabled=False), settings, sequences),
            "with": partial(train, config, settings, sequences),
        }
        seconds = in_turn(ways, options.rounds, warm=True)
    results = report(f"{options.steps} steps, {options.validations} validations", seconds, "without")
    added = [one - other for one, other in zip(seconds["with"], seconds["without"], strict=True)]
    measurements = options.validations + config.on_start
    stall = statistics.median(added) / measurements
    share = statistics.median(more / whole for more, whole in zip(added, seconds["with"], strict=True))
    Console().print(
        f"each of {measurements} stalls the training for {stall:.2f} s: {share:.0%} of this one's time in all"
    )
    write({**results, "stall_s": stall, "share": share}, options.json)


if __name__ == "__main__":
    main()
