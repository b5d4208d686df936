"""Warnings of `ModelCheckpoint` and `EarlyStopping` callbacks that would not do what their user means."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from pipeline.config.schema import Config
from pipeline.tracking.mirrors import is_kind
from pipeline.training.lightning_package import pl

RULE = "names begin with the task's where dataset is a list"


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
    ours = is_kind(callback, "DownstreamModelCheckpoint")
    shown = re.findall(r"\{([^}:]*)", (inserts and not ours and callback.filename) or "")
    folders = [name for name in shown if "/" in name and config.has_metric(name)]
    if folders:
        pl.utilities.rank_zero_warn(
            f"{type(callback).__name__}(filename='{callback.filename}') makes a folder per checkpoint: Lightning "
            f"writes the name {folders[0]}, with its '/', before the value; pass auto_insert_metric_name=False, "
            "or use pipeline.DownstreamModelCheckpoint in its place"
        )
