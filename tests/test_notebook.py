"""The tutorial as a notebook: it is stored without outputs, and runs in a kernel from any folder."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

from tests.support.programs import ROOT

TUTORIAL = ROOT / "examples" / "tutorial.ipynb"


def executed(notebook: Any, folder: Path) -> list[Any]:
    """The cells of code, run in a fresh kernel in a folder."""
    NotebookClient(
        notebook, kernel_name="python3", timeout=300, resources={"metadata": {"path": str(folder)}}
    ).execute()
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def printed(cell: Any, stream: str) -> str:
    return "".join(output.text for output in cell.outputs if output.get("name") == stream)


def test_it_is_stored_without_outputs() -> None:
    notebook = nbformat.read(TUTORIAL, 4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        assert (cell.get("outputs", []), cell.get("execution_count"), dict(cell.metadata)) == ([], None, {})


def test_it_runs_to_a_decision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With bars of text, a table and a picture, and without MLflow."""
    for name in ("HOME", "IPYTHONDIR", "JUPYTER_CONFIG_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    work = tmp_path / "work"
    work.mkdir()
    cells = executed(nbformat.read(TUTORIAL, 4), work)
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
