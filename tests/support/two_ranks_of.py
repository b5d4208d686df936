"""Starts a scenario of `tests.support.loops` on two ranks, as torchrun does."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.support.data import planted_task
from tests.support.programs import ROOT


def both_ranks(scenario: str, folder: Path, database: Path) -> list[Any]:
    """What each rank wrote."""
    planted_task(folder / "data")
    shutil.copy(database, folder / "mlflow.db")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = []
    for rank in range(2):
        own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        own |= {"LOCAL_WORLD_SIZE": 2, "OMP_NUM_THREADS": 1, "PYTHONHASHSEED": 0}
        own |= {"MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db"}
        environment = {**os.environ, **{key: str(value) for key, value in own.items()}}
        command = [sys.executable, "-m", "tests.support.loops", scenario, str(folder)]
        with (folder / f"rank-{rank}.log").open("w") as log:
            ranks.append(subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log))
    try:
        for one in ranks:
            one.wait(280)
    finally:
        for one in ranks:
            one.kill()
            one.wait()
    files = [folder / f"rank-{rank}.json" for rank in range(2)]
    logs = "".join((folder / f"rank-{rank}.log").read_text()[-3000:] for rank in range(2))
    assert all(file.exists() for file in files), logs
    return [json.loads(file.read_text()) for file in files]
