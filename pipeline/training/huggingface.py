"""The Hugging Face `Trainer`: measures the weights in training at each evaluation or save, and changes nothing else."""

from __future__ import annotations

import base64
import copy
import logging
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_callback import CallbackHandler, PrinterCallback, ProgressCallback

from pipeline.config.background import late_monitor
from pipeline.config.schema import Config
from pipeline.config.yaml_file import read_config
from pipeline.errors import ConfigError
from pipeline.tracking.protocol import Tracker
from pipeline.training.host import LogHost, default_name
from pipeline.training.session import Session
from pipeline.training.unwrapped import REMEDY, arithmetic, unwrapped, without_autocast_wrapper

PREFIX = "eval_"
CONSOLES = (PrinterCallback, ProgressCallback)  # of transformers: they print all that they are told in a line

logger = logging.getLogger(__name__)


class TrainerHost(LogHost):
    """See `Host`. The trainer's own reporters are told by the callback, as they are told of everything else."""

    def __init__(self, args: Any, module: nn.Module, tokenizer: Any, title: str) -> None:
        """The autocast is that of the trainer's arguments, by way of accelerate."""
        super().__init__(Path(args.output_dir))
        self.device: torch.device = args.device
        own = args.run_name if args.run_name != args.output_dir else None  # which older versions of transformers take
        self.name: str = own or default_name(module, title)
        self.tokenizer = tokenizer
        self.context, self.mode = arithmetic(self.device)

    def mirrors(self, run: Any) -> Sequence[Tracker]:  # noqa: ARG002
        """None: see above."""
        return []

    def close(self) -> None:
        """See `Host.close`: nothing was opened."""


