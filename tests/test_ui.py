"""What a person sees in the MLflow UI: pages of a real server in a real browser, beside what the database holds."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run
from PIL import Image

from tests.support.browser import CARD, Ui, show_columns, show_model_metrics
from tests.support.programs import ROOT
from tests.support.servers import running

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Locator, Page

ACCURACY = "secondary_structure/test_3state_accuracy"
SPEARMAN = "fitness/test_fitness_spearman"
PARENT = "mlflow.parentRunId"
KINDS = {"measurement": "single", "training": "training", "checkpoints": "several"}


@dataclass
class Lab:
    """A database with a measurement, a training, and a measurement of the two checkpoints that it wrote."""

    uri: str

    @property
    def client(self) -> MlflowClient:
        return MlflowClient(self.uri)

    @cached_property
    def runs(self) -> dict[str, Run]:
        """The three runs that are nested in no other, as in `KINDS`."""
        every = self.client.search_runs(["0"])
        return {KINDS[run.data.tags["downstream.kind"]]: run for run in every if PARENT not in run.data.tags}

    @cached_property
    def children(self) -> list[Run]:
        """The measurements of the several checkpoints, in the order of their steps."""
        several = self.client.search_runs(["0"], f"tags.`{PARENT}` = '{self.id('several')}'")
        return sorted(several, key=lambda run: str(run.info.run_name))

    @cached_property
    def every(self) -> dict[str, float]:
        """Every metric of the single measurement: its stages `score` have them."""
        stages = self.client.search_runs(["0"], f"tags.`{PARENT}` = '{self.id('single')}'")
        scored = [run for run in stages if str(run.info.run_name).startswith("score")]
        return {name: value for run in scored for name, value in run.data.metrics.items() if "/" in name}

    def id(self, key: str) -> str:
        return str(self.runs[key].info.run_id)

    def file(self, key: str, path: str) -> Path:
        return Path(self.client.download_artifacts(self.id(key), path))


@pytest.fixture(scope="module")
def lab(browser: Browser, tmp_path_factory: pytest.TempPathFactory, empty_database: Path) -> Lab:
    """Made as a user does, in as few steps as there can be; the two that do not depend on one another, at once."""
    folder = tmp_path_factory.mktemp("ui")
    lab = Lab(f"sqlite:///{shutil.copy(empty_database, folder / 'mlflow.db')}")
    short = "--overrides=dataset.num_epochs=1 store="
    single = begin(lab, "pipeline", "main", f"{short}{folder}/single")
    training = begin(
        lab, "examples.pretrain", "--steps=20", "--validations=2", f"--out={folder}/out", f"{short}{folder}/store"
    )
    finish(training)
    ckpt = f"--ckpt={folder}/out/checkpoints/*"
    finish(begin(lab, "pipeline", "main", ckpt, "--config=configs/pretrain.yaml", f"{short}{folder}/store"))
    finish(single)
    return lab


def begin(lab: Lab, *arguments: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "MLFLOW_TRACKING_URI": lab.uri, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", *arguments]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )


def finish(process: subprocess.Popen[str]) -> None:
    errors = process.communicate()[1]
    assert process.returncode == 0, errors[-3000:]


@pytest.fixture(scope="module")
def server(lab: Lab) -> Iterator[str]:
    with running(Path(lab.uri.removeprefix("sqlite:///")).parent) as started:
        yield started.uri


@pytest.fixture
def ui(browser: Browser, server: str) -> Iterator[Ui]:
    """Tall enough for MLflow to draw all of a run's charts: it leaves out what would have to be scrolled to."""
    yield Ui(browser, server, height=2600)
    for context in browser.contexts:
        context.close()


def shown(value: float) -> str:
    """A number as JavaScript writes it, in full."""
    return str(int(value)) if value == int(value) else repr(value)


def cells(page: Page, column: str) -> Locator:
    """Of a column of the tables of runs and models; there is a row that the table has, and keeps out of sight."""
    return page.locator(f"[role=gridcell][col-id*='{column}']")


def in_rows(page: Page, column: str) -> list[str]:
    """The texts of a column, from the top: in the document the rows are in any order."""
    cells(page, column).first.wait_for()
    ranked = cells(page, column).evaluate_all(
        "all => all.map(one => [+one.closest('[row-index]').getAttribute('row-index'), one.innerText])"
    )
    return [text for _, text in sorted(ranked)]


