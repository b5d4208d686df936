"""What a measurement asks of the loop in which it stands; implemented for Lightning, Hugging Face, and any loop."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from pipeline.encoders.custom import Context
from pipeline.encoders.description import DESCRIPTION
from pipeline.errors import CheckpointError
from pipeline.tracking.protocol import Tracker

logger = logging.getLogger("pipeline.training")


class Host(Protocol):
    """A training loop, on rank 0. Each value is read when it is needed, since a trainer may set it late."""

    @property
    def name(self) -> str:
        """Names a new MLflow run: the user's name for the training, or else `default_name`."""

    @property
    def device(self) -> torch.device:
        """Where the training runs; at its end the module may be elsewhere."""

    @property
    def context(self) -> Context:
        """Wraps a forward pass of a module's own code, such as autocast."""

    @property
    def mode(self) -> str:
        """Names the arithmetic of `context`, such as `bf16-mixed`; empty or `32-true` for float32."""

    @property
    def tokenizer(self) -> Any:
        """The Hugging Face tokenizer, where the loop was given one."""

    @property
    def holders(self) -> Sequence[object]:
        """Objects to look for a tokenizer in, beside the module."""

    @property
    def loggers(self) -> Sequence[Any]:
        """Lightning's loggers, whose MLflow run is the run of the training."""

    def mirrors(self, run: Any) -> Sequence[Tracker]:
        """Trackers beside MLflow. A logger of `run`, the `TrainingRun` or None, is none of them."""

    @property
    def folder(self) -> Path:
        """Of the training's output."""

    def checkpoint(self, module: nn.Module, step: int) -> dict[str, Any]:
        """What a checkpoint of the module holds."""

    def save(self, module: nn.Module, step: int, description: Mapping[str, Any] | None) -> Path:
        """Writes a checkpoint of the module, without callbacks and barriers of the loop. Raises CheckpointError."""

    def say(self, text: str) -> None:
        """Tells the user, once for all ranks."""

    def warn(self, text: str) -> None:
        """The same, where something went wrong."""

    def close(self) -> None:
        """Ends what `mirrors` opened."""


class LogHost:
    """What the hosts without a package of their own share: they talk through the log.

    Where logging has no handler by the first measurement, they write to stderr, as Lightning does: Python shows only
    warnings then, whatever the level of the logger. A level above INFO asks for silence.
    """

    holders: Sequence[object] = ()
    loggers: Sequence[Any] = ()

    def __init__(self, folder: Path) -> None:
        """Checkpoints that are written for a measurement are kept below `folder`."""
        self.folder = folder
        own = (logger, logging.getLogger("pipeline"))
        self._is_configured = logger.hasHandlers() or any(one.level > logging.INFO for one in own)

    def checkpoint(self, module: nn.Module, step: int) -> dict[str, Any]:
        """See `Host.checkpoint`."""
        return {"global_step": step, "state_dict": module.state_dict()}

    def save(self, module: nn.Module, step: int, description: Mapping[str, Any] | None) -> Path:
        """See `Host.save`."""
        content = self.checkpoint(module, step)
        return write_checkpoint(self.folder, step, content, description, "set the folder of the training's output")

    def say(self, text: str) -> None:
        """See `Host.say`."""
        if self._is_configured:
            logger.info("%s", text)
        else:
            print(text, file=sys.stderr)

    def warn(self, text: str) -> None:
        """See `Host.warn`."""
        logger.warning("%s", text)


def default_name(module: nn.Module, title: str) -> str:
    """Of a training that has no name. The time is first: it tells two apart, and MLflow's pages cut long names.

    Args:
        module: that is trained.
        title: of the tasks.
    """
    return f"{time.strftime('%Y-%m-%d %H:%M:%S')} {type(module).__name__} on {title}"


def write_checkpoint(
    root: Path, step: int, content: dict[str, Any], description: Mapping[str, Any] | None, remedy: str
) -> Path:
    """Writes `downstream/step=N.ckpt` below `root`, whole or not at all.

    Raises:
        CheckpointError: the file cannot be written.
    """
    if description is not None:
        content[DESCRIPTION] = description
    path = root / "downstream" / f"step={step}.ckpt"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(content, path.with_suffix(".tmp"))
        path.with_suffix(".tmp").replace(path)
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"save: '{path}' cannot be written ({error}); {remedy}") from error
    return path
