"""Temporary folders, which are removed even if the process is killed."""

from __future__ import annotations

import os
import re
import shutil
import socket
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from pipeline.errors import CacheError


def nearest(folder: Path) -> tuple[Path, bool]:
    """The folder, or what is there of those above it where it is yet to be made; and whether that can be written."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return there, there.is_dir() and os.access(there, os.W_OK)


@contextmanager
def temporary_folder(parent: Path | None = None) -> Iterator[Path]:
    """A new folder in `parent`, removed afterwards; the folders that killed processes of this host left go, too.

    Args:
        parent: by default, a folder of the user's own below `TMPDIR`.

    Raises:
        CacheError: it cannot be made.
    """
    setting, name = ("store" if parent else "TMPDIR"), f"{os.getpid()}-{os.urandom(4).hex()}{host_mark()}"
    try:
        parent = parent or _private_folder()
        parent.mkdir(parents=True, exist_ok=True)
        remove_abandoned(parent)
        lock = FileLock(parent / f"{name}.lock", thread_local=False)
        lock.acquire()
        (parent / name).mkdir(mode=0o700)
    except OSError as error:
        where = f"'{parent}' cannot be written" if parent else "there is no folder for temporary files"
        raise CacheError(f"{setting}: {where} ({error}); set {setting} to another folder") from error
    try:
        yield parent / name
    finally:
        shutil.rmtree(parent / name, ignore_errors=True)
        lock.release()
        (parent / f"{name}.lock").unlink(missing_ok=True)


def remove_abandoned(parent: Path) -> None:
    """Removes the folders that killed processes of this host left: the system has released their locks.

    Folders of another host stay: on a file system that does not share locks between hosts, theirs look free here.
    """
    for path in parent.glob(f"*{host_mark()}.lock"):
        with suppress(OSError, Timeout), FileLock(path, timeout=0):
            shutil.rmtree(path.with_suffix(""), ignore_errors=True)
            path.unlink(missing_ok=True)


def remove_left() -> None:
    """As `remove_abandoned`, in the user's own folder below `TMPDIR`."""
    remove_abandoned(_private_folder())


def link_folder(source: Path, target: Path) -> None:
    """Copies a folder; its files are hard links, where the file system has them, so that nothing is written twice.

    Raises:
        OSError: it cannot be written.
    """

    def link(old: str, new: str) -> None:
        try:
            os.link(old, new)
        except OSError:  # another file system, or one without links
            shutil.copyfile(old, new)

    shutil.copytree(source, target, copy_function=link)


def host_mark() -> str:
    """The end of the names of this host's files, in folders that several hosts may share."""
    return "@" + re.sub(r"[^\w.-]", "_", socket.gethostname())


def _private_folder() -> Path:
    """The user's own folder below `TMPDIR`, which no other user can read or has made."""
    user = os.getuid() if hasattr(os, "getuid") else ""
    folder = Path(tempfile.gettempdir()) / f"downstream-validation-{user}".rstrip("-")
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if user != "":
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != user:
            raise CacheError(f"TMPDIR: '{folder}' belongs to another user; set TMPDIR to another folder")
        if found.st_mode & 0o077:
            folder.chmod(0o700)
    return folder
