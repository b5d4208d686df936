"""The tutorial as a notebook, and how it is run; `docs/notebook.py` stores what it gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nbclient import NotebookClient

from tests.support.programs import ROOT

TUTORIAL = ROOT / "examples" / "tutorial.ipynb"
WIDGET = "application/vnd.jupyter.widget-view+json"


def surroundings(folder: Path) -> dict[str, str]:
    """Variables with which a kernel has a home of its own in a folder, and always the same number of threads."""
    home = str(folder / "home")
    own = dict.fromkeys(("HOME", "IPYTHONDIR", "JUPYTER_CONFIG_DIR"), home)
    return {**own, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def is_bar(output: Any) -> bool:
    """Whether an output is a bar of `ipywidgets`, which shows nothing once its kernel is gone."""
    return WIDGET in output.get("data", {})


def execute(notebook: Any, folder: Path) -> None:
    """Runs the cells in a fresh kernel in a folder."""
    where = {"metadata": {"path": str(folder)}}
    NotebookClient(notebook, kernel_name="python3", timeout=300, resources=where).execute()
