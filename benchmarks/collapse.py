"""Cases behind the thresholds of `pipeline/statistics/label_free.py`: encoders that have collapsed, and useful ones.

Of each encoder and set of sequences: the logged metrics; how far apart and along how many directions the embeddings
lie, beside the composition of the sequences; and what is said.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional
from transformers import BertConfig, BertModel, EsmConfig, EsmForMaskedLM, EsmModel, EsmTokenizer, GPT2Config, GPT2Model

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline.data import tables
from pipeline.report.tables import Table
from pipeline.statistics import label_free as statistics

ROOT = Path(__file__).resolve().parents[1]
CHECKPOINT = ROOT / "sample" / "checkpoint"
SHAPE: dict[str, Any] = {"vocab_size": 33, "num_hidden_layers": 6, "hidden_size": 320}
MASK, EACH = 32, 150  # the token; sequences of a set
COLUMNS = (
    "encoder",
    "sequences",
    "RankMe",
    "mean cosine",
    "apart, of composition",
    "directions, of composition",
    "said",
)


def main() -> None:
    """Prints a table, and says what it has come to as it goes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", help="folder with gb1_fitness and meltome; without it, the sample alone")
    options = parser.parse_args()
    sample = ROOT / "sample" / "data"
    folders = {"sample's variants": sample / "variants", "sample's proteins": sample / "proteins"}
    if options.data:
        folders |= {name: Path(options.data) / name for name in ("gb1_fitness", "meltome")}
    sets = {name: read(folder)[:EACH] for name, folder in folders.items()}
    tokenizer = EsmTokenizer.from_pretrained(CHECKPOINT)
    rows = []
    for name, model in encoders(read(sample / "family") + sets["sample's proteins"], tokenizer):
        for of_set, texts in sets.items():
            rows.append([name, of_set, *row(embedded(model, texts, tokenizer), texts)])
            print("  ".join(rows[-1]), flush=True)
    print(Table(COLUMNS, rows, frozenset({0, 1, 6})).markdown())


def read(folder: Path) -> list[str]:
    """The distinct train sequences of up to 300 residues, in an order that repeats."""
    texts = tables.read(folder / "train", "x000", ["sequence"]).columns["sequence"]
    found = [str(text) for text in dict.fromkeys(texts) if len(text) <= 300]
    return [found[place] for place in np.random.default_rng(0).permutation(len(found))]


def encoders(texts: Sequence[str], tokenizer: Any) -> Iterator[tuple[str, Any]]:
    """Models by name: random weights of three architectures, trained ones, and ways to collapse."""
    torch.manual_seed(0)
    heads: dict[str, Any] = {"num_attention_heads": 20, "intermediate_size": 1280, "pad_token_id": 1}
    yield "ESM, random", EsmModel(EsmConfig(**SHAPE, **heads, position_embedding_type="rotary"), False)
    yield "BERT, random", BertModel(BertConfig(**SHAPE, **heads), False)
    yield "GPT-2, random", GPT2Model(GPT2Config(vocab_size=33, n_embd=320, n_layer=6, n_head=20))
    sample = EsmForMaskedLM.from_pretrained(CHECKPOINT)
    yield "the sample's checkpoint", sample.esm
    rogue = copy.deepcopy(sample.esm)
    rogue.encoder.emb_layer_norm_after.bias.data[7] += 1000
    yield "the same, a rogue dimension", rogue
    flat = copy.deepcopy(sample.esm)
    flat.encoder.emb_layer_norm_after.weight.data *= 0.01
    flat.encoder.emb_layer_norm_after.bias.data.normal_()
    yield "the same, its last weights / 100", flat
    for steps, rate, decay in (
        (50, 1e-3, 0.01),
        (300, 1e-3, 0.01),
        (200, 1e-1, 0.01),
        (300, 1e-2, 1.0),
        (300, 1e-2, 10.0),
    ):
        torch.manual_seed(0)
        model = EsmForMaskedLM(sample.config)
        loss = train(model, masked_loss, texts, tokenizer, steps, rate, decay)
        yield f"masked, {steps} steps, rate {rate:g}, decay {decay:g}: loss {loss:.2f}", model.esm
    loss = train(sample, view_loss, texts, tokenizer, 100, 1e-3, 0.0)
    yield f"the sample's, 100 steps of two views that attract: loss {loss:.4f}", sample.esm


Loss = Callable[[EsmForMaskedLM, Any], torch.Tensor]


def train(
    model: EsmForMaskedLM, loss_of: Loss, texts: Sequence[str], tokenizer: Any, steps: int, rate: float, decay: float
) -> float:
    """Trains on batches of 32; returns the last loss."""
    draw, optimizer = np.random.default_rng(0), torch.optim.AdamW(model.parameters(), rate, weight_decay=decay)
    model.train()
    for _ in range(steps):
        chosen = [texts[place][:64] for place in draw.integers(0, len(texts), 32)]
        loss = loss_of(model, tokenizer(chosen, return_tensors="pt", padding=True))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return float(loss)


def masked(batch: Any) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The batch with three of ten tokens masked, and which."""
    places = (torch.rand(batch["input_ids"].shape) < 0.3) & (batch["attention_mask"] > 0)
    return {**batch, "input_ids": batch["input_ids"].masked_fill(places, MASK)}, places


def masked_loss(model: EsmForMaskedLM, batch: Any) -> torch.Tensor:
    """That of masked language modelling."""
    given, places = masked(batch)
    return functional.cross_entropy(model(**given).logits[places], batch["input_ids"][places])


def view_loss(model: EsmForMaskedLM, batch: Any) -> torch.Tensor:
    """Two views of a sequence attract and nothing repels: the way to collapse that is best known."""
    one, other = (pooled(model.esm(**masked(batch)[0]).last_hidden_state, batch["attention_mask"]) for _ in range(2))
    return -functional.cosine_similarity(one, other).mean()


def pooled(states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The mean over tokens, shape (sequences, width)."""
    return (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)


@torch.no_grad()
def embedded(model: Any, texts: Sequence[str], tokenizer: Any) -> Any:
    """Mean-pooled, shape (sequences, width)."""
    model.eval()
    found = []
    for start in range(0, len(texts), 25):
        batch = tokenizer(list(texts[start : start + 25]), return_tensors="pt", padding=True)
        found.append(pooled(model(**batch).last_hidden_state, batch["attention_mask"]).numpy())
    return np.concatenate(found)


def row(values: Any, texts: Sequence[str]) -> list[str]:
    """The numbers of an encoder on a set, and what is said."""
    found, known = statistics.label_free(values), statistics.composition(texts)
    apart = statistics.apart(values, known)
    directions = [statistics.directions(np.asarray(one, np.float64)) for one in (values, known)]
    said = "collapsed" if statistics.collapse(values, texts) else ""
    numbers = [f"{found['rank_me']:.2f}", f"{found['mean_cosine']:.5f}", f"{apart:.4f}"]
    return [*numbers, f"{directions[0]:.1f} / {directions[1]:.1f}", said]


if __name__ == "__main__":
    main()
