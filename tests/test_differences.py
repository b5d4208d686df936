"""How far checkpoints are from one another: measured together, in a notebook, or compared from what MLflow keeps."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from mlflow.artifacts import load_text
from mlflow.entities import Run
from torch import Tensor

import pipeline
from pipeline import Measured
from pipeline.__main__ import main
from pipeline.encoders.protocol import Encoder
from pipeline.errors import DataError
from pipeline.report.comparison import Row, leaderboard
from pipeline.report.differences import FIRST, differences
from pipeline.statistics.intervals import MIN_SEQUENCES, changes
from pipeline.statistics.predictions import Predictions, from_table
from pipeline.tracking.earlier_runs import read_runs, with_predictions
from tests.support.data import proteins
from tests.support.encoders import FakeEncoder
from tests.support.lab import VALUE, Lab, furnished, own_signals, write_checkpoint

SPEARMAN, MSE, PROBE_MSE = "test_value_spearman", "test_value_mse", "test_value_probe_mse"
ENDS = ("", "_ci_low", "_ci_high")


@pytest.fixture
def lab(tmp_path: Path, model_folder: Callable[..., Path], tracking: str) -> Iterator[Lab]:
    """With enough test sequences for intervals, and checkpoints of three steps."""
    with own_signals():
        lab = furnished(tmp_path / "lab", model_folder, tracking)
        lab.write("test", 20, 90)
        for step in (0, 50, 100):
            write_checkpoint(lab, step, noise=(100 - step) / 50)
        yield lab


def measure(lab: Lab, ckpt: str) -> Run:
    entry, _, config = lab.command({**VALUE, "num_seeds": 2})
    assert main([entry, f"--ckpt={ckpt}", config]) == 0
    return lab.parents()[0]


def compared(lab: Lab, runs: list[Run], by: str) -> Run:
    assert main(["compare", *(run.info.run_id for run in runs), f"--tracking-uri={lab.uri}", f"--by={by}"]) == 0
    return lab.parents()[0]


def board(run: Run) -> list[dict[str, Any]]:
    table = json.loads(load_text(f"{run.info.artifact_uri}/leaderboard.json"))
    return [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]


def stored(run: Run, folder: Path, probe: bool) -> Predictions:
    path = mlflow.artifacts.download_artifacts(None, run.info.run_id, "predictions_value.parquet", str(folder))
    return from_table(pq.read_table(path), "value", probe)


def found(rows: list[dict[str, Any]], name: str) -> list[list[float | None]]:
    """Of each row the metric, the difference to the first, and its interval."""
    return [[row[name], *(row[name + FIRST + end] for end in ENDS)] for row in rows]


def test_compare_gives_the_intervals_of_the_run_itself(lab: Lab, tmp_path: Path) -> None:
    """Those of the stored predictions, whether measured together or one by one, of the head and of the probe."""
    together = measure(lab, f"{lab.folder}/run/*.ckpt")
    children = list(lab.nested(together).values())
    alone = [measure(lab, f"{lab.folder}/run/step={step}.ckpt") for step in (50, 0, 100)]
    own = board(together)
    assert own[0][SPEARMAN + FIRST] is None
    assert all(row[SPEARMAN + FIRST] < 0 for row in own[1:])
    assert found(board(compared(lab, children, SPEARMAN)), SPEARMAN) == found(own, SPEARMAN)
    assert found(board(compared(lab, alone, SPEARMAN)), SPEARMAN) == found(own, SPEARMAN)
    assert found(board(compared(lab, [together], SPEARMAN)), SPEARMAN) == found(own, SPEARMAN)
    for name, metric, probe in ((SPEARMAN, "spearman", False), (MSE, "mse", False), (PROBE_MSE, "mse", True)):
        rows = board(compared(lab, children, name))
        runs = [next(run for run in children if run.info.run_name.startswith(f"step={row['step']}: ")) for row in rows]
        first, *others = (stored(run, tmp_path / f"{name} {place}", probe) for place, run in enumerate(runs))
        for row, other in zip(found(rows, name)[1:], others, strict=True):
            change = changes(other, first).values[metric]
            assert row[1:] == [change.value, change.interval.low, change.interval.high]
            assert row[0] - rows[0][name] == pytest.approx(change.value)
        assert [row[name] for row in rows] == sorted((row[name] for row in rows), reverse=metric == "spearman")


def predictions(noise: float, sequences: int = 200, seed: int = 0) -> pa.Table:
    """Of a head, the better the less noise; the labels are those of every `noise`."""
    rng = np.random.default_rng(seed)
    true, error = rng.standard_normal((2, sequences))
    rows = [f"x000.csv:{row}" for row in range(sequences)]
    columns = {"y_target": true, "y_prediction": true + noise * error, "y_mask": np.ones(sequences, bool)}
    return pa.table({"row": rows, **columns})


def row(label: str, table: pa.Table | None, step: int | None = 1) -> Row:
    if table is None:
        return Row(label, step, {"test_y_mse": 5.0})
    one = from_table(table, "y")
    error = float(np.mean((one.predicted - one.true) ** 2))
    return Row(label, step, {"test_y_mse": error}, tables={"downstream": table})


def test_rows_that_cannot_be_told_apart_are_marked() -> None:
    """The same head with a little noise about the first one's predictions, and a clearly worse one."""
    best, worse = predictions(0.3), predictions(0.6)
    jitter = 0.003 * np.random.default_rng(7).standard_normal(len(best))
    near = best.set_column(2, "y_prediction", pa.array(best["y_prediction"].to_numpy() + jitter))
    rows = [row("worse", worse), row("near", near), row("best", best)]
    shown = leaderboard(rows, ["test_y_mse"]).table
    assert list(shown.columns) == ["#", "checkpoint", "test_y_mse", "against #1 (95 %)"]
    first, second, third = shown.rows
    assert {first[1], second[1]} == {"best", "near"}
    assert first[3] == ""
    assert second[3].endswith(") =")
    assert third[1] == "worse"
    assert third[3].startswith("+0.2")
    assert not third[3].endswith("=")
    (told, *_) = said = leaderboard(rows, ["test_y_mse"]).remarks
    assert (
        told == "Rows with = cannot be told apart from the first by test_y_mse: the interval of the difference holds 0."
    )
    assert said[1:] == ["The first is the best of 3: its lead is not corrected for that choice."]
    assert len(leaderboard(rows[1:], ["test_y_mse"]).remarks) == 1


