"""Lightning: measures the weights in training at the end of every validation epoch, and changes nothing else."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from pipeline.config.schema import Config
from pipeline.config.yaml_file import read_config
from pipeline.encoders.description import DESCRIPTION
from pipeline.encoders.parts import is_part
from pipeline.errors import ConfigError
from pipeline.report.tables import Table
from pipeline.training.lightning_host import LightningHost
from pipeline.training.lightning_package import DescribingIO, pl
from pipeline.training.monitors import refuse_monitors, warn_of_monitors
from pipeline.training.session import Session

SEVERAL = {"DDPStrategy", "ModelParallelStrategy", "FSDPStrategy"}  # strategies that can be measured on several ranks


def setup_dwnstr_task_validation_callbacks(
    cfg: str | Path | Mapping[Any, Any] | Config, tokenizer: Any = None
) -> list[pl.Callback]:
    """The callbacks for `Trainer(callbacks=...)`: a list of one, or empty where the section has `enabled: False`.

    Args:
        cfg: a YAML file with the section `model.dwnstr_task_validation`, its content as Hydra or OmegaConf give it, or
            a `Config`.
        tokenizer: the Hugging Face tokenizer; by default that in the module, or else in the data module.

    Raises:
        ConfigError: the configuration is not valid.
    """
    config = cfg if isinstance(cfg, Config) else read_config(cfg)
    return [DownstreamValidation(config, tokenizer)] if config.enabled else []


class DownstreamValidation(pl.Callback):
    """Measures what the embeddings of the weights in training are worth on the downstream tasks.

    The metrics are published on every rank, for `ModelCheckpoint` and `EarlyStopping`; rank 0 logs them to MLflow and
    to the trainer's loggers, at `trainer.global_step`.

    Attributes:
        published: the names of the metrics that the last validation published; empty where it measured nothing.
        published_step: the step at which it did.
        curve: the step and the metrics of each, on every rank.
        overview: on rank 0, after the training: the last scores, and what they have changed by; None without any.
        summary: on rank 0, after the training: the overview and the headline metrics of each step, in Markdown.
    """

    def __init__(self, config: Config, tokenizer: Any = None) -> None:
        """Checks the configuration, see `setup_dwnstr_task_validation_callbacks`. Raises ConfigError."""
        self.session: Session = Session(config)
        self.tokenizer: Any = tokenizer
        self.config = config
        self.published: frozenset[str] = frozenset()
        self.published_step: int = -1
        self._loaded_step: int | None = None
        self._stage = ""
        self._trainer: Any = None
        self._rehearsal = False  # whether the trainer only tries a few batches
        self._late = False  # whether the module is to be inspected again when its layers are there

    @property
    def curve(self) -> list[tuple[int, dict[str, float]]]:
        """See above."""
        return self.session.curve

    @property
    def overview(self) -> Table | None:
        """See above."""
        return self.session.overview

    @property
    def summary(self) -> str:
        """See above."""
        return self.session.summary

    @property
    def state_key(self) -> str:
        """The key of the callback's state in a checkpoint, with the tasks' names: a trainer may have two callbacks."""
        return f"DownstreamValidation{[task.task_name for task in self.config.dataset]}"

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Finds the encoder, and has rank 0 read all data.

        Raises:
            PipelineError: what would fail at the first measurement, on every rank alike.
        """
        if stage not in ("fit", "validate"):
            return
        _check_strategy(trainer)
        if self._trainer is not None and self._trainer() is not trainer:  # another training, such as another fold
            self.session.forget()
        self._trainer, self._stage, self._loaded_step = weakref.ref(trainer), stage, None
        self._rehearsal = bool(vars(trainer)["fast_dev_run"])
        # First, so that averaged weights are still in place when this measures. Lightning's loop over the list has come
        # to this callback, so none is skipped or called twice.
        callbacks = vars(trainer)["callbacks"]
        callbacks.insert(0, callbacks.pop(callbacks.index(self)))
        self.session.open(LightningHost(trainer, self.tokenizer, self.config.title), may_be_late=stage == "fit")
        # A module may build its layers in one of these hooks, which come later; then it is inspected again.
        kind, base = type(pl_module), pl.LightningModule
        hooks = ("setup", "configure_model")
        self._late = any(getattr(kind, hook, None) is not getattr(base, hook, None) for hook in hooks)
        self._late = self._late or "FSDPStrategy" in _kinds(trainer)  # which has weights in parts from then on
        self.session.prepare(pl_module, may_wait=self._late)
        self._look_at_monitors(callbacks)
        io = trainer.strategy.checkpoint_io
        if not isinstance(io, DescribingIO):
            trainer.strategy.checkpoint_io = DescribingIO(io, DESCRIPTION, lambda: self.session.description)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Finds the encoder in a module that was not complete at `setup`."""
        if self._late and self.session.work is not None:
            self._late = False
            self.session.prepare(_in_training(trainer, pl_module))
            self._look_at_monitors(vars(trainer)["callbacks"])

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The same for a trainer that only validates."""
        self.on_fit_start(trainer, pl_module)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """With `on_start`, measures the untrained model; not where a training is resumed."""
        self.session.start_clock()
        if self.config.on_start and trainer.global_step == 0 and not self._rehearsal:
            self._measure(trainer, pl_module)

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        """Takes in what has been measured in the background."""
        self.session.poll()

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measures, and publishes the metrics. In the sanity check, only tries whether that can work."""
        if self.session.work is None:
            return
        if trainer.sanity_checking or self._rehearsal:
            self.session.try_out(_in_training(trainer, pl_module))
            return
        if trainer.state.fn == "fit" and not self.session.is_due():
            self.published = frozenset()
            return
        metrics = self._measure(trainer, pl_module)
        self.published, self.published_step = frozenset(metrics), trainer.global_step
        for name, value in metrics.items():
            # The values are the same on all ranks; a maximum leaves them as they are, and a mean might round.
            pl_module.log(
                name, value, logger=False, on_step=False, on_epoch=True, reduce_fx="max", sync_dist=True, batch_size=1
            )

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """With `on_end`, measures the final weights, unless the last validation did."""
        done = self.session.last_step == trainer.global_step
        if self.config.on_end and not done and not self._rehearsal:
            self._measure(trainer, pl_module)
        self.session.finish(pl_module, trainer.global_step)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Ends the MLflow run if it was opened here, and leaves the trainer as it was."""
        if isinstance(trainer.strategy.checkpoint_io, DescribingIO):
            trainer.strategy.checkpoint_io = trainer.strategy.checkpoint_io.inner
        self.session.close("FINISHED")

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Ends the MLflow run as failed or killed."""
        self.session.close("FAILED" if isinstance(exception, Exception) else "KILLED")

    def state_dict(self) -> dict[str, Any]:
        """What a resumed training needs to continue the curve and the MLflow run."""
        return self.session.state()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues an interrupted training, see `state_dict`."""
        self.session.load(state_dict, fits=self._stage == "fit")

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Adds the description with which the checkpoint can be opened without the code of the module."""
        if self.session.description is not None:
            checkpoint.setdefault(DESCRIPTION, self.session.description)

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Keeps the checkpoint's step: a trainer that only validates does not restore it."""
        self._loaded_step = int(checkpoint.get("global_step", 0))

    def _look_at_monitors(self, callbacks: Sequence[Any]) -> None:
        """Refuses or warns of callbacks that would go by old metrics, once it is known whether they are late."""
        if not self.session.is_late:
            warn_of_monitors(callbacks, self.config)
        elif not self._late:
            refuse_monitors(callbacks, self.config)

    def _measure(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, float]:
        """The metrics, the same on every rank; empty where the measurement failed and `on_error` is `warn`."""
        alone = trainer.state.fn != "fit" and self._loaded_step is not None
        step: int = self._loaded_step if alone else trainer.global_step  # type: ignore[assignment]
        return self.session.measure(_in_training(trainer, pl_module), step)


def _in_training(trainer: pl.Trainer, pl_module: pl.LightningModule) -> nn.Module:
    """The module itself, or what FSDP1 has around it, which alone can gather its weights."""
    model = trainer.strategy.model
    return model if model is not None and is_part(model) else pl_module


def _kinds(trainer: pl.Trainer) -> list[str]:
    return [kind.__name__ for kind in type(trainer.strategy).__mro__]


def _check_strategy(trainer: pl.Trainer) -> None:
    """Raises ConfigError for a strategy under which no rank has all weights, nor can gather them."""
    kinds = _kinds(trainer)
    if any(kind.startswith("DeepSpeed") for kind in kinds):
        remedy = "use ddp, or FSDP (ModelParallelStrategy, FSDPStrategy)"
        raise ConfigError(f"strategy {kinds[0]}: downstream validation needs all weights on a rank; {remedy}")
    if trainer.world_size > 1 and not SEVERAL & {*kinds}:
        raise ConfigError(f"strategy {kinds[0]}: downstream validation on several ranks needs ddp, or FSDP")
