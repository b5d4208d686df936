"""Tables on terminals of any width: no name, number or word is lost or broken."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest

PROGRAM = """
from pipeline.report.tables import Table
names = "secondary_structure/test_3state_accuracy", "location/test_location_accuracy"
verdict = "still learning; not better than its baseline"
rows = [[name, "0.5947 ± 0.0132 †", "0.571, 0.618", "0.4943", "0.472, 0.517", verdict] for name in names]
columns = "metric", "score ± seeds", "95 %", "probe", "95 %", "verdict"
print(Table(columns, rows, frozenset({0, 5}), "Scores").text())
steps = [[str(step), "0.5947", "0.4943"] for step in range(2)]
print(Table(("step", *names), steps, frozenset(), "Steps").text())
"""


def printed(width: int) -> str:
    """What the program prints on a terminal of so many columns, without the lines of tables and styles."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, width, 0, 0))
    environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
    command = [sys.executable, "-c", PROGRAM]
    root = Path(__file__).parent.parent
    subprocess.run(command, stdout=theirs, env=environment | {"TERM": "xterm"}, check=True, cwd=root)
    os.close(theirs)
    found = b""
    try:
        while part := os.read(ours, 65536):
            found += part
    except OSError:  # the end, on Linux
        pass
    os.close(ours)
    return re.sub(r"\x1b\[[\d;]*m", "", found.decode()).replace("\r\n", "\n")


@pytest.mark.parametrize("width", [60, 80, 100, 120, 160])
def test_nothing_is_lost_on_a_narrow_terminal(width: int) -> None:
    text = printed(width)
    scores, steps = text.split("Steps")
    assert max(map(len, text.splitlines())) <= width
    whole = ("secondary_structure/test_3state_accuracy", "location/test_location_accuracy", "0.5947 ± 0.0132", "0.4943")
    assert all(one in scores for one in whole)
    assert scores.count("baseline") == scores.count("0.472, 0.517") == 2
    assert ("│" in scores) == (width >= 140)
    assert scores.count("another seed") == 1
    assert "│    1 │" in steps
