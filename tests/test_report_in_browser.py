"""The report in a real browser: wide and narrow, light and dark, by keyboard, for a screen reader, on paper."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pytest

from pipeline.report.comparison import Row, leaderboard
from pipeline.report.figures import draw
from pipeline.report.overview import Changes, Reading
from pipeline.report.page import leaderboard_page, page
from pipeline.score import Scores
from pipeline.statistics.metrics import Change, Interval
from pipeline.store.embedding_table import Store
from pipeline.validation import validate
from tests.support.browser import barriers
from tests.support.data import planted_task
from tests.support.encoders import FakeEncoder

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Locator, Page

SIZES = {"desk": (1280, 800), "phone": (390, 844)}


def of_a_training(scores: list[Scores], folder: Path) -> str:
    """The page of the last of five measurements, in which one metric has become worse and one cannot be told apart."""
    headlines = [metric for one in scores for metric in one.results if metric.is_headline]
    found: dict[str, float] = {}
    for metric, low in zip(headlines, (-0.5, -0.25, 0.125, -0.125), strict=False):
        found |= Change(low + 0.125, Interval(low, low + 0.25), 0.5).named(metric.key, "start")
        found |= Change(low, Interval(low - 0.125, low + 0.125), 0.5).named(metric.key, "best")
    curves = {metric.key: [Reading(50 * i, metric.value * i / 4) for i in range(5)] for metric in headlines}
    pictures = {one.task_name: draw(one, folder / one.task_name) for one in scores}
    facts = {"checkpoint": "/data/runs/" + 20 * "long" + "/step=200.ckpt", "measured": "2026-01-02 03:04 UTC"}
    return page("step=200: two tasks", scores, pictures, facts, "a: 1\n", Changes(found, "start", "step 0", curves))


def of_several() -> str:
    """A best checkpoint, one that cannot be told apart, one that is worse, and one that failed."""
    rng = np.random.default_rng(0)
    true, error = rng.standard_normal((2, 100))
    names = ["downstream/test_value_mse", "downstream/test_value_spearman"]
    rows = []
    for step, errors in ((0, 0.6 * error), (50, 0.3 * error[::-1]), (100, 0.299 * error)):
        columns = {"value_target": true, "value_prediction": true + errors, "value_mask": np.ones(100, bool)}
        table = pa.table({"row": [f"x000.csv:{row}" for row in range(100)], **columns})
        metrics = {names[0]: float(np.mean(errors**2)), names[1]: 0.5}
        rows.append(Row(f"step={step}", step, metrics, tables={"downstream": table}))
    return leaderboard_page("4 checkpoints", leaderboard([*rows, Row("broken", None, {}, "no weights")], names))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    folder = tmp_path_factory.mktemp("report")
    first = planted_task(folder / "a", task_name="structure", num_epochs=1)
    numbers = {"target_column": ["number"], "task_type": "regression"}
    second = planted_task(folder / "b", task_name="numbers", num_epochs=0, max_seq_length=20, **numbers)
    scores = validate(FakeEncoder(), [first, second], Store(folder / "store"))
    texts = {"training": of_a_training(scores, folder / "pictures"), "several": of_several()}
    for name, text in texts.items():
        (folder / f"{name}.html").write_text(text, encoding="utf-8")
    return {name: folder / f"{name}.html" for name in texts}


@pytest.fixture
def opened(browser: Browser, files: Mapping[str, Path]) -> Iterator[Any]:
    """Opens a page, at a size and with the options of a browser's context."""

    def opens(name: str, size: str = "desk", **options: Any) -> Page:
        width, height = SIZES[size]
        shown = browser.new_context(viewport={"width": width, "height": height}, **options).new_page()
        shown.goto(files[name].as_uri())
        return shown

    yield opens
    for context in browser.contexts:
        context.close()


def unfold(shown: Page) -> None:
    shown.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", ["training", "several"])
def test_anyone_can_read_it_on_any_screen(opened: Any, name: str, size: str, scheme: str) -> None:
    shown = opened(name, size, color_scheme=scheme)
    unfold(shown)
    assert barriers(shown) == []
    assert shown.evaluate("document.documentElement.scrollWidth") == SIZES[size][0]
    red, *_ = shown.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)")
    assert (red < 64) == (scheme == "dark")
    for image in shown.locator("img").all():
        assert (image.evaluate("one => getComputedStyle(one).filter") != "none") == (scheme == "dark")


