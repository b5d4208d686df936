"""Runs the tutorial's notebook, and stores what its cells give in it, for those who read it on the git forge.

python docs/notebook.py
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import nbformat

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.support.notebooks import TUTORIAL, execute, is_bar, surroundings  # noqa: E402


def main() -> None:
    """Runs it in a new folder with an empty store."""
    notebook = nbformat.read(TUTORIAL, 4)
    metadata = dict(notebook.metadata)
    with tempfile.TemporaryDirectory() as folder:
        os.environ.update(surroundings(Path(folder)))
        execute(notebook, Path(folder))
    notebook.metadata = metadata
    for cell in notebook.cells:
        cell.metadata = {}
        if cell.cell_type == "code":
            shown = _joined([output for output in cell.outputs if not is_bar(output)])
            cell.outputs = [output for output in map(_without_bars, shown) if output.get("text") != ""]
    nbformat.write(notebook, TUTORIAL)


def _joined(outputs: list[Any]) -> list[Any]:
    """The outputs, with what a cell has written to a stream in one."""
    found: list[Any] = []
    for output in outputs:
        if found and output.output_type == "stream" == found[-1].output_type and output.name == found[-1].name:
            found[-1].text += output.text
        else:
            found.append(output)
    return found


def _without_bars(output: Any) -> Any:
    """Lines as they stand in the end: a bar is drawn over until it is gone."""
    if output.output_type == "stream":
        lines = [line.rpartition("\r")[2] for line in output.text.splitlines(keepends=True) if line.endswith("\n")]
        output.text = "".join(line for line in lines if line.strip())
    return output


if __name__ == "__main__":
    main()
