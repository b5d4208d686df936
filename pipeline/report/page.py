"""A measurement as a single HTML file, figures included."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING

from pipeline.report.overview import Changes, overview
from pipeline.report.tables import class_table, companion_table, score_table

if TYPE_CHECKING:
    from pipeline.score import Scores

PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>$title</title>
<style>
:root { color-scheme: light dark; --ink: #222; --dim: #666; --line: #ddd; --back: #fff; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #ddd; --dim: #999; --line: #444; --back: #000; }
  img { filter: invert(1) hue-rotate(180deg); }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 72rem; padding: 1rem; overflow-wrap: anywhere;
  font: 1rem/1.5 system-ui, sans-serif; color: var(--ink); background: var(--back); }
h1, h2 { line-height: 1.2; }
h2 { margin-top: 2.5rem; padding-top: 1rem; border-top: 1px solid var(--line); }
dl { display: grid; grid-template-columns: fit-content(40%) 1fr; gap: 0.25rem 1rem; }
dt { color: var(--dim); }
dd { margin: 0; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; overflow-wrap: normal; }
th, td { padding: 0.25rem 1rem 0.25rem 0; border-bottom: 1px solid var(--line); text-align: left; white-space: nowrap; }
td { text-align: right; font-variant-numeric: tabular-nums; }
th { font-weight: normal; }
thead th { color: var(--dim); white-space: normal; vertical-align: bottom; }
thead th + th { text-align: right; }
td:last-child { color: var(--dim); }
img { display: block; max-width: 100%; height: auto; margin: 1.5rem 0; }
pre { overflow-x: auto; overflow-wrap: normal; }
</style>
</head>
<body>
<main>
<h1>$title</h1>
<div class="wide" role="region" aria-label="Overview" tabindex="0">
$overview
</div>
<dl>
$facts
</dl>
$tasks
<h2>Configuration</h2>
<details>
<summary>The YAML that repeats this measurement</summary>
<pre>$yaml</pre>
</details>
</main>
</body>
</html>
""")
TASK = Template("""<section>
<h2>$name</h2>
<div class="wide" role="region" aria-label="Metrics" tabindex="0">
$table
$embeddings
</div>
$classes
$notes
$pictures
</section>""")


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
    terms = [f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in facts.items()]
    tasks = [_task(one, pictures.get(one.task_name, ())) for one in scores]
    texts = {"title": escape(title), "yaml": escape(yaml), "overview": overview(scores, changes).html()}
    return PAGE.substitute(texts, facts="\n".join(terms), tasks="\n".join(tasks))


def _task(scores: Scores, pictures: Sequence[Path]) -> str:
    """A task's section: its metrics, the warnings, and its figures."""
    items = [f"<li>{escape(note)}</li>" for note in (*scores.earlier_notes, *scores.notes)]
    listed = "<ul>\n" + "\n".join(items) + "\n</ul>" if items else ""
    images = "\n".join(_image(scores.task_name, path) for path in pictures)
    return TASK.substitute(
        name=escape(scores.task_name),
        table=score_table([scores]).html(),
        embeddings=companion_table(scores).html() if scores.companions else "",
        classes=_classes(scores),
        notes=listed,
        pictures=images,
    )


def _classes(scores: Scores) -> str:
    """A fold with the metrics of each class alone; empty where the labels are numbers."""
    table = class_table(scores)
    if not table.rows:
        return ""
    region = f'<div class="wide" role="region" aria-label="Each class" tabindex="0">\n{table.html()}\n</div>'
    return f"<details>\n<summary>Each class alone</summary>\n{region}\n</details>"


def _image(task_name: str, path: Path) -> str:
    """A figure, within the page; its alternative text is taken from the file's name."""
    alt = escape(f"{task_name}: {path.stem.replace('_', ' ')}")
    return f'<img alt="{alt}" src="data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}">'
