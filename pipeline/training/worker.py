"""The process that measures the snapshots of a training, see `python -m pipeline worker`."""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from pipeline.checkpoints.opening import open_encoder
from pipeline.config.yaml_file import read_config
from pipeline.encoders.options import EncoderOptions
from pipeline.errors import ConfigError
from pipeline.load import Examples, load_all
from pipeline.store.temporary import host_mark
from pipeline.tracking.recording import Recording
from pipeline.training.progress import Progress
from pipeline.training.sharing import measured
from pipeline.training.snapshots import Snapshot, Snapshots, synced, write_json

PAUSE = 0.1  # seconds between two looks for a snapshot
logger = logging.getLogger("pipeline")


class Worker:
    """Measures snapshots, one after another, in the order of their steps."""

    def __init__(self, folder: Path) -> None:
        """Reads how to measure the snapshots in `folder`. Raises ConfigError."""
        try:
            told = json.loads((folder / "worker.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            expected = f"worker: expected the folder of a training's snapshots, found '{folder}'"
            raise ConfigError(f"{expected} ({error}); the training names it in its log") from error
        self.snapshots = Snapshots(folder.absolute())
        with suppress(OSError):  # elsewhere there may be no such folder
            os.chdir(told["folder"])  # that relative paths in the configuration start from
        self.config = read_config(self.snapshots.folder / "config.yaml")
        own = self.config.background
        torch.set_num_threads(own.worker_threads or told["threads"])
        torch.set_float32_matmul_precision(told["matmul_precision"])
        # Unpickled as the configuration says: a snapshot may name classes of the training script, unknown here.
        self._options = replace(EncoderOptions.from_config(self.config), device=own.worker_device, compile=False)
        self._examples: list[Examples] = []
        self._limit: int | None = None
        self._progress: tuple[int, Progress] | None = None  # the step of the last measurement, and the changes up to it

    def run(self, parent: int | None = None) -> None:
        """Measures what there is; then ends, or waits for more as long as the process `parent` lives.

        Raises:
            Exception: whatever a measurement raised; the next worker tries it once more, if the training wants that.
        """
        if parent is not None:
            threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
        with FileLock(self.snapshots.folder / "worker.lock"):
            while True:
                snapshot = self._next()
                if snapshot is not None:
                    self._handle(snapshot)
                elif parent is None:
                    return
                else:
                    time.sleep(PAUSE)

    def _next(self) -> Snapshot | None:
        """The first snapshot that is not measured; None where the training has yet to say what becomes of a failure."""
        found = next((one for one in self.snapshots.waiting() if not one.result.exists()), None)
        return None if found is None or found.error.exists() else found

    def _handle(self, snapshot: Snapshot) -> None:
        try:
            snapshot.claim.write_text(f"{os.getpid()}{host_mark()}", encoding="utf-8")
            self._measure(snapshot)
        except Exception as error:
            if not snapshot.manifest.exists():  # dropped meanwhile
                return
            with suppress(OSError):
                snapshot.error.write_text(f"{type(error).__name__}: {error}", encoding="utf-8")
            raise

    def _measure(self, snapshot: Snapshot) -> None:
        """Measures a snapshot, and writes the result, whole or not at all."""
        began, step = time.perf_counter(), snapshot.step
        draft = snapshot.folder / f"draft-{os.urandom(4).hex()}"
        for made in (draft, draft / "files"):
            made.mkdir()  # without its parents: the training may have removed the snapshot
        encoder = open_encoder(str(snapshot.weights), self._options)
        if not self._examples or encoder.max_seq_length != self._limit:
            self._limit = encoder.max_seq_length
            self._examples = load_all(self.config.dataset, self._limit)
        progress = self._progress_before(step)
        run, mirrors, source = Recording(draft / "files"), Recording(draft / "files"), f"snapshot of step {step}"
        for missed in sorted(self.snapshots.missed()):
            if missed < step:
                progress.missed(missed)
        with _warnings() as said:
            metrics = measured(encoder, self.config, self._examples, progress, run, mirrors, source, step)
        content = {
            "step": step,
            "metrics": metrics,
            "digest": encoder.digest,
            "source": source,
            "run": run.calls,
            "mirrors": mirrors.calls,
            "warnings": said,
            "start": progress.start,
            "verdicts": progress.verdicts,
            "overview": _plain(progress),
            "seconds": time.perf_counter() - began,
            "time": int(time.time() * 1000),
        }
        synced(draft / "progress.pt", lambda path: torch.save(progress.state(), path))
        write_json(draft / "result.json", content)
        draft.rename(snapshot.result)
        self._progress = step, progress

    def _progress_before(self, step: int) -> Progress:
        """What the measurements before `step` have left; a training that is resumed may go back."""
        if self._progress is not None and self._progress[0] < step:
            return self._progress[1]
        path = self.snapshots.progress_before(step)
        return Progress() if path is None else Progress.from_state(torch.load(path, weights_only=True))


def _plain(progress: Progress) -> Mapping[str, Any] | None:
    """The table of the latest scores, as JSON has it."""
    table = progress.overview
    if table is None:
        return None
    rows = [list(row) for row in table.rows]
    return {"columns": list(table.columns), "rows": rows, "left": sorted(table.left), "title": table.title}


@contextmanager
def _warnings() -> Iterator[list[str]]:
    """The warnings that are logged within."""
    said: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger.addHandler(handler)
    try:
        yield said
    finally:
        logger.removeHandler(handler)


def _end_with(parent: int) -> None:
    """Ends this process when its parent is gone, also where that was killed."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)
