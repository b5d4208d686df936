"""Which program writes a journal, so that another can see whether it lives.

That is known by a lock, which the system gives back when its holder dies. A process id says nothing where two
containers share a name but not their processes.
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
PARTS = re.compile(r"(.+?)\.(jsonl|files|sent|sent\.tmp|lock|writer\.lock)")  # of a journal
PATIENCE = 5.0  # seconds; another program may be looking whether the writer lives


def writer_tags(journal: Path) -> dict[str, str]:
    """Tags that name the program which writes a journal, so that another can see whether it lives."""
    return {HOST: socket.gethostname(), WRITER: str(journal.absolute())}


def is_original(journal: Path, head: Mapping[str, Any]) -> bool:
    """Whether a journal is the very file that its program writes: beside a copy, the lock is not that program's."""
    tags = head.get("tags") or {}
    writer = Path(tags.get(WRITER) or ".")
    same = (writer.parent.resolve(), writer.name) == (journal.parent.resolve(), journal.name)
    return same and tags.get(HOST) == socket.gethostname()


def lock_path(journal: Path) -> Path:
    """The lock that is held by the program which writes a journal, as long as it lives."""
    return journal.with_suffix(".writer.lock")


def writer_lock(journal: Path) -> FileLock:
    """The same, to be held. There is one in a process, since a journal may be opened twice in it."""
    return FileLock(lock_path(journal), timeout=PATIENCE, thread_local=False, is_singleton=True)


@contextmanager
def deserted(journal: Path) -> Iterator[bool]:
    """Whether no living program writes a journal; where that is so, none begins to before the end."""
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
    """Whether a journal's program may live: one whose journal is not here may be in another container."""
    if not journal.is_file():
        return True
    with deserted(journal) as gone:
        return not gone


def remove_journal(path: Path) -> None:
    """Removes a journal and what belongs to it, the writer's lock last: `journals_in` finds what a kill leaves."""
    shutil.rmtree(path.with_suffix(".files"), ignore_errors=True)
    beside = [path.with_suffix(ending) for ending in (".sent.tmp", ".sent", ".lock")]
    for one in (path, *beside, lock_path(path)):
        one.unlink(missing_ok=True)


def journals_in(folder: Path) -> list[Path]:
    """The journals in a folder, and those of which only a part is there."""
    parts = [PARTS.fullmatch(path.name) for path in folder.glob("*")]
    return sorted({folder / f"{part[1]}.jsonl" for part in parts if part})
