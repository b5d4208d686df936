"""The work in any training loop, of rank 0 or of each rank: it prepares, and measures the current weights."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

from torch import nn

from pipeline import validation
from pipeline.checkpoints.opening import open_encoder
from pipeline.command.program import links
from pipeline.config.class_paths import encoder_class
from pipeline.config.schema import Config
from pipeline.embed import check_sequences, made_with
from pipeline.encoders.devices import find_device, find_precision
from pipeline.encoders.live import LiveModel
from pipeline.encoders.options import EncoderOptions
from pipeline.encoders.parts import at_rest, is_sharded
from pipeline.encoders.protocol import Encoder
from pipeline.engines.workers import ALONE, Workers
from pipeline.errors import CheckpointError, ConfigError
from pipeline.load import Examples, load_all
from pipeline.progress import no_progress
from pipeline.report.publishing import describe, publish_curves, verdict_tags
from pipeline.store.embedding_table import Store
from pipeline.tracking.protocol import FOLDER, TRAINING, NullTracker, Several, Tracker, attempt, guarded
from pipeline.train_head import make_head
from pipeline.training.host import Host
from pipeline.training.progress import Progress, resolution_of
from pipeline.training.sharing import check_same, first_ranks_buffers, measured
from pipeline.training.untouched import untouched
from pipeline.training.unwrapped import refuse_sharded
from pipeline.validation import check, dry_run

if TYPE_CHECKING:
    from pipeline.tracking.training_run import TrainingRun


class Measurement:
    """Measures a module in training, and leaves it as it is.

    Several ranks share the work, each with its own copy of the module; the first has the data read, logs and publishes.

    Attributes:
        host: the loop in which the module is trained.
        earlier_run: key of the MLflow run that an interrupted training had opened, to be continued.
        description: what a `.ckpt` needs to be opened, and how it is measured here; None where that takes a class.
        progress: what the scores have changed by.
    """

    def __init__(self, config: Config, host: Host, earlier_run: str | None = None, workers: Workers = ALONE) -> None:
        """Opens nothing yet."""
        self.workers = workers
        self.config = config
        self.host = host
        self.earlier_run = earlier_run
        self.description: dict[str, Any] | None = None
        self.progress: Progress = Progress()
        self._live: LiveModel | None = None
        self._examples: list[Examples] = []
        self._run: TrainingRun | None = None
        self._limit: int | None = None
        self._said: set[str] = set()

    def prepare(self, module: nn.Module, may_wait: bool = False) -> None:
        """Finds how the module gives hidden states, and reads and checks all data.

        Args:
            module: the module in training.
            may_wait: a module that gives no hidden states yet may do so later; then only the data are checked.

        Raises:
            PipelineError: the module, the configuration or the data cannot be used.
        """
        with self._around(module):
            check(self.config.dataset)
            try:
                self._live = self._look_at(module)
            except CheckpointError:
                if not may_wait:
                    raise
            self._limit = self._live.max_seq_length if self._live else None
            self._read()
            self.description = self._describe()
            self._check(module)

    def try_out(self, module: nn.Module) -> None:
        """Embeds a few sequences and makes the heads. Raises PipelineError where a measurement would."""
        with self._around(module):
            if self._live is not None:
                dry_run(self._encoder(module), self._examples, self.workers)

    def measure(self, module: nn.Module, step: int) -> dict[str, float]:
        """Measures the weights that the module has now, and logs the result at `step`.

        Raises:
            PipelineError: see `validate`. Trackers that fail only warn.
        """
        with self._around(module), self._in_place(module), first_ranks_buffers(module, self.workers):
            try:
                metrics = self._measure(module, step)
            except Exception as error:
                self.progress.missed(step)
                if self.workers.rank == 0:
                    self.tell_failure(step, str(error))
                raise
            return metrics

    @property
    def runs_module(self) -> bool:
        """Whether measuring runs the module itself, see `LiveModel`; False where that is not known yet."""
        return self._live is not None and self._live.runs_module

    @property
    def own_run(self) -> str | None:
        """The key of the MLflow run, if it was opened here."""
        return self._run.run.key if self._run and self._run.own else None

    def close(self, status: str, points: Sequence[tuple[int, Mapping[str, float]]]) -> None:
        """Draws the curves of a training, and ends the MLflow run if it was opened here."""
        run = self._run
        if run is not None:
            self._close(run, status, points)
        attempt("closing of the trackers", self.host.close)

    def _close(self, run: TrainingRun, status: str, points: Sequence[tuple[int, Mapping[str, float]]]) -> None:
        if self.config.logging.figures:
            several = Several([run.run, *self._mirrors])
            attempt("drawing of the curves", lambda: publish_curves(points, several, f"{FOLDER}/curves"))
        if seen := resolution_of(points, self.config):
            attempt("logging", lambda: run.run.text(seen, f"{FOLDER}/curves/resolution.md"))
            said = resolution_of(points, self.config, markdown=False)
            self.host.say(f"downstream validation, what each score can tell apart:\n{said}")
        if run.own and any(metrics for _, metrics in points):
            run.run.describe(self.progress.summary(points, self.config))
        attempt("closing of the MLflow run", lambda: run.end(status))
        if run.own and run.opened is not None and (lines := links(run.opened)):
            self.host.say("\n".join(lines))

    @property
    def _options(self) -> EncoderOptions:
        """With the training's device: at its end the module may be back on the CPU."""
        device = str(self.host.device) if self.config.device == "auto" else self.config.device
        return replace(EncoderOptions.from_config(self.config), device=device, compile=False)

    @contextmanager
    def _around(self, module: nn.Module) -> Iterator[None]:
        """Leaves the module as it is, draws no bars beside the trainer's, and logs each warning once."""
        validation.logger.addFilter(self._first_time)
        try:
            with no_progress(), at_rest(module), untouched(module, self._live is None or self._live.runs_module):
                yield
        finally:
            if self._live is not None:
                self._live.release()
            validation.logger.removeFilter(self._first_time)

    @contextmanager
    def _in_place(self, module: nn.Module) -> Iterator[None]:
        """A module that runs itself, on the training's device: at its end the module may be back on the CPU."""
        there = self.host.device
        here = next((parameter.device for parameter in module.parameters()), there)
        if here == there or self._live is None or not self._live.runs_module or self._live.in_parts:
            yield
            return
        module.to(there)
        try:
            yield
        finally:
            module.to(here)

    def _first_time(self, record: logging.LogRecord) -> bool:
        if self.workers.rank > 0:
            return False  # the first says the same
        text = record.getMessage()
        new = record.levelno < logging.WARNING or text not in self._said
        self._said.add(text)
        return new

    def _look_at(self, module: nn.Module) -> LiveModel | None:
        """How the live module gives hidden states; None where a checkpoint is written for a class of the user's."""
        target, host = self.config.dataset[0].infer_target, self.host
        own = encoder_class(target)
        if self.config.save and own is not None:
            if not hasattr(own, "from_checkpoint"):
                raise CheckpointError(f"infer_target: {target} has no from_checkpoint(path), which save needs")
            return None
        refuse_sharded(module)
        if is_sharded(module) and (self.config.mode != "sharded" or self.config.save):
            found = "save" if self.config.save else f"mode {self.config.mode}"
            raise ConfigError(f"{found}: the weights are in parts on several ranks; use mode: sharded without save")
        return LiveModel(module, target, host.tokenizer, host.context, host.mode, host.holders)

    def _describe(self) -> dict[str, Any] | None:
        if self._live is None or self._live.description is None:
            return None
        device = find_device(self._options.device)
        precision = self._live.own_precision or find_precision(self.config.precision, device)
        plan = made_with(device, precision, self.config.pooling, Store.from_config(self.config), self._examples)
        return {**self._live.description, "made_with": plan}

    def _check(self, module: nn.Module) -> None:
        """Raises early what can be found without running the module, which may not be on its device yet."""
        live, config = self._live, self.config
        if live and config.save and live.runs_module and config.model_factory is None:
            remedy = "set model_factory, name a class with from_checkpoint(path) in infer_target, or leave save out"
            raise CheckpointError(f"save: a checkpoint of {type(module).__name__} cannot be opened again; {remedy}")
        if live and not live.runs_module:
            encoder = live.encoder(module, replace(self._options, device="cpu", precision="fp32"))
            check_sequences(self._examples, encoder)
            for examples in self._examples:
                make_head(examples.task, encoder.hidden_size, examples.targets, encoder.device)

    def _measure(self, module: nn.Module, step: int) -> dict[str, float]:
        source = str(self.host.save(module, step, self.description)) if self.config.save else "live weights"
        if self.config.save:
            encoder = open_encoder(source, replace(self._options, trust_pickle=True))  # it was just written here
        else:
            encoder = self._encoder(module)
        if encoder.max_seq_length != self._limit:
            self._limit = encoder.max_seq_length
            self._read()
        check_same(encoder, module, self.workers)
        more = (source, step, self.workers)
        if self.workers.rank > 0:
            nowhere = NullTracker()
            return measured(encoder, self.config, self._examples, self.progress, nowhere, nowhere, *more)
        with self.trackers(step, encoder.digest, source) as (tracker, mirrors):
            metrics = measured(encoder, self.config, self._examples, self.progress, tracker, mirrors, *more)
        self.tell(self.progress.start, self.progress.verdicts)
        return metrics

    @contextmanager
    def trackers(
        self, step: int, digest: str, source: str, time: int | None = None
    ) -> Iterator[tuple[Tracker, Tracker]]:
        """What a measurement of the weights with `digest` is logged to: MLflow, and the mirrors.

        Args:
            step: of the training.
            digest: of the encoder.
            source: where the weights are.
            time: of the measurement, in milliseconds since 1970; by default, that of each call.
        """
        run = self._training_run
        if run is None:
            yield NullTracker(), Several(self._mirrors)
            return
        open_tracker = partial(run.measurement, step, digest, source, self.config.title, self.config.child_runs, time)
        with guarded("logging to MLflow", open_tracker) as tracker:
            yield tracker, Several(self._mirrors)

    def open(self) -> None:
        """Opens the MLflow run, unless it is open."""
        _ = self._training_run

    def tell(self, start: int | None, verdicts: Mapping[str, str]) -> None:
        """Tags the run with the step that changes are since, and with what is said of each task."""
        if self._run is not None:
            self._run.run.tags({f"{FOLDER}.start": f"step {start}", **verdict_tags(verdicts)})

    def tell_failure(self, step: int, message: str) -> None:
        """Tags the run with the failure of a measurement."""
        run = self._training_run
        if run is not None:
            attempt("logging of the failure", lambda: run.failed(step, message))

    def warn_once(self, texts: Sequence[str]) -> None:
        """Logs warnings of a measurement that another process made, each once in a training."""
        validation.logger.addFilter(self._first_time)
        for text in texts:
            validation.logger.warning("%s", text)
        validation.logger.removeFilter(self._first_time)

    def _read(self) -> None:
        """Reads and checks all data, on one rank."""
        self._examples = self.workers.from_first(lambda: load_all(self.config.dataset, self._limit))

    @cached_property
    def _mirrors(self) -> Sequence[Tracker]:
        return self.host.mirrors(self._run)

    def _encoder(self, module: nn.Module) -> Encoder:
        assert self._live is not None
        probe = min(self._examples[0].train.sequences, key=len)
        return self._live.encoder(module, self._options, probe)

    @cached_property
    def _training_run(self) -> TrainingRun | None:
        """The MLflow run, opened when it is needed first; None where it cannot be opened, which is warned of once."""
        self._run = attempt("opening of the MLflow run", self._open_run)
        return self._run

    def _open_run(self) -> TrainingRun:
        from pipeline.tracking.training_run import TrainingRun

        run = TrainingRun(self.host.loggers, self.host.name, self.config, self.earlier_run)
        if run.own:
            self.host.say(f"downstream validation logs to MLflow: {run.place}")
        describe(run.run, self.config, TRAINING, FOLDER)
        return run
