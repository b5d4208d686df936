"""Measurements that two ranks share: to the last bit what one process measures."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from tests.support.programs import ROOT, run_two_ranks

PROGRAM = "tests.support.sharded_ranks"


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory, model_folder: Any) -> Any:
    """What one process saw, and each of two ranks."""
    both, alone, model = tmp_path_factory.mktemp("both"), tmp_path_factory.mktemp("alone"), str(model_folder("esm"))
    run_two_ranks(PROGRAM, [str(both), model], both, MLFLOW_TRACKING_URI=f"sqlite:///{both}/mlflow.db")
    tracking = {"MLFLOW_TRACKING_URI": f"sqlite:///{alone}/mlflow.db", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", PROGRAM, str(alone), model]
    run = subprocess.run(command, cwd=ROOT, env={**os.environ, **tracking}, capture_output=True, text=True, timeout=300)
    files = [alone / "rank-0.json", *(both / f"rank-{rank}.json" for rank in range(2))]
    logs = run.stderr[-3000:] + "".join(path.read_text()[-3000:] for path in both.glob("rank-*.log"))
    assert all(file.exists() for file in files), logs
    return [json.loads(file.read_text()) for file in files]


@pytest.mark.parametrize("case", ["esm", "own", "blocking"])
def test_the_metrics_of_two_ranks_are_those_of_one_process(case: str, found: Any) -> None:
    one, first, second = (seen[case] for seen in found)
    assert len(one) > 50
    assert first == one
    assert second == one


def test_so_are_the_embeddings(found: Any) -> None:
    one, first, _ = (seen["rows"] for seen in found)
    assert len(one) > 150
    assert first == one


def test_so_are_scores_and_predictions_without_a_common_file_system(found: Any) -> None:
    one, first, second = (seen["apart"] for seen in found)
    assert first == one
    assert second == one


def test_each_rank_keeps_buffers_of_its_own(found: Any) -> None:
    assert [seen["buffer"] for seen in found] == [[0.0] * 8, [0.0] * 8, [1.0] * 8]
