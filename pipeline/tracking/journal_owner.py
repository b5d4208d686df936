"""Which program writes a journal, and whether it still runs.

A lock tells, which the system releases when its holder dies. A process id does not, where two containers share a host
name but not their processes.
"""

from __future__ import annotations

import re
import shutil
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

HOST = "pipeline.host"
KEY = "pipeline.journal"  # the tag that holds a run's key in the journal
WRITER = "pipeline.writer"  # the tag that names the journal whose lock a run's program holds
FILES = re.compile(r"(.+?)\.(jsonl|files|sent|sent\.tmp|lock|writer\.lock)")  # that belong to a journal
PATIENCE = 5.0  # seconds; another program may be testing the lock


def writer_tags(journal: Path) -> dict[str, str]:
    """Tags by which another program finds the lock of the program that writes a journal."""
    return {HOST: socket.gethostname(), WRITER: str(journal.absolute())}


def is_original(journal: Path, head: Mapping[str, Any]) -> bool:
    """Whether a journal is the file that its program writes, and no copy, whose lock is not the program's."""
    tags = head.get("tags") or {}
    writer = Path(tags.get(WRITER) or ".")
    same = (writer.parent.resolve(), writer.name) == (journal.parent.resolve(), journal.name)
    return same and tags.get(HOST) == socket.gethostname()


def lock_path(journal: Path) -> Path:
    """The file of the lock that a program holds while it writes a journal."""
    return journal.with_suffix(".writer.lock")


def writer_lock(journal: Path) -> FileLock:
    """The lock itself. A process has a single one for each journal, since it may open a journal twice."""
    return FileLock(lock_path(journal), timeout=PATIENCE, thread_local=False, is_singleton=True)


@contextmanager
def deserted(journal: Path) -> Iterator[bool]:
    """Yields whether no running program writes a journal. If so, none can start to write it within the block."""
    lock = FileLock(lock_path(journal), timeout=0)
    try:
        lock.acquire()
    except (OSError, Timeout):
        yield False
        return
    try:
        yield True
    finally:
        if not journal.exists():
            lock_path(journal).unlink(missing_ok=True)
        lock.release()


def lives(journal: Path) -> bool:
    """Whether a journal's program may still run. A journal that is not here may be another container's."""
    if not journal.is_file():
        return True
    with deserted(journal) as gone:
        return not gone


def remove_journal(path: Path) -> None:
    """Removes a journal and its files, the writer's lock last: `journals_in` finds what a kill leaves."""
    shutil.rmtree(path.with_suffix(".files"), ignore_errors=True)
    others = [path.with_suffix(ending) for ending in (".sent.tmp", ".sent", ".lock")]
    for file in (path, *others, lock_path(path)):
        file.unlink(missing_ok=True)


def journals_in(folder: Path) -> list[Path]:
    """The journals in a folder, also those of which only some files are left."""
    matches = [FILES.fullmatch(path.name) for path in folder.glob("*")]
    return sorted({folder / f"{match[1]}.jsonl" for match in matches if match})
