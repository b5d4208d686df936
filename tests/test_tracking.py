"""Several processes, one tracking database."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from mlflow import MlflowClient

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
