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
from functools import cached_property
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.data.tables import place
from pipeline.encoders.forward import POOLED, Transfer, batches, misaligned
from pipeline.encoders.protocol import Encoder
from pipeline.errors import CheckpointError, DataError
from pipeline.load import Examples
from pipeline.progress import progress
from pipeline.statistics.label_free import label_free, sample
from pipeline.store.embedding_table import EmbeddingTable, Store, sequence_key
from pipeline.store.reading import Rows
from pipeline.store.shards import DamagedShardsError, Entry
from pipeline.store.writing import ShardWriter

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

    @cached_property
    def label_free(self) -> dict[str, float]:
        """What the embeddings of train are like, tokens pooled by their mean; see `statistics.label_free`."""
        rows, keys = self.rows("train"), [sequence_key(text) for text in self.examples.train.sequences]
        pooled = [rows.gather(np.array([place])).mean(0).numpy() for place in sample(keys)]
        return {f"embedding_{name}": value for name, value in label_free(np.stack(pooled)).items()}

    def rows(self, part: str) -> Rows:
        """The embedding rows of a part, in memory if the rows of all tasks or of the part fit the budget."""
        entries, rows = self.entries[part], self.all_rows
        return rows.of(entries) if rows.in_memory else Rows(self.table, entries, self.memory_bytes)


def embed(examples: Sequence[Examples], encoder: Encoder, store: Store) -> list[Embeddings]:
    """Embeds the sequences that are not stored yet, and gives each task its embeddings.

    Raises:
        DataError: a sequence has no token that the encoder knows.
        CheckpointError: a token-level task, and the tokenizer does not give one token per character.
        CacheError: the store cannot be written, or reads back damaged what was just written.
    """
    levels = {level: _Level(level, examples, encoder, store) for level in sorted({e.task.level for e in examples})}
    plan = made_with(encoder.device, encoder.precision, encoder.pooling, store, examples)
    with ExitStack() as locks:
        for level in levels.values():
            locks.enter_context(level.table.lock())
            level.look_up()
        began = time.perf_counter()
        tokens = _embed_missing(list(levels.values()), encoder, plan, examples)
        seconds = time.perf_counter() - began
        for level in levels.values():
            level.read_embedded()
    total = len(_texts(examples))
    embedded = len({key for level in levels.values() for key in level.missing})
    cached = total - embedded
    metrics = {"embedded": embedded, "cached": cached, "tokens": tokens, "cache_hits": cached / max(1, total)}
    if tokens:
        metrics["tokens_per_second"] = tokens / seconds
    return [levels[one.task.level].embeddings(one, metrics) for one in examples]


class _Level:
    """The sequences of all tasks of a level, which have the same pooling, and the table of their embeddings.

    Attributes:
        pooling: the encoder's, or `none` at token level.
        table: where the embeddings are stored.
        texts: the distinct sequences, by key.
        missing: the sequences that were not stored.
        entries: where the rows of each stored sequence are.
        rows: the rows of these.
    """

    def __init__(self, level: str, examples: Sequence[Examples], encoder: Encoder, store: Store) -> None:
        self.pooling = encoder.pooling if level == "sequence" else "none"
        self.table = store.table(encoder.digest, self.pooling, encoder.hidden_size, encoder.reusable)
        self.texts = _texts([one for one in examples if one.task.level == level])
        self.memory_bytes, self.reusable = store.memory_bytes, encoder.reusable
        self._per_character = encoder.per_character

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

    def read_embedded(self) -> None:
        """Reads all rows where some were missing. Raises DamagedShardsError where they are not what was written."""
        if self.missing:
            self._read(self.table.index(), self.memory_bytes)

    def _read(self, index: dict[bytes, Entry], memory_bytes: int) -> None:
        self.entries = {key: index[key] for key in self.texts if key in index}
        self.rows = Rows(self.table, self.entries.values(), memory_bytes)

    def pooled(self, batch: Sequence[bytes], states: Sequence[Tensor]) -> _Pooled | None:
        """The missing rows of a batch from its hidden states, each (tokens, hidden_size); pooled on their device."""
        found = {key: rows for key, rows in zip(batch, states, strict=True) if key in self.missing}
        if not found:
            return None
        if self.pooling in POOLED:
            found = {key: POOLED[self.pooling](rows) for key, rows in found.items()}
        else:
            found = {key: self._per_character(self.texts[key], rows) for key, rows in found.items()}
            for key, rows in found.items():
                if len(rows) != len(self.texts[key]):
                    raise CheckpointError(misaligned(self.texts[key], len(rows)))
        return _Pooled(list(found), [len(rows) for rows in found.values()], Transfer(torch.cat(list(found.values()))))

    def embeddings(self, examples: Examples, metrics: Mapping[str, float]) -> Embeddings:
        """The embeddings of a task of this level."""
        parts = examples.parts.items()
        entries = {name: [self.entries[sequence_key(text)] for text in part.sequences] for name, part in parts}
        unknown = [self.entries[key].unknown for key in _texts([examples])]
        some = f"{sum(unknown)} tokens in {len(unknown) - unknown.count(0)} of {len(unknown)} sequences"
        notes = (f"{some} are unknown to the tokenizer",) if any(unknown) else ()
        return Embeddings(examples, self.rows, entries, self.memory_bytes, metrics, notes, self.reusable)


