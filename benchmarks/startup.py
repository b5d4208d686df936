"""Start-up: `--help`, an error in the configuration, and a measurement with everything stored, beside `import torch`.

    python benchmarks/startup.py [--ckpt sample/checkpoint] [--rounds 5] [--json FILE]

The last table names what each second of the stored measurement goes to: the imports of each library (from
`python -X importtime`), and the rest.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.table import Table
from timing import in_turn, report, write

TIMED = re.compile(r"import time:\s+(\d+) \|\s+\d+ \|\s+([\w.]+)")


def run(arguments: Sequence[str], environment: dict[str, str], code: int = 0) -> str:
    """Runs Python in a process of its own; what it writes to stderr."""
    command = [sys.executable, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    return done.stderr


def imports(stderr: str) -> dict[str, float]:
    """Seconds of each package's own modules, largest first."""
    seconds: dict[str, float] = defaultdict(float)
    for microseconds, module in TIMED.findall(stderr):
        seconds[module.split(".")[0]] += int(microseconds) / 1e6
    return dict(sorted(seconds.items(), key=lambda pair: -pair[1]))


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", default="sample/checkpoint")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db"}
        environment.pop("MLFLOW_RUN_ID", None)
        stored = ["-m", "pipeline", "main", "--ckpt", options.ckpt, "--overrides", f"store={folder}/store"]
        ways = {
            "import torch": partial(run, ["-c", "import torch"], environment),
            "--help": partial(run, ["-m", "pipeline", "--help"], environment),
            "a wrong key": partial(run, ["-m", "pipeline", "main", "--overrides", "batchsize=1"], environment, 2),
            "all is stored": partial(run, stored, environment),
        }
        seconds = in_turn(ways, options.rounds, warm=True)
        results = report("start-up", seconds, "import torch")
        found = imports(run(["-X", "importtime", *stored], environment))
    view = Table("imports of the last", "s", title="where its time goes", title_justify="left")
    for package, took in list(found.items())[:12]:
        view.add_row(package, f"{took:.2f}")
    view.add_row("all imports", f"{sum(found.values()):.2f}")
    Console(width=110).print(view)
    write({**results, "imports_s": found}, options.json)


if __name__ == "__main__":
    main()
