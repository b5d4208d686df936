"""`ModelCheckpoint` and `EarlyStopping` for downstream metrics: they act once on each measurement.

Lightning's own keep the last value of a metric. Where a validation is not measured (`every_n_validations`, or a
measurement that failed), they would save a checkpoint under an old score, or count it against the patience. Where the
metric was never measured, they would end the training. A warning says so.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from pipeline.config.background import late_monitor
from pipeline.config.schema import Config
from pipeline.errors import ConfigError
from pipeline.tracking.mirrors import is_kind
from pipeline.training.lightning_package import pl

if TYPE_CHECKING:
    from pipeline.training.lightning import DownstreamValidation

RULE = "names begin with the task's where dataset is a list"


class _Companion(pl.Callback):
    """Finds the `DownstreamValidation` that measures a metric, and asks it whether the metric is fresh."""

    _sources: tuple[DownstreamValidation, ...] = ()
    _warned = False

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Finds the callbacks that measure."""
        self._sources = tuple(found for found in trainer.callbacks if is_kind(found, "DownstreamValidation"))
        super().setup(trainer, pl_module, stage)

    def _source(self, name: str) -> DownstreamValidation | None:
        """The callback that measures the metric `name`; None for another metric."""
        return next((source for source in self._sources if source.config.has_metric(name)), None)

    def _is_fresh(self, trainer: Any, monitor: str) -> bool:
        """Whether the last validation measured the metric on the current weights; True for other metrics."""
        source = self._source(monitor)
        if source is None:
            return True
        if source.published and monitor not in source.published and not self._warned:
            self._warned = True
            known = ", ".join(sorted(source.published))
            pl.utilities.rank_zero_warn(f"{type(self).__name__}: '{monitor}' was not measured; known: {known}")
        return monitor in source.published and source.published_step == trainer.global_step


class DownstreamModelCheckpoint(_Companion, pl.callbacks.ModelCheckpoint):
    """`ModelCheckpoint` that saves under a downstream metric only where it was measured on these weights.

    `save_last` and checkpoints without a monitor are saved as always. The name of a downstream metric is written with
    `_` for `/` in file names, so that every checkpoint is a file of `dirpath`:
    `filename="{step}-{ss3/test_3state_accuracy:.3f}"` makes `step=300-ss3_test_3state_accuracy=0.688.ckpt`, where
    Lightning's own makes a folder `step=300-ss3`.
    """

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        """As Lightning's, for a fresh metric."""
        with self._only_if_fresh(trainer):
            super().on_train_batch_end(trainer, *args)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """As Lightning's, for a fresh metric."""
        with self._only_if_fresh(trainer):
            super().on_train_epoch_end(trainer, pl_module)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """As Lightning's, for a fresh metric."""
        with self._only_if_fresh(trainer):
            super().on_validation_end(trainer, pl_module)

    def format_checkpoint_name(
        self, metrics: Mapping[str, Any], filename: str | None = None, *args: Any, **options: Any
    ) -> str:
        """As Lightning's, with `_` for the `/` of downstream metrics."""
        shown = re.sub(r"(?<=\{)[^}:]*", lambda name: self._flat(name[0]), filename or self.filename or "")
        flat = {self._flat(name): value for name, value in metrics.items()}
        return super().format_checkpoint_name(flat, shown or None, *args, **options)

    def _flat(self, name: str) -> str:
        return name.replace("/", "_") if self._source(name) else name

    @contextmanager
    def _only_if_fresh(self, trainer: Any) -> Iterator[None]:
        """Within, nothing is saved under an old value: `save_top_k` 0 leaves `save_last` alone."""
        top_k = self.save_top_k
        if self.monitor is not None and not self._is_fresh(trainer, self.monitor):
            self.save_top_k = 0
        try:
            yield
        finally:
            self.save_top_k = top_k


class DownstreamEarlyStopping(_Companion, pl.callbacks.EarlyStopping):
    """`EarlyStopping` whose patience counts measurements, not validations."""

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """As Lightning's, for a fresh metric."""
        if self._is_fresh(trainer, self.monitor):
            super().on_train_epoch_end(trainer, pl_module)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """As Lightning's, for a fresh metric."""
        if self._is_fresh(trainer, self.monitor):
            super().on_validation_end(trainer, pl_module)


def refuse_monitors(callbacks: Sequence[Any], config: Config) -> None:
    """Raises ConfigError where a callback goes by a downstream metric that comes later than the weights it is of."""
    for callback in callbacks:
        monitor = getattr(callback, "monitor", None) or ""
        if config.has_metric(monitor):
            raise ConfigError(late_monitor(f"{type(callback).__name__}(monitor='{monitor}')"))


def warn_of_monitors(callbacks: Sequence[Any], config: Config) -> None:
    """Warns where a monitored name lacks the task's, a value would be stale, or a file name would make folders."""
    for callback in callbacks:
        kind, monitor = type(callback).__name__, getattr(callback, "monitor", None) or ""
        short = monitor.rpartition("/")[2]
        meant = [metric.key for metric in config.metrics if metric.short == short]
        if meant and not config.has_metric(monitor):
            pl.utilities.rank_zero_warn(f"{kind}: no metric '{monitor}' is measured, but '{meant[0]}': {RULE}")
        may_be_stale = config.every_n_validations > 1 and kind in ("ModelCheckpoint", "EarlyStopping")
        if may_be_stale and config.has_metric(monitor):
            pl.utilities.rank_zero_warn(
                f"{kind}(monitor='{monitor}') acts on old values where every_n_validations skips a validation; "
                f"use pipeline.Downstream{kind} in its place"
            )
        _warn_of_folders(callback, config)


def _warn_of_folders(callback: Any, config: Config) -> None:
    """Warns of a `ModelCheckpoint` that puts the `/` of a metric's name into the names of its files."""
    inserts = getattr(callback, "auto_insert_metric_name", False)
    ours = isinstance(callback, DownstreamModelCheckpoint)
    shown = re.findall(r"\{([^}:]*)", (inserts and not ours and callback.filename) or "")
    folders = [name for name in shown if "/" in name and config.has_metric(name)]
    if folders:
        pl.utilities.rank_zero_warn(
            f"{type(callback).__name__}(filename='{callback.filename}') makes a folder per checkpoint: Lightning "
            f"writes the name {folders[0]}, with its '/', before the value; pass auto_insert_metric_name=False, "
            "or use pipeline.DownstreamModelCheckpoint in its place"
        )
