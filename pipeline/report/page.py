"""A measurement, or several side by side, as a single HTML file, figures included."""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.report.overview import HEAD, PROBE, Changes, Headline, change_table, headlines, overview
from pipeline.report.sparkline import HEIGHT, WIDTH, sparkline
from pipeline.report.tables import (
    class_table,
    companion_table,
    data_table,
    footnote,
    interval_text,
    number,
    score_table,
    seeds_text,
)
from pipeline.report.tables import score_text as value_text
from pipeline.statistics.metrics import P_IMPROVED

if TYPE_CHECKING:
    from jinja2 import Environment
    from markupsafe import Markup

    from pipeline.report.comparison import Leaderboard
    from pipeline.score import Scores

WIDE = 800  # pixels from which a picture has a row of its own
HELPERS = {"HEAD": HEAD, "PROBE": PROBE, "width": WIDTH, "height": HEIGHT}


def page(
    title: str,
    scores: Sequence[Scores],
    pictures: Mapping[str, Sequence[Path]],
    facts: Mapping[str, str],
    yaml: str,
    changes: Changes = Changes(),
) -> str:
    """Returns the HTML of the page.

    Args:
        title: the heading.
        scores: the scores of each task, in the order to show them.
        pictures: by the task's name, its PNG files.
        facts: by name, what else to say of the measurement: checkpoint, digest, date.
        yaml: the configuration.
        changes: what the metrics have changed by since the training began.

    Raises:
        OSError: a picture cannot be read.
    """
    tasks = [_task(one, pictures.get(one.task_name, ()), changes) for one in scores]
    repeats = all(one.examples.task.dataset_path for one in scores)  # else the data were DataFrames
    return _render(
        "measurement.html", title=title, tasks=tasks, facts=facts, yaml=yaml, changes=changes, repeats=repeats
    )


def leaderboard_page(title: str, board: Leaderboard) -> str:
    """Returns the HTML of several checkpoints side by side."""
    every = board.every_metric
    about = f"{P_IMPROVED}." if any(row[0].endswith("_p_improved") for row in every.rows) else ""
    return _render("leaderboard.html", title=title, board=board, bars=board.bars, every=every, about=about)


def notebook_table(title: str, scores: Sequence[Scores], changes: Changes, notes: Sequence[str]) -> str:
    """Returns the HTML of the overview as a notebook shows it, in its own style."""
    return _render("notebook.html", title=title, content=overview(scores, changes), notes=notes)


def _render(template: str, **values: Any) -> str:
    return _environment().get_template(f"{template}.jinja").render(values)


@cache
def _environment() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    loader = PackageLoader("pipeline.report")
    found = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    found.globals.update(HELPERS)
    found.filters.update(
        interval=interval_text, value=value_text, seeds=seeds_text, number=number, breakable=_breakable
    )
    return found


def _breakable(name: str) -> Markup:
    """The name of a metric, that a narrow page breaks between words."""
    from markupsafe import Markup, escape

    return Markup(re.sub("([_/])", r"\1<wbr>", str(escape(name))))  # noqa: S704 - it is escaped


def _task(scores: Scores, pictures: Sequence[Path], changes: Changes) -> dict[str, Any]:
    """What a task's card and its fold show."""
    data, found = set(scores.examples.notes), headlines([scores], changes)
    return {
        "name": scores.task_name,
        "headlines": [(one, _curve(one, changes)) for one in found],
        "footnote": footnote(value_text(metric) for one in found for metric in one.pair.values()),
        "notes": [note for note in (*scores.earlier_notes, *scores.notes) if note not in data],
        "data_notes": [note for note in scores.earlier_notes if note in data],
        "data": data_table(scores),
        "metrics": score_table([scores]),
        "embeddings": companion_table(scores),
        "classes": class_table(scores),
        "changes": change_table(scores, changes),
        "pictures": [_picture(scores.task_name, path) for path in pictures],
    }


def _curve(one: Headline, changes: Changes) -> Any:
    """The head's and the probe's values over the training, and the baseline's level."""
    names = {"probe" if which else "head": metric.key for which, metric in one.pair.items()}
    curves = {name: changes.curves[key] for name, key in names.items() if key in changes.curves}
    return sparkline(curves, one.scores.baselines.get(one.main.key))


def _picture(task_name: str, path: Path) -> dict[str, Any]:
    """A figure, within the page; its alternative text is taken from the file's name."""
    from PIL import Image

    with Image.open(path) as image:
        width, height = image.size
    source = f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"
    alt = f"{task_name}: {path.stem.replace('_', ' ')}"
    return {"src": source, "alt": alt, "width": width, "height": height, "wide": width > WIDE}
