"""Where the project is, and what a fresh interpreter loads of it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def loaded_after(code: str) -> set[str]:
    """The top-level modules that are loaded in a fresh interpreter after running `code`."""
    script = f"{code}\nimport sys; print(*sorted({{name.split('.')[0] for name in sys.modules}}))"
    run = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(run.stdout.split("\n")[-2].split())


def run_two_ranks(
    module: str, arguments: Sequence[str], folder: Path, wait_for: Sequence[int] = (0, 1), **variables: object
) -> list[int | None]:
    """See `run_ranks`."""
    return run_ranks(2, module, arguments, folder, wait_for, **variables)


def seen_by_ranks(count: int, module: str, folder: Path, *arguments: object) -> list[Any]:
    """What each of some ranks wrote, to `rank-N.json` in `folder`, see `run_ranks`; they log to a database there."""
    tracking = f"sqlite:///{folder}/mlflow.db"
    words = [str(one) for one in (folder, *arguments)]
    run_ranks(count, module, words, folder, range(count), MLFLOW_TRACKING_URI=tracking)
    files = [folder / f"rank-{rank}.json" for rank in range(count)]
    assert all(file.exists() for file in files), "".join(log.read_text()[-3000:] for log in folder.glob("*.log"))
    return [json.loads(file.read_text()) for file in files]


def alike(ranks: Sequence[Any], case: str) -> Any:
    """What all ranks saw alike in a case."""
    first, *others = (rank[case] for rank in ranks)
    assert all(other == first for other in others)
    return first


def run_ranks(
    count: int, module: str, arguments: Sequence[str], folder: Path, wait_for: Sequence[int], **variables: object
) -> list[int | None]:
    """Runs a module as ranks on this machine, of one thread each; what they print goes to `rank-N.log` in `folder`.

    All end when those of `wait_for` do, at the latest after 400 s. Returns the exit code of each.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = []
    for rank in range(count):
        own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        own |= {"TORCHELASTIC_RUN_ID": "x", "GROUP_RANK": 0, "LOCAL_WORLD_SIZE": count, "OMP_NUM_THREADS": 1}
        own |= {"PYTHONHASHSEED": 0, **variables}
        environment = {**os.environ, **{key: str(value) for key, value in own.items()}}
        with (folder / f"rank-{rank}.log").open("w") as log:
            command = [sys.executable, "-m", module, *arguments]
            ranks.append(subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log))
    try:
        for rank in wait_for:
            ranks[rank].wait(400)
    finally:
        for one in ranks:
            one.kill()
            one.wait()
    return [one.returncode for one in ranks]
