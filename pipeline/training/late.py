"""The measurements of a session that come later than the weights they are of, as every rank sees them."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from pipeline.config.class_paths import encoder_class
from pipeline.config.schema import Config
from pipeline.errors import ConfigError, PipelineError
from pipeline.tracking.protocol import attempt
from pipeline.training.background import Arrival, Background
from pipeline.training.progress import Progress
from pipeline.training.ranks import Ranks

if TYPE_CHECKING:
    from pipeline.training.measurement import Measurement

logger = logging.getLogger(__name__)


class Late:
    """The background of rank 0; on the other ranks nothing happens. No rank waits for another."""

    def __init__(self, config: Config, ranks: Ranks, work: Measurement) -> None:
        """Nothing is written yet. Raises ConfigError, on every rank alike."""
        if config.background.when_busy == "wait" and ranks.count > 1:
            expected = f"background.when_busy: expected drop_oldest or skip, found wait with {ranks.count} ranks"
            raise ConfigError(f"{expected}: the others would wait for the first in the next step; set drop_oldest")
        self.config, self.ranks, self.work = config, ranks, work
        self.background = Background(config, work) if ranks.is_first else None

    def hand_over(self, module: nn.Module, step: int, last: bool = False) -> None:
        """See `Background.hand_over`. A failure is said, and raised at once where there is one rank."""
        if self.background is None:
            return
        try:
            self.work.open()
            self.background.hand_over(module, step, last)
        except Exception as error:
            if self.config.on_error == "raise" and self.ranks.group is None:
                raise
            logger.debug("downstream validation at step %d", step, exc_info=True)
            kind = "" if isinstance(error, PipelineError) else f"{type(error).__name__}: "
            text = f"downstream validation failed at step {step}, training goes on: {kind}{error}"
            self.work.host.warn(text)
            self.work.tell_failure(step, str(error))
            self.background.failures.append(text)
            self.background.miss(step)

    def poll(self) -> list[Arrival]:
        """What has come back. Raises PipelineError as `Session.poll` says."""
        if self.background is None:
            return []
        attempt("polling of the worker", self.background.poll)
        if self.ranks.group is None:
            self.raise_failures()
        return self.background.arrivals()

    def drain(self, module: nn.Module | None, step: int) -> list[Arrival]:
        """Waits for the worker, no longer than the other ranks wait for this one; see `Session.finish`."""
        if self.background is None:
            return []
        if self.background.skipped and module is None:
            why = f"the worker was busy (when_busy: {self.config.background.when_busy}); drop_oldest measures them"
            self.work.host.warn(f"downstream validation: the last weights are not measured, {why}")
        elif self.background.skipped and module is not None:
            self.hand_over(module, step, last=True)
        longest, key = self.config.background.drain_timeout, "background.drain_timeout"
        if self.ranks.group is not None and 0.9 * self.config.timeout < longest:
            longest, key = 0.9 * self.config.timeout, "0.9 of timeout"
        self.background.drain(longest, key)
        return self.background.arrivals()

    def raise_failures(self) -> None:
        """Raises PipelineError where a measurement failed, and `on_error` is `raise`."""
        failures = self.background.failures if self.background else []
        if failures and self.config.on_error == "raise":
            raise PipelineError("; ".join(failures))

    def close(self) -> list[Arrival]:
        """Takes in what is there, and ends the worker."""
        if self.background is None:
            return []
        attempt("polling of the worker", self.background.poll)
        self.background.close()
        return self.background.arrivals()

    def resume(
        self, state: Mapping[str, Any], progress: Mapping[str, Any] | None, last_step: int | None
    ) -> list[Arrival]:
        """See `Background.resume`."""
        if self.background is None:
            return []
        background = self.background
        attempt("going on with earlier snapshots", lambda: background.resume(state, progress, last_step))
        return background.arrivals()

    def state(self) -> dict[str, Any] | None:
        """See `Background.state`."""
        return self.background.state() if self.background else None

    def progress_state(self) -> dict[str, Any] | None:
        """See `Background.progress_state`."""
        return attempt("reading of the changes", self.background.progress_state) if self.background else None

    def progress(self) -> Progress | None:
        """See `Background.progress`."""
        return attempt("reading of a result", self.background.progress) if self.background else None


def why_not_late(config: Config, module: nn.Module, runs_module: bool) -> str:
    """Why another process cannot open a snapshot of the module; empty where it can.

    Args:
        config: of the measurements.
        module: in training.
        runs_module: whether it takes the module's own code to measure it, see `LiveModel`.
    """
    target, factory = config.dataset[0].infer_target, config.model_factory
    for key, path in (("infer_target", target), ("model_factory", factory)):
        if (path or "").startswith("__main__."):
            return f"{key}: '{path}' is in the program itself; put it into a module"
    own = encoder_class(target)
    if own is not None:
        return "" if hasattr(own, "from_checkpoint") else f"infer_target: {target} has no from_checkpoint(path)"
    if runs_module and factory is None:
        return f"{type(module).__name__} cannot be made again from its weights; set model_factory"
    return ""
