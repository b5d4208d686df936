"""Work in another process that does what it would do here: the same threads, errors and lines of the log.

Whatever brings it there and back (see `ray_engine.py`) needs no more than to pickle it.
"""

from __future__ import annotations

import logging
import os
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any, Self

from pipeline.errors import PipelineError

Line = tuple[str, int, str]  # of the log: logger, level, text
ROOT = "pipeline"  # of the loggers of this project
TRACKING_URI = "MLFLOW_TRACKING_URI"  # `mlflow.set_tracking_uri` sets it too


@dataclass(frozen=True)
class Answer:
    """What work gave, or the error that it raised, and the lines that it logged."""

    value: Any = None
    error: Exception | None = None
    said: tuple[Line, ...] = ()

    def get(self) -> Any:
        """The value. Raises the error."""
        if self.error is not None:
            raise self.error
        return self.value

    def then(self, settings: Settings, work: Callable[[Any], Any]) -> Answer:
        """The answer of further work on the value; this one, where it is an error."""
        if self.error is not None:
            return self
        found = settings.run(lambda: work(self.value))
        return replace(found, said=self.said + found.said)


@dataclass(frozen=True)
class Settings:
    """What the result of work depends on beside its arguments, to the last bit.

    Attributes:
        threads: of torch.
        matmul_precision: of torch, for float32.
        folder: that relative paths start from, where there is such a folder.
        tracking_uri: where MLflow finds what checkpoints name; empty for its default.
    """

    threads: int
    matmul_precision: str
    folder: str
    tracking_uri: str = ""

    @classmethod
    def of_this_process(cls, threads: int) -> Self:
        """Those in force here, with that many threads."""
        import torch

        folder, uri = str(os.getcwd()), os.environ.get(TRACKING_URI, "")  # noqa: PTH109
        return cls(threads, torch.get_float32_matmul_precision(), folder, uri)

    def run(self, work: Callable[[], Any]) -> Answer:
        """Does work in this process, with these settings."""
        import torch

        with suppress(OSError):
            os.chdir(self.folder)
        if self.tracking_uri:
            os.environ[TRACKING_URI] = self.tracking_uri
        torch.set_num_threads(self.threads)
        torch.set_float32_matmul_precision(self.matmul_precision)
        said: list[Line] = []
        with _listening(said):
            try:
                return Answer(work(), None, tuple(said))
            except Exception as error:
                return Answer(None, portable(error), tuple(said))


class Heard:
    """Says here what was logged elsewhere: each line once, however many processes have said it."""

    def __init__(self) -> None:
        """Nothing yet."""
        self._said = set[Line]()

    def value(self, answer: Answer) -> Any:
        """The value of an answer. Raises its error."""
        say(line for line in answer.said if line not in self._said)
        self._said.update(answer.said)
        return answer.get()


def say(lines: Iterable[Line]) -> None:
    """Logs lines that were logged elsewhere."""
    for name, level, text in lines:
        logging.getLogger(name).log(level, "%s", text)


@contextmanager
def _listening(said: list[Line]) -> Iterator[None]:
    """Keeps what this project's loggers say within, which then goes nowhere else."""
    logger = logging.getLogger(ROOT)
    handler = logging.Handler()
    handler.emit = lambda record: said.append((record.name, record.levelno, record.getMessage()))  # type: ignore[method-assign]
    before = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before[0])
        logger.propagate = before[1]


def portable(error: Exception) -> Exception:
    """The error in a form that every process can unpickle; one of this project's keeps its words and its kind."""
    if isinstance(error, PipelineError):
        kind: type[PipelineError] = next(
            kind for kind in type(error).__mro__ if kind.__module__ == PipelineError.__module__
        )
        return kind(*error.args)
    own = type(error).__module__ == "builtins" and len(error.args) == 1
    found: Exception = type(error)(*error.args) if own else RuntimeError(f"{type(error).__name__}: {error}")
    found.add_note("".join(traceback.format_exception(error)))
    return found
