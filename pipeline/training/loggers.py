"""A Lightning logger for MLflow that never delays a training: a server that is down or slow is sent the rest later."""

from __future__ import annotations

import logging
from argparse import Namespace
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from pipeline.config.schema import Config
from pipeline.tracking.journal_run import JournalRun, clean
from pipeline.tracking.runs import OpenRun, journal_path
from pipeline.training.lightning_package import pl

logger = logging.getLogger(__name__)
rank_zero_only = pl.utilities.rank_zero_only


class JournalLogger(pl.loggers.Logger):  # type: ignore[name-defined,misc,unused-ignore]
    """Logs to MLflow by way of a journal: `Trainer(logger=JournalLogger(journal="out/journal.jsonl"))`.

    Each call writes a line to the journal; a thread sends it on. What has not arrived when the program ends is sent by
    `python -m pipeline replay JOURNAL`, once and only once. A training that is resumed with the same journal goes on
    with the same run. The downstream callback logs to the same run.
    """

    def __init__(
        self,
        run_name: str | None = None,
        experiment_name: str | None = None,
        tracking_uri: str | None = None,
        run_id: str | None = None,
        journal: str | Path | None = None,
        run: JournalRun | None = None,
    ) -> None:
        """Names the run, which begins when something is logged first.

        Args:
            run_name: by default the beginning of the run's key.
            experiment_name: by default that of MLflow's own variables, else MLflow's default experiment.
            tracking_uri: server or database; by default MLflow's current one.
            run_id: of a run on the server to write to; the logger does not end it.
            journal: the file, which stays; by default a new file in the default `store`, until all of it is sent.
            run: an open run to write to; the logger does not end it. The other arguments are not used then.
        """
        super().__init__()
        self._what = {"name": run_name, "run_id": run_id}
        if experiment_name:
            self._what["experiment"] = {"name": experiment_name}  # type: ignore[assignment]
        self._uri = tracking_uri or ""
        self._journal = journal
        self._run = run
        self._opened: OpenRun | None = None

    @cached_property
    def experiment(self) -> JournalRun | None:
        """The run, on rank 0; None on the others, and where no journal can be written."""
        if self._run is not None or getattr(rank_zero_only, "rank", 0) != 0:
            return self._run
        path = Path(self._journal or journal_path(Config(), str(self._what["name"] or "training")))
        try:
            self._opened = OpenRun(path, self._uri, self._journal is None, **self._what)
        except OSError as error:
            logger.warning("JournalLogger: '%s' cannot be written, nothing is logged: %s", path, error)
            return None
        return self._opened.run

    @property
    def name(self) -> str:
        """The folder of Lightning's checkpoints, where the user gives none."""
        return "journalled"

    @property
    def version(self) -> str:
        """The beginning of the run's key."""
        return self.experiment.key[:8] if self.experiment else ""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Logs numbers at a step."""
        numbers = {}
        for name, value in metrics.items():
            try:
                numbers[clean(name)] = float(value)
            except (TypeError, ValueError):
                logger.warning("JournalLogger: '%s' is not logged: expected a number, found %r", name, value)
        if self.experiment is not None:
            self.experiment.metrics(numbers, step or 0)

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *_args: Any, **_options: Any) -> None:
        """Logs the settings of the training, nested ones as `a.b`."""
        if self.experiment is not None:
            self.experiment.parameters(vars(params) if isinstance(params, Namespace) else dict(params), "")

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Ends the run, if the logger began it."""
        if self._opened is None:
            return
        if not self._what["run_id"]:
            self._opened.run.end("FINISHED" if status in ("success", "finished") else "FAILED")
        self._opened.sender.settle()
