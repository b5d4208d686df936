"""Lightning: measures the weights in training at the end of every validation epoch, and changes nothing else."""

from __future__ import annotations

import logging
import time
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.config.schema import Config
from pipeline.config.yaml_file import read_config
from pipeline.encoders.description import DESCRIPTION
from pipeline.errors import ConfigError, PipelineError
from pipeline.report.tables import Table
from pipeline.training.lightning_package import DescribingIO, pl
from pipeline.training.measurement import Measurement
from pipeline.training.monitors import warn_of_monitors
from pipeline.training.progress import Progress
from pipeline.training.ranks import LostRankError, Ranks

logger = logging.getLogger(__name__)

SHARDED = ("FSDP", "ModelParallel", "DeepSpeed")


def setup_dwnstr_task_validation_callbacks(cfg: str | Path | Mapping[Any, Any] | Config) -> list[pl.Callback]:
    """The callbacks for `Trainer(callbacks=...)`: a list of one, or empty where the section has `enabled: False`.

    Args:
        cfg: a YAML file with the section `model.dwnstr_task_validation`, its content as Hydra or OmegaConf give it, or
            a `Config`.

    Raises:
        ConfigError: the configuration is not valid.
    """
    config = cfg if isinstance(cfg, Config) else read_config(cfg)
    return [DownstreamValidation(config)] if config.enabled else []


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

    def __init__(self, config: Config) -> None:
        """Checks the configuration. Raises ConfigError."""
        config.check()
        self.config = config
        self.published: frozenset[str] = frozenset()
        self.published_step = -1
        self.curve: list[tuple[int, dict[str, float]]] = []
        self.overview: Table | None = None
        self.summary = ""
        self.work: Measurement | None = None
        self.ranks = Ranks(config.timeout)
        self._validations = 0
        self._last_step: int | None = None
        self._loaded_step: int | None = None
        self._stage = ""
        self._trainer: Any = None
        self._run: str | None = None
        self._points: list[tuple[int, dict[str, float]]] = []  # the curve, with what came before an interruption
        self._progress: dict[str, Any] | None = None  # of rank 0, in the form in which a checkpoint has it
        self._description: dict[str, Any] | None = None  # on rank 0, which writes the checkpoints
        self._rehearsal = False  # whether the trainer only tries a few batches
        self._late = False  # whether the module is to be inspected again when its layers are there
        self._began = self._spent = 0.0

    @property
    def state_key(self) -> str:
        """The key of the callback's state in a checkpoint, with the tasks' names: a trainer may have two callbacks."""
        return f"DownstreamValidation{[task.task_name for task in self.config.dataset]}"

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Finds the encoder and reads all data, on rank 0.

        Raises:
            PipelineError: what would fail at the first measurement, on every rank alike.
        """
        if stage not in ("fit", "validate"):
            return
        _check_strategy(trainer)
        if self._trainer is not None and self._trainer() is not trainer:  # another training, such as another fold
            self._validations, self._last_step, self._run = 0, None, None
            self._points, self._progress = [], None
        self._trainer, self._stage, self._loaded_step = weakref.ref(trainer), stage, None
        self._rehearsal = bool(vars(trainer)["fast_dev_run"])
        # First, so that averaged weights are still in place when this measures. Lightning's loop over the list has come
        # to this callback, so none is skipped or called twice.
        callbacks = vars(trainer)["callbacks"]
        callbacks.insert(0, callbacks.pop(callbacks.index(self)))
        self.ranks.open()
        self._began, self._spent = time.perf_counter(), 0.0
        self.work = Measurement(self.config, trainer, self._run)
        self._continue_progress()
        # A module may build its layers in one of these hooks, which come later; then it is inspected again.
        kind, base = type(pl_module), pl.LightningModule
        self._late = any(
            getattr(kind, hook, None) is not getattr(base, hook, None) for hook in ("setup", "configure_model")
        )
        work = self.work
        self.ranks.on_rank_zero(lambda: work.prepare(pl_module, may_wait=self._late))
        self._description = work.description
        warn_of_monitors(callbacks, self.config)
        io = trainer.strategy.checkpoint_io
        if not isinstance(io, DescribingIO):
            trainer.strategy.checkpoint_io = DescribingIO(io, DESCRIPTION, lambda: self._description)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Finds the encoder in a module that was not complete at `setup`."""
        if self._late and self.work is not None:
            work, self._late = self.work, False
            self.ranks.on_rank_zero(lambda: work.prepare(pl_module))
            self._description = work.description

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The same for a trainer that only validates."""
        self.on_fit_start(trainer, pl_module)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """With `on_start`, measures the untrained model; not where a training is resumed."""
        self._began = time.perf_counter()
        if self.config.on_start and trainer.global_step == 0 and not self._rehearsal:
            self._measure(trainer, pl_module)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measures, and publishes the metrics. In the sanity check, only tries whether that can work."""
        if self.work is None:
            return
        work = self.work
        if trainer.sanity_checking or self._rehearsal:
            self.ranks.on_rank_zero(lambda: work.try_out(pl_module))
            return
        if trainer.state.fn == "fit":
            self._validations += 1
            if (self._validations - 1) % self.config.every_n_validations:
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
        done = self._last_step == trainer.global_step
        if self.config.on_end and not done and not self._rehearsal:
            self._measure(trainer, pl_module)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Ends the MLflow run if it was opened here, and leaves the trainer as it was."""
        if isinstance(trainer.strategy.checkpoint_io, DescribingIO):
            trainer.strategy.checkpoint_io = trainer.strategy.checkpoint_io.inner
        self._close("FINISHED")

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Ends the MLflow run as failed or killed."""
        self._close("FAILED" if isinstance(exception, Exception) else "KILLED")

    def state_dict(self) -> dict[str, Any]:
        """What a resumed training needs to continue the curve and the MLflow run."""
        run = self.work.own_run if self.work else None
        return {
            "validations": self._validations,
            "last_step": self._last_step,
            "run": run or self._run,
            "points": list(self._points),
            "progress": self.work.progress.state() if self.work else self._progress,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues an interrupted training, see `state_dict`."""
        if self._stage == "fit":
            self._validations = state_dict["validations"]
            self._last_step = state_dict["last_step"]
            self._points = list(state_dict["points"])
            self._progress = state_dict.get("progress")
            self._continue_progress()
        self._run = state_dict["run"]
        if self.work:
            self.work.earlier_run = self._run

    def _continue_progress(self) -> None:
        """Changes are since the first measurement before an interruption."""
        if self.work and self._progress is not None:
            self.work.progress = Progress.from_state(self._progress)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Adds the description with which the checkpoint can be opened without the code of the module."""
        if self._description is not None:
            checkpoint.setdefault(DESCRIPTION, self._description)

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Keeps the checkpoint's step: a trainer that only validates does not restore it."""
        self._loaded_step = int(checkpoint.get("global_step", 0))

    def _measure(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, float]:
        """The metrics, the same on every rank; empty where the measurement failed and `on_error` is `warn`."""
        assert self.work is not None
        work, began = self.work, time.perf_counter()
        alone = trainer.state.fn != "fit" and self._loaded_step is not None
        step: int = self._loaded_step if alone else trainer.global_step  # type: ignore[assignment]
        try:
            metrics = self.ranks.on_rank_zero(lambda: work.measure(pl_module, step))
        except LostRankError:
            raise
        except Exception as error:
            if self.config.on_error == "raise":
                raise
            logger.debug("downstream validation at step %d", step, exc_info=True)
            kind = "" if isinstance(error, PipelineError) else f"{type(error).__name__}: "
            pl.utilities.rank_zero_warn(
                f"downstream validation failed at step {step}, training goes on: {kind}{error}", stacklevel=2
            )
            return {}
        self._last_step = step
        self.curve.append((step, metrics))
        self._points.append((step, metrics))
        self._report(step, metrics, time.perf_counter() - began)
        return metrics

    def _report(self, step: int, metrics: Mapping[str, float], seconds: float) -> None:
        """Logs the headline metrics, the seconds of the measurement, and its share of the training time."""
        self._spent += seconds
        share = 100 * self._spent / max(time.perf_counter() - self._began, 1e-9)
        numbers = ", ".join(f"{name} {metrics[name]:.4f}" for name in self.config.headlines if name in metrics)
        cost = f"{seconds:.1f} s; {share:.0f} % of the training time so far"
        pl.utilities.rank_zero_info(f"downstream validation at step {step}: {numbers} ({cost})")

    def _close(self, status: str) -> None:
        if self.work is not None:
            self._run = self.work.own_run or self._run
            self._progress = self.work.progress.state()
            self.overview = self.work.progress.overview
            self.summary = self.work.progress.summary(self._points, self.config)
            self.work.close(status, self._points)
        self.work = None
        self.ranks.close()


def _check_strategy(trainer: pl.Trainer) -> None:
    """Raises ConfigError for a strategy under which no rank has all weights."""
    kinds = [kind.__name__ for kind in type(trainer.strategy).__mro__]
    if any(kind.startswith(SHARDED) for kind in kinds):
        raise ConfigError(f"strategy {kinds[0]}: downstream validation needs all weights on a rank; use ddp for now")
    if trainer.world_size > 1 and "DDPStrategy" not in kinds:
        raise ConfigError(f"strategy {kinds[0]}: downstream validation on several ranks needs ddp")
