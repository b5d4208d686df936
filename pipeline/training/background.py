"""Measurements that a training does not wait for: rank 0 writes snapshots, a worker measures, rank 0 logs results."""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from pipeline.config.schema import Config
from pipeline.encoders.description import DESCRIPTION
from pipeline.report.tables import Table
from pipeline.tracking.protocol import attempt
from pipeline.tracking.recording import replay
from pipeline.training.best import Best
from pipeline.training.host import Host
from pipeline.training.instructions import instruct, manifest_of, read_json, read_result
from pipeline.training.progress import Progress
from pipeline.training.snapshots import KEPT, Snapshot, Snapshots, synced, write_json
from pipeline.training.worker_process import Command, OwnWorker, Workers

PAUSE = 0.05  # seconds between two looks for a result, where the training waits

if TYPE_CHECKING:
    from pipeline.training.measurement import Measurement


@dataclass(frozen=True)
class Arrival:
    """A measurement that has come back.

    Attributes:
        step: of the snapshot.
        metrics: by name; none where the snapshot was dropped or skipped, or failed.
        seconds: that the worker took.
        waited: seconds that the training took for the snapshot, and for the result.
        is_new: False where it was logged before an interruption already.
    """

    step: int
    metrics: dict[str, float]
    seconds: float
    waited: float
    is_new: bool = True


