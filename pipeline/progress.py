"""Progress on a terminal and in a notebook; nothing in a log."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from importlib.util import find_spec

_hidden: ContextVar[bool] = ContextVar("hidden", default=False)


@contextmanager
def no_progress() -> Iterator[None]:
    """Draws no bars within: the caller, such as a Lightning trainer, has one of its own."""
    token = _hidden.set(True)
    try:
        yield
    finally:
        _hidden.reset(token)


@contextmanager
def progress(what: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
    """A bar of `total` units on a terminal or in a notebook; gives the function that moves it on."""
    if _hidden.get() or not (sys.stderr.isatty() or _in_notebook()):
        yield lambda _units: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda units: bar.advance(task, units)


def _in_notebook() -> bool:
    """Whether a notebook shows bars: rich draws them with ipywidgets, and without them only warns."""
    if "ipykernel" not in sys.modules or find_spec("ipywidgets") is None:
        return False
    from rich.console import Console

    return Console().is_jupyter