@dataclass(frozen=True)
class _Pooled:
    """Rows of a batch on their way to the CPU: keys of the sequences, rows of each, and the rows."""

    keys: list[bytes]
    counts: list[int]
    rows: Transfer


@dataclass(frozen=True)
class _Batch:
    """The result of a forward pass: for each level the rows that it lacks; and the numbers of tokens and residues."""

    pooled: list[_Pooled | None]
    tokens: int
    residues: int


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
    found = [f"{key} {there[key]} there and {here[key]} here" for key in there if there[key] != here.get(key)]
    note = f"in training it was measured with {', '.join(found)}: scores may differ from the callback's"
    return [note] if found else []


def check_sequences(examples: Sequence[Examples], encoder: Encoder) -> None:
    """Raises what `embed` would for a sequence that the encoder cannot take, without embedding any."""
    aligned = _texts([one for one in examples if one.task.level == "token"])
    _count_unknown(_texts(examples), aligned, encoder, examples)


def _embed_missing(
    levels: Sequence[_Level], encoder: Encoder, plan: Mapping[str, Any], examples: Sequence[Examples]
) -> int:
    """One pass of the encoder over all that is missing; returns the number of tokens."""
    levels = [level for level in levels if level.missing]
    texts = {key: text for level in levels for key, text in level.missing.items()}
    if not texts:
        return 0
    aligned = {key for level in levels if level.pooling == "none" for key in level.missing}
    unknown = _count_unknown(texts, aligned, encoder, examples)
    tokens, on_gpu = 0, encoder.device.type != "cpu"
    with ExitStack() as stack:
        made = {**plan, "packed": encoder.packs}
        writers = [stack.enter_context(level.table.writer(made, in_thread=on_gpu)) for level in levels]
        advance = stack.enter_context(progress("embed", sum(map(len, texts.values())), "residues"))
        planned = batches(texts, plan["max_batch_tokens"], plan["emb_batch_size"], encoder.packs)
        passes = (_forward(keys, texts, levels, encoder) for keys in planned)
        if on_gpu:  # a GPU computes the next batch while one is written
            passes = (batch for batch, _ in pairwise(chain(passes, [None])) if batch)
        for batch in passes:
            _write(batch, unknown, writers)
            tokens += batch.tokens
            advance(batch.residues)
    return tokens


def _forward(keys: list[bytes], texts: Mapping[bytes, str], levels: Sequence[_Level], encoder: Encoder) -> _Batch:
    first = any(level.pooling == "cls" for level in levels)
    found = (encoder.states_from_first if first else encoder.hidden_states)([texts[key] for key in keys])
    states = [rows[1:] for rows in found] if first else found
    pooled = [level.pooled(keys, found if level.pooling == "cls" else states) for level in levels]
    return _Batch(pooled, sum(map(len, states)), sum(len(texts[key]) for key in keys))


def _write(batch: _Batch, unknown: Mapping[bytes, int], writers: Sequence[ShardWriter]) -> None:
    """Writes the rows of a batch. All tables end their shards together, so that a resumed run has the same batches."""
    for writer, pooled in zip(writers, batch.pooled, strict=True):
        if pooled is not None:
            writer.add(pooled.keys, [unknown[key] for key in pooled.keys], pooled.counts, pooled.rows.array())
        writer.count(batch.tokens)
    if any(writer.is_full for writer in writers):
        for writer in writers:
            writer.flush()


def _texts(examples: Sequence[Examples]) -> dict[bytes, str]:
    """The distinct sequences of some tasks, by key."""
    return {sequence_key(text): text for one in examples for part in one.parts.values() for text in part.sequences}


def _count_unknown(
    texts: Mapping[bytes, str], aligned: Collection[bytes], encoder: Encoder, examples: Sequence[Examples]
) -> dict[bytes, int]:
    """The number of unknown tokens of each sequence; those in `aligned` must have one token per character.

    It is known before anything is embedded, so that an encoder that cannot serve a task fails at once.
    """
    counts: dict[bytes, int] = {}
    keys = list(texts)
    for begin in range(0, len(keys), 1024):
        chunk = keys[begin : begin + 1024]
        for key, (unknown, tokens) in zip(chunk, encoder.count_unknown([texts[key] for key in chunk]), strict=True):
            if unknown == tokens:
                raise _all_unknown(texts[key], examples, encoder.why_unknown(texts[key]))
            if key in aligned and tokens != len(texts[key]):
                raise CheckpointError(misaligned(texts[key], tokens))
            counts[key] = unknown
    return counts


def _all_unknown(text: str, examples: Sequence[Examples], why: str) -> DataError:
    """The error for a sequence of unknown tokens alone, with the file and line of the first row that has it."""
    rows = ((one.task, name, part) for one in examples for name, part in one.parts.items() if text in part.sequences)
    task, name, part = next(rows)
    file, _, row = part.rows[part.sequences.index(text)].rpartition(":")
    in_memory = not task.dataset_path
    path = Path(f"frames['{name}']") if in_memory else Path(task.dataset_path) / name / file
    where = place(path, int(row), in_memory)
    shown = text if len(text) <= 60 else text[:57] + "..."
    column = f"column '{task.sequence_column}'"
    return DataError(f"{where}: {column}: expected a sequence with characters the encoder knows, found {shown!r}{why}")
