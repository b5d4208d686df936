"""The section `background` of the configuration: measurements that a training does not wait for."""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from dataclasses import dataclass

from pipeline.config.fields import DEVICES, check_choice, check_values, key, require
from pipeline.errors import nearest

WHEN_BUSY = ("drop_oldest", "skip", "wait")
PLACE = "{folder}"  # stands for the folder of the snapshots in `worker_command`


@dataclass
class Background:
    """How `mode: background` measures: by whom, how many snapshots may wait, and which of them stay."""

    worker_device: str = key("where the worker measures: `cpu`, `cuda:1`, ...", "cpu")
    worker_threads: int | None = key("threads of the worker; null: as many as the training has", least=1)
    worker_command: str | None = key(
        "a command that has a worker started elsewhere, for each snapshot, such as `sbatch measure.sh {folder}`, where "
        "the script runs `python -m pipeline worker` on that folder; null: one process beside the training"
    )
    max_pending: int = key("most snapshots that wait while one is measured", 1, least=1)
    when_busy: str = key(
        "where that many wait already: `drop_oldest` of them, `skip` the new one, or have a training of one process "
        "`wait`, no longer than `timeout`",
        "drop_oldest",
        choices=WHEN_BUSY,
    )
    drain_timeout: float = key("seconds that the end of the training waits for what is not measured yet", 1800.0)
    keep_best: int = key("how many of the best measured snapshots stay as checkpoints", 0, least=0)
    keep_best_metric: str | None = key("the metric they are judged by; null: the first main metric")

    def check(self, metrics: Iterable[str]) -> None:
        """Raises ConfigError for a value that is out of range, or a metric that is none of `metrics`."""
        check_values(self, "background.")
        check_choice("background.worker_device", self.worker_device.split(":")[0], DEVICES)
        wait = self.drain_timeout
        require(0 <= wait < 10**7, f"background.drain_timeout is {wait}, expected 0 to 10 million seconds")
        metric, known = self.keep_best_metric, list(metrics)
        found = f"background.keep_best_metric: '{metric}' is not measured"
        require(metric is None or metric in known, f"{found}{nearest(str(metric), known)}")
        if self.worker_command is not None:
            expected = f"background.worker_command: expected a command with {PLACE} in it"
            try:
                named = any(PLACE in word for word in shlex.split(self.worker_command))
            except ValueError as error:
                require(False, f"{expected}, found '{self.worker_command}' ({error})")
            require(named, f"{expected}, found '{self.worker_command}'")


def late_monitor(who: str) -> str:
    """Why something must not go by a metric that is measured in the background."""
    return (
        f"mode background: {who} would go by a score of earlier weights; set background.keep_best, which keeps "
        "the best measured snapshots, or mode: sharded"
    )