def test_the_table_of_runs(ui: Ui, lab: Lab) -> None:
    page = ui.runs()
    show_columns(page, [ACCURACY, SPEARMAN])
    runs = sorted(lab.runs.values(), key=lambda run: -run.info.start_time)
    for run in runs:
        page.get_by_role("link", name=run.info.run_name, exact=True).wait_for()
    for metric in (ACCURACY, SPEARMAN):
        values = [shown(run.data.metrics[metric]) if metric in run.data.metrics else "-" for run in runs]
        assert in_rows(page, metric) == values


def test_the_table_of_runs_ranks_them(ui: Ui, lab: Lab) -> None:
    """What the leaderboard does for checkpoints given together, sorting does for all."""
    page = ui.runs(ACCURACY)
    show_columns(page, [ACCURACY])
    values = [run.data.metrics[ACCURACY] for run in lab.client.search_runs(["0"]) if ACCURACY in run.data.metrics]
    assert in_rows(page, ACCURACY)[: len(values)] == [shown(value) for value in sorted(values, reverse=True)]


def test_two_runs_side_by_side(ui: Ui, lab: Lab) -> None:
    page = ui.compare([run.info.run_id for run in lab.children])
    page.get_by_text("Comparing 2 Runs from 1 Experiment").wait_for()
    page.get_by_text("ckpt.step", exact=True).first.wait_for()  # an axis of the plot: parameters that differ
    for run in lab.children:
        page.get_by_text(str(run.info.run_name), exact=True).first.wait_for()
    for metric in (ACCURACY, SPEARMAN):
        name = page.locator("[role=rowgroup] > div").filter(has=page.get_by_text(metric, exact=True))
        scroll_to(page, name)
        top = name.evaluate("one => one.style.top")
        section = name.locator("xpath=ancestor::*[contains(@class, 'collapse-content-box')]")
        row = section.locator(f"[role=rowgroup] > div[style*='top: {top};'] > span")
        row.nth(1).wait_for()
        values = [float(text) for text in row.all_inner_texts()]
        assert values == pytest.approx([run.data.metrics[metric] for run in lab.children], abs=0.0005)


def scroll_to(page: Page, row: Locator) -> None:
    """Down the table of metrics, which has the rows alone that are in sight."""
    page.get_by_role("link", name=SPEARMAN, exact=True).wait_for()
    table = page.get_by_role("grid").last  # of the values: the grid of the names follows it
    for _ in range(200):
        if row.count():
            break
        table.evaluate("one => { one.scrollTop += 100 }")
        page.wait_for_timeout(50)
    row.wait_for()


@pytest.mark.parametrize(("key", "steps"), [("training", [0, 10, 20]), ("several", [10, 20])])
def test_the_charts_of_a_run_are_grouped_by_task(key: str, steps: list[int], ui: Ui, lab: Lab) -> None:
    run = lab.runs[key]
    page = ui.run(run.info.run_id, "model-metrics")
    for task in ("secondary_structure", "fitness"):
        names = [name for name in run.data.metrics if name.startswith(f"{task}/")]
        page.get_by_text(task, exact=True).wait_for()
        page.get_by_text(f"({len(names)})", exact=True).first.wait_for()
        metric = next(name for name in (ACCURACY, SPEARMAN) if name in names)
        for name in (metric, metric.replace(f"_{metric.split('_')[-1]}", f"_probe_{metric.split('_')[-1]}")):
            page.get_by_placeholder("Search metric charts").fill(f"^{name}$")
            card = page.locator(CARD, has_text=name.split("/")[1])
            plot = card.filter(has_text=f"({name})").locator(".js-plotly-plot .trace, .js-plotly-plot .scatterlayer")
            plot.first.wait_for()
            points = plot.first.evaluate(
                "one => { const {x, y} = one.closest('.js-plotly-plot').data[0]; return [x, y] }"
            )
            history = sorted(lab.client.get_metric_history(run.info.run_id, name), key=lambda point: point.step)
            assert points == [steps, [point.value for point in history]]
        page.get_by_placeholder("Search metric charts").fill("")


def test_the_checkpoints_in_the_tab_of_models(ui: Ui, lab: Lab) -> None:
    page = ui.models()
    show_model_metrics(page, [ACCURACY, SPEARMAN])
    models = lab.client.search_logged_models(["0"])
    assert {model.name for model in models} == {"checkpoint", "step=0", "step=10", "step=20"}
    names = [text.split()[-1] for text in in_rows(page, "name")]
    for metric in (ACCURACY, SPEARMAN):
        values = {model.name: value_of(model.metrics, metric) for model in models}
        assert dict(zip(names, in_rows(page, metric), strict=True)) == values


def value_of(metrics: object, name: str) -> str:
    assert isinstance(metrics, list)
    return next((shown(metric.value) for metric in metrics if metric.key == name), "")


