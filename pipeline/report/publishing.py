"""Publishes what goes to the trackers beside the numbers: configuration, figures, and the HTML page."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config.schema import Config
from pipeline.config.yaml_file import to_mapping, to_yaml
from pipeline.encoders.protocol import Encoder
from pipeline.encoders.remote import kind_of
from pipeline.errors import ConfigError
from pipeline.report.figures import curves, draw
from pipeline.report.overview import Changes
from pipeline.report.page import page
from pipeline.statistics.metrics import metric_name
from pipeline.store.temporary import temporary_folder
from pipeline.tracking.journal_run import JournalRun
from pipeline.tracking.protocol import FOLDER, KIND, VERDICT, Tracker

if TYPE_CHECKING:
    from pipeline.score import Scores

PACKAGES = ("downstream-validation", "torch", "transformers", "mlflow")


def describe(run: JournalRun, config: Config, kind: str, folder: str = "") -> None:
    """Logs the configuration, as parameters and as a file in `folder`, the versions, and what the run is of."""
    names = ", ".join(task.task_name for task in config.dataset)
    run.tags({KIND: kind, f"{FOLDER}.tasks": names} | {f"version.{name}": one for name, one in versions().items()})
    run.parameters(to_mapping(config))
    run.text(to_yaml(config), f"{folder}/config.yaml".lstrip("/"))


def publish(
    scores: Sequence[Scores], changes: Changes, tracker: Tracker, title: str, facts: Mapping[str, str], yaml: str
) -> None:
    """Draws the figures of a measurement and writes `report.html`; the tracker gets the files.

    Args:
        scores: the scores of each task.
        changes: what the metrics have changed by since the training began.
        tracker: gets `figures/<task>/*.png` and the page.
        title: the page's title.
        facts: by name, what else the page says of the measurement.
        yaml: the configuration.
    """
    with temporary_folder() as temporary:
        pictures: dict[str, Sequence[Path]] = {}
        for one in scores:
            name = metric_name(one.task_name)
            pictures[one.task_name] = draw(one, temporary / name)
            for path in pictures[one.task_name]:
                tracker.artifact(path, f"figures/{name}")
        report = temporary / "report.html"
        report.write_text(page(title, scores, pictures, facts, yaml, changes), encoding="utf-8")
        tracker.artifact(report)


def write_report(
    path: Path, scores: Sequence[Scores], changes: Changes, title: str, facts: Mapping[str, str], yaml: str
) -> None:
    """Writes the page to a file of the user's, see `publish`. Raises ConfigError where it cannot be written."""
    with temporary_folder() as temporary:
        pictures = {one.task_name: draw(one, temporary / metric_name(one.task_name)) for one in scores}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(page(title, scores, pictures, facts, yaml, changes), encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"report: '{path}' cannot be written ({error.strerror}); give another path") from error


def publish_curves(points: Sequence[tuple[int, Mapping[str, float]]], tracker: Tracker, folder: str = "curves") -> None:
    """Draws every metric against the step, if there are two measurements or more; without metrics a step is a gap."""
    if sum(bool(metrics) for _, metrics in points) < 2:
        return
    with temporary_folder() as temporary:
        for path in curves(points, temporary):
            tracker.artifact(path, folder, points[-1][0])


def facts_of(ckpt: str, step: int | None, encoder: Encoder, scores: Sequence[Scores]) -> dict[str, str]:
    """What a reader of the report wants to know first: checkpoint, data, device, versions, date."""
    facts = {"checkpoint": ckpt}
    if step is not None:
        facts["step"] = str(step)
    data = {one.task_name: _data_of(one) for one in scores}
    same = len(set(data.values())) == 1
    facts |= {"data": data[scores[0].task_name]} if same else {f"data of {name}": what for name, what in data.items()}
    return {
        **facts,
        "digest": encoder.digest[:16],
        "device": f"{encoder.device} {encoder.precision}".strip(),
        "versions": ", ".join(f"{name} {number}" for name, number in versions().items()),
        "measured": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


def parameters_of(encoder: Encoder, source: str, step: int | None) -> dict[str, Any]:
    """By what runs of measurements differ on MLflow's page of comparisons, beside their configurations."""
    found = {"digest": encoder.digest[:16], "encoder": kind_of(encoder), "hidden_size": encoder.hidden_size}
    return {"source": source, **found} | ({} if step is None else {"step": step})


def tags_of(encoder: Encoder, step: int | None) -> dict[str, str]:
    """The tags that runs of measurements are filtered by: the weights, and their step."""
    tags = {f"{FOLDER}.encoder": kind_of(encoder), f"{FOLDER}.checkpoint": encoder.digest[:16]}
    return tags | ({} if step is None else {f"{FOLDER}.step": str(step)})


def verdict_tags(verdicts: Mapping[str, str]) -> dict[str, str]:
    """A tag for each task with what is said of it; see `verdicts_of`."""
    return {f"{VERDICT}{metric_name(name)}": text for name, text in verdicts.items()}


def _data_of(scores: Scores) -> str:
    """The folder of a task's data, and how many sequences were used and left out."""
    rows = []
    for name, part in scores.examples.parts.items():
        left_out = f" ({part.left_out} left out)" if part.left_out else ""
        rows.append(f"{len(part)} {name}{left_out}")
    return f"{scores.examples.task.dataset_path or 'DataFrame'}: {', '.join(rows)}"


def versions() -> dict[str, str]:
    """The versions of Python and of the packages that a score may depend on."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
