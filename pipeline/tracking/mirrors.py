"""Trackers beside MLflow: W&B and TensorBoard on the command line, and the loggers of a Lightning trainer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from logging import getLogger
from pathlib import Path
from threading import Event, Thread
from typing import Any

from pipeline.config.trackers import Logging
from pipeline.errors import ConfigError
from pipeline.tracking import tensorboard as tensorboard_adapter
from pipeline.tracking import wandb as wandb_adapter
from pipeline.tracking.protocol import Data, NullTracker, Tracker, attempt, guarded

PICTURES: dict[str, Callable[[Any, str, Path, int], None]] = {
    "WandbLogger": wandb_adapter.log_picture,
    "TensorBoardLogger": tensorboard_adapter.log_picture,
}
PATIENCE = 5.0  # seconds
logger = getLogger(__name__)


@contextmanager
def mirrors(logging: Logging, name: str, config: Mapping[str, Any], folder: Path) -> Iterator[list[Tracker]]:
    """The trackers that the configuration asks for. A failure of one becomes a warning, and the work goes on.

    Args:
        logging: which, and where.
        name: of the measurement.
        config: shown with it, where there is a place.
        folder: for what W&B writes.

    Raises:
        ConfigError: a library is not installed, or W&B has no account to log in to.
    """
    asked: dict[str, Callable[[], AbstractContextManager[Tracker]]] = {}
    if logging.wandb != "disabled":
        asked["W&B"] = partial(wandb_adapter.open_wandb, logging, name, config, folder)
    if logging.tensorboard is not None:
        path = Path(logging.tensorboard).expanduser()
        asked["TensorBoard"] = partial(tensorboard_adapter.open_tensorboard, path, name)
    with ExitStack() as stack:
        yield [stack.enter_context(guarded(what, opening, (ConfigError,))) for what, opening in asked.items()]


class LoggerTracker(NullTracker):
    """A Lightning trainer's logger of any kind. A call neither raises nor lasts longer than `patience`.

    A slower call continues in a thread of its own. Until it returns, the logger is not called again.
    """

    def __init__(self, logger: Any, patience: float = PATIENCE) -> None:
        """Writes to `logger`."""
        self.logger = logger
        self.patience = patience
        self._name = type(logger).__name__
        self._back = Event()  # set when the latest call has returned
        self._back.set()
        self._skipped = 0

    def metrics(self, values: Mapping[str, float], step: int = 0, data: Data | None = None) -> None:  # noqa: ARG002
        """See `Tracker.metrics`."""
        copied = dict(values)
        self._call(lambda: self.logger.log_metrics(copied, step=step))

    def artifact(self, path: Path, folder: str = "", step: int = 0) -> None:
        """See `Tracker.artifact`. Pictures are shown by the loggers that can."""
        show = next((show for kind, show in PICTURES.items() if is_kind(self.logger, kind)), None)
        if show is not None and path.suffix == ".png":
            key = f"{folder}/{path.stem}" if folder else path.stem
            self._call(lambda: show(self.logger.experiment, key, path, step))

    def _call(self, act: Callable[[], None]) -> None:
        if not self._back.is_set():
            self._skipped += 1
            return
        if self._skipped:
            logger.warning("%s is back; it was not told of %d results meanwhile", self._name, self._skipped)
            self._skipped = 0
        self._back = back = Event()

        def work() -> None:
            try:
                attempt(self._name, act)
            finally:
                back.set()

        Thread(target=work, name=f"logging to {self._name}", daemon=True).start()
        if not back.wait(self.patience):
            logger.warning("%s takes more than %g s; work goes on without it", self._name, self.patience)


def is_kind(instance: Any, name: str) -> bool:
    """Whether something is of a class called `name`, of either Lightning package, or of a subclass."""
    return any(base.__name__ == name for base in type(instance).__mro__)
