"""Embedding: the stage `embed`, the reference's procedure, and the limit, on the same proteins with the same model.

    python benchmarks/embed.py [--data FOLDER] [--limit 200] [--rounds 3] [--json FILE]

The model is an ESM of random weights (6 layers, width 320, 20 heads). *Reference*: file order, batches of 128 padded to
the longest. *One by one* and *equal lengths* bound what the model can do: tokenised beforehand, results thrown away, no
padding; in the latter, sequences in length-sorted batches are cut or extended to the batch's mean length. Hidden states
of ours and of the reference are compared first.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from timing import in_turn, report
from torch import Tensor
from transformers import EsmConfig, EsmModel

from pipeline import HuggingFaceEncoder, Store, Task
from pipeline.embed import BATCH_TOKENS, embed
from pipeline.load import Examples, load
from pipeline.pretrain import VOCABULARY, make_tokenizer


def make_encoder(layers: int = 6, width: int = 320, heads: int = 20) -> HuggingFaceEncoder:
    """An ESM of random weights."""
    torch.manual_seed(0)
    config = EsmConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * width,
        pad_token_id=1,
        mask_token_id=32,
        max_position_embeddings=1026,
        position_embedding_type="rotary",
    )
    return HuggingFaceEncoder(EsmModel(config, add_pooling_layer=False), make_tokenizer(), "cpu", "fp32")


@torch.inference_mode()
def reference(encoder: HuggingFaceEncoder, sequences: Sequence[str], batch_size: int = 128) -> list[Tensor]:
    """As the reference: batches in file order, padded to the longest."""
    states = []
    for begin in range(0, len(sequences), batch_size):
        rows = [token_ids(encoder, text) for text in sequences[begin : begin + batch_size]]
        longest = max(map(len, rows))
        ids = torch.tensor([row + [1] * (longest - len(row)) for row in rows])
        mask = (torch.arange(longest)[None] < torch.tensor([len(row) for row in rows])[:, None]).long()
        output = encoder.model(input_ids=ids, attention_mask=mask).last_hidden_state
        states += [state[1 : len(row) - 1].clone() for state, row in zip(output, rows, strict=True)]
    return states


@torch.inference_mode()
def forward(encoder: HuggingFaceEncoder, batches: Sequence[Tensor]) -> None:
    """The model alone; each batch has the shape (sequences, tokens), with no padding."""
    for ids in batches:
        encoder.model(input_ids=ids)


def equal_lengths(rows: Sequence[list[int]]) -> list[Tensor]:
    """Length-sorted batches, each sequence cut or extended to the mean length of its batch."""
    batches, batch = [], list[list[int]]()
    for row in [*sorted(rows, key=len, reverse=True), []]:
        if batch and (not row or (len(batch) + 1) * len(batch[0]) > BATCH_TOKENS["cpu"]):
            mean = round(sum(map(len, batch)) / len(batch))
            batches.append(torch.tensor([(one + one[1:-1] * mean)[:mean] for one in batch]))
            batch = []
        batch.append(row)
    return batches


def token_ids(encoder: HuggingFaceEncoder, text: str) -> list[int]:
    """With special tokens."""
    return [*encoder.tokens.before, *encoder.tokens.ids(text), *encoder.tokens.after]


def examples_of(folder: Path, limit: int) -> Examples:
    """The task in a folder with a column `3state`; `limit` sequences of train."""
    task = Task(level="token", task_type="classification", dataset_path=str(folder), target_column=["3state"])
    task.max_rows.train = limit
    return load(task, 1022)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("sample/data/proteins"))
    parser.add_argument("--limit", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    encoder, examples = make_encoder(), examples_of(options.data, options.limit)
    sequences = list(dict.fromkeys([*examples.train.sequences, *examples.test.sequences]))
    rows = [token_ids(encoder, text) for text in sequences]

    def ours() -> None:
        with tempfile.TemporaryDirectory() as folder:
            embed([examples], encoder, Store(Path(folder)))

    some = sequences[:32]
    pairs = zip(reference(encoder, some), encoder.hidden_states(some), strict=True)
    worst = max(float((one - other).abs().max()) for one, other in pairs)
    assert worst < 1e-5, worst
    single, equal = [torch.tensor([row]) for row in rows], equal_lengths(rows)
    ways = {
        "ours": ours,
        "reference": lambda: reference(encoder, sequences),
        "limit: one by one": lambda: forward(encoder, single),
        "limit: equal lengths": lambda: forward(encoder, equal),
    }
    title = f"{len(sequences)} proteins, {sum(map(len, rows))} tokens, {torch.get_num_threads()} threads"
    report(f"{title}; largest difference {worst:.0e}", in_turn(ways, options.rounds), "ours", options.json)


if __name__ == "__main__":
    main()
