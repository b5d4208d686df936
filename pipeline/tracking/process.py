"""Which process a run belongs to, so that another can see whether it lives."""

from __future__ import annotations

import os
import socket
from pathlib import Path

PROCESS = "pipeline.process"
HOST = "pipeline.host"


def process_tags() -> dict[str, str]:
    """Tags that name this process, so that another can see whether it lives."""
    return {HOST: socket.gethostname(), PROCESS: f"{os.getpid()} {_started(os.getpid())}"}


def alive(process: str) -> bool:
    """Whether the process that a tag names is there."""
    if os.name == "nt":
        return True  # there is no asking without ending it
    pid, _, started = process.partition(" ")
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, ValueError):
        return False
    except PermissionError:
        pass
    return started in ("?", _started(int(pid)))


def _started(pid: int) -> str:
    """When a process started, in clock ticks since boot, so that a number used again is not taken for it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return "?"
