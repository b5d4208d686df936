"""Stage 2: `Examples` and an `Encoder` to `Embeddings`.

All tasks meet here: each distinct sequence whose embedding is not stored goes through the encoder once, whatever tasks
and parts it is in.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.encoders.embedding_pass import embed_missing
from pipeline.encoders.protocol import Encoder
from pipeline.encoders.unknown import count_unknown
from pipeline.engines.workers import ALONE, Workers
from pipeline.load import Examples
from pipeline.statistics.label_free import collapse, label_free, sample
from pipeline.store.embedding_table import EmbeddingTable, Store, sequence_key
from pipeline.store.reading import Rows
from pipeline.store.shards import DamagedShardsError, Entry

logger = logging.getLogger(__name__)

# Tokens (padding counted) in a batch. Large batches do not fit a CPU's caches; small batches leave a GPU idle.
BATCH_TOKENS = {"cpu": 2_048, "cuda": 65_536, "mps": 16_384}


@dataclass(frozen=True)
class Embeddings:
    """A task's embeddings, in the order of its examples.

    Attributes:
        examples: what was embedded.
        all_rows: of the sequences of all tasks with this pooling.
        entries: for each part, where each example's rows are stored: one row, or one per token.
        memory_bytes: the budget of `rows`.
        metrics: of the pass over all tasks: how many distinct sequences were `embedded`, how many were stored before
            (`cached`) and their share (`cache_hits`), and the `tokens` of the embedded sequences, special tokens out.
        notes: warnings for whoever reads the result.
        reusable: whether `key` will be found again; else the files are removed with the last object that reads them.
    """

    examples: Examples
    all_rows: Rows
    entries: dict[str, list[Entry]]
    memory_bytes: int
    metrics: Mapping[str, float]
    notes: tuple[str, ...]
    reusable: bool

    @property
    def table(self) -> EmbeddingTable:
        """Where they are stored."""
        return self.all_rows.table

    @property
    def key(self) -> str:
        """The key of the table: it changes with the encoder, pooling and dtype."""
        return self.table.folder.name

    @property
    def label_free(self) -> dict[str, float]:
        """What the embeddings of train are like, tokens pooled by their mean; see `statistics.label_free`."""
        return self._looks[0]

    @property
    def collapse(self) -> str:
        """What shows that they have collapsed, in words; empty where nothing does."""
        return self._looks[1]

    @cached_property
    def _looks(self) -> tuple[dict[str, float], str]:
        rows, texts = self.rows("train"), self.examples.train.sequences
        places = sample([sequence_key(text) for text in texts])
        pooled = np.stack([rows.gather(np.array([place])).mean(0).numpy() for place in places])
        named = {f"embedding_{name}": value for name, value in label_free(pooled).items()}
        return named, collapse(pooled, [texts[place] for place in places])

    def rows(self, part: str) -> Rows:
        """The embedding rows of a part, in memory if the rows of all tasks or of the part fit the budget."""
        entries, rows = self.entries[part], self.all_rows
        return rows.of(entries) if rows.in_memory else Rows(self.table, entries, self.memory_bytes)


def embed(examples: Sequence[Examples], encoder: Encoder, store: Store, workers: Workers = ALONE) -> list[Embeddings]:
    """Embeds the sequences that are not stored yet, and gives each task its embeddings.

    Several workers share the batches of one plan. The rows meet in the table of the first one, where the store is the
    same folder for all; else in that of each.

    Raises:
        DataError: a sequence has no token that the encoder knows.
        CheckpointError: a token-level task, and the tokenizer does not give one token per character.
        CacheError: the store cannot be written, or reads back damaged what was just written.
    """
    levels = [_Level(level, examples, encoder, store) for level in sorted({e.task.level for e in examples})]
    plan = made_with(encoder.device, encoder.precision, encoder.pooling, store, examples)
    with ExitStack() as locks:
        _look_up(levels, store, workers, locks)
        began = time.perf_counter()
        count = partial(count_unknown, encoder=encoder, examples=examples)
        tokens = embed_missing(levels, encoder, plan, count, workers, store.shared)
        seconds = time.perf_counter() - began
        for level in levels:
            workers.from_first(level.table.take_parts)
            workers.together(level.read_embedded)
    total = len(_texts(examples))
    embedded = len({key for level in levels for key in level.missing})
    cached = total - embedded
    metrics = {"embedded": embedded, "cached": cached, "tokens": tokens, "cache_hits": cached / max(1, total)}
    if tokens:
        metrics["tokens_per_second"] = tokens / seconds
    by_name = {level.name: level for level in levels}
    return [_embeddings(by_name[one.task.level], one, metrics, store.memory_bytes) for one in examples]


class _Level:
    """The sequences of all tasks of a level, which have the same pooling, and the table of their embeddings.

    Attributes:
        name: the level.
        pooling: the encoder's, or `none` at token level.
        table: where the embeddings are stored.
        texts: the distinct sequences, by key.
        missing: the sequences that were not stored.
        entries: where the rows of each stored sequence are.
        rows: the rows of these.
    """

    def __init__(self, level: str, examples: Sequence[Examples], encoder: Encoder, store: Store) -> None:
        self.name = level
        self.pooling = encoder.pooling if level == "sequence" else "none"
        self.table = store.table(encoder.digest, self.pooling, encoder.hidden_size, encoder.reusable)
        self.texts = _texts([one for one in examples if one.task.level == level])
        self.memory_bytes, self.reusable = store.memory_bytes, encoder.reusable
        self.missing: dict[bytes, str] = {}
        self.rows: Rows | None = None

    def look_up(self) -> None:
        """Reads stored rows, and finds the missing sequences; damaged shards are dropped, and theirs are missing."""
        index = self.table.index()
        self.missing = {key: text for key, text in self.texts.items() if key not in index}
        try:  # to verify it; where some are missing, the rows are read for use once they are embedded
            self._read(index, 0 if self.missing else self.memory_bytes)
        except DamagedShardsError as error:
            logger.warning("%s", error)
            self.table.drop(shard for shard, _ in error.damaged)
            self.look_up()

    def join(self, folder: Path | None, missing: Collection[bytes]) -> None:
        """Takes the table in `folder`, where there is one, for this worker's own; all are to embed what is missing."""
        self.missing = {key: text for key, text in self.texts.items() if key in missing}
        if folder is not None:
            self.table = EmbeddingTable(folder, self.table.settings)

    def read_embedded(self) -> None:
        """Reads all rows that were not read. Raises DamagedShardsError where they are not what was written."""
        if self.missing or self.rows is None:
            self._read(self.table.index(), self.memory_bytes)

    def _read(self, index: dict[bytes, Entry], memory_bytes: int) -> None:
        self.entries = {key: index[key] for key in self.texts if key in index}
        self.rows = Rows(self.table, self.entries.values(), memory_bytes)