def test_remarks_are_about_the_first_of_the_table_in_whatever_order_the_rows_are_given() -> None:
    """A run whose predictions were not kept is given first: the others still have differences, and it is named."""
    rows = [row("old", None), row("good", predictions(0.3)), row("bad", predictions(0.6), step=2)]
    board = leaderboard(rows, ["test_y_mse"])
    shown = board.frame
    assert list(shown["checkpoint"]) == ["good", "bad", "old"]
    assert list(np.isfinite(shown["test_y_mse" + FIRST])) == [False, True, False]
    assert board.remarks == [
        "There is no difference to the first row: the predictions of some rows were not kept",
        "Rows with = cannot be told apart from the first by test_y_mse: the interval of the difference holds 0.",
        "The first is the best of 3: its lead is not corrected for that choice.",
        "The rows are of different steps: how long each was trained is part of the difference.",
    ]
    both_old = leaderboard([row("old", None), row("older", None)], ["test_y_mse"])
    assert not both_old.remarks  # there never were any predictions to compare


def test_why_there_is_no_difference() -> None:
    few = [{"downstream": predictions(noise, MIN_SEQUENCES - 1)} for noise in (0.3, 0.6)]
    found, reasons = differences(few, "test_y_mse")
    assert found == [None, None]
    assert reasons == [f"an interval takes at least {MIN_SEQUENCES} test sequences with labels, and there are 49"]
    other = [{"downstream": predictions(0.3)}, {"downstream": predictions(0.3, seed=1)}]
    found, reasons = differences(other, "test_y_mse")
    assert found == [None, None]
    assert reasons[0].startswith("two checkpoints can be compared on the same test sequences and labels only")
    assert differences(other, "test_x_mse") == ([None, None], [])
    assert differences(other, "loss") == ([None, None], [])


def test_predictions_of_other_tasks_are_not_read(tracking: str, tmp_path: Path) -> None:
    """The names of tasks may begin and end alike."""
    tasks = ("a", "a b a", "b")
    with mlflow.start_run() as run:
        for task in tasks:
            mlflow.log_metric(f"{task}/test_y_mse", 0.5, step=3)
            pq.write_table(predictions(0.3), tmp_path / f"predictions_{task}.parquet")
            mlflow.log_artifact(str(tmp_path / f"predictions_{task}.parquet"))
    runs = read_runs([run.info.run_id], tracking)
    assert [one.tables for one in runs] == [{}]
    for task in tasks:
        (one,) = with_predictions(runs, f"{task}/test_y_mse")
        assert {step: list(tables) for step, tables in one.tables.items()} == {3: [task]}
    (one,) = with_predictions(runs, "test_y_mse")
    assert set(one.tables[3]) == set(tasks)


