"""The page holds all that was measured, stands alone, and takes any text for what it is."""

from __future__ import annotations

import base64
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.report.figures import draw
from pipeline.report.overview import overview
from pipeline.report.page import page
from pipeline.report.tables import class_table
from pipeline.score import Scores
from pipeline.statistics.metrics import LOSS
from pipeline.store.embedding_table import Store
from pipeline.validation import validate
from tests.support.data import planted_task
from tests.support.encoders import FakeEncoder

VOID = {"meta", "img"}
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
        self.sources: list[str | None] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.sources += [value for name, value in attrs if name in ("src", "href", "srcset", "action", "poster")]
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
    assert dict(zip(reader.texts["dt"], reader.texts["dd"], strict=True)) == FACTS
    assert reader.texts["h2"] == [*(one.task_name for one in scores), "Configuration"]
    assert reader.texts["pre"] == [YAML]
    cells = [cell for row in overview(scores).rows for cell in row[1:]]
    for one in scores:
        assert one.metrics
        for metric in (result for result in one.results if not result.probe):
            beside = "" if metric.name == LOSS else f"{one.metrics[replace(metric, probe=True).key]:.4f}"
            cells += [f"{metric.value:.4f}", beside]
            cells += [f"{one.constant[metric.key]:.4f}" if metric.key in one.constant else ""]
        cells += [f"{value:.4f}" for value in one.companions.values()]
        cells += [cell for row in class_table(one).rows for cell in row[1:]]
    assert reader.texts["td"] == cells
    names = [metric.key for one in scores for metric in one.results if not metric.probe]
    first = [metric.key for one in scores for metric in one.results if metric.is_headline and not metric.probe]
    assert [text for text in reader.texts["th"] if "/test_" in text or LOSS in text] == [*first, *names]
    notes = [note for one in scores for note in (*one.earlier_notes, *one.notes)]
    assert reader.texts["li"] == notes
    assert len(notes) > 2
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
    assert all(source and source.startswith("data:image/png;base64,") for source in reader.sources)
    for outside in ("http://", "https://", "url(", "@import", "<script", "<link", "<iframe"):
        assert outside not in text


def test_a_task_without_pictures_or_notes(measured: tuple[list[Scores], dict[str, list[Path]]]) -> None:
    bare = replace(measured[0][0], notes=(), earlier_notes=())
    reader = Reader(page("Title", [bare], {}, {}, ""))
    assert not reader.images
    assert not reader.tags["li"]
    assert not reader.tags["ul"]
    assert Reader(page("Title", [], {}, {}, "")).texts["h2"] == ["Configuration"]


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
        assert reader.texts["h2"][0] == text
        assert reader.texts["li"][0] == text
        assert reader.texts["dt"] == list({**facts, text: text})
        assert reader.texts["dd"] == list({**facts, text: text}.values())
        assert reader.texts["pre"] == [yaml]
