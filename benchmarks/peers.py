"""This project beside biotrainer 1.4.0 on the same work: secondary structure, from sequences to scores, on the CPU.

    python benchmarks/peers.py --peer VENV [--data FOLDER] [--limit N] [--rounds 3] [--threads 2] [--json FILE]

Two command lines, run in turn, each time with nothing stored, no network and as many threads. The same in both are: the
sequences and their masks; the checkpoint, an ESM of random weights (6 layers, width 320, 20 heads); the head, two
convolutions of kernel 7 with 32 channels between them and dropout 0.25; batches of 128 sequences; the epochs; and the
optimiser, the one that biotrainer calls adam (AdamW, amsgrad, weight decay 0.01). biotrainer insists on a validation
set: one train sequence in ten is that in both, which look at its loss at every epoch, keep the best head, and never
stop early. It refuses a sequence that comes twice or has no unmasked residue: both do without. What biotrainer does
besides and can be turned off is off (bootstrap, sanity checks, TensorBoard); of ours, only pictures are.

The checkpoint lies in `facebook/esm2_t6_8M_UR50D`, whose sizes it has: by that name biotrainer takes its faster
embedder. Its seconds of embedding are those it logs, which leave out loading the model and reading the embeddings back;
those of training are in `out.yml`. Ours are those of the stages `embed` and `train_head`, and the latter reads the
embeddings, too. Peak memory is that of the largest process. What differs still: the order of the batches, the initial
weights, and that biotrainer looks at the validation set before an epoch and with dropout, we after it and without. So
the accuracies are not equal: after the few steps of a small data set they vary by some percent from seed to seed.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml
from mlflow import MlflowClient
from rich.console import Console
from rich.progress import track
from rich.table import Table
from timing import write
from work import make_esm

from pipeline.encoders.esm import make_tokenizer

ROOT = Path(__file__).resolve().parents[1]
CKPT = "facebook/esm2_t6_8M_UR50D"
LONGEST = 1022
MEASURES = {"whole_s": "whole command, s", "embed_s": "embedding, s", "train_s": "training the head, s"}
MEASURES |= {"peak_mb": "peak memory, MB", "accuracy": "test accuracy"}
# A small process between: `ru_maxrss` of a program counts what was resident in the process that started it, too.
LAUNCH = """import json, os, sys, time
began = time.perf_counter()
pid = os.posix_spawn(sys.argv[2], sys.argv[2:], os.environ)
status, used = os.wait4(pid, 0)[1:]
found = {"whole_s": time.perf_counter() - began, "peak": used.ru_maxrss, "code": os.waitstatus_to_exitcode(status)}
json.dump(found, open(sys.argv[1], "w"))"""
MAKE = "python3.11 -m venv {0} && {0}/bin/pip install torch==2.13.0 && {0}/bin/pip install biotrainer==1.4.0 requests"

Parts = dict[str, list[dict[str, str]]]
Found = dict[str, Any]


def read(folder: Path, limit: int) -> Parts:
    """The rows of train, val and test that both are given."""
    parts: Parts = {}
    seen = set[str]()
    for part in ("test", "train"):
        rows = parts[part] = []
        with (folder / part / "x000.csv").open(newline="") as stream:
            for row in csv.DictReader(stream):
                text, mask = row["sequence"], row.get("resolved", "1")
                if 0 < len(text) <= LONGEST and text.isalpha() and "1" in mask and text not in seen:
                    seen.add(text)
                    rows.append({key: row[key] for key in ("sequence", "3state", "resolved") if key in row})
    train = parts["train"][: limit or None]
    if len(train) < 2:
        raise SystemExit(f"data: expected at least 2 train sequences, found {len(train)}")
    fitted = [row for number, row in enumerate(train) if number % 10 != 1]
    return {"train": fitted, "val": train[1::10], "test": parts["test"]}


def write_data(parts: Parts, folder: Path) -> None:
    """As each wants it: CSV files, and a FASTA file."""
    lines = []
    for part, rows in parts.items():
        (folder / part).mkdir()
        with (folder / part / "x000.csv").open("w", newline="") as stream:
            writer = csv.DictWriter(stream, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        for number, row in enumerate(rows):
            mask = f" MASK={row['resolved']}" if "resolved" in row else ""
            lines.append(f">{part}{number} TARGET={row['3state']} SET={part}{mask}\n{row['sequence']}\n")
    (folder / "all.fasta").write_text("".join(lines))


def launch(command: list[str], folder: Path, **variables: str) -> Found:
    """Runs a command to its end, and exits with the end of its output where it fails."""
    environment = {**os.environ, **variables, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    measured, output = folder / "measured.json", folder / "output.txt"
    with output.open("w") as stream:
        launcher = [sys.executable, "-I", "-S", "-c", LAUNCH, str(measured), *command]
        subprocess.run(launcher, check=True, cwd=folder, env=environment, stdout=stream, stderr=subprocess.STDOUT)
    found: Found = json.loads(measured.read_text())
    if found["code"]:
        raise SystemExit(f"{' '.join(command)}:\n{output.read_text()[-3000:]}")
    return {"whole_s": found["whole_s"], "peak_mb": found["peak"] * (1024 if sys.platform == "linux" else 1) / 1e6}


def ours(data: Path, folder: Path, options: argparse.Namespace, threads: Mapping[str, str]) -> Found:
    """`python -m pipeline main`, with a fresh store and a fresh database for MLflow."""
    masked = "resolved" in (data / "train" / "x000.csv").read_text().partition("\n")[0]
    task = {
        "class": "token",
        "task_type": "token-level-classification",
        "dataset_path": str(data),
        "dataset": {"train": "x000", "val": "x000", "test": "x000"},
        "target_column": ["3state"],
        "mask_column": ["resolved" if masked else None],
        "batch_size": 128,
        "num_epochs": options.epochs,
        "patience": options.epochs,
        "optim": {"name": "adamw", "lr": 1e-3, "weight_decay": 0.01, "amsgrad": True},
    }
    section = {"dataset": task, "device": "cpu", "store": str(folder / "store"), "logging": {"figures": False}}
    (folder / "config.yaml").write_text(json.dumps({"model": {"dwnstr_task_validation": section}}))
    uri = f"sqlite:///{folder}/mlflow.db"
    command = [sys.executable, "-m", "pipeline", "main", "--ckpt", str(data / CKPT), "--config"]
    variables = {**threads, "MLFLOW_TRACKING_URI": uri, "PYTHONPATH": str(ROOT)}
    found = launch([*command, str(folder / "config.yaml")], folder, **variables)
    client = MlflowClient(uri)
    runs = client.search_runs([one.experiment_id for one in client.search_experiments()])
    metrics = {run.info.run_name: run.data.metrics for run in runs}
    (accuracy,) = {one["test_3state_accuracy"] for one in metrics.values() if "test_3state_accuracy" in one}
    steps = {name: one["seconds"] for name, one in metrics.items() if "seconds" in one}
    return {**found, "embed_s": steps["embed"], "train_s": steps["train_head"], "accuracy": accuracy, "steps": steps}


def biotrainer(data: Path, folder: Path, options: argparse.Namespace, threads: Mapping[str, str]) -> Found:
    """`biotrainer train`, with a fresh output folder."""
    (folder / "facebook").symlink_to(data / "facebook")
    out, config = folder / "out", folder / "config.yaml"
    files = {"input_file": str(data / "all.fasta"), "output_dir": str(out)}
    what = {"protocol": "residue_to_class", "embedder_name": CKPT, "model_choice": "CNN", "dropout_rate": 0.25}
    how = {"optimizer_choice": "adam", "learning_rate": 1e-3, "batch_size": 128, "device": "cpu"}
    # epsilon: the part of the loss by which an epoch must be better to be the best
    epochs = {"num_epochs": options.epochs, "patience": options.epochs, "epsilon": 1e-9}
    off = {"bootstrapping_iterations": 0, "sanity_check": False, "external_writer": "none"}
    config.write_text(yaml.safe_dump({**files, **what, **how, **epochs, **off}))
    command = [str(options.peer / "bin" / "biotrainer"), "train", "--config", str(config)]
    found = launch(command, folder, **threads, PYTHONPATH="")
    result = yaml.safe_load((out / "out.yml").read_text())
    log = (out / "logger_out.log").read_text()
    (embedding,) = re.findall(r"Time elapsed for computing embeddings: ([\d.]+)", log)
    begun = [(name, datetime.fromisoformat(when)) for when, name in re.findall(r"(.+) INFO Executing step: (\w+)", log)]
    begun.append(("", datetime.fromisoformat(log.splitlines()[-1][:23])))
    steps = {name: (then - when).total_seconds() for (name, when), (_, then) in pairwise(begun)}
    training = result["derived_values"]["training_elapsed_time"]
    accuracy = result["test_results"]["test"]["metrics"]["accuracy"]
    return {**found, "embed_s": float(embedding), "train_s": training, "accuracy": accuracy, "steps": steps}


def show(title: str, found: Mapping[str, list[Found]]) -> dict[str, Any]:
    """Prints medians and the ratios round by round, and returns them with all that was measured."""
    view = Table(title=title, title_justify="left")
    for column in ("", *found, "times ours", "least", "greatest"):
        view.add_column(column, justify="right" if column else "left")
    medians: dict[str, Any] = {}
    for key, name in MEASURES.items():
        values = {tool: [one[key] for one in rounds] for tool, rounds in found.items()}
        ratios = sorted(peer / own for own, peer in zip(*values.values(), strict=True))
        medians[key] = {tool: statistics.median(each) for tool, each in values.items()}
        numbers = [f"{median:.0f}" if key == "peak_mb" else f"{median:.3f}" for median in medians[key].values()]
        if key != "accuracy":
            medians[key] |= {"ratio": statistics.median(ratios), "least": ratios[0], "greatest": ratios[-1]}
            numbers += [f"{ratio:.2f}" for ratio in list(medians[key].values())[2:]]
        view.add_row(name, *numbers)
    Console(width=110).print(view)
    return {"title": title, "medians": medians, "rounds": found}


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", type=Path, required=True, help="virtual environment with biotrainer 1.4.0")
    parser.add_argument("--data", type=Path, default=ROOT / "sample/data/proteins", help="folder with a column 3state")
    parser.add_argument("--limit", type=int, default=0, help="most train sequences; 0 for all")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    options.peer = options.peer.absolute()
    if not (options.peer / "bin" / "biotrainer").exists():
        raise SystemExit(f"peer: no biotrainer in '{options.peer}'; to make it: {MAKE.format(options.peer)}")
    parts = read(options.data, options.limit)
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(options.threads))
    tools: dict[str, Callable[..., Found]] = {"ours": ours, "biotrainer": biotrainer}
    found: dict[str, list[Found]] = {name: [] for name in tools}
    with tempfile.TemporaryDirectory() as data:
        write_data(parts, Path(data))
        model: Any = make_esm().model
        for one in (model, make_tokenizer()):
            one.save_pretrained(Path(data) / CKPT)
        console = Console(stderr=True)
        for number in track(range(options.rounds * len(tools)), "measuring", transient=True, console=console):
            name = list(tools)[number % len(tools)]
            with tempfile.TemporaryDirectory() as folder:
                found[name].append(tools[name](Path(data), Path(folder), options, threads))
    counts = ", ".join(f"{len(rows)} {part}" for part, rows in parts.items())
    residues = sum(len(row["sequence"]) for rows in parts.values() for row in rows)
    title = f"{counts} sequences, {residues} residues, {options.epochs} epochs, {options.threads} threads"
    write(show(title, found), options.json)


if __name__ == "__main__":
    main()
