"""The pass of an encoder over the sequences that are not stored yet, shared by the workers of a measurement."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import chain, pairwise
from typing import Any, Protocol

import torch
from torch import Tensor

from pipeline.encoders.forward import POOLED, Transfer, batches, misaligned
from pipeline.encoders.in_step import SameNumber
from pipeline.encoders.protocol import Encoder
from pipeline.engines.workers import Workers, here
from pipeline.errors import CheckpointError
from pipeline.progress import progress
from pipeline.store.embedding_table import EmbeddingTable
from pipeline.store.writing import ShardWriter


class Lacking(Protocol):
    """A table of embeddings that are pooled alike, and the sequences that it lacks."""

    pooling: str
    missing: dict[bytes, str]
    table: EmbeddingTable


@dataclass(frozen=True)
class Work:
    """Sequences that go through the encoder together, by key, and for each table its pooling and the keys it lacks."""

    texts: dict[bytes, str]
    wanted: list[tuple[str, list[bytes]]]


@dataclass(frozen=True)
class Pooled:
    """Rows of a batch on their way to the CPU: keys of the sequences, how many rows each has, and the rows."""

    keys: list[bytes]
    counts: list[int]
    rows: Transfer


@dataclass(frozen=True)
class _Batch:
    """The result of a forward pass: for each level the rows that it lacks; tokens of all; unknown tokens by key."""

    pooled: list[Pooled | None]
    tokens: int
    residues: int
    unknown: Mapping[bytes, int]


def embed_missing(
    levels: Sequence[Lacking],
    encoder: Encoder,
    plan: Mapping[str, Any],
    count: Callable[[Mapping[bytes, str], Collection[bytes]], dict[bytes, int]],
    workers: Workers,
    shared: bool,
) -> int:
    """One pass of the encoder over all that is missing, shared by the workers.

    Args:
        levels: the tables.
        encoder: gives the hidden states.
        plan: see `embed.made_with`.
        count: the unknown tokens of sequences by key, some of which must have one token per character.
        workers: each takes every n-th batch.
        shared: whether they write to the same folders.

    Returns:
        The number of tokens.
    """
    levels = [level for level in levels if level.missing]
    texts = {key: text for level in levels for key, text in level.missing.items()}
    if not texts:
        return 0
    aligned = {key for level in levels if level.pooling == "none" for key in level.missing}
    made = workers.from_first(lambda: {**plan, "packed": encoder.packs})
    planned = list(batches(texts, plan["max_batch_tokens"], plan["emb_batch_size"], made["packed"]))
    share = _share(encoder, workers)
    own = planned[share.number :: share.count]
    own_texts = {key: texts[key] for keys in own for key in keys}
    unknown = here(workers, lambda: count(own_texts, aligned))
    rounds = -(-len(planned) // share.count)
    works = (_work(keys, texts, levels) for keys in own)

    def fill(number: int) -> None:  # that of its own too, which other ranks may embed with this one
        encoder.hidden_states([texts[key] for key in (own[number] if number < len(own) else planned[-1])])

    same = SameNumber(encoder.in_step, fill)
    if encoder.elsewhere is not None:
        passes: Iterator[_Batch | None] = encoder.elsewhere(_forward, works)
    else:
        passes = _passes(works, rounds, same, lambda work: _forward(encoder, work))
    passes = (batch and replace(batch, unknown={key: unknown[key] for key in batch.unknown}) for batch in passes)
    if not share.keeps:
        passes = (None for _ in passes)
    ahead = int(encoder.device.type != "cpu")  # a GPU computes the next batch while one is written
    if ahead:
        passes = (batch for batch, _ in pairwise(chain(passes, [None])))
    if shared:
        part, residues = workers.rank, sum(map(len, own_texts.values()))
        return sum(workers.together(lambda: _write(passes, levels, made, residues, same.to(rounds), part)))
    every = _exchanged(passes, rounds, workers)
    return here(
        workers, lambda: _write(every, levels, made, sum(map(len, texts.values())), same.to(min(rounds, 1 + ahead)))
    )


def _work(keys: list[bytes], texts: Mapping[bytes, str], levels: Sequence[Lacking]) -> Work:
    wanted = [(level.pooling, [key for key in keys if key in level.missing]) for level in levels]
    return Work({key: texts[key] for key in keys}, wanted)


@dataclass(frozen=True)
class _Share:
    """Which batches a worker embeds: every `count`-th from `number` on; and whether it is the one that keeps them."""

    number: int
    count: int
    keeps: bool = True


def _share(encoder: Encoder, workers: Workers) -> _Share:
    """Of the workers that must embed the same batches, one keeps the result."""
    if encoder.in_step is None:
        return _Share(workers.rank, workers.count)
    place = encoder.in_step.place
    places = workers.together(lambda: place)
    each = sorted({*places})
    return _Share(each.index(place), len(each), places.index(place) == workers.rank)


def _passes(
    works: Iterator[Work], rounds: int, same: SameNumber, forward: Callable[[Work], _Batch]
) -> Iterator[_Batch | None]:
    """The batch of this worker in each round, None without any; the passes of all are as many, where they have to be.

    A round that failed is one too: the workers may meet after each.
    """
    for number in range(rounds):
        work, batch = next(works, None), None
        with same:
            batch = forward(work) if work is not None and same.error is None else None
        same.fill_up(number + 1)
        yield batch


def _exchanged(passes: Iterator[_Batch | None], rounds: int, workers: Workers) -> Iterator[_Batch | None]:
    """The batches of all workers, a batch of each at a time: memory does not grow with their number."""
    for _ in range(rounds):
        yield from workers.together(lambda: next(passes))


def _forward(encoder: Encoder, work: Work) -> _Batch:
    """What is wanted of some sequences. How many of their tokens are unknown is yet to be said."""
    first = any(pooling == "cls" for pooling, _ in work.wanted)
    found = (encoder.states_from_first if first else encoder.hidden_states)([*work.texts.values()])
    states = [rows[1:] for rows in found] if first else found
    by_pooling = {pooling: found if pooling == "cls" else states for pooling, _ in work.wanted}
    pooled = [_pooled(work.texts, pooling, keys, by_pooling[pooling], encoder) for pooling, keys in work.wanted]
    tokens, residues = sum(map(len, states)), sum(map(len, work.texts.values()))
    return _Batch(pooled, tokens, residues, dict.fromkeys(work.texts, 0))


def _pooled(
    texts: Mapping[bytes, str], pooling: str, wanted: Collection[bytes], states: Sequence[Tensor], encoder: Encoder
) -> Pooled | None:
    """The rows that a table wants, from hidden states, each (tokens, hidden_size); pooled on their device."""
    by_key = dict(zip(texts, states, strict=True))
    found = {key: by_key[key] for key in wanted}
    if not found:
        return None
    if pooling in POOLED:
        found = {key: POOLED[pooling](rows) for key, rows in found.items()}
    else:
        found = {key: encoder.per_character(texts[key], rows) for key, rows in found.items()}
        for key, rows in found.items():
            if len(rows) != len(texts[key]):
                raise CheckpointError(misaligned(texts[key], len(rows)))
    return Pooled(list(found), [len(rows) for rows in found.values()], Transfer(torch.cat(list(found.values()))))


def _write(
    passes: Iterator[_Batch | None],
    levels: Sequence[Lacking],
    made: Mapping[str, Any],
    residues: int,
    same: SameNumber,
    part: int = 0,
) -> int:
    """Writes batches as they come, into a part of each table unless that is 0; returns the number of tokens.

    All tables end their shards together, so that a resumed run has the same batches.
    """
    tokens, on_gpu = 0, made["device"] != "cpu"
    with ExitStack() as stack:
        stack.callback(same.fill_up)
        tables = [level.table.part(part) if part else level.table for level in levels]
        writers = [stack.enter_context(table.writer(made, in_thread=on_gpu)) for table in tables]
        advance = stack.enter_context(progress("embed", residues, "residues"))
        for batch in filter(None, passes):
            with same:
                _add(batch, writers)
            tokens += batch.tokens
            advance(batch.residues)
        same.raise_late()
    return tokens


def _add(batch: _Batch, writers: Sequence[ShardWriter]) -> None:
    for writer, pooled in zip(writers, batch.pooled, strict=True):
        if pooled is not None:
            counts = [batch.unknown[key] for key in pooled.keys]
            writer.add(pooled.keys, counts, pooled.counts, pooled.rows.array())
        writer.count(batch.tokens)
    if any(writer.is_full for writer in writers):
        for writer in writers:
            writer.flush()
