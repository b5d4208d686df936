"""Does pre-training on real proteins show in real downstream tasks? The demonstration's training on other data.

    DOWNSTREAM_TEST_DATA=... python benchmarks/pretrain.py [--steps N] [--seed N] [--json FILE]

Trains the demonstration's masked language model (four layers) on `pretrain_protein_uniprot`, and measures secondary
structure (`ss3_flip`, 400 of the train and all test sequences) and membrane or soluble (`membrane_soluble`) before the
first step and six times on the way. About 20 minutes on two cores. Prints the curve beside what the most frequent class
reaches, and the floors of simple baselines that the data sets state.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from examples.pretrain import Settings, pretrain, read_sequences
from pipeline import Config, Files, Task
from pipeline.config.task import MaxRows
from pipeline.report.tables import step_table

# The floors in the data sets' README: logistic regression on a one-hot window of 15, and on amino-acid and dipeptide
# content; and the share of the most frequent class.
FLOORS = {"ss3_flip": (0.382, 0.613), "membrane_soluble": (0.587, 0.711)}


def tasks(data: Path) -> list[Task]:
    """The two downstream tasks."""
    shared = {"max_seq_length": 1022, "batch_size": 32, "optim": {"name": "adam", "lr": 0.001}}
    structure = Task(
        level="token",
        task_type="classification",
        task_name="ss3_flip",
        dataset_path=str(data / "ss3_flip"),
        dataset=Files("x[000..003]", "x[000..001]"),
        target_column=["3state"],
        mask_column=["resolved"],
        max_rows=MaxRows(train=400),
        num_epochs=20,
        **shared,  # type: ignore[arg-type]
    )
    membrane = Task(
        level="sequence",
        task_type="classification",
        task_name="membrane_soluble",
        dataset_path=str(data / "membrane_soluble"),
        target_column=["membrane"],
        num_epochs=40,
        **shared,  # type: ignore[arg-type]
    )
    return [structure, membrane]


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--seed", type=int, default=1234)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    data = Path(os.environ["DOWNSTREAM_TEST_DATA"])
    sequences = read_sequences(data / "pretrain_protein_uniprot" / "train", "x[000..004]")
    settings = Settings(layers=4, crop=48, steps=options.steps, seed=options.seed)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        os.environ.setdefault("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/mlflow.db")
        config = Config(dataset=tasks(data), is_list=True, store=f"{folder}/store", on_start=True, on_error="raise")
        (callback,) = pretrain(sequences, Path(folder) / "out", settings, config)
    points = callback.curve
    print(step_table(points, config.headlines).text())
    for name, (majority, baseline) in FLOORS.items():
        print(f"{name}: most frequent class {majority}, simple baseline {baseline}")
    print(f"{(time.perf_counter() - began) / 60:.1f} minutes")
    if options.json:
        options.json.write_text(json.dumps(points, indent=1))


if __name__ == "__main__":
    main()
