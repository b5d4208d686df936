"""Measurements in the background of the Hugging Face Trainer, and of a loop on two ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from pipeline import DownstreamTrainerCallback
from pipeline.tracking.sender import flush
from tests.support.data import planted_task
from tests.support.loops import BEST, late_section, train
from tests.support.readers import in_tensorboard
from tests.support.two_ranks_of import both_ranks

pytestmark = pytest.mark.slow
NAME = f"eval_{BEST}"


def measured(folder: Path, where: str, mode: str = "background", **options: Any) -> tuple[Any, Any]:
    callback = DownstreamTrainerCallback(late_section(folder, mode))
    trainer = train(folder / where, [callback], **options)
    flush()
    return callback, trainer


def points_of(callback: DownstreamTrainerCallback) -> list[Any]:
    return [(step, found) for step, found in callback.session.state()["points"]]


def test_the_trainer_and_its_reporters(tmp_path: Path, tracking: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The training is what it is without, the curve that of blocking; reporters are told at the snapshots' steps."""
    planted_task(tmp_path / "data")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "tb"))
    undisturbed = train(tmp_path / "undisturbed").seen
    late, trainer = measured(tmp_path, "late", report_to=["tensorboard"])
    waited, _ = measured(tmp_path, "waited", "blocking")
    assert trainer.seen == undisturbed
    assert points_of(late) == points_of(waited)
    curve = [(step, found[BEST]) for step, found in points_of(late)]
    assert [step for step, _ in curve] == [0, 2, 4, 6, 8]
    assert [(one["step"], one[NAME]) for one in trainer.state.log_history if NAME in one] == curve
    (events,) = {file.parent for file in (tmp_path / "tb").rglob("events.out.*")}
    in_single: list[Any] = [(step, pytest.approx(value)) for step, value in curve]
    assert in_tensorboard(events, f"eval/{BEST}") == in_single


def test_the_trainer_is_resumed(tmp_path: Path, tracking: str) -> None:
    """What was not measured when the checkpoint was written is, and once."""
    planted_task(tmp_path / "data")
    waited, _ = measured(tmp_path, "waited", "blocking")
    first, _ = measured(tmp_path, "out", stop=4)
    stored = json.loads((tmp_path / "out/checkpoint-4/trainer_state.json").read_text())
    kept = stored["stateful_callbacks"][first.state_key]
    assert kept["background"]["pending"]
    resumed, _ = measured(tmp_path, "out", resume=str(tmp_path / "out/checkpoint-4"))
    assert points_of(resumed) == points_of(waited)
    run = first.session.state()["run"]
    assert run == resumed.session.state()["run"]
    (found,) = MlflowClient(tracking).search_runs(["0"], f"tags.`pipeline.journal` = '{run}'")
    history = MlflowClient(tracking).get_metric_history(found.info.run_id, BEST)
    assert [one.step for one in history] == [0, 2, 4, 6, 8]


def test_two_ranks(tmp_path: Path, empty_database: Path) -> None:
    first, second = both_ranks("late", tmp_path, empty_database)
    for rank in (first, second):
        assert rank["background"] == rank["blocking"] == rank["without"]
        assert rank["background curve"] == rank["blocking curve"]
        assert "when_busy: expected drop_oldest or skip, found wait with 2 ranks" in rank["refused"]
    assert [step for step, _ in second["background curve"]] == [0, 1, 2, 3, 4]