def test_what_is_found_can_be_found(opened: Any) -> None:
    """The checks above would see a page that nobody can read."""
    shown = opened("training")
    shown.add_style_tag(content="main { color: #eee; background: #fff } .card { background: #fff; width: 2000px }")
    shown.evaluate("document.querySelector('h2 a').removeAttribute('href')")
    assert any(one.startswith("color-contrast") for one in barriers(shown))
    assert shown.evaluate("document.documentElement.scrollWidth") > 1280


def test_the_first_screen_says_it_all(opened: Any) -> None:
    shown = opened("training")
    cards = shown.locator(".card")
    assert cards.count() == 2
    for card in cards.all():
        box = card.bounding_box()
        assert box["y"] + box["height"] < SIZES["desk"][1]
        assert card.get_by_role("img").count() == 1
    text = cards.first.inner_text()
    for words in ("label accuracy", "worse (head)", "since step 0", "since the best before", "step 0 to 200"):
        assert words in text


def test_nothing_is_loaded_and_nothing_goes_wrong(opened: Any, files: Mapping[str, Path]) -> None:
    shown = opened("training")
    asked: list[str] = []
    shown.on("request", lambda request: asked.append(request.url))
    shown.on("pageerror", lambda error: asked.append(str(error)))
    shown.on("console", lambda message: asked.append(message.text))
    shown.reload()
    unfold(shown)
    assert {url for url in asked if not url.startswith("data:image/png")} == {files["training"].as_uri()}


def rows_of(shown: Page, label: str) -> Locator:
    return shown.get_by_role("region", name=label, exact=True).locator("tbody tr:visible")


def test_metrics_are_searched(opened: Any) -> None:
    shown = opened("training")
    unfold(shown)
    rows, box = rows_of(shown, "Metrics: structure"), shown.get_by_label("Filter: Metrics: structure")
    every = rows.count()
    box.fill("TEST auroc")
    assert [row.split("\t")[0] for row in rows.all_inner_texts()] == ["structure/test_label_auroc"]
    assert shown.locator("output").first.inner_text() == f"1 of {every}"
    assert rows_of(shown, "Metrics: numbers").count() > 1
    box.fill("")
    assert rows.count() == every > 5


def test_without_script_all_is_there(opened: Any) -> None:
    shown = opened("training", java_script_enabled=False)
    assert not rows_of(shown, "Metrics: structure").count()
    shown.locator("summary").first.click()
    assert rows_of(shown, "Metrics: structure").count() > 5
    assert not shown.locator("input:visible").count()
    assert shown.locator("img:visible").count() > 3


def test_by_keyboard(opened: Any) -> None:
    """From a card to its fold, which opens, and there to a picture, which is shown in full."""
    shown = opened("training", "phone")
    shown.keyboard.press("Tab")
    assert shown.evaluate("document.activeElement.innerText") == "structure"
    shown.keyboard.press("Enter")
    picture = shown.locator("figure").first
    picture.wait_for()
    assert shown.locator("details[open]").count() == 1
    shown.keyboard.press("Tab")
    narrow = picture.locator("img").bounding_box()["width"]
    shown.keyboard.press("Enter")
    assert picture.locator("[aria-pressed=true] img").bounding_box()["width"] > narrow
    assert shown.evaluate("document.documentElement.scrollWidth") == SIZES["phone"][0]


def test_what_is_folded_is_printed(opened: Any) -> None:
    for name in ("training", "several"):
        shown = opened(name)
        assert not shown.locator("details td:visible").count()
        shown.emulate_media(media="print")
        assert not shown.locator("details[open]").count()
        cells = shown.locator("details td, details img, pre")
        assert cells.count() > 3
        assert shown.locator("details td:visible, details img:visible, pre:visible").count() == cells.count()
        assert shown.evaluate("document.documentElement.scrollWidth") == SIZES["desk"][0]


def test_rows_that_cannot_be_told_apart_are_marked(opened: Any) -> None:
    rows = rows_of(opened("several"), "Leaderboard")
    names = [row.locator("th").inner_text() for row in rows.all()]
    assert names == ["step=100", "step=50", "step=0", "broken"]
    marks = [[svg.get_attribute("aria-label") for svg in row.locator("svg").all()] for row in rows.all()]
    assert marks == [[], ["not told apart from the first"], ["told apart from the first"], []]
    assert [row.get_attribute("class") for row in rows.all()] == [None, "tied", None, None]
