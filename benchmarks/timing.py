"""Times several ways of doing the same work in turn, and shows their medians side by side."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table


def in_turn(ways: Mapping[str, Callable[[], Any]], rounds: int, warm: bool = False) -> dict[str, list[float]]:
    """Seconds of each way in each round: first, second, ..., first again, so that a slow spell hits all alike.

    `warm` runs each once before. A way that returns a number has timed itself.
    """
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for way in ways.values() if warm else ():
        way()
    for number in track(range(rounds * len(ways)), "measuring", transient=True, console=Console(stderr=True)):
        name = list(ways)[number % len(ways)]
        began = time.perf_counter()
        own = ways[name]()
        seconds[name].append(own if isinstance(own, float) else time.perf_counter() - began)
    return seconds


def report(title: str, seconds: Mapping[str, list[float]], base: str) -> dict[str, Any]:
    """Prints medians, and for each way the median of its ratios to `base` round by round, with the least and greatest.

    Args:
        title: of the table.
        seconds: from `in_turn`.
        base: the way that the others are compared with.

    Returns:
        The same, to be written as JSON.
    """
    view = Table(title=title, title_justify="left")
    for column in ("", "median s", f"times {base}", "least", "greatest"):
        view.add_column(column, justify="left" if not column else "right")
    found = {}
    for name, values in seconds.items():
        ratios = sorted(one / other for one, other in zip(values, seconds[base], strict=True))
        found[name] = {"median_s": statistics.median(values), "ratio": statistics.median(ratios), "seconds": values}
        numbers = (found[name]["median_s"], found[name]["ratio"], ratios[0], ratios[-1])
        view.add_row(name, *(f"{number:.3f}" for number in numbers))
    Console(width=110).print(view)
    return {"title": title, "base": base, "threads": torch.get_num_threads(), "ways": found}


def write(results: Any, path: Path | None) -> None:
    """Writes results as JSON, where a path is given."""
    if path is not None:
        path.write_text(json.dumps(results, indent=1))
