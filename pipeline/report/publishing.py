"""What trackers are told of a measurement beside its numbers: the pictures, and the page that puts all together."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from pipeline.config.schema import Config
from pipeline.config.yaml_file import to_mapping, to_yaml
from pipeline.encoders.protocol import Encoder
from pipeline.report.figures import curves, draw
from pipeline.report.page import page
from pipeline.score import Scores
from pipeline.statistics.metrics import metric_name
from pipeline.store.temporary import temporary_folder
from pipeline.tracking import Tracker
from pipeline.tracking.journal_run import JournalRun

PACKAGES = ("downstream-validation", "torch", "transformers", "mlflow")


def describe(run: JournalRun, config: Config, folder: str = "") -> None:
    """Logs the configuration, as parameters and as a file in `folder`, and the versions."""
    run.tags({f"version.{name}": number for name, number in versions().items()})
    run.parameters(to_mapping(config))
    run.text(to_yaml(config), f"{folder}/config.yaml".lstrip("/"))


def publish(scores: Sequence[Scores], tracker: Tracker, title: str, facts: Mapping[str, str], yaml: str) -> None:
    """Draws the pictures of a measurement, and writes `report.html`.

    Args:
        scores: what was measured.
        tracker: gets the files: `figures/<task>/*.png`, and the page.
        title: of the page.
        facts: what else it says of the measurement.
        yaml: the configuration.
    """
    with temporary_folder() as temporary:
        pictures: dict[str, Sequence[Path]] = {}
        for one in scores:
            name = metric_name(one.task_name)
            folder = temporary / name
            folder.mkdir()
            pictures[one.task_name] = draw(one, folder)
            for path in pictures[one.task_name]:
                tracker.artifact(path, f"figures/{name}")
        report = temporary / "report.html"
        report.write_text(page(title, scores, pictures, facts, yaml), encoding="utf-8")
        tracker.artifact(report)


def publish_curves(points: Sequence[tuple[int, Mapping[str, float]]], tracker: Tracker, folder: str = "curves") -> None:
    """Draws every metric against the step, where there are two steps at least."""
    if len(points) < 2:
        return
    with temporary_folder() as temporary:
        for path in curves(points, temporary):
            tracker.artifact(path, folder, points[-1][0])


def facts_of(ckpt: str, step: int | None, encoder: Encoder, scores: Sequence[Scores]) -> dict[str, str]:
    """What a reader asks of a measurement first."""
    facts = {"checkpoint": ckpt}
    if step is not None:
        facts["step"] = str(step)
    data = {one.task_name: _data_of(one) for one in scores}
    same = len(set(data.values())) == 1
    facts |= {"data": data[scores[0].task_name]} if same else {f"data of {name}": what for name, what in data.items()}
    precision = getattr(encoder, "precision", "")
    return {
        **facts,
        "digest": encoder.digest[:16],
        "device": f"{encoder.device} {precision}".strip(),
        "versions": ", ".join(f"{name} {number}" for name, number in versions().items()),
        "measured": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


def _data_of(scores: Scores) -> str:
    """Where a task's data are, and how many sequences were used and left out."""
    rows = []
    for name, part in scores.examples.parts.items():
        left_out = f" ({part.left_out} left out)" if part.left_out else ""
        rows.append(f"{len(part)} {name}{left_out}")
    return f"{scores.examples.task.dataset_path}: {', '.join(rows)}"


def versions() -> dict[str, str]:
    """Of Python and of the packages that a score may depend on."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
