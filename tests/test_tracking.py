"""Several processes, one tracking database."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow import MlflowClient

from pipeline.encoders.custom import CustomEncoder
from pipeline.encoders.remote import RemoteEncoder
from pipeline.report.publishing import tags_of
from pipeline.tracking.journal import Journal
from pipeline.tracking.journal_run import NOTE, JournalRun
from pipeline.tracking.protocol import NullTracker
from pipeline.tracking.recording import Recording, replay
from tests.support.encoders import FakeEncoder
from tests.support.programs import ROOT

START = """
import sys
from pipeline.config.schema import Config
from pipeline.tracking.runs import open_run
with open_run(sys.argv[1], Config(store="store"), sys.argv[2]) as opened:
    opened.run.metrics({"x": 1.0})
"""


def test_eight_processes_on_a_new_database(tmp_path: Path) -> None:
    """MLflow alone fails here, and may leave a database that nobody can open."""
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MLFLOW_")}
    environment["PYTHONPATH"] = str(ROOT)
    ours = [
        subprocess.Popen([sys.executable, "-c", START, f"run {i}", uri], cwd=tmp_path, env=environment, stderr=-1)
        for i in range(8)
    ]
    errors = [one.communicate()[1].decode() for one in ours]
    assert [one.returncode for one in ours] == [0] * 8, errors
    # A program's wait at its end is bounded: what it could not send, the next one does.
    subprocess.run([sys.executable, "-c", START, "run 8", uri], cwd=tmp_path, env=environment, check=True)
    runs = MlflowClient(uri).search_runs(["0"])
    assert {run.info.run_name for run in runs} == {f"run {i}" for i in range(9)}
    assert {run.info.status for run in runs} == {"FINISHED"}


def tags_in(journal: Journal) -> dict[str, str]:
    return {
        key: value for record, _ in journal.read() if record["op"] == "tags" for key, value in record["values"].items()
    }


def test_what_is_recorded_is_told_to_the_run(tmp_path: Path) -> None:
    """Tags too, by which runs are filtered and verdicts compared."""
    recording = Recording(tmp_path)
    recording.tags({"downstream.verdict.a": "better"})
    recording.parameters({"step": 3}, "ckpt.")
    recording.describe("Scores")
    recording.note("a note")
    journal = Journal(tmp_path / "x.jsonl")
    replay(recording.calls, JournalRun.begin(journal), tmp_path)
    assert tags_in(journal) == {"downstream.verdict.a": "better", NOTE: "Scores\n\n- a note"}
    assert [record["values"] for record, _ in journal.read() if record["op"] == "parameters"] == [{"ckpt.step": "3"}]
    with pytest.raises(ValueError, match="a recording has no call 'tag'"):
        replay([["tag", {}]], NullTracker(), tmp_path)


def test_notes_stay_below_a_description_that_comes_later(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "x.jsonl")
    run = JournalRun.begin(journal)
    run.note("no model is logged")
    assert tags_in(journal)[NOTE] == "- no model is logged"
    run.describe("Scores")
    assert tags_in(journal)[NOTE] == "Scores\n\n- no model is logged"


class Here:
    """An engine whose other process is this one."""

    def host(self, make: Callable[[], Any]) -> Any:
        self.made = make()
        return self

    def ask(self, question: Callable[..., Any], *arguments: Any) -> Any:
        return question(self.made, *arguments)


def test_tags_name_the_encoder_that_is_elsewhere() -> None:
    def make() -> CustomEncoder:
        return CustomEncoder.from_object(FakeEncoder(), torch.device("cpu"))

    engine: Any = Here()
    assert tags_of(RemoteEncoder(engine, make), 3) == tags_of(make(), 3)
    assert tags_of(make(), 3)["downstream.encoder"] == "FakeEncoder"
