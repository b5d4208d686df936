"""Which score to trust: what a pre-training has gained on real data, beside the noise of each way to measure it.

    python benchmarks/signal_noise.py --data FOLDER [--out FOLDER] [--sets NAME ...] [--parts gains ranking]
        [--steps 1800] [--checkpoints 15] [--seeds 10] [--tokens 60] [--draws 3] [--json FILE]

FOLDER holds the data sets of `signal_models.SETS` and what to pre-train on. An ESM of 2 layers and width 96 is
pre-trained by masked language modelling, one on proteins, one on molecules; `--out` keeps their checkpoints for the
next run. `gains` measures the untrained and the last model on each set: by a head with the reference's example settings
(squared error of raw labels, learning rate 1e-4, 10 epochs in batches of 128), by heads with the settings of `configs/`
(1e-3, 20 epochs or, for numbers of sequences, 40, in batches of 32), by the probe, and the composition of sequences by
ridge. `ranking` is in `signal_ranking.py`: which way ranks the checkpoints of a training as much data would.

Seconds are CPU seconds of one thread. A first look takes about a minute:
`--sets meltome --parts gains --steps 60 --checkpoints 2 --seeds 3`.

(A file `signal.py` here would be imported in place of the standard library's module by every program of this folder.)
"""

from __future__ import annotations

import argparse
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from signal_gains import gain_tables, gains
from signal_models import SETS, checkpoints, encoder_of
from signal_ranking import rank
from timing import write

from pipeline import Store


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [one.name for one in SETS]
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets")
    parser.add_argument("--out", type=Path, help="folder of the checkpoints, kept for the next run")
    parser.add_argument("--sets", nargs="+", choices=names, default=names)
    parser.add_argument("--parts", nargs="+", choices=["gains", "ranking"], default=["gains", "ranking"])
    parser.add_argument("--steps", type=int, default=1800, help="of the pre-training on proteins; a third on molecules")
    parser.add_argument("--checkpoints", type=int, default=15, help="beside the untrained one")
    parser.add_argument("--seeds", type=int, default=10, help="of heads; at least 2")
    parser.add_argument("--tokens", type=int, default=60, help="most train and test sequences of token-level tasks")
    parser.add_argument("--draws", type=int, default=3, help="of small tasks in the ranking")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, Any] = {"gains": []}
    with tempfile.TemporaryDirectory() as made, nullcontext(options.out or Path(made)) as out:
        store = Store(Path(made) / "store")
        proteins = checkpoints(options.data, out / "proteins", options.steps, options.checkpoints)
        if "ranking" in options.parts:
            results["ranking"], table = rank(proteins, options, store)
            write(results, options.json)
            print(table.markdown(), "\n", flush=True)
        for one in (one for one in SETS if one.name in options.sets and "gains" in options.parts):
            paths = proteins
            if one.smiles:
                paths = checkpoints(options.data, out / "molecules", options.steps // 3, 1, smiles=True)
            encoders = [encoder_of(paths[0]), encoder_of(paths[-1])]
            results["gains"].append(gains(one, encoders, store, options))
            write(results, options.json)
        for table in gain_tables(results["gains"]) if results["gains"] else []:
            print(table.markdown(), "\n")


if __name__ == "__main__":
    main()
