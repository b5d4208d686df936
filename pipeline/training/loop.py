"""Any training loop: a call measures the weights of the moment, and changes nothing else."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from pipeline.config.schema import Config
from pipeline.config.yaml_file import read_config, to_mapping
from pipeline.report.tables import Table
from pipeline.tracking.mirrors import mirrors
from pipeline.tracking.protocol import Tracker
from pipeline.training.host import LogHost, default_name
from pipeline.training.session import Session
from pipeline.training.unwrapped import arithmetic, unwrapped, without_autocast_wrapper


class LoopHost(LogHost):
    """See `Host`: a loop of one's own, with the mirrors that the configuration asks for."""

    def __init__(self, config: Config, module: nn.Module, tokenizer: Any, name: str | None, folder: Path) -> None:
        """The device and the autocast are those in force now."""
        super().__init__(folder)
        self.config, self.tokenizer = config, tokenizer
        self.name = name or default_name(module, config.title)
        first = next(module.parameters(), None)
        self.device = torch.device("cpu") if first is None else first.device
        self.context, self.mode = arithmetic(self.device)
        self._opened = ExitStack()

    def mirrors(self, run: Any) -> Sequence[Tracker]:  # noqa: ARG002
        """W&B and TensorBoard as the section `logging` names them."""
        root = Path(self.config.store).expanduser()
        opening = mirrors(self.config.logging, self.name, to_mapping(self.config), root)
        return self._opened.enter_context(opening)

    def close(self) -> None:
        """See `Host.close`."""
        self._opened.close()


class Downstream:
    """Measures a model in training: `downstream = Downstream("my.yaml", tokenizer=...)`, `downstream(model, step)`.

    Where there are several ranks, all of them call and share the work (see `mode`), and get the same metrics or the
    same error. The model may be wrapped by DDP, `torch.compile` or accelerate, or be one of FSDP or of tensor
    parallelism. Model, optimizer, random states and modes are afterwards what they were. Used as a context manager, or
    with `close`, it ends the MLflow run that it opened; else that is done when the program ends.

    Attributes:
        config: of the measurements.
        overview: on rank 0, after `close`: the last scores, and what they have changed by; None without any.
        summary: on rank 0, after `close`: the overview and the headline metrics of each step, in Markdown.
    """

    def __init__(
        self,
        config: str | Path | Mapping[Any, Any] | Config,
        tokenizer: Any = None,
        name: str | None = None,
        folder: str | Path = ".",
    ) -> None:
        """Reads the configuration; everything else waits for the first call.

        Args:
            config: a YAML file with the section `model.dwnstr_task_validation`, its content, or a `Config`.
            tokenizer: the Hugging Face tokenizer; by default that in the model.
            name: of an MLflow run that is opened here; by default the time, the model's class and the tasks.
            folder: below it, in `downstream`, checkpoints are kept where `save` is set.

        Raises:
            ConfigError: the configuration is not valid.
        """
        self.config: Config = config if isinstance(config, Config) else read_config(config)
        self.session: Session = Session(self.config)
        self.tokenizer: Any = tokenizer
        self.name: str | None = name
        self.folder: Path = Path(folder)
        self._last: tuple[Callable[[], nn.Module | None], int, Any] = (lambda: None), 0, None  # that was to be measured

    def __call__(self, model: nn.Module, step: int) -> dict[str, float]:
        """Measures the weights that the model has now, and logs the result at `step`.

        At step 0 it measures with `on_start`, and else only tries whether it can; of the later calls it measures the
        first and then every `every_n_validations`-th.

        Returns:
            The metrics, the same on every rank; empty where nothing was measured: by these keys, where the section is
            not `enabled`, and where the measurement failed and `on_error` is `warn`; and with `mode: background`, where
            they come later, see `curve`.

        Raises:
            PipelineError: at the first call, what would fail at each; later where `on_error` is `raise`.
            LostRankError: a rank did not arrive, or is gone.
        """
        if not self.config.enabled:
            return {}
        module = unwrapped(model)
        with without_autocast_wrapper(module):
            first = self._opened(module)
            self.session.poll()
            due = self.config.on_start if step == 0 else self.session.is_due()
            if not due:
                if first:
                    self.session.try_out(module)
                return {}
            self._last = weakref.ref(module), step, _look(module) if self.session.is_late else None
            try:
                return self.session.measure(module, step)
            finally:
                self.session.close_at_exit()

    def describe(self, model: nn.Module) -> dict[str, Any] | None:
        """What a checkpoint holds under `pipeline.DESCRIPTION`, so that it opens without the code that trained it.

        Every rank calls it, unless the model was measured already. None where `infer_target` names a class, and where
        the section is not `enabled`.

        Raises:
            PipelineError: see `__call__`.
        """
        if not self.config.enabled:
            return None
        module = unwrapped(model)
        with without_autocast_wrapper(module):
            self._opened(module)
        return self.session.description

    @property
    def curve(self) -> list[tuple[int, dict[str, float]]]:
        """The step and the metrics of each measurement of this process."""
        return self.session.curve

    @property
    def overview(self) -> Table | None:
        """See above."""
        return self.session.overview

    @property
    def summary(self) -> str:
        """See above."""
        return self.session.summary

    def state_dict(self) -> dict[str, Any]:
        """What a resumed training needs to go on with the curve, the changes and the MLflow run: numbers and tensors.

        It is rank 0's: the other ranks do not have the predictions that changes are worked out from.
        """
        return self.session.state()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues an interrupted training, see `state_dict`."""
        self.session.load(state)

    def close(self, status: str = "FINISHED") -> None:
        """Draws the curves, and ends the MLflow run if it was opened here, as `FINISHED`, `FAILED` or `KILLED`.

        In the background (`mode`), waits for what is not measured yet if the status is `FINISHED`; every rank calls.
        """
        if status == "FINISHED":
            found, step, look = self._last
            module = found() if self.session.is_late else None
            self.session.finish(module if module is not None and _look(module) == look else None, step)
        self.session.close(status)

    def __enter__(self) -> Downstream:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        failed = "FAILED" if kind and issubclass(kind, Exception) else "KILLED"
        self.close(failed if kind else "FINISHED")

    def _opened(self, module: nn.Module) -> bool:
        """Finds the encoder and reads all data, at the first call alone; whether this is it."""
        if self.session.work is not None:
            return False
        self.session.open(LoopHost(self.config, module, self.tokenizer, self.name, self.folder))
        try:
            self.session.prepare(module)
        except BaseException:
            self.session.work = None
            raise
        return True


def _look(module: nn.Module) -> tuple[int, list[list[float]]]:
    """What changes when weights do: how often they were changed in place, and, as `.data` hides that, some values."""
    weights = [one for one in module.parameters() if not is_lazy(one)]
    flat = [one.detach().reshape(-1) for one in weights]
    return sum(one._version for one in weights), [one[:: max(1, len(one) // 8)].tolist() for one in flat]
