"""A place to measure in, by the command line and with an MLflow database of its own."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from mlflow import MlflowClient
from mlflow.entities import Run, ViewType
from transformers import AutoTokenizer, EsmForMaskedLM

from pipeline.encoders.description import DESCRIPTION, describe
from tests.support.data import write_csv
from tests.support.models import RESIDUES

PARENT = "mlflow.parentRunId"
ALONE = {"num_seeds": 1, "baselines": False}  # one head, and nothing beside it but the probe
STAGES = ["load", "embed", "train_head", "score"]
VALUE = {"task_name": "value", "class": "sequence", "task_type": "regression", "target_column": "value"}
STATE = {"task_name": "state", "class": "token", "task_type": "classification", "target_column": ["state"]}


@dataclass
class Lab:
    """A folder with data, a model and a database, and the measurements made there."""

    folder: Path
    ckpt: Path
    uri: str
    task: dict[str, Any] = field(default_factory=dict)

    @property
    def client(self) -> MlflowClient:
        return MlflowClient(self.uri)

    def write(self, part: str, first: int, last: int) -> None:
        """Sequences number `first` to `last`, each unlike the others; one of 40 is too long for `max_seq_length`."""
        texts = [RESIDUES[n % 20 :] + RESIDUES[: n % 20 + n // 20] for n in range(first, last)]
        rows = [
            {"sequence": text, "value": str(index % 7), "state": "".join("HC"[ord(c) % 2] for c in text)}
            for index, text in enumerate([*texts, 2 * RESIDUES])
        ]
        write_csv(self.folder / part / "x000.csv", rows)

    def command(self, *tasks: dict[str, Any], entry: str = "main", name: str = "config", **section: Any) -> list[str]:
        """The arguments of a measurement; several tasks are a list, one is not."""
        given = {"dataset_path": str(self.folder), "max_seq_length": 30, "num_epochs": 2, **ALONE, **self.task}
        entries = [{**given, **task} for task in tasks]
        dataset: Any = entries if len(entries) > 1 else entries[0]
        where = {"store": str(self.folder / "store"), "device": "cpu", "logging": {"figures": False}}
        values = {**where, "dataset": dataset, **section}
        config = self.folder / f"{name}.yaml"
        config.write_text(yaml.safe_dump({"model": {"dwnstr_task_validation": values}}))
        return [entry, f"--ckpt={self.ckpt}", f"--config={config}"]

    def runs(self) -> list[Run]:
        """All runs, the last first."""
        return list(self.client.search_runs(["0"], run_view_type=ViewType.ALL, order_by=["start_time DESC"]))

    def parents(self) -> list[Run]:
        return [run for run in self.runs() if PARENT not in run.data.tags]

    def nested(self, parent: Run) -> dict[str, Run]:
        """The nested runs by name, in the order they began."""
        runs = [run for run in reversed(self.runs()) if run.data.tags.get(PARENT) == parent.info.run_id]
        return {run.info.run_name: run for run in sorted(runs, key=lambda run: run.info.start_time)}

    def statuses(self, parent: Run) -> dict[str, str]:
        """Of the run itself (by the name `main`) and of its nested runs."""
        own = {"main": self.client.get_run(parent.info.run_id).info.status}
        return own | {name: run.info.status for name, run in self.nested(parent).items()}


@contextmanager
def own_signals() -> Iterator[None]:
    """`main` takes over signals; this gives them back."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def furnished(folder: Path, model_folder: Callable[..., Path], uri: str) -> Lab:
    lab = Lab(folder, model_folder("esm"), uri)
    lab.write("train", 0, 30)
    lab.write("test", 20, 40)
    return lab


def newest_run() -> Any:
    """The run begun last, nested ones aside."""
    runs = MlflowClient().search_runs(["0"])
    return next(run for run in runs if "mlflow.parentRunId" not in run.data.tags)


def every_metric(run: Run) -> dict[str, float]:
    """All metrics of a measurement: the runs of its stage `score` have them."""
    nested = MlflowClient().search_runs([run.info.experiment_id], f"tags.`{PARENT}` = '{run.info.run_id}'")
    scored = [one.data.metrics for one in nested if one.info.run_name.startswith("score")]
    found = {name: value for metrics in scored for name, value in metrics.items()}
    return {name: value for name, value in found.items() if name not in ("seconds", "peak_memory_mb")}


def write_checkpoint(lab: Lab, step: int, noise: float) -> None:
    """Writes `run/step=N.ckpt`: the model of `lab.ckpt`, with noise of this deviation on its weights."""
    model = EsmForMaskedLM.from_pretrained(lab.ckpt)
    generator = torch.Generator().manual_seed(step)
    state = {
        f"model.{name}": value + noise * torch.randn(value.shape, generator=generator)
        for name, value in model.state_dict().items()
    }
    description = describe(model, AutoTokenizer.from_pretrained(lab.ckpt), "model.")
    path = lab.folder / "run" / f"step={step}.ckpt"
    path.parent.mkdir(exist_ok=True)
    torch.save({"state_dict": state, DESCRIPTION: description, "global_step": step}, path)
