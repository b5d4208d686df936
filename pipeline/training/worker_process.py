"""Who measures the snapshots: a process beside the training, or what a command of the user's starts."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from pipeline.config.background import PLACE
from pipeline.training.snapshots import Snapshot

GRACE = 5.0  # seconds


class Workers(Protocol):
    """Has snapshots measured."""

    def call(self, snapshot: Snapshot) -> None:
        """Has somebody measure a snapshot, which is there. Raises OSError."""

    def trouble(self, snapshot: Snapshot) -> str:
        """Why the first snapshot that is not measured will not be; empty where it may yet be."""

    def stop(self) -> None:
        """Ends what is still at work, as far as it is here."""


class OwnWorker:
    """One process, which is started when it is needed first, and again when it has ended."""

    def __init__(self, folder: Path, timeout: float, threads: int | None) -> None:
        """For the snapshots in `folder`; `timeout` in seconds is how long one may take."""
        self.folder, self.timeout, self.threads = folder, timeout, threads
        self._process: subprocess.Popen[bytes] | None = None
        self._current: tuple[int, float] | None = None  # the first snapshot's step, and since when it is the first
        self._begun_for: int | None = None  # the step of the snapshot that the process was started for

    def call(self, snapshot: Snapshot) -> None:
        """See `Workers.call`."""
        if self._process is not None and self._process.poll() is None:
            return
        self._current, self._begun_for = None, snapshot.step
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path or str(Path.cwd()) for path in sys.path)}
        if self.threads:
            libraries = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
            environment |= dict.fromkeys(libraries, str(self.threads))
        command = [sys.executable, "-m", "pipeline", "worker", str(self.folder), "--parent", str(os.getpid())]
        with self._log.open("ab") as log:
            # A session of its own: Ctrl-C is for the training, which then ends the worker.
            self._process = subprocess.Popen(  # noqa: S603
                command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )

    def trouble(self, snapshot: Snapshot) -> str:
        """See `Workers.trouble`."""
        if self._process is None or self._process.poll() is not None:
            return self._why_ended(snapshot)
        if self._current is None or self._current[0] != snapshot.step:
            self._current = snapshot.step, time.monotonic()
        if time.monotonic() - self._current[1] <= self.timeout:
            return ""
        self.stop()
        return f"the worker gave no result in {self.timeout:g} s (timeout)"

    def stop(self) -> None:
        """See `Workers.stop`."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._process = self._current = None

    def _why_ended(self, snapshot: Snapshot) -> str:
        """See `trouble`. The end of a process that had not begun with the snapshot is no fault of it, but for once."""
        if why := _reason(snapshot):
            return why
        if self._process is not None and (snapshot.claim.exists() or snapshot.step == self._begun_for):
            return f"the worker ended with code {self._process.returncode}: {self._last_words()}"
        try:
            self.call(snapshot)
        except OSError as error:
            return f"the worker cannot be started: {error}"
        return ""

    @property
    def _log(self) -> Path:
        return self.folder / "worker.log"

    def _last_words(self) -> str:
        with suppress(OSError):
            lines = self._log.read_text(encoding="utf-8", errors="replace").splitlines()
            return next((line for line in reversed(lines) if line.strip()), "nothing in its log")[:500]
        return "no log"


class Command:
    """A command of the user's for each snapshot, such as one that submits a job."""

    def __init__(self, command: str, folder: Path, timeout: float) -> None:
        """See `OwnWorker`; the time counts from when a worker has begun with a snapshot."""
        self.words = [word.replace(PLACE, str(folder)) for word in shlex.split(command)]
        self.timeout = timeout
        self._processes: dict[int, subprocess.Popen[bytes]] = {}  # the last of each step
        self._running: list[subprocess.Popen[bytes]] = []
        self._begun: dict[int, float] = {}

    def call(self, snapshot: Snapshot) -> None:
        """See `Workers.call`."""
        self._begun.pop(snapshot.step, None)
        process = subprocess.Popen(self.words, stdin=subprocess.DEVNULL, start_new_session=True)  # noqa: S603
        self._processes[snapshot.step] = process
        self._running = [process, *(one for one in self._running if one.poll() is None)]

    def trouble(self, snapshot: Snapshot) -> str:
        """See `Workers.trouble`."""
        process = self._processes.get(snapshot.step)
        code = process.poll() if process else None
        failed = f"'{shlex.join(self.words)}' ended with code {code}" if code else ""
        if why := _reason(snapshot) or failed:
            return why
        if snapshot.claim.exists():
            began = self._begun.setdefault(snapshot.step, time.monotonic())
            if time.monotonic() - began > self.timeout:
                return f"the worker gave no result in {self.timeout:g} s (timeout)"
        return ""

    def stop(self) -> None:
        """See `Workers.stop`: what was submitted goes on; a command that is about to end is waited for."""
        end = time.monotonic() + GRACE
        for process in self._running:
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, end - time.monotonic()))


def _reason(snapshot: Snapshot) -> str:
    """What a worker has written of its failure."""
    try:
        return " ".join(snapshot.error.read_text(encoding="utf-8").split())
    except OSError:
        return ""
