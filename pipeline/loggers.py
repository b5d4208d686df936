"""A Lightning logger for MLflow that never holds up a training: down, slow or gone, the server is told later."""

from __future__ import annotations

import time
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.lightning import pl
from pipeline.tracking.journal import JournalRun, clean
from pipeline.tracking.runs import OpenRun

MOMENT = 0.2  # seconds that `finalize` waits for what is on its way; the end of the program waits longer
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
        """Names the run; it is begun when the first thing is logged.

        Args:
            run_name: by default the beginning of the run's key.
            experiment_name: by default the one in MLflow's own variables, or the default one.
            tracking_uri: server or database; by default the one in force.
            run_id: of a run on the server that is to be written to; it is not ended here.
            journal: the file; by default a new one in the folder `mlflow-journal`, removed when everything has arrived.
            run: one that is begun already; it is not ended here, and all of the above is left out.
        """
        super().__init__()
        self._what = {"name": run_name, "run_id": run_id}
        if experiment_name:
            self._what["experiment"] = {"name": experiment_name}  # type: ignore[assignment]
        self._uri = tracking_uri or ""
        self._journal = journal
        self._own = run is None and run_id is None
        self._run = run
        self._opened: OpenRun | None = None

    @property
    def experiment(self) -> JournalRun | None:
        """The run, on rank 0; None on the others."""
        if getattr(rank_zero_only, "rank", 0) == 0 and self._run is None:
            new = Path("mlflow-journal") / f"{time.strftime('%Y%m%d-%H%M%S')}-{id(self):x}.jsonl"
            path = Path(self._journal) if self._journal else new
            self._opened = OpenRun(path, self._uri, self._journal is None, **self._what)
            self._run = self._opened.run
        return self._run

    @property
    def name(self) -> str:
        """Of the folder of Lightning's checkpoints, where none is given."""
        return "mlflow-journal"

    @property
    def version(self) -> str:
        """The beginning of the run's key."""
        return self.experiment.key[:8] if self.experiment else ""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Numbers at a step."""
        assert self.experiment is not None
        self.experiment.metrics({clean(name): float(value) for name, value in metrics.items()}, step or 0)

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *_args: Any, **_options: Any) -> None:
        """Settings of the training, nested ones as `a.b`."""
        assert self.experiment is not None
        self.experiment.parameters(vars(params) if isinstance(params, Namespace) else dict(params), "")

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Ends the run, if it was begun here."""
        if self._run is None:
            return
        if self._own:
            self._run.end({"success": "FINISHED", "finished": "FINISHED"}.get(status, "FAILED"))
        if self._opened:
            self._opened.sender.settle(MOMENT)
