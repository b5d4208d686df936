# SPDX-License-Identifier: Apache-2.0
"""Make the sample data: synthetic proteins, variants and molecules, the same bytes on every run.

Nothing here is copied from a data set. See ``proteins.py``, ``variants.py`` and ``molecules.py`` for how
the data are made.
"""

from __future__ import annotations

import argparse
import csv
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from dice import Dice
from molecules import molecule_rows
from proteins import Source, protein_row
from variants import Family

Row = dict[str, str]


def split_files(task: str, prefix: str, rows: list[Row], cuts: dict[str, int]) -> dict[str, list[Row]]:
    """Number the rows and deal them out, in order, to the files of a task."""
    named = [{"id": f"{prefix}{n:04d}", **row} for n, row in enumerate(rows, start=1)]
    files: dict[str, list[Row]] = {}
    for name, count in cuts.items():
        files[f"{task}/{name}.csv"], named = named[:count], named[count:]
    return files


def make_files() -> dict[str, list[Row]]:
    """Make every file's rows, each task from a seed of its own."""
    source = Source(Dice(1))
    labelled, unlabelled = Dice(2), Dice(3)
    proteins = [protein_row(labelled, source.draw(labelled)) for _ in range(420)]
    sequences = [{"sequence": source.draw(unlabelled).sequence} for _ in range(2600)]
    molecules = molecule_rows(Dice(4), 300)
    family, labelled = Family(Dice(5)), Dice(6)
    variants = [family.variant(labelled) for _ in range(1500)]
    natural = Dice(7)
    members = [{"sequence": family.member(natural)} for _ in range(3200)]
    halves = {"train/x000": 160, "train/x001": 160, "test/x000": 100}
    many = {"train/x000": 1200, "train/x001": 1200, "test/x000": 200}
    return {
        **split_files("proteins", "p", proteins, halves),
        **split_files("unlabelled", "u", sequences, many),
        **split_files("family", "f", members, {"train/x000": 3000, "test/x000": 200}),
        **split_files("variants", "v", variants, {"train/x000": 1000, "test/x000": 500}),
        **split_files("molecules", "m", molecules, {"train/x000": 240, "test/x000": 60}),
    }


def write_files(out: Path, files: dict[str, list[Row]]) -> None:
    """Write all files to a temporary folder first, so that a failing run leaves none half written."""
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".making-", dir=out) as folder:
        for name, rows in files.items():
            path = Path(folder, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("w", encoding="utf-8", newline="") as handle:
                writer = csv.DictWriter(handle, list(rows[0]), lineterminator="\n")
                writer.writeheader()
                writer.writerows(rows)
        for name in files:
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            Path(folder, name).replace(out / name)


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the data under ``--out``."""
    parser = argparse.ArgumentParser(description="Make the sample data (the same bytes on every run).")
    default = Path(__file__).resolve().parent / "data"
    parser.add_argument("--out", type=Path, default=default, help="folder to write to (sample/data)")
    out: Path = parser.parse_args(arguments).out
    files = make_files()
    write_files(out, files)
    print(f"{len(files)} files, {sum(map(len, files.values()))} rows")
    return 0


if __name__ == "__main__":
    sys.exit(main())
