"""Snapshots of a training's weights, and the results of their measurements, as files.

<output>/downstream/background-<training>/
config.yaml  worker.json    what the worker needs to know
progress.pt                 what changes were since, where the training was resumed
missed.json                 the steps that were dropped or skipped, or failed
step=<N>/                   whole, or not there; in done/ when the result has been logged
weights.ckpt              a checkpoint that describes itself, until it is measured
snapshot.json             step, training, tasks, digest of the configuration
claim                     a worker is at it
error                     why the worker could not measure it
result/                   whole, or not there: result.json, progress.pt, files/
best/                       the best measured snapshots
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.errors import CheckpointError

KEPT = 20  # results whose predictions stay, for a training that is resumed


@dataclass(frozen=True)
class Snapshot:
    """The folder of the weights at a step of the training."""

    folder: Path
    step: int

    @property
    def weights(self) -> Path:
        """The checkpoint."""
        return self.folder / "weights.ckpt"

    @property
    def manifest(self) -> Path:
        """What it is a snapshot of."""
        return self.folder / "snapshot.json"

    @property
    def claim(self) -> Path:
        """There from when a worker begins to measure; names its process and host."""
        return self.folder / "claim"

    @property
    def error(self) -> Path:
        """Why a worker could not measure it."""
        return self.folder / "error"

    @property
    def result(self) -> Path:
        """The folder of the result."""
        return self.folder / "result"

    def remove(self) -> None:
        """Removes it, all at once for whoever looks."""
        gone = self.folder.with_name(f"gone-{os.urandom(4).hex()}")
        try:
            self.folder.rename(gone)
        except FileNotFoundError:
            return
        shutil.rmtree(gone, ignore_errors=True)

    def strip(self) -> None:
        """Removes all but the numbers of the result, and what further changes are worked out from."""
        self.weights.unlink(missing_ok=True)
        for path in [self.result / "files", *self.folder.glob("draft-*")]:
            shutil.rmtree(path, ignore_errors=True)


class Snapshots:
    """The snapshots of one training."""

    def __init__(self, folder: Path) -> None:
        """In `folder`, which need not exist."""
        self.folder = folder

    def of(self, step: int) -> Snapshot:
        """The snapshot at a step that is not logged yet, whether or not there is one."""
        return Snapshot(self.folder / f"step={step}", step)

    def done(self, step: int) -> Snapshot:
        """The snapshot at a step whose result has been logged, whether or not there is one."""
        return Snapshot(self.folder / "done" / f"step={step}", step)

    def finish(self, snapshot: Snapshot) -> None:
        """Notes, at once, that the result has been logged. Raises OSError."""
        snapshot.strip()
        (self.folder / "done").mkdir(exist_ok=True)
        snapshot.folder.rename(self.done(snapshot.step).folder)

    def clear(self, last_step: int) -> None:
        """Removes those behind `last_step`, and what a killed training had half written or half removed."""
        for one in [*self.waiting(), *self.finished()]:
            if one.step > last_step:
                one.remove()
        for path in self.folder.glob("step=*"):
            if not Snapshot(path, 0).manifest.exists():  # it would be in the way of another one
                shutil.rmtree(path, ignore_errors=True)
        for pattern in ("draft-*", "gone-*", "done/gone-*"):
            for path in self.folder.glob(pattern):
                shutil.rmtree(path, ignore_errors=True)

    def miss(self, step: int) -> None:
        """Notes that a step is not measured, for the worker's curves."""
        with suppress(OSError):
            write_json(self.folder / "missed.json", [*self.missed(), step])

    def missed(self) -> list[int]:
        """The steps that are not measured, in the order in which that was known."""
        with suppress(OSError, ValueError):
            return list(json.loads((self.folder / "missed.json").read_text(encoding="utf-8")))
        return []

    def waiting(self) -> list[Snapshot]:
        """Those that are not logged yet, in the order of their steps."""
        return _found(self.folder)

    def finished(self) -> list[Snapshot]:
        """Those whose results have been logged, in the order of their steps."""
        return _found(self.folder / "done")

    def write(self, step: int, content: Mapping[str, Any], manifest: Mapping[str, Any]) -> Snapshot:
        """Writes the weights, whole or not at all.

        Args:
            step: of the training.
            content: the checkpoint; the tensors of its `state_dict` are copied to the CPU first.
            manifest: what it is a snapshot of.

        Raises:
            CheckpointError: it cannot be written.
        """
        made = self.of(step)
        draft = Snapshot(self.folder / f"draft-{step}-{os.urandom(4).hex()}", step)
        try:
            draft.folder.mkdir()
            copied = {**content, "state_dict": on_cpu(content["state_dict"])}
            synced(draft.weights, lambda path: torch.save(copied, path))
            write_json(draft.manifest, manifest)
            draft.folder.rename(made.folder)
            with suppress(OSError):  # some systems do not open folders
                _sync(self.folder)
        except (OSError, RuntimeError) as error:
            shutil.rmtree(draft.folder, ignore_errors=True)
            raise unwritable(made.folder, error) from error
        return made

    def progress_before(self, step: int) -> Path | None:
        """What the changes of a measurement at `step` are worked out from; None for the first."""
        results = sorted([*self.waiting(), *self.finished()], key=lambda one: one.step)
        earlier = [one.result / "progress.pt" for one in results if one.step < step]
        found = [path for path in [self.folder / "progress.pt", *earlier] if path.exists()]
        return found[-1] if found else None


def _found(folder: Path) -> list[Snapshot]:
    steps = [int(name[1]) for path in folder.glob("step=*") if (name := re.fullmatch(r"step=(\d+)", path.name))]
    every = [Snapshot(folder / f"step={step}", step) for step in sorted(steps)]
    return [one for one in every if one.manifest.exists()]


def on_cpu(state: Mapping[str, Any]) -> dict[str, Any]:
    """The weights of the moment, copied to the CPU; those that share memory do so afterwards."""
    copies: dict[Any, Tensor] = {}

    def copied(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        key = (value.device, value.data_ptr(), value.dtype, value.shape, value.stride())
        if key not in copies:
            copies[key] = value.detach().to("cpu", copy=True)
        return copies[key]

    return {name: copied(value) for name, value in state.items()}


def unwritable(path: Path, error: Exception) -> CheckpointError:
    """What to raise where a file of the snapshots cannot be written."""
    remedy = "make room, or set the folder of the training's output"
    return CheckpointError(f"background: '{path}' cannot be written ({error}); {remedy}")


def write_json(path: Path, content: Any) -> None:
    """Writes a JSON file, whole or not at all. Raises OSError."""
    temporary = path.with_name(f"{path.name}.tmp")
    synced(temporary, lambda place: place.write_text(json.dumps(content), encoding="utf-8"))
    temporary.replace(path)


def synced(path: Path, write: Callable[[Path], Any]) -> None:
    """Calls `write`, and waits until the file is on the disk."""
    write(path)
    _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
