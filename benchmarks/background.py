"""What a measurement in the background costs a training: in turn with one that the training waits for.

    python benchmarks/background.py [--layers 6] [--width 320] [--rounds 7] [--rows 0] [--json FILE]

A loop of optimizer steps of an ESM, measured on the sample data. *Stall* is the time that one measurement keeps the
training: the call with the weights, and the call that takes in the result and hands it to the journal. Beside it, in
the same round, the time to copy the same weights to the CPU, and to write them to the same disk and wait for it.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from timing import report, write

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from transformers import EsmConfig, EsmForMaskedLM

from pipeline import Downstream, read_config
from pipeline.encoders.esm import VOCABULARY, make_tokenizer
from pipeline.training.snapshots import on_cpu, synced


def timed(work: Callable[[], Any]) -> float:
    """Seconds of a call."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


class Loop:
    """A training of one model, measured in one way."""

    def __init__(self, mode: str, folder: Path, layers: int, width: int, rows: int, figures: bool) -> None:
        """Of random weights, on random tokens; measured on at most `rows` sequences of each part."""
        less = "dataset.num_epochs=1 dataset.num_seeds=1 dataset.baselines=false"
        less += f" dataset.max_rows.train={rows} dataset.max_rows.test={rows}" if rows else ""
        own = f"{less} logging.figures={str(figures).lower()} store={folder}/store mode={mode}"
        config = read_config("configs/pretrain.yaml", own)
        torch.manual_seed(0)
        size: dict[str, Any] = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": 20}
        size |= {"intermediate_size": 4 * width, "vocab_size": len(VOCABULARY), "max_position_embeddings": 1026}
        known = EsmConfig(pad_token_id=1, mask_token_id=32, position_embedding_type="rotary", **size)
        self.model, self.step, self.mode = EsmForMaskedLM(known), 0, mode
        self.optimizer = torch.optim.AdamW(self.model.parameters())
        self.downstream = Downstream(config, make_tokenizer(), f"benchmark {mode}", folder / mode)

    def train(self) -> None:
        """An optimizer step."""
        tokens = torch.randint(4, 24, (4, 64))
        loss = self.model(tokens, labels=tokens).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1

    def stall(self) -> float:
        """Seconds of one measurement; the worker is idle again afterwards."""
        self.train()
        before = len(self.downstream.curve)
        seconds = timed(lambda: self.downstream(self.model, self.step))
        while len(self.downstream.curve) == before:
            self.train()
            took = timed(self.downstream.session.poll)
            seconds += took if len(self.downstream.curve) > before else 0.0
        return seconds


def one_round(late: Loop, waited: Loop, folder: Path) -> dict[str, float]:
    """The seconds of each way, in turn."""
    state = late.model.state_dict()
    found = {"background": late.stall()}
    found["clone"] = timed(lambda: on_cpu(state))
    copied = {"state_dict": on_cpu(state), "global_step": 0}
    found["write"] = timed(lambda: synced(folder / "weights.ckpt", lambda path: torch.save(copied, path)))
    found["clone + write"] = found["clone"] + found["write"]
    return {**found, "blocking": waited.stall()}


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=320)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--rows", type=int, default=0, help="most sequences of each part; 0: all")
    parser.add_argument("--figures", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{folder}/mlflow.db"
        late, waited = (
            Loop(mode, folder, options.layers, options.width, options.rows, options.figures)
            for mode in ("background", "blocking")
        )
        with late.downstream, waited.downstream:
            for loop in (late, waited):  # opens the run of MLflow, and starts the worker
                loop.stall()
            found = [one_round(late, waited, folder) for _ in range(options.rounds)]
        size = sum(value.numel() * value.element_size() for value in late.model.state_dict().values()) / 1e6
    seconds = {name: [one[name] for one in found] for name in found[0]}
    results = report(f"{size:.0f} MB of weights, {options.rounds} measurements", seconds, "clone + write")
    extra = statistics.median(1000 * (one["background"] - one["clone + write"]) for one in found)
    share = statistics.median(one["background"] / one["blocking"] for one in found)
    Console().print(f"background: {extra:+.1f} ms beside clone + write; {share:.1%} of the stall of blocking")
    write({**results, "extra_ms": extra, "share": share}, options.json)


if __name__ == "__main__":
    main()
