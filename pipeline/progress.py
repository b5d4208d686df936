"""Progress on a terminal and in a notebook; nothing in a log."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

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
    if _hidden.get():
        yield lambda _units: None
    elif _in_notebook():
        from tqdm import tqdm

        with tqdm(total=total, desc=what, unit=f" {unit}", leave=False, mininterval=0.5) as text:
            yield text.update
    elif not sys.stderr.isatty():
        yield lambda _units: None
    else:
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
    """Whether a notebook shows what is printed.

    There a bar is text: those of rich take `ipywidgets`, and leave an empty output for each that has ended.
    """
    if "ipykernel" not in sys.modules:
        return False
    from rich.console import Console

    return Console().is_jupyter
