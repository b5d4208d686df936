"""Embedding on a GPU: the stage `embed`, its forward passes packed, padded and compiled, and the card's own rate.

    python benchmarks/gpu.py [--layers 24] [--width 1152] [--heads 18] [--sequences 6000] [--rounds 3] [--json FILE]

The model is an ESM of random weights, by default of 400 million, in bf16; proteins have lengths as UniProt has them
(log-normal, median 290, at most 1,022). *Padded* are batches of equal lengths as near as the plan finds them, *file
order* batches of 128 padded to the longest, as the reference has them. Hidden states of the ways are compared first.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from rich.console import Console
from timing import in_turn, report, write
from work import make_esm

from pipeline import Store, Task
from pipeline.embed import BATCH_TOKENS, embed
from pipeline.encoders.forward import batches
from pipeline.load import load
from pipeline.store.embedding_table import sequence_key

RESIDUES = np.array(list("ACDEFGHIKLMNPQRSTVWY"))


def proteins(count: int) -> list[str]:
    """Random residues, of lengths as proteins have them."""
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(np.log(290), 0.65, count), 30, 1022).astype(int)
    return ["".join(rng.choice(RESIDUES, length)) for length in lengths]


def product_rate(size: int = 8192, rounds: int = 20) -> float:
    """Bf16 matrix products of the card, in TFLOP/s."""
    one, other = torch.randn(2, size, size, device="cuda", dtype=torch.bfloat16)
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    for repeat in range(rounds + 3):
        if repeat == 3:
            begin.record()
        one @ other
    end.record()
    torch.cuda.synchronize()
    return float(2 * size**3 * rounds / begin.elapsed_time(end) / 1e9)


def padded_batches(texts: Sequence[str]) -> Iterator[list[str]]:
    """The order of the file, 128 at a time."""
    for begin in range(0, len(texts), 128):
        yield list(texts[begin : begin + 128])


def main() -> None:
    """Prints the rate of each way."""
    options = _options()
    if not torch.cuda.is_available():
        sys.exit("benchmarks/gpu.py: expected a GPU, found none")
    texts = proteins(options.sequences)
    tokens = sum(map(len, texts)) + 2 * len(texts)
    by_key = {sequence_key(text): text for text in texts}
    shape = (options.layers, options.width, options.heads)
    packed, padded = make_esm(*shape, device="cuda"), make_esm(*shape, device="cuda")
    padded.__dict__["_packing"] = None
    assert packed.packs

    def run(encoder: Any, some: Iterator[list[str]]) -> None:
        for batch in some:
            states = encoder.hidden_states(batch)
        torch.cuda.synchronize()
        del states

    def plan(packs: bool) -> Iterator[list[str]]:
        planned = batches(by_key, BATCH_TOKENS["cuda"], 512, packs)
        return ([by_key[key] for key in batch] for batch in planned)

    frame = pd.DataFrame({"sequence": texts, "label": np.linspace(0, 1, len(texts))})
    task = Task(task_name="proteins", target_column=["label"], max_seq_length=1022, emb_batch_size=512)
    examples = [load(task, 1022, frames={"train": frame[: len(frame) // 2], "test": frame[len(frame) // 2 :]})]

    def stage() -> None:
        with tempfile.TemporaryDirectory() as folder:
            embed(examples, packed, Store(Path(folder)))

    difference = _differences(packed, padded, texts[:64])
    ways = {
        "packed": lambda: run(packed, plan(True)),
        "padded": lambda: run(padded, plan(False)),
        "file order, padded": lambda: run(padded, padded_batches(texts)),
        "the stage embed": stage,
    }
    if options.compile:
        compiled = make_esm(*shape, device="cuda", compiled=True)
        assert compiled.packs
        ways["packed, layers compiled"] = lambda: run(compiled, plan(True))
    rate = product_rate()
    seconds = in_turn(ways, options.rounds, warm=True)
    weights = sum(value.numel() for name, value in packed.model.named_parameters() if "embeddings" not in name)
    title = (
        f"{len(texts)} proteins, {tokens} tokens, {weights / 1e6:.0f} million weights; {torch.cuda.get_device_name()}"
    )
    result = report(f"{title}; difference {difference:.1e} of the norm", seconds, "packed")
    for name, way in result["ways"].items():
        way["tokens_per_second"] = tokens / way["median_s"]
        way["tflops"] = 2 * weights * way["tokens_per_second"] / 1e12
        line = (
            f"{name:28} {way['tokens_per_second']:10,.0f} tokens/s, {way['tflops']:5.0f} TFLOP/s in products of weights"
        )
        Console(width=110).print(line)
    longest = [max(map(len, batch)) * len(batch) for batch in padded_batches(texts)]
    share = 1 - sum(map(len, texts)) / sum(longest)
    Console(width=110).print(
        f"the card: {rate:.0f} TFLOP/s in products of 8,192; padding in file order {100 * share:.0f} %"
    )
    write([{**result, "card_tflops": rate, "padding": share}], options.json)


def _differences(one: Any, other: Any, texts: Sequence[str]) -> float:
    """The largest difference of hidden states, as a share of their norm."""
    pairs = zip(one.hidden_states(texts), other.hidden_states(texts), strict=True)
    return max(float((a - b).norm() / b.norm()) for a, b in pairs)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--width", type=int, default=1152)
    parser.add_argument("--heads", type=int, default=18)
    parser.add_argument("--sequences", type=int, default=6000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--compile", action="store_true", help="compiled layers too: a minute more")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
