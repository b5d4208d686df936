"""What a measurement will cost, before it is made: sequences, tokens, steps, time on this device, disk."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from pipeline.command.head_cost import HeadCost, of_baseline, of_checkpoint
from pipeline.embed import made_with
from pipeline.encoders.forward import batches
from pipeline.encoders.protocol import Encoder
from pipeline.load import Examples
from pipeline.store.embedding_table import Store, sequence_key

SECONDS = 5.0  # to time batches for
COUNTED = 4096  # sequences whose tokens are counted; of more, a sample over all lengths stands for the others


@dataclass(frozen=True)
class Cost:
    """The cost of a measurement: of its embeddings and its heads. Probes and scores come on top.

    Attributes:
        rows: by task, the sequences of each part.
        sequences: distinct ones, of all tasks.
        stored: those of them that are in the store already.
        tokens: of the others, special tokens left out.
        seconds: that embedding the others takes; None where that cannot be told, as all are stored.
        timed: the batches that were timed, of `batches`.
        batches: in which the others are embedded.
        disk_bytes: of the embeddings of the others.
        heads: by task.
        baselines: by task, of the heads on its baseline's embeddings; those are not counted above.
    """

    rows: Mapping[str, Mapping[str, int]]
    sequences: int
    stored: int
    tokens: int
    seconds: float | None
    timed: int
    batches: int
    disk_bytes: int
    heads: Mapping[str, HeadCost]
    baselines: Mapping[str, HeadCost]

    @property
    def head_seconds(self) -> float:
        """That the heads of all tasks and baselines take."""
        return sum(one.seconds for one in (*self.heads.values(), *self.baselines.values()))


def estimate(examples: Sequence[Examples], encoder: Encoder, store: Store, seconds: float = SECONDS) -> Cost:
    """Counts what is to be embedded and trained, and times some of it.

    Nothing is stored. The batches are those that `embed` would make, of all lengths.

    Args:
        examples: of each task.
        encoder: what is to be measured.
        store: where its embeddings would be kept.
        seconds: to time batches for; at least two are.

    Raises:
        CheckpointError: the encoder cannot embed a batch.
    """
    every, missing, disk = dict[bytes, str](), dict[bytes, str](), 0
    tables = dict[str, str | None]()
    for level in sorted({one.task.level for one in examples}):
        pooling = encoder.pooling if level == "sequence" else "none"
        table = store.table(encoder.digest, pooling, encoder.hidden_size, encoder.reusable)
        texts = _texts([one for one in examples if one.task.level == level])
        known = table.keys()
        new = {key: text for key, text in texts.items() if key not in known}
        disk += table.row_bytes * (len(new) if level == "sequence" else sum(map(len, new.values())))
        tables[level] = table.folder.name if encoder.reusable else None
        every |= texts
        missing |= new
    plan = made_with(encoder.device, encoder.precision, encoder.pooling, store, examples)
    planned = list(batches(missing, plan["max_batch_tokens"], plan["emb_batch_size"], encoder.packs))
    times = _times([[missing[key] for key in keys] for keys in planned], encoder, seconds)
    sizes = [sum(len(missing[key]) for key in keys) for keys in planned]
    rows = {one.task.task_name: {name: len(part) for name, part in one.parts.items()} for one in examples}
    expected = _expected(times, sizes) if planned else None
    tokens, stored = _tokens([*missing.values()], encoder), len(every) - len(missing)
    heads, baselines = dict[str, HeadCost](), dict[str, HeadCost]()
    for one in examples:
        name, key = one.task.task_name, tables[one.task.level]
        heads[name] = of_checkpoint(one, key, encoder.hidden_size, store, encoder.device)
        if of_baselines := of_baseline(one, store, encoder.device):
            baselines[name] = of_baselines
    return Cost(rows, len(every), stored, tokens, expected, len(times), len(planned), disk, heads, baselines)


def _texts(examples: Sequence[Examples]) -> dict[bytes, str]:
    return {sequence_key(text): text for one in examples for part in one.parts.values() for text in part.sequences}


def _times(planned: Sequence[Sequence[str]], encoder: Encoder, limit: float) -> dict[int, float]:
    """The seconds of some batches, by their place: the first and last, then those between, until the time is up."""
    if not planned:
        return {}
    last = len(planned) - 1
    wanted = [0, last, *(round(last * step / 8) for step in (4, 2, 6, 1, 3, 5, 7))]
    _run(planned[last], encoder)  # the first pass of a process takes longer
    times: dict[int, float] = {}
    for place in dict.fromkeys(wanted):
        if len(times) >= 2 and sum(times.values()) > limit:
            break
        began = time.perf_counter()
        _run(planned[place], encoder)
        times[place] = time.perf_counter() - began
    return times


def _expected(times: Mapping[int, float], sizes: Sequence[int]) -> float:
    """The seconds of all batches of some sizes, in characters: those between timed ones by their time per character."""
    places = sorted(times)
    rates = np.interp(np.arange(len(sizes)), places, [times[place] / sizes[place] for place in places])
    return float(np.dot(rates, sizes))


def _run(texts: Sequence[str], encoder: Encoder) -> None:
    """A forward pass, to its end on a GPU too."""
    with torch.no_grad():
        float(encoder.hidden_states(texts)[-1].sum())


def _tokens(texts: Sequence[str], encoder: Encoder) -> int:
    """The tokens of sequences; of many, about."""
    some = sorted(texts, key=len)[:: max(1, -(-len(texts) // COUNTED))]
    counted = sum(tokens for _, tokens in encoder.count_unknown(some)) if some else 0
    return round(counted * sum(map(len, texts)) / max(1, sum(map(len, some))))