def made_with(
    device: torch.device, precision: str, pooling: str, store: Store, examples: Sequence[Examples]
) -> dict[str, Any]:
    """What embeddings depend on, to the last bit, beside the weights: pooling, the batch plan's limits, arithmetic."""
    return {
        "max_batch_tokens": store.max_batch_tokens or BATCH_TOKENS.get(device.type, BATCH_TOKENS["cpu"]),
        "emb_batch_size": min(one.task.emb_batch_size for one in examples),
        "device": device.type,
        "precision": precision,
        "pooling": pooling,
        "matmul_precision": torch.get_float32_matmul_precision(),
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
    }


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """A line on how a checkpoint was measured in training, if that was otherwise; else no line."""
    found = [f"{key} {there[key]}, here {here[key]}" for key in there if there[key] != here.get(key)]
    note = f"in training it was measured with {'; '.join(found)}: scores may differ slightly from those of the training"
    return [note] if found else []


def check_sequences(examples: Sequence[Examples], encoder: Encoder) -> None:
    """Raises what `embed` would for a sequence that the encoder cannot take, without embedding any."""
    aligned = _texts([one for one in examples if one.task.level == "token"])
    count_unknown(_texts(examples), aligned, encoder, examples)


def _look_up(levels: Sequence[_Level], store: Store, workers: Workers, locks: ExitStack) -> None:
    """Finds what is missing. The first worker's table is that of all, where they share the store."""
    own = workers.rank == 0 or not store.shared

    def looked_up() -> list[tuple[Path, set[bytes]]]:
        for level in levels if own else ():
            locks.enter_context(level.table.lock())
            level.table.take_parts()
            level.look_up()
        return [(level.table.folder, {*level.missing}) for level in levels]

    found = workers.together(looked_up)
    for level, (first, *others) in zip(levels, zip(*found, strict=True), strict=True):
        level.join(None if own else first[0], first[1].union(*(missing for _, missing in others)))


def _embeddings(level: _Level, examples: Examples, metrics: Mapping[str, float], memory_bytes: int) -> Embeddings:
    """The embeddings of a task of this level."""
    parts = examples.parts.items()
    entries = {name: [level.entries[sequence_key(text)] for text in part.sequences] for name, part in parts}
    notes = _unknown({text: level.entries[key].unknown for key, text in _texts([examples]).items()})
    assert level.rows is not None
    return Embeddings(examples, level.rows, entries, memory_bytes, metrics, notes, level.reusable)


def _unknown(counts: Mapping[str, int]) -> tuple[str, ...]:
    """A warning where sequences have tokens that the tokenizer does not know."""
    some = [text for text, count in counts.items() if count]
    if not some:
        return ()
    tokens, found = sum(counts.values()), f"{len(some)} of {len(counts)} sequences"
    capitals = "; it may know capital letters alone" if some[0].isalpha() and not some[0].isupper() else ""
    return (f"{tokens} tokens in {found} are unknown to the tokenizer, such as in '{some[0][:60]}'{capitals}",)


def _texts(examples: Sequence[Examples]) -> dict[bytes, str]:
    """The distinct sequences of some tasks, by key."""
    return {sequence_key(text): text for one in examples for part in one.parts.values() for text in part.sequences}