class Background:
    """The snapshots of a training on rank 0. No call waits for a worker, but for `drain`, and with `when_busy: wait`.

    Attributes:
        pending: the steps of the snapshots that are not measured yet; the first is being measured, or is next.
        skipped: whether the last snapshot that was due was left out, because the worker was busy.
        failures: what became of measurements that failed twice.
    """

    def __init__(self, config: Config, work: Measurement) -> None:
        """Nothing is written yet, and no worker started."""
        self.config, self.work = config, work
        self.pending: list[int] = []
        self.skipped = False
        self.failures: list[str] = []
        self._failed: dict[int, int] = {}  # attempts, by step
        self._arrivals: list[Arrival] = []
        self._waited: dict[int, float] = {}
        self._taken: list[int] = []  # steps whose predictions stay
        self._place(os.urandom(4).hex())

    def hand_over(self, module: nn.Module, step: int, last: bool = False) -> None:
        """Writes the weights of the moment for the worker; a step is taken once.

        Args:
            module: the module in training.
            step: of the training.
            last: the worker being busy is no reason to leave it out.

        Raises:
            CheckpointError: they cannot be written.
        """
        began, snapshot = time.perf_counter(), self.snapshots.of(step)
        self.poll()
        self.skipped = False
        known = snapshot.manifest.exists() or self.snapshots.done(step).manifest.exists()
        if known or not (last or self._has_room(step)):
            return
        content = self._host.checkpoint(module, step)
        if self.work.description is not None:
            content[DESCRIPTION] = self.work.description
        self._prepare_folder()
        self.snapshots.write(step, content, manifest_of(self.config, self.training, step))
        self.pending.append(step)
        self._call(snapshot)
        self._waited[step] = time.perf_counter() - began

    def poll(self) -> None:
        """Takes in what has been measured, and sees to a worker that failed. Cheap where nothing has changed."""
        while self.pending:
            snapshot = self.snapshots.of(self.pending[0])
            if snapshot.result.exists():
                self._take_in(snapshot)
                continue
            why = self._workers.trouble(snapshot)
            if not why or snapshot.result.exists():
                return
            self._see_to(snapshot, why)

    def arrivals(self) -> list[Arrival]:
        """What has come back since the last call, in the order of the steps."""
        found, self._arrivals = self._arrivals, []
        return found

    def drain(self, seconds: float, key: str) -> None:
        """Waits until everything is measured, at most so long, as the `key` has it; then says what is not."""
        if self.pending:
            self._host.say(f"downstream validation: waiting up to {seconds:g} s for {self._named(self.pending)}")
        self._wait(seconds, 0)
        if self.pending:
            files = ",".join(f"{self.snapshots.of(step).weights}" for step in self.pending)
            self._host.warn(
                f"downstream validation: {self._named(self.pending)} not measured after {seconds:g} s "
                f"({key}); resume the training, or measure: python -m pipeline main --ckpt {files}"
            )

    def close(self) -> None:
        """Ends the worker; what is not measured stays for a training that is resumed."""
        self._workers.stop()

    def state(self) -> dict[str, Any]:
        """What a resumed training needs: the name of the folder, and what is not measured."""
        return {"training": self.training, "pending": list(self.pending)}

    def progress_state(self) -> dict[str, Any] | None:
        """See `Progress.state`; None before the first result."""
        path = self.snapshots.folder / "progress.pt"
        if self._taken:
            path = self.snapshots.done(self._taken[-1]).result / "progress.pt"
        return torch.load(path, weights_only=True) if path.exists() else None

    def progress(self) -> Progress | None:
        """What the scores have changed by, up to the last result; None without any."""
        state = self.progress_state()
        if state is None:
            return None
        found = Progress.from_state(state)
        table = read_result(self.snapshots.done(self._taken[-1]).result)["overview"] if self._taken else None
        if table is not None:
            found.overview = Table(table["columns"], table["rows"], frozenset(table["left"]), table["title"])
        return found

    def resume(self, state: Mapping[str, Any], progress: Mapping[str, Any] | None, last_step: int | None) -> None:
        """Goes on with the snapshots of an interrupted training.

        Args:
            state: see `state`.
            progress: see `Progress.state`.
            last_step: the step of the last snapshot by then; later ones will be made again.
        """
        pending, last = sorted(map(int, state["pending"])), -1 if last_step is None else last_step
        if re.fullmatch("[0-9a-f]{8}", str(state["training"])):
            self._place(str(state["training"]))
        else:
            found = f"found {str(state['training'])[:80]!r}"
            self._host.warn(f"background: expected the name of a training, such as 0123abcd, {found}; one begins anew")
        self._prepare_folder()
        self.snapshots.clear(last)
        attempt("keep_best", lambda: self._best.go_back(last))
        earlier = self.snapshots.folder / "progress.pt"
        earlier.unlink(missing_ok=True)
        if progress is not None:
            synced(earlier, lambda path: torch.save(progress, path))
        for step in pending:
            self._requeue(self.snapshots.of(step))
        self.poll()

    def _requeue(self, snapshot: Snapshot) -> None:
        """Takes a snapshot of before the interruption in: logged, measured, or waiting."""
        step, done = snapshot.step, self.snapshots.done(snapshot.step)
        if done.manifest.exists():
            result = read_result(done.result)
            self._taken.append(step)
            self._arrivals.append(Arrival(step, result["metrics"], result["seconds"], 0.0, is_new=False))
            return
        if not snapshot.manifest.exists():
            self._host.warn(f"downstream validation: the snapshot of step {step} is gone, it is not measured")
            return
        self.pending.append(step)
        manifest = manifest_of(self.config, self.training, step)
        if read_json(snapshot.manifest) != manifest:
            shutil.rmtree(snapshot.result, ignore_errors=True)  # measured as another configuration says
            write_json(snapshot.manifest, manifest)
        for path in (snapshot.error, snapshot.claim):
            path.unlink(missing_ok=True)
        if not snapshot.result.exists():
            self._call(snapshot)

    def _place(self, training: str) -> None:
        """Keeps the snapshots in the folder of a training, which has a name of its own."""
        own = self.config.background
        self.training = training
        self.snapshots = Snapshots(self._host.folder.absolute() / "downstream" / f"background-{training}")
        self._workers: Workers = OwnWorker(self.snapshots.folder, self.config.timeout, own.worker_threads)
        if own.worker_command is not None:
            self._workers = Command(own.worker_command, self.snapshots.folder, self.config.timeout)
        self._best = Best(self.snapshots.folder / "best", self.config)
        self._is_prepared = False

    def _prepare_folder(self) -> None:
        """Writes what the worker needs to know, once."""
        if self._is_prepared:
            return
        instruct(self.snapshots.folder, self.config)
        self._is_prepared = True

    def _has_room(self, step: int) -> bool:
        """Whether one more may wait; makes room as `when_busy` says."""
        own, longest = self.config.background, self.config.timeout
        if own.when_busy == "wait":
            self._wait(longest, own.max_pending)
        while len(self.pending) > own.max_pending and own.when_busy == "drop_oldest":
            dropped = self.pending.pop(1)  # the first is being measured
            self.snapshots.of(dropped).remove()
            why = "the worker is busy (when_busy: drop_oldest)"
            self._host.say(f"downstream validation: the snapshot of step {dropped} is dropped, {why}")
            self.miss(dropped)
        self.skipped = len(self.pending) > own.max_pending
        if self.skipped:
            why = "skip" if own.when_busy == "skip" else f"wait; still after {longest:g} s, timeout"
            self._host.say(f"downstream validation: step {step} is skipped, the worker is busy (when_busy: {why})")
            self.miss(step)
        return not self.skipped

    def _wait(self, seconds: float, most: int) -> None:
        """Waits until at most so many are not measured, at most so long."""
        end = time.monotonic() + seconds
        self.poll()
        while len(self.pending) > most and time.monotonic() < end:
            time.sleep(PAUSE)
            self.poll()

    def _call(self, snapshot: Snapshot) -> None:
        try:
            self._workers.call(snapshot)
        except OSError as error:
            snapshot.error.write_text(f"the worker cannot be started: {error}", encoding="utf-8")

    def _take_in(self, snapshot: Snapshot) -> None:
        """Logs a result, and keeps what is needed of the snapshot."""
        began, step = time.perf_counter(), snapshot.step
        result = attempt("reading of a result", lambda: read_result(snapshot.result))
        if result is None:
            shutil.rmtree(snapshot.result, ignore_errors=True)
            self._see_to(snapshot, "its result cannot be read")
            return
        attempt("logging of a measurement", lambda: self._log(result, snapshot.result / "files"))
        said = attempt("keep_best", lambda: self._best.offer(snapshot, result["metrics"]))
        if said:
            self._host.say(said)
        attempt("keeping of a result", lambda: self.snapshots.finish(snapshot))
        self.pending.remove(step)
        self._taken.append(step)
        for old in self._taken[:-KEPT]:
            (self.snapshots.done(old).result / "progress.pt").unlink(missing_ok=True)
        self._taken = self._taken[-KEPT:]
        waited = self._waited.pop(step, 0.0) + time.perf_counter() - began
        self._arrivals.append(Arrival(step, result["metrics"], result["seconds"], waited))

    def _log(self, result: Mapping[str, Any], files: Path) -> None:
        self.work.warn_once(result["warnings"])
        with self.work.trackers(result["step"], result["digest"], result["source"], result["time"]) as (run, mirrors):
            replay(result["run"], run, files)
            replay(result["mirrors"], mirrors, files)
        self.work.tell(result["start"], result.get("verdicts", {}))

    def _see_to(self, snapshot: Snapshot, why: str) -> None:
        """Has a snapshot measured once more, or gives it up."""
        step = snapshot.step
        self._failed[step] = self._failed.get(step, 0) + 1
        for path in (snapshot.error, snapshot.claim):
            path.unlink(missing_ok=True)
        if self._failed[step] == 1:
            self._host.warn(f"downstream validation failed at step {step}, it is tried once more: {why}")
            self._call(snapshot)
            return
        text = f"downstream validation failed at step {step}, training goes on: {why}"
        self._host.warn(text)
        self.work.tell_failure(step, why)
        self.failures.append(text)
        self.miss(step)
        self.pending.remove(step)
        snapshot.remove()
        for after in map(self.snapshots.of, self.pending[:1]):
            self._call(after)

    def miss(self, step: int) -> None:
        """Leaves a gap in the curves at a step that is not measured: here, and in what the worker draws."""
        self._arrivals.append(Arrival(step, {}, 0.0, 0.0))
        self.snapshots.miss(step)

    def _named(self, steps: list[int]) -> str:
        return f"step{'s' if len(steps) > 1 else ''} {', '.join(map(str, steps))}"

    @property
    def _host(self) -> Host:
        return self.work.host