def test_a_row_without_the_metric_stands_before_one_that_failed() -> None:
    rows = [Row("broken", None, {}, "no weights"), Row("other", 1, {"test_x_mse": 1.0}), row("one", predictions(0.3))]
    board = leaderboard([*rows, row("two", predictions(0.6))], ["test_y_mse"])
    assert list(board.frame["checkpoint"]) == ["one", "two", "other", "broken"]
    assert list(np.isfinite(board.frame["test_y_mse" + FIRST])) == [False, True, False, False]
    assert [bar is not None for bar in board.bars] == [False, True, False, False]
    assert board.every_metric.columns == ("metric", "one", "two", "other", "broken")
    assert board.errors == ["broken: no weights"]


def measured(encoder: Encoder, folder: Path, rows: tuple[int, int] = (60, 60), **settings: Any) -> Measured:
    """On the share of leucine, which a mean of one-hot residues tells."""
    texts = [proteins(number, seed) for seed, number in enumerate(rows)]
    parts = [pd.DataFrame({"sequence": few, "share": [text.count("L") / len(text) for text in few]}) for few in texts]
    quick = {"num_epochs": 2, "num_seeds": 1, "baselines": False, "store": str(folder), **settings}
    return pipeline.measure(encoder, {"train": parts[0], "test": parts[1]}, **quick)


class Blind(FakeEncoder):
    """Sees lengths alone."""

    def state(self, sequence: str) -> Tensor:
        return torch.full((len(sequence), self.hidden_size), len(sequence) / 100.0)


def test_two_results_of_a_notebook_are_compared(tmp_path: Path) -> None:
    """Head and probe, with the paired intervals of their predictions; the other way round is the same with a minus."""
    seeing, blind = (measured(one, tmp_path) for one in (FakeEncoder(), Blind(name="blind")))
    frame = seeing.compare(blind)
    assert list(frame["metric"]) == ["test_share_spearman", "test_share_probe_spearman"]
    for row, probe in zip(frame.to_dict("records"), (False, True), strict=True):
        now, then = (from_table(one.scores[0].table, "share", probe) for one in (seeing, blind))
        change = changes(now, then).values["spearman"]
        assert row["task"] == "share"
        assert [row["score"], row["other"]] == [one.metrics[row["metric"]] for one in (seeing, blind)]
        assert row["change"] == pytest.approx(change.value)
        assert (row["ci_low"], row["ci_high"]) == (change.interval.low, change.interval.high)
        assert row["p_improved"] == change.p_improved
    probe = frame["verdict"].iloc[1]
    assert (probe, blind.compare(seeing)["verdict"].iloc[1]) == ("improved", "worse")
    assert np.allclose(blind.compare(seeing)["change"], -frame["change"])
    assert list(seeing.compare(seeing)["verdict"]) == ["not told apart"] * 2


class Constant(FakeEncoder):
    """Sees nothing."""

    def state(self, sequence: str) -> Tensor:
        return torch.zeros(len(sequence), self.hidden_size)


def test_what_is_not_defined_for_one_has_a_row_that_says_why(tmp_path: Path) -> None:
    constant, seeing = measured(Constant(name="constant"), tmp_path), measured(FakeEncoder(), tmp_path)
    for one, other, empty, whose in ((constant, seeing, "score", "this one"), (seeing, constant, "other", "the other")):
        frame = one.compare(other)
        assert list(frame["metric"]) == ["test_share_spearman", "test_share_probe_spearman"]
        assert frame[empty].isna().all()
        assert frame["change"].isna().all()
        assert list(frame["verdict"]) == [f"not defined for {whose}: the predictions are all equal"] * 2


def test_results_that_cannot_be_compared(tmp_path: Path) -> None:
    one = measured(FakeEncoder(), tmp_path)
    with pytest.raises(DataError, match="on the same test sequences and labels only, not on 60 and 70 that differ"):
        one.compare(measured(FakeEncoder(), tmp_path, (60, 70)))
    with pytest.raises(DataError, match="compare: expected the same tasks, found share and other; measure both with"):
        one.compare(measured(FakeEncoder(), tmp_path, task_name="other"))
    few = measured(FakeEncoder(), tmp_path, (60, 20))
    frame = few.compare(measured(Blind(name="blind"), tmp_path, (60, 20)))
    assert frame["verdict"].iloc[1] == "an interval takes at least 50 test sequences with labels, and there are 20"
    assert frame["change"].notna().all()
    assert frame[["ci_low", "ci_high", "p_improved"]].isna().all(axis=None)