def test_a_picture_among_the_artifacts(ui: Ui, lab: Lab) -> None:
    path = "figures/secondary_structure/3state_confusion.png"
    image = ui.run(lab.id("single"), f"artifacts/{path}").locator(f"img[alt='{path}']")
    image.wait_for()
    with Image.open(lab.file("single", path)) as drawn:
        assert image.evaluate("one => [one.naturalWidth, one.naturalHeight]") == list(drawn.size)


def test_the_leaderboard_is_a_table(ui: Ui, lab: Lab) -> None:
    page = ui.run(lab.id("several"), "artifacts/leaderboard.json")
    page.get_by_role("columnheader").filter(has=page.get_by_text(ACCURACY, exact=True)).wait_for()
    heads, *rows = [
        row.all_inner_texts()
        for row in [each.locator("[role=columnheader], [role=cell]") for each in page.get_by_role("row").all()]
    ]
    ranked = sorted(lab.children, key=lambda run: -run.data.metrics[ACCURACY])
    assert heads[:3] == ["rank", "checkpoint", "step"]
    for place, (run, texts) in enumerate(zip(ranked, rows, strict=True), 1):
        row = dict(zip(heads, texts, strict=True))
        step = str(run.info.run_name).partition(":")[0].removeprefix("step=")
        assert (row["rank"], row["checkpoint"], row["step"]) == (str(place), f"step={step}", step)
        assert {name: shown(value) for name, value in run.data.metrics.items()}.items() <= row.items()


def markdown_table(page: Page) -> list[list[str]]:
    """The rows of the table in a run's description."""
    page.locator("table td").first.wait_for()
    return [row.locator("td").all_inner_texts() for row in page.locator("table tbody tr").all()]


def test_the_description_of_a_measurement_begins_with_a_line_per_target(ui: Ui, lab: Lab) -> None:
    page = ui.run(lab.id("single"))
    page.get_by_text("Show more").click()
    rows = markdown_table(page)
    metrics = lab.every
    assert {name for name, *_ in rows} == every_metric(metrics)
    headlines = [name for name in every_metric(metrics) if re.search("_(accuracy|spearman)$", name)]
    headlines = [name for name in headlines if "balanced" not in name and "per_sequence" not in name]
    lines = page.locator("li:has(code):has(strong)").all_inner_texts()
    assert len(lines) == len(headlines) == 4
    for name in headlines:
        score = f"{name}: {metrics[name]:.4f} ± {metrics[f'{name}_seed_std']:.4f}"
        assert any(line.startswith(score) for line in lines)
    link = page.get_by_role("link", name=ACCURACY, exact=True)
    link.wait_for()
    row = page.get_by_role("row").filter(has=link)
    assert shown(lab.runs["single"].data.metrics[ACCURACY]) in row.inner_text().split()


def every_metric(names: Iterable[str]) -> set[str]:
    """Those that have a row of their own: probe, baselines, intervals and seeds stand in columns."""
    names = [name for name in names if not re.search("_seed_std$|_ci_|/embedding_", name)]
    return {re.sub("_probe_|_baseline_probe_|_baseline_", "_", name) for name in names}


def test_the_description_of_several_is_the_leaderboard(ui: Ui, lab: Lab) -> None:
    table = markdown_table(ui.run(lab.id("several")))
    ranked = sorted(lab.children, key=lambda run: -run.data.metrics[ACCURACY])
    names = [(str(run.info.run_name).partition(":")[0], run.data.metrics) for run in ranked]
    assert [row[:3] for row in table] == [
        [str(place), name, f"{metrics[ACCURACY]:.4f}"] for place, (name, metrics) in enumerate(names, 1)
    ]


def test_the_report_among_the_artifacts(ui: Ui, lab: Lab) -> None:
    page = ui.run(lab.id("single"), "artifacts/report.html")
    report = page.frame_locator("iframe")
    report.get_by_role("heading", name="checkpoint: 4 tasks").wait_for()
    for fold in report.locator("summary").all():
        fold.click()
    shown = report.locator("[aria-label^=Metrics] tbody tr, [aria-label^=Embeddings] tbody tr")
    rows = [row.locator("th, td").all_inner_texts()[:2] for row in shown.all()]
    metrics: Mapping[str, float] = lab.every
    assert {name for name, _ in rows} == every_metric(metrics) | {name for name in metrics if "/embedding_" in name}
    for name, text in rows:
        assert text.split()[0] == f"{metrics[name]:.4f}"
    widths = report.locator("img").evaluate_all("all => all.map(one => one.naturalWidth)")
    assert len(widths) == len(list(lab.file("single", "figures").rglob("*.png"))) > 0
    assert all(widths)
