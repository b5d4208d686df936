"""The best measured snapshots of a training, kept as checkpoints."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from pipeline.config.schema import Config
from pipeline.statistics.metrics import lower_is_better
from pipeline.training.snapshots import Snapshot, write_json


@dataclass(frozen=True)
class Kept:
    """The metric of a snapshot, with the ends of its interval, where it has one."""

    step: int
    value: float
    low: float | None
    high: float | None

    @property
    def text(self) -> str:
        """`step=30 (0.8120, interval 0.780 to 0.840)`."""
        interval = "" if self.low is None else f", interval {self.low:.3f} to {self.high:.3f}"
        return f"step={self.step} ({self.value:.4f}{interval})"

    def overlaps(self, other: Kept) -> bool:
        """Whether the intervals have a number in common."""
        if self.low is None or self.high is None or other.low is None or other.high is None:
            return self.value == other.value
        return self.low <= other.high and other.low <= self.high


class Best:
    """Keeps the best snapshots as `step=<N>.ckpt` in a folder; which they are, and their metric, in `kept.json`."""

    def __init__(self, folder: Path, config: Config) -> None:
        """Of as many, and by the metric, that the configuration says."""
        self.folder, self.count = folder, config.background.keep_best
        self.metric = config.background.keep_best_metric or config.headlines[0]
        self._sign = 1 if lower_is_better(self.metric) else -1

    def offer(self, snapshot: Snapshot, metrics: Mapping[str, float]) -> str:
        """Keeps a measured snapshot if it is among the best; the one that it displaces goes. Offered twice, it is once.

        Of equal ones the earlier stays.

        Returns:
            What was decided, and whether the intervals bear it out; empty where none are to be kept.

        Raises:
            OSError: the checkpoint cannot be moved.
        """
        if self.count == 0:
            return ""
        if self.metric not in metrics:
            return f"keep_best: step={snapshot.step} is not kept: {self.metric} is not defined there"
        ends = (metrics.get(f"{self.metric}_ci_{end}") for end in ("low", "high"))
        new = Kept(snapshot.step, metrics[self.metric], *ends)
        ranked = [*(one for one in self.kept if one.step != new.step), new]
        ranked.sort(key=lambda one: (self._sign * one.value, one.step))
        kept, out = ranked[: self.count], ranked[self.count :]
        if new in kept:
            self._take(snapshot)
        self._note(kept)
        for path in self.folder.glob("step=*.ckpt"):
            if path not in [self.path(one.step) for one in kept]:
                path.unlink()
        return self._words(new, kept, out)

    def go_back(self, last_step: int) -> None:
        """Forgets snapshots behind `last_step`, which a resumed training makes anew. Raises OSError."""
        kept = self.kept
        gone = [one for one in kept if one.step > last_step]
        if gone:
            self._note([one for one in kept if one not in gone])
        for one in gone:
            self.path(one.step).unlink(missing_ok=True)

    def path(self, step: int) -> Path:
        """The checkpoint of a step."""
        return self.folder / f"step={step}.ckpt"

    @property
    def kept(self) -> list[Kept]:
        """The best first."""
        try:
            return [Kept(**one) for one in json.loads((self.folder / "kept.json").read_text(encoding="utf-8"))]
        except OSError:
            return []

    def _note(self, kept: list[Kept]) -> None:
        write_json(self.folder / "kept.json", [asdict(one) for one in kept])

    def _take(self, snapshot: Snapshot) -> None:
        self.folder.mkdir(exist_ok=True)
        if snapshot.weights.exists():  # else it was moved before an interruption
            snapshot.weights.replace(self.path(snapshot.step))

    def _words(self, new: Kept, kept: list[Kept], out: list[Kept]) -> str:
        if not out:
            return f"keep_best: {new.text} is kept, by {self.metric}: {self.path(new.step)}"
        other = kept[-1] if new in out else out[0]
        tie = f"; their intervals do not tell it from step={other.step}" if new.overlaps(other) else ""
        if new in out:
            return f"keep_best: {new.text} is not kept, by {self.metric}: {other.text} is better{tie}"
        gone = ", ".join(one.text for one in out)  # several, where `keep_best` is less than before an interruption
        return f"keep_best: {new.text} is kept, by {self.metric}, in the place of {gone}{tie}"
