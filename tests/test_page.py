"""The page holds all that was measured, stands alone, and takes any text for what it is."""

from __future__ import annotations

import base64
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.report.figures import draw
from pipeline.report.overview import Changes, Reading, change_table, headlines
from pipeline.report.page import page
from pipeline.report.sparkline import sparkline
from pipeline.report.tables import Table, class_table, companion_table, data_table, score_table
from pipeline.score import Scores
from pipeline.statistics.metrics import LOSS, Change, Interval
from pipeline.store.embedding_table import Store
from pipeline.validation import validate
from tests.support.data import planted_task
from tests.support.encoders import FakeEncoder

VOID = {"meta", "img", "input", "wbr"}
LOADED = ("src", "href", "xlink:href", "srcset", "action", "poster", "data")
FACTS = {"checkpoint": "runs/<a & b>/last.ckpt", "date": "2026-01-02"}
YAML = "model:\n  dwnstr_task_validation: {enabled: true, note: '</pre><script>'}\n"


class Reader(HTMLParser):
    """Checks that tags are balanced, and keeps texts by the tag they stand in, and attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: dict[str, list[str]] = {}
        self.tags: Counter[str] = Counter()
        self.images: list[dict[str, str | None]] = []
        self.sources: list[str] = []
        self.links: list[str] = []
        self.ids: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        own = [(name, value or "") for name, value in attrs]
        self.links += [value for name, value in own if (tag, name) == ("a", "href")]
        self.sources += [value for name, value in own if name in LOADED and (tag, name) != ("a", "href")]
        self.ids += [value for name, value in own if name == "id"]
        assert not any(name.startswith("on") for name, _ in attrs)
        if tag == "img":
            self.images.append(dict(attrs))
        if tag not in VOID:
            self.open.append(tag)
            self.texts.setdefault(tag, []).append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open:
            self.texts[self.open[-1]][-1] += data


def tables_of(scores: Scores) -> list[Table]:
    return [score_table([scores]), companion_table(scores), class_table(scores), data_table(scores)]


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Scores], dict[str, list[Path]]]:
    folder = tmp_path_factory.mktemp("page")
    first = planted_task(folder / "a", task_name="first <script>alert(1)</script>", num_epochs=2)
    numbers = {"target_column": ["number"], "task_type": "regression"}
    second = planted_task(folder / "b", task_name="second", num_epochs=0, max_seq_length=20, **numbers)
    scores = validate(FakeEncoder(), [first, second], Store(folder / "store"))
    pictures = {one.task_name: draw(one, folder / str(i)) for i, one in enumerate(scores)}
    return scores, pictures


def test_every_number_note_and_picture_is_there(measured: tuple[list[Scores], dict[str, list[Path]]]) -> None:
    scores, pictures = measured
    scores = [replace(one, notes=(*one.notes, "mcc is left out: all of <one> class")) for one in scores]
    reader = Reader(page("Title & more", scores, pictures, FACTS, YAML))
    assert reader.texts["title"] == reader.texts["h1"] == ["Title & more"]
    assert FACTS.items() <= dict(zip(reader.texts["dt"], reader.texts["dd"], strict=True)).items()
    names = [one.task_name for one in scores]
    assert [text for text in reader.texts["h2"] if text] == [*names, "Configuration"]
    assert reader.texts["pre"] == [YAML]
    cells = [cell for one in scores for table in tables_of(one) for row in table.rows for cell in row[1:]]
    assert reader.texts["td"] == cells
    keys = [metric.key for one in scores for metric in one.results if not metric.probe]
    assert [text for text in reader.texts["th"] if "/test_" in text or LOSS in text] == keys
    for one in scores:
        for metric in one.results:
            assert f"{metric.value:.4f}" in cells
    notes = [note for one in scores for note in (*one.earlier_notes, *one.notes)]
    judged = [text for one in headlines(scores) for text, _ in one.judgements]
    assert sorted(reader.texts["li"]) == sorted(notes + judged)
    assert len(notes) > 2
    counts = [len(one.notes) + len(one.earlier_notes) for one in scores]
    assert reader.texts["a"] == [names[0], f"{counts[0]} warnings", names[1], f"{counts[1]} warnings"]
    assert set(reader.links) <= {f"#{one}" for one in reader.ids}
    paths = [path for one in scores for path in pictures[one.task_name]]
    assert [image["src"] for image in reader.images] == [
        "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode() for path in paths
    ]
    assert all(image["alt"] for image in reader.images)
    assert reader.images[0]["alt"] == "first <script>alert(1)</script>: label confusion"


def test_it_needs_nothing_else(measured: tuple[list[Scores], dict[str, list[Path]]]) -> None:
    text = page("Title", *measured, FACTS, YAML)
    reader = Reader(text)
    assert len(reader.sources) == sum(map(len, measured[1].values())) > 0
    assert all(source.startswith("data:image/png;base64,") for source in reader.sources)
    assert reader.tags["script"] == 1
    for outside in ("http://", "https://", "url(", "@import", "<link", "<iframe", "fetch(", "alert(1)</script"):
        assert outside not in text


def test_a_task_without_pictures_or_notes(measured: tuple[list[Scores], dict[str, list[Path]]]) -> None:
    bare = replace(measured[0][0], notes=(), earlier_notes=())
    reader = Reader(page("Title", [bare], {}, {}, ""))
    assert not reader.images
    assert reader.texts["li"] == ["no better than a guess"]
    assert not any("warning" in text for text in reader.texts["a"])
    assert Reader(page("Title", [], {}, {}, "")).texts["h2"] == ["Configuration"]


def test_a_training_has_its_curve_and_what_has_changed(measured: tuple[list[Scores], dict[str, list[Path]]]) -> None:
    scores = measured[0][1]
    head, probe = (one.key for one in scores.results if one.is_headline)
    since = Change(0.25, Interval(0.125, 0.5), 0.99).named(head, "start")
    best = Change(-0.25, Interval(-0.5, -0.125), 0.99).named(head, "best")
    curves = {head: curve((0, 0.25), (50, 0.75), (100, 0.5)), probe: curve((0, 0.0), (50, 0.0), (100, 1.0))}
    of_data = [cell for row in data_table(scores).rows for cell in row[1:]]
    reader = Reader(page("Title", [scores], {}, {}, "", Changes(since | best, "start", "step 0", curves)))
    terms = dict(zip(reader.texts["dt"], reader.texts["dd"], strict=True))
    assert terms["since step 0"] == "+0.250 (+0.125, +0.500)"
    assert terms["since the best before"] == "-0.250 (-0.500, -0.125)"
    assert (reader.tags["svg"], reader.tags["polyline"], reader.tags["polygon"]) == (1, 2, 0)
    assert any("dashed: probe; no bands: the scores have no intervals" in text for text in reader.texts["p"])
    curves[head] = curve((0, 0.25, 0.0, 0.5), (20, 0.5, 0.25, 0.75), (50,), (100, 0.5, 0.25, 0.75))
    gap = Reader(page("Title", [scores], {}, {}, "", Changes(since, "start", "step 0", curves)))
    assert (gap.tags["polyline"], gap.tags["polygon"]) == (3, 1)
    assert any("dashed: probe; bands: 95 % intervals; gaps: no value" in text for text in gap.texts["p"])
    told = change_table(scores, Changes(since | best, "start", "step 0")).rows
    assert len(told) == 2
    cells = [cell for row in told for cell in row[1:]] + of_data
    assert reader.texts["td"][-len(cells) :] == cells
    alone = Reader(page("Title", [scores], {}, {}, "", Changes({}, "start", "step 0", {head: curve((0, 0.25))})))
    assert not alone.tags["svg"]
    assert not any("since" in text for text in alone.texts["dt"])


def curve(*points: tuple[int] | tuple[int, float] | tuple[int, float, float, float]) -> list[Reading]:
    return [Reading(*point) for point in points]


def test_a_sparkline() -> None:
    head = curve((0, 0.25), (50, 0.75), (100, 0.5))
    found = sparkline({"head": head, "probe": curve((50, 1.0))}, level=0.0)
    assert found is not None
    assert found.lines == {"head": ["4,34 120,14 236,24"], "probe": ["119,4 121,4"]}
    assert found.bands == {"head": [], "probe": []}
    assert (found.dot, found.level, found.steps) == ((236.0, 24.0), 44.0, (0, 100))
    assert found.label == "3 measurements, from 0.250 at step 0 to 0.500 at step 100, between 0.250 and 0.750"
    assert sparkline({"head": curve((0, 1.0))}) is None
    assert sparkline({}) is None
    level = sparkline({"head": curve((3, 1.0), (3, 1.0))})
    assert level is not None
    assert level.dot == (4.0, 44.0)


def test_a_gap_in_a_sparkline_is_a_gap_and_intervals_are_bands() -> None:
    """The last value, after the gap, has no interval."""
    ends: list[Any] = [(0, 0.5, 0.25, 1.0), (25, 0.5, 0.0, 0.75), (50,), (75, 0.5, 0.25, 0.75), (100, 0.75)]
    found = sparkline({"head": curve(*ends)})
    assert found is not None
    assert found.lines["head"] == ["4,24 62,24", "178,24 236,14"]
    assert found.bands["head"] == ["4,4 62,14 62,44 4,34"]
    assert (found.gaps, found.steps) == (1, (0, 100))
    assert found.label.startswith("4 measurements, from 0.500 at step 0 to 0.750 at step 100")


printable = st.text(st.characters(exclude_categories=["C"], exclude_characters="\r"))


@settings(max_examples=50, deadline=None)
@given(printable, st.dictionaries(printable, printable), printable)
def test_any_text_is_shown_as_it_is(
    measured: tuple[list[Scores], dict[str, list[Path]]], title: str, facts: dict[str, str], yaml: str
) -> None:
    """Tags, entities, and what a template would take for a place of its own."""
    for text in ("$title ${facts} $$ &lt; <!-- ]]>", title):
        examples = measured[0][1].examples
        examples = replace(examples, task=replace(examples.task, task_name=text))
        scores = replace(measured[0][1], examples=examples, notes=(text,), earlier_notes=())
        reader = Reader(page(text, [scores], {}, {**facts, text: text}, yaml))
        assert reader.texts["h1"] == [text]
        assert reader.texts["a"][0] == text
        assert reader.texts["h2"][1] == text
        assert text in reader.texts["li"]
        told = {**facts, text: text}
        assert reader.texts["dt"][-len(told) :] == list(told)
        assert reader.texts["dd"][-len(told) :] == list(told.values())
        assert reader.texts["pre"] == [yaml]
