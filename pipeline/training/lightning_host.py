"""A Lightning trainer as the host of a measurement."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from pipeline.encoders.custom import Context
from pipeline.tracking.mirrors import LoggerTracker, is_kind
from pipeline.tracking.protocol import Tracker
from pipeline.training.host import default_name, write_checkpoint
from pipeline.training.lightning_package import pl

UNNAMED = "lightning_logs"  # what Lightning calls the folder of a logger without a name


class LightningHost:
    """See `Host`: the trainer's loggers, precision and folder are read when they are needed."""

    def __init__(self, trainer: Any, tokenizer: Any, title: str) -> None:
        """Keeps the trainer, the tokenizer that the user gave, and the title of the tasks."""
        self.trainer, self.tokenizer, self.title = trainer, tokenizer, title

    @property
    def name(self) -> str:
        """See `Host.name`: that of a logger."""
        named = next(filter(None, map(_name_in, self.loggers)), None)
        return named or default_name(self.trainer.lightning_module, self.title)

    @property
    def device(self) -> torch.device:
        """See `Host.device`: at the end of training Lightning puts the module on the CPU."""
        device: torch.device = self.trainer.strategy.root_device
        return device

    @property
    def context(self) -> Context:
        """See `Host.context`."""
        context: Context = self.trainer.precision_plugin.forward_context
        return context

    @property
    def mode(self) -> str:
        """See `Host.mode`."""
        return str(self.trainer.precision)

    @property
    def holders(self) -> Sequence[object]:
        """See `Host.holders`."""
        return [self.trainer.datamodule]

    @property
    def loggers(self) -> Sequence[Any]:
        """See `Host.loggers`."""
        loggers: Sequence[Any] = self.trainer.loggers
        return loggers

    def mirrors(self, run: Any) -> Sequence[Tracker]:
        """The trainer's loggers, without a logger of the MLflow run, which has the metrics already."""

        def writes_to_run(one: Any) -> bool:
            if is_kind(one, "JournalLogger"):
                return run is not None and one.experiment is run.run
            return run is not None and is_kind(one, "MLFlowLogger") and one.run_id == run.run_id

        return [LoggerTracker(one) for one in self.loggers if not writes_to_run(one)]

    @property
    def folder(self) -> Path:
        """See `Host.folder`."""
        return Path(self.trainer.default_root_dir)

    def checkpoint(self, module: Any, step: int) -> dict[str, Any]:
        """See `Host.checkpoint`: as Lightning's own, without the trainer's callbacks."""
        content = {
            "epoch": self.trainer.current_epoch,
            "global_step": step,
            "pytorch-lightning_version": vars(pl)["__version__"],
            "state_dict": module.state_dict(),
            "hyper_parameters": dict(module.hparams),
        }
        module.on_save_checkpoint(content)
        return content

    def save(self, module: Any, step: int, description: Mapping[str, Any] | None) -> Path:
        """See `Host.save`: without the trainer's barrier."""
        content = self.checkpoint(module, step)
        return write_checkpoint(self.folder, step, content, description, "set default_root_dir")

    def say(self, text: str) -> None:
        """See `Host.say`."""
        pl.utilities.rank_zero_info("%s", text)

    def warn(self, text: str) -> None:
        """See `Host.warn`."""
        pl.utilities.rank_zero_warn(text, stacklevel=2)

    def close(self) -> None:
        """See `Host.close`: the trainer ends its loggers."""


def _name_in(logger: Any) -> str | None:
    """What a logger's own pages or folders call the training; None where the user has not named it.

    W&B is not begun for that: it may wait for a server.
    """
    if is_kind(logger, "WandbLogger"):
        return getattr(vars(logger).get("_experiment"), "name", None)
    if not any(is_kind(logger, kind) for kind in ("TensorBoardLogger", "CSVLogger")):
        return None
    name = None if logger.name == UNNAMED else logger.name or None
    version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}" if name else None
    return "/".join(filter(None, [name, version])) or None
