"""Folders that live as long as a measurement does, also when the process is killed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from pipeline.store import writing


@contextmanager
def temporary_folder(parent: Path) -> Iterator[Path]:
    """A new folder in `parent`, gone afterwards. One that a killed process left goes when the next is made.

    Raises:
        CacheError: it cannot be made.
    """
    with writing(parent):
        parent.mkdir(parents=True, exist_ok=True)
        for lock in parent.glob("*.lock"):
            _remove_abandoned(lock)
        name = f"{os.getpid()}-{os.urandom(4).hex()}"
        held = FileLock(parent / f"{name}.lock")
        held.acquire()
        (parent / name).mkdir()
    try:
        yield parent / name
    finally:
        shutil.rmtree(parent / name, ignore_errors=True)
        held.release()
        (parent / f"{name}.lock").unlink(missing_ok=True)


def _remove_abandoned(path: Path) -> None:
    """Removes the folder that a lock stands for, unless a process holds it: the system frees those of dead ones."""
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return
    shutil.rmtree(path.with_suffix(""), ignore_errors=True)
    path.unlink(missing_ok=True)
    lock.release()
