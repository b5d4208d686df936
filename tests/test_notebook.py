"""The tutorial as a notebook: it is stored with what its cells give, and runs in a kernel from any folder."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import nbformat
import pytest

from tests.support.notebooks import TUTORIAL, execute, is_bar, surroundings

MOST_BYTES = 100_000
MACHINE = re.compile(r"/(tmp|home|root|Users|mnt|work|var)\b|\\\\Users")  # a path of whoever ran it


def printed(cell: Any, stream: str) -> str:
    return "".join(output.text for output in cell.outputs if output.get("name") == stream)


def shape(cell: Any) -> list[tuple[str, ...]]:
    """What kinds of output a cell has, what it writes to stderr aside."""
    shown = [output for output in cell.outputs if output.get("name") != "stderr" and not is_bar(output)]
    return [(output.output_type, *sorted(output.get("data", {}))) for output in shown]


def code_of(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_it_is_stored_as_docs_notebook_leaves_it() -> None:
    """Small, without bars, and without a word about the machine that it was run on."""
    notebook = nbformat.read(TUTORIAL, 4)
    nbformat.validate(notebook)
    text = TUTORIAL.read_text(encoding="utf-8")
    assert len(text) < MOST_BYTES
    assert not MACHINE.search(text)
    assert r"\r" not in text
    assert not any(cell.metadata for cell in notebook.cells)
    assert not any(is_bar(output) for cell in code_of(notebook) for output in cell.outputs)
    assert [cell.execution_count for cell in code_of(notebook)] == list(range(1, len(code_of(notebook)) + 1))


def test_it_runs_to_a_decision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With bars of text, a table and a picture, and without MLflow."""
    for name, value in surroundings(tmp_path).items():
        monkeypatch.setenv(name, value)
    work = tmp_path / "work"
    work.mkdir()
    notebook = nbformat.read(TUTORIAL, 4)
    execute(notebook, work)
    cells = code_of(notebook)
    said = {cell.source.splitlines()[-1]: cell for cell in cells}
    bars = printed(said["later"], "stderr")
    assert re.search(r"embed: +\d+%\|.+ residues/s", bars)
    assert re.search(r"train_head fitness: +\d+%", bars)
    assert "<table>" in said["later"].outputs[-1].data["text/html"]
    assert "image/png" in said["later.plot()"].outputs[-1].data
    gained, same = (said[f"{now}.compare({then})"] for now, then in (("later", "earlier"), ("compact", "later")))
    assert gained.outputs[-1].data["text/plain"].count("improved") == 3  # p_improved, of the head and of the probe
    assert "not told apart" in same.outputs[-1].data["text/plain"]
    assert "UNEXPECTED" not in printed(same, "stderr")
    assert printed(cells[-1], "stdout") == "pre-training: it pays\nbfloat16: no loss beyond chance\n"
    assert sorted(path.name for path in work.iterdir()) == ["report.html"]
    assert (tmp_path / "home" / ".cache" / "downstream-validation" / "embeddings").is_dir()
    stored = code_of(nbformat.read(TUTORIAL, 4))
    assert [shape(cell) for cell in cells] == [shape(cell) for cell in stored]
    assert printed(cells[-1], "stdout") == printed(stored[-1], "stdout")
