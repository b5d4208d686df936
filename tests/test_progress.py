"""What scores have changed by in a training: the numbers of the stored predictions, before a resume and after."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlflow
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytorch_lightning as pl
from mlflow import MlflowClient

from pipeline import setup_dwnstr_task_validation_callbacks
from pipeline.report.overview import Reading
from pipeline.statistics.intervals import changes
from pipeline.statistics.metrics import Interval, Metric
from pipeline.statistics.predictions import Predictions, from_table
from pipeline.tracking.protocol import NullTracker
from pipeline.training.progress import Progress
from tests.support.data import planted, planted_task, proteins, write_csv
from tests.support.training import INERT, Busy, Recorder, loader, section, trainer

ACCURACY = "test_label_accuracy"


def stored(run_id: str, step: int, folder: Path) -> Predictions:
    path = f"downstream/step={step}/predictions_downstream.parquet"
    return from_table(pq.read_table(mlflow.artifacts.download_artifacts(None, run_id, path, str(folder))), "label")


def test_changes_are_since_the_start_and_the_best_also_after_a_resume(
    tmp_path: Path, tracking: str, model_folder: Any
) -> None:
    """The training itself is what it is without the callback, to the last bit."""
    task = planted_task(tmp_path / "data", num_epochs=3)
    write_csv(tmp_path / "data" / "test" / "x000.csv", planted(proteins(60, 2)))
    curve: list[tuple[int, dict[str, float]]] = []
    ends, folder = [], model_folder("esm")
    for measured in (True, False):
        path = None
        for epochs in (2, 4):
            callbacks: list[Any] = []
            if measured:
                callbacks = setup_dwnstr_task_validation_callbacks(section(tmp_path, task, on_start=True))
            keep = pl.callbacks.ModelCheckpoint(tmp_path / f"kept {measured}", "{step}", save_top_k=-1)
            recorder = Recorder()
            pl.seed_everything(4, verbose=False)
            module = Busy(folder)
            fit = trainer(tmp_path, [*callbacks, keep, recorder], max_epochs=epochs)
            fit.fit(module, loader(), loader(shuffle=False), ckpt_path=path, **(INERT if path else {}))
            path = str(tmp_path / f"kept {measured}" / "step=8.ckpt")
            ends.append(recorder.end)
            curve += callbacks[0].curve if measured else []
    assert ends[:2] == ends[2:]
    assert [step for step, _ in curve] == [0, 4, 8, 12, 16]
    (run,) = MlflowClient().search_runs(["0"])
    assert run.data.tags["downstream.start"] == "step 0"
    assert run.data.tags["mlflow.note.content"].startswith(f"- `{ACCURACY}`: **{curve[-1][1][ACCURACY]:.4f}** (95 %: ")
    assert "since step 0, the first measurement" in run.data.tags["mlflow.note.content"]
    seen = mlflow.artifacts.load_text(f"{run.info.artifact_uri}/downstream/curves/resolution.md")
    assert f"| {ACCURACY} | " in seen
    assert seen in run.data.tags["mlflow.note.content"]
    predictions = {step: stored(run.info.run_id, step, tmp_path / str(step)) for step, _ in curve}
    assert not any("delta" in name for name in curve[0][1])
    for place, (step, metrics) in enumerate(curve[1:], 1):
        best = max(curve[:place], key=lambda point: point[1][ACCURACY])[0]
        expected = {
            **changes(predictions[step], predictions[0]).values["accuracy"].named(ACCURACY, "start"),
            **changes(predictions[step], predictions[best]).values["accuracy"].named(ACCURACY, "best"),
        }
        since = {name: value for name, value in metrics.items() if "delta" in name or "p_improved" in name}
        of_probe = {name: value for name, value in since.items() if "_probe_" in name}
        assert since == {**expected, **of_probe}
        assert {name.replace("_probe_", "_") for name in of_probe} == set(expected)
        for name, value in expected.items():
            history = MlflowClient().get_metric_history(run.info.run_id, name)
            assert [point.value for point in history if point.step == step] == [value]


def test_curves_go_on_after_a_resume() -> None:
    def measured(value: float) -> Any:
        results = (Metric("", "y", "spearman", value), Metric("", "y", "mse", 1.0))
        table = pa.table({"seed": [0]})
        return [SimpleNamespace(results=results, task_name="t", table=table, verdicts=(), baselines={})]

    def log(progress: Progress, value: float, step: int) -> dict[str, Any]:
        return dict(progress.log(measured(value), step, NullTracker(), NullTracker()).curves)

    first = Progress()
    assert log(first, 0.25, 0) == {"test_y_spearman": (Reading(0, 0.25),)}
    state = first.state()
    log(first, 0.75, 50)
    resumed = Progress.from_state(state)
    assert log(resumed, 0.5, 50) == {"test_y_spearman": (Reading(0, 0.25), Reading(50, 0.5))}
    resumed.missed(75)
    old = {**resumed.state(), "curves": {"test_y_spearman": [(0, 0.25)]}}  # as earlier versions have it
    assert log(Progress.from_state(old), 0.75, 100)["test_y_spearman"] == (Reading(0, 0.25), Reading(100, 0.75))
    gap = (Reading(0, 0.25), Reading(50, 0.5), Reading(75), Reading(100, 0.75))
    assert log(Progress.from_state(resumed.state()), 0.75, 100)["test_y_spearman"] == gap


def test_changes_that_are_not_known_are_told_of_in_one_line() -> None:
    """Probabilities that rank alike, and are not the same: no difference varies with the test sequences."""

    def measured(scale: float) -> Any:
        true = pa.array(np.tile([0.0, 1.0], 30))
        said = pa.array(scale * np.tile([0.0, 1.0], 30))
        rows = pa.array([f"x000:{row}" for row in range(60)])
        columns = {"seed": pa.array([0] * 60), "row": rows, "y_target": true, "y_mask": pa.array([True] * 60)}
        table = pa.table(columns | {"y_prediction": said, "y_probe_prediction": said})
        results = [
            Metric("", "y", "spearman", 1.0, interval=Interval(0.9, 1.0), probe=probe) for probe in (False, True)
        ]
        return [SimpleNamespace(results=results, task_name="t", table=table)]

    progress = Progress()
    assert progress.follow(measured(1.0), 0) == ({}, [])
    same = "no change since the start and the best: the difference is the same whichever test sequence is left out"
    assert progress.follow(measured(2.0), 10) == ({}, [f"test_y_spearman and the probe's: {same}"])