class DownstreamTrainerCallback(TrainerCallback):
    """`Trainer(callbacks=[DownstreamTrainerCallback("my.yaml")])`, in one process or several, see `mode`.

    Measures at each evaluation, and where there is none at each save. The metrics are added, as `eval_<name>`, to those
    of the evaluation, so that `metric_for_best_model`, `load_best_model_at_end` and `EarlyStoppingCallback` may go by
    them; to `state.log_history`; and to the logs of all that the trainer reports to. Only what `train()` does is
    measured.

    Attributes:
        config: of the measurements.
        session: has the curve, and after the training `overview` and `summary`.
    """

    def __init__(self, config: str | Path | Mapping[Any, Any] | Config, tokenizer: Any = None) -> None:
        """Checks the configuration.

        Args:
            config: a YAML file with the section `model.dwnstr_task_validation`, its content, or a `Config`.
            tokenizer: by default the trainer's `processing_class`, or else that in the model.

        Raises:
            ConfigError: the configuration is not valid.
        """
        self.config: Config = config if isinstance(config, Config) else read_config(config)
        self.session: Session = Session(self.config)
        self.tokenizer = tokenizer
        self._handler: Any = None
        self._latest: tuple[int, dict[str, float]] | None = None  # step and metrics: evaluations may follow one another

    @property
    def state_key(self) -> str:
        """The key in `trainer_state.json`, with the tasks' names: a trainer may have two callbacks."""
        return f"DownstreamTrainerCallback{[task.task_name for task in self.config.dataset]}"

    def on_init_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:  # noqa: ARG002
        """Refuses, early, a training in which no rank has all weights, nor can gather them. Raises ConfigError."""
        if not self.config.enabled:
            return
        deepspeed = getattr(args, "hf_deepspeed_config", None)
        if deepspeed is not None and deepspeed.is_zero3():
            raise ConfigError(f"TrainingArguments: the model is sharded: DeepSpeed ZeRO-3; {REMEDY}")

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Finds the encoder and reads all data, on rank 0; continues a training that is resumed.

        Raises:
            PipelineError: what would fail at the first measurement, on every rank alike.
        """
        if not self.config.enabled:
            return
        self.on_init_end(args, state, control)
        self._handler, self._latest = _handler_that_calls(self), None
        if self._handler is None:
            logger.warning(
                "downstream validation finds no list of the trainer's callbacks: its reporters are not told of a "
                "measurement, and early stopping by its metrics must stand behind DownstreamTrainerCallback"
            )
        else:
            _put_in_front(self, self._handler.callbacks)
        self.session.close("FAILED")  # of a training that did not come to its end
        self.session.forget()
        stored = (state.stateful_callbacks or {}).get(self.state_key)
        if stored and state.global_step > 0:
            self.session.load(_from_json(stored))
        module = unwrapped(given["model"])
        with without_autocast_wrapper(module):
            tokenizer = self.tokenizer or _tokenizer(given.get("processing_class"))
            self.session.open(TrainerHost(args, module, tokenizer, self.config.title))
            try:
                self.session.prepare(module)
                self._refuse_monitor(args)
            except BaseException:
                self.session.close("FAILED")
                raise
        self._keep(state)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """With `on_start`, measures the untrained model: all reporters are set up by now."""
        if self._is_on and self.config.on_start and state.global_step == 0 and self.session.last_step is None:
            self._measure(args, state, control, given["model"])
            self._latest = None

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **given: Any) -> None:
        """Measures, and adds the metrics to those of the evaluation."""
        if not self._is_on:
            return
        metrics = {} if metrics is None else metrics
        if self._latest is None or self._latest[0] != state.global_step:
            if self.session.is_due():
                self._measure(args, state, control, given["model"])
            else:
                self._latest = state.global_step, {}
        if self._latest is not None:
            metrics.update(self._latest[1])
        best = args.metric_for_best_model or ""
        best = best if best.startswith(PREFIX) else f"{PREFIX}{best}"
        if best not in metrics and self.config.has_metric(best.removeprefix(PREFIX)):
            metrics[best] = math.nan  # not measured: no new best model, and the trainer goes on

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Where the trainer does not evaluate, measures before a save, so that the checkpoint holds the state.

        Takes in what has been measured in the background.
        """
        self._tell(args, state, control, self.session.poll())
        if self._is_on and control.should_save and not _evaluates(args):
            self._measure_once(args, state, control, given["model"])

    def on_epoch_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """The same for the save at the end of an epoch."""
        self.on_step_end(args, state, control, **given)

    def on_save(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """The same for a save that another callback asked for."""
        if self._is_on and not _evaluates(args):
            self._measure_once(args, state, control, given["model"])

    def on_train_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Draws the curves, and ends the MLflow run if it was opened here."""
        if not self._is_on:
            return
        replaced = args.load_best_model_at_end and state.best_model_checkpoint  # then these are not the final weights
        if self.config.on_end and not replaced and self.session.last_step != state.global_step:
            self._measure(args, state, control, given["model"])
        final = None if replaced else unwrapped(given["model"])
        self._tell(args, state, control, self.session.finish(final, state.global_step))
        self._keep(state)
        self.session.close("FINISHED")

    @property
    def _is_on(self) -> bool:
        return self.session.work is not None

    def _measure_once(self, args: Any, state: Any, control: Any, model: nn.Module) -> None:
        """At most once at a step, and as `every_n_validations` says."""
        if self._latest is None or self._latest[0] != state.global_step:
            if self.session.is_due():
                self._measure(args, state, control, model)
            else:
                self._latest = state.global_step, {}

    def _measure(self, args: Any, state: Any, control: Any, model: nn.Module) -> None:
        """Measures, and tells the trainer's history and its reporters, once."""
        module = unwrapped(model)
        with without_autocast_wrapper(module):
            found = self.session.measure(module, state.global_step)
        self.session.close_at_exit()
        named = {f"{PREFIX}{name}": value for name, value in found.items()}
        self._latest = state.global_step, named
        self._keep(state)
        if not named:
            return
        epoch = {} if state.epoch is None else {"epoch": state.epoch}
        last = state.log_history[-1] if state.log_history else {}
        if last.get("step") == state.global_step and any(name.startswith(PREFIX) for name in last):
            last.update(named)  # the entry of this evaluation
        else:
            state.log_history.append({**named, **epoch, "step": state.global_step})
        if self._handler is not None:
            self._report(args, state, control, {**named, **epoch})

    def _report(self, args: Any, state: Any, control: Any, logs: Mapping[str, float]) -> None:
        """Tells reporters everything, and the console the main metrics alone."""
        should_log, main = control.should_log, {f"{PREFIX}{name}" for name in self.config.headlines} | {"epoch"}
        for is_console in (False, True):
            handler = copy.copy(self._handler)
            handler.callbacks = [one for one in self._handler.callbacks if (type(one) in CONSOLES) == is_console]
            handler.on_log(args, state, control, {name: logs[name] for name in logs if not is_console or name in main})
        control.should_log = should_log

    def _tell(self, args: Any, state: Any, control: Any, points: Sequence[tuple[int, Mapping[str, float]]]) -> None:
        """Tells the trainer's history and its reporters of measurements of earlier steps, at those."""
        for step, metrics in points:
            named = {f"{PREFIX}{name}": value for name, value in metrics.items()}
            state.log_history.append({**named, "step": step})
            if self._handler is not None:
                earlier = copy.copy(state)
                earlier.global_step = step
                self._report(args, earlier, control, named)
        if points:
            self._keep(state)

    def _refuse_monitor(self, args: Any) -> None:
        """Raises ConfigError where the best model would be chosen by a metric that comes later than its weights."""
        best = (args.metric_for_best_model or "").removeprefix(PREFIX)
        if self.session.is_late and self.config.has_metric(best):
            raise ConfigError(late_monitor(f"metric_for_best_model='{args.metric_for_best_model}'"))

    def _keep(self, state: Any) -> None:
        """Puts what a resumed training needs where `trainer_state.json` has it."""
        if state.stateful_callbacks is None:
            state.stateful_callbacks = {}
        state.stateful_callbacks[self.state_key] = _to_json(self.session.state())


def _handler_that_calls(callback: TrainerCallback) -> Any:
    """The trainer's list of callbacks, which calls this one: a callback is handed everything else.

    Its place in the list matters (early stopping must come after it), and reporters are told through it.
    """
    frame = sys._getframe(1)
    while frame is not None:
        found = frame.f_locals.get("self")
        if isinstance(found, CallbackHandler) and callback in found.callbacks:
            return found
        frame = frame.f_back  # type: ignore[assignment]
    return None


def _put_in_front(callback: TrainerCallback, callbacks: list[Any]) -> None:
    """Behind the one that decides on saves, and before all that act on metrics.

    The loop over the list has come to this callback, so none is skipped or called twice.
    """
    callbacks.pop(callbacks.index(callback))
    flow = [index for index, one in enumerate(callbacks) if type(one).__name__ == "DefaultFlowCallback"]
    callbacks.insert(flow[0] + 1 if flow else 0, callback)


def _evaluates(args: Any) -> bool:
    """Whether the trainer evaluates on the way."""
    return str(getattr(args.eval_strategy, "value", args.eval_strategy)) != "no"


def _tokenizer(found: Any) -> Any:
    """A processing class that is a tokenizer, or the one that it has; None without any."""
    found = getattr(found, "tokenizer", found)
    return found if isinstance(found, PreTrainedTokenizerBase) else None


def _to_json(value: Any) -> Any:
    """Plain values, with tensors of bytes as text and tuples as lists."""
    if isinstance(value, torch.Tensor):
        return {"bytes": base64.b64encode(value.numpy().tobytes()).decode()}
    if isinstance(value, Mapping):
        return {key: _to_json(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_to_json(one) for one in value]
    return value


def _from_json(value: Any) -> Any:
    """What `_to_json` was given, but for lists in place of tuples."""
    if isinstance(value, Mapping):
        if [*value] == ["bytes"]:
            return torch.frombuffer(bytearray(base64.b64decode(value["bytes"])), dtype=torch.uint8)
        return {key: _from_json(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_from_json(one) for one in value]
    return value
