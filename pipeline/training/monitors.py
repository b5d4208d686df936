"""Lightning's `ModelCheckpoint` and `EarlyStopping`, acting on fresh downstream metrics alone.

A trainer keeps a metric until it is logged again. Where a validation was not measured (`every_n_validations`, or a
measurement that failed), Lightning's own monitors would see the last value once more: save a checkpoint under a score
that is not its own, and use up patience. Where the metric was never there, they would end the training.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from pipeline.training.lightning import DownstreamValidation
from pipeline.training.lightning_package import pl


class _Fresh:
    """Knows whether a downstream metric was measured since it was last acted on."""

    _acted_on = 0
    _warned = False

    def _is_fresh(self, trainer: Any, monitor: str) -> bool:
        """True for metrics of other origin, and once for each measurement of the weights of this moment."""
        sources = [one for one in trainer.callbacks if isinstance(one, DownstreamValidation)]
        source = next((one for one in sources if one.has_metric(monitor)), None)
        if source is None:
            return True
        if source.published and monitor not in source.published_names and not self._warned:
            self._warned = True
            known = ", ".join(sorted(source.published_names))
            pl.utilities.rank_zero_warn(f"{type(self).__name__}: '{monitor}' was not measured; known: {known}")
        new = source.published > self._acted_on and source.published_step == trainer.global_step
        if not new or monitor not in source.published_names:
            return False
        self._acted_on = source.published
        return True


class DownstreamModelCheckpoint(_Fresh, pl.callbacks.ModelCheckpoint):
    """`ModelCheckpoint` that saves under a downstream metric only where it was measured on these weights.

    `save_last` and checkpoints without a monitor are saved as always. A metric that the file name shows is written with
    `_` for `/`, so that every checkpoint is a file of `dirpath`: `filename="{step}-{ss3/test_3state_accuracy:.3f}"`
    makes `step=300-ss3_test_3state_accuracy=0.688.ckpt`, where Lightning's own makes a folder `step=300-ss3`.
    """

    def format_checkpoint_name(
        self, metrics: Mapping[str, Any], filename: str | None = None, *args: Any, **options: Any
    ) -> str:
        """As Lightning's, for metrics whose names may hold a `/`."""
        shown = re.sub(r"\{[^}:]*", lambda name: _flat(name[0]), filename or self.filename or "")
        flat = {_flat(name): value for name, value in metrics.items()}
        return super().format_checkpoint_name(flat, shown or None, *args, **options)

    def _save_topk_checkpoint(self, trainer: pl.Trainer, monitor_candidates: dict[str, Any]) -> None:
        if self.monitor is None or self._is_fresh(trainer, self.monitor):
            super()._save_topk_checkpoint(trainer, monitor_candidates)


def _flat(name: str) -> str:
    return name.replace("/", "_")


class DownstreamEarlyStopping(_Fresh, pl.callbacks.EarlyStopping):
    """`EarlyStopping` whose patience counts measurements, not validations."""

    def _run_early_stopping_check(self, trainer: pl.Trainer) -> None:
        if self._is_fresh(trainer, self.monitor):
            super()._run_early_stopping_check(trainer)
