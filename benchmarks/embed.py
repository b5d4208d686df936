"""Embedding: the stage `embed`, the reference's procedure, and the limit, on the same sequences with the same model.

    python benchmarks/embed.py [--proteins FOLDER] [--molecules FOLDER] [--limit N] [--rounds 3] [--json FILE]

Models are an ESM and a BART of random weights (6 layers, width 320, 20 heads). *Reference*: file order, batches of 128
padded to the longest. *One by one* and *equal lengths* bound what the model can do: tokenised beforehand, results
thrown away, no padding; in the latter, sequences in length-sorted batches are cut or extended to the batch's mean
length.
Hidden states of ours and of the reference are compared first. *Ours* has all that the stage does: digests, checks, the
forward passes, the store. *Without the store* has the forward passes alone.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import reference
import torch
from timing import in_turn, report, write
from torch import Tensor
from work import chosen, parser, sequences_of

from pipeline import HuggingFaceEncoder, Store
from pipeline.embed import BATCH_TOKENS, embed
from pipeline.encoders.forward import batches
from pipeline.store.embedding_table import sequence_key


@torch.inference_mode()
def forward(encoder: HuggingFaceEncoder, rows: Sequence[Tensor]) -> None:
    """The model alone; each batch has the shape (sequences, tokens), with no padding."""
    for ids in rows:
        encoder.model(input_ids=ids)


def equal_lengths(rows: Sequence[list[int]]) -> list[Tensor]:
    """Length-sorted batches, each sequence cut or extended to the mean length of its batch."""
    found, batch = [], list[list[int]]()
    for row in [*sorted(rows, key=len, reverse=True), []]:
        if batch and (not row or (len(batch) + 1) * len(batch[0]) > BATCH_TOKENS["cpu"]):
            mean = round(sum(map(len, batch)) / len(batch))
            found.append(torch.tensor([(one + one[1:-1] * mean + one)[:mean] for one in batch]))
            batch = []
        batch.append(row)
    return found


def without_store(encoder: HuggingFaceEncoder, sequences: Sequence[str]) -> None:
    """The forward passes of the batch plan."""
    texts = {sequence_key(text): text for text in sequences}
    for batch in batches(texts, BATCH_TOKENS["cpu"], 128, encoder.packs):
        encoder.hidden_states([texts[key] for key in batch])


def main() -> None:
    """Prints a table for each kind."""
    options = parser(__doc__).parse_args()
    results = []
    for kind in ("proteins", "molecules"):
        encoder, _, examples = chosen(options, kind)
        sequences = sequences_of(examples)
        rows = [reference.token_ids(encoder, text) for text in sequences]
        pairs = zip(reference.embed(encoder, sequences[:32]), encoder.hidden_states(sequences[:32]), strict=True)
        worst = max(float((one - other).abs().max()) for one, other in pairs)
        assert worst < 1e-5, worst
        single, equal = [torch.tensor([row]) for row in rows], equal_lengths(rows)

        def ours(encoder: HuggingFaceEncoder = encoder, examples: object = examples) -> None:
            encoder.__dict__.pop("digest", None)
            with tempfile.TemporaryDirectory() as folder:
                embed([examples], encoder, Store(Path(folder)))  # type: ignore[list-item]

        ways = {
            "ours": ours,
            "without the store": lambda e=encoder, s=sequences: without_store(e, s),
            "limit: one by one": lambda e=encoder, r=single: forward(e, r),
            "limit: equal lengths": lambda e=encoder, r=equal: forward(e, r),
            "reference": lambda e=encoder, s=sequences: reference.embed(e, s),
        }
        title = f"{len(sequences)} {kind}, {sum(map(len, rows))} tokens, {torch.get_num_threads()} threads"
        seconds = in_turn(ways, options.rounds)
        seconds["limit"] = [min(pair) for pair in zip(*(seconds[name] for name in list(ways)[2:4]), strict=True)]
        results.append(report(f"{title}; largest difference {worst:.0e}", seconds, "ours"))
    write(results, options.json)


if __name__ == "__main__":
    main()
