"""Stage 2: `Examples` and an `Encoder` to `Embeddings`.

All tasks meet here: each distinct sequence that is not yet stored goes through the encoder once, whatever tasks and
parts it stands in.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from pipeline.data.tables import line_of
from pipeline.encoders.forward import batches, forward, misaligned, one_behind
from pipeline.encoders.protocol import Encoder
from pipeline.encoders.tokens import Tokens
from pipeline.errors import CacheError, CheckpointError, DataError
from pipeline.load import Examples
from pipeline.progress import progress
from pipeline.store.reading import Rows, Vectors
from pipeline.store.shards import DamagedShardsError, Entry
from pipeline.store.shelf import Shelf, Store, sequence_key
from pipeline.store.temporary import temporary_folder

logger = logging.getLogger(__name__)

# Tokens (padding counted) in a batch. On a CPU large batches fall out of the caches; on a GPU small ones leave it idle.
BATCH_TOKENS = {"cpu": 2_048, "cuda": 65_536, "mps": 16_384}
POOLING = {"sequence": "mean", "token": "none"}


@dataclass(frozen=True)
class Embeddings:
    """A task's embeddings, in the order of its examples.

    Attributes:
        examples: what was embedded.
        key: of the shelf they are stored on: changes with the encoder, pooling and dtype.
        vectors: what is stored of the sequences of all tasks.
        entries: for each part, where each example's rows are: one row, or one per token.
        memory_bytes: the budget of `rows`.
        embedded: how many distinct sequences went through the encoder, over all tasks.
        cached: how many were there already.
        tokens: how many tokens the embedded ones have, special ones out.
        notes: warnings for whoever reads the result.
        reusable: whether the key will be found again; else what is stored goes with the last object that reads it.
    """

    examples: Examples
    key: str
    vectors: Vectors
    entries: dict[str, list[Entry]]
    memory_bytes: int
    embedded: int
    cached: int
    tokens: int
    notes: tuple[str, ...] = ()
    reusable: bool = True

    @property
    def metrics(self) -> dict[str, float]:
        """What the pass over all tasks took."""
        hits = self.cached / max(1, self.cached + self.embedded)
        return {"embedded": self.embedded, "cached": self.cached, "tokens": self.tokens, "cache_hits": hits}

    @property
    def shelf(self) -> Shelf:
        """Where they are stored."""
        return self.vectors.shelf

    def rows(self, part: str) -> Rows:
        """The embedding rows of a part, in memory if those of all tasks or those of the part fit the budget."""
        entries, vectors = self.entries[part], self.vectors
        return Rows(vectors if vectors.in_memory else Vectors(self.shelf, entries, self.memory_bytes), entries)


def embed(examples: Sequence[Examples], encoder: Encoder, store: Store) -> list[Embeddings]:
    """Embeds what is not stored yet, and gives each task its embeddings.

    Raises:
        DataError: a sequence has no token that the encoder knows.
        CheckpointError: a token-level task, and the tokenizer does not give one token per character.
        CacheError: the store cannot be written.
    """
    reusable = bool(getattr(encoder, "reusable", True))
    shelf_of = _shelf if reusable else _passing_shelf
    shelves = {
        pooling: shelf_of(store, encoder, pooling) for pooling in sorted({POOLING[one.task.level] for one in examples})
    }
    wanted: dict[str, dict[bytes, str]] = {pooling: {} for pooling in shelves}
    for one in examples:
        for part in one.parts.values():
            wanted[POOLING[one.task.level]].update((sequence_key(text), text) for text in part.sequences)
    plan = made_with(encoder.device, precision_of(encoder), store, examples)
    done, tokens = set[bytes](), 0
    with ExitStack() as locks:
        for shelf in shelves.values():
            locks.enter_context(shelf.lock())
        for _ in range(100):  # once, unless a shard turns out to be damaged
            indices = {pooling: shelf.index() for pooling, shelf in shelves.items()}
            missing = {p: {k: s for k, s in wanted[p].items() if k not in indices[p]} for p in shelves}
            tokens += _embed_missing(missing, shelves, encoder, plan, examples)
            indices = {p: shelf.index() if missing[p] else indices[p] for p, shelf in shelves.items()}
            done.update(key for texts in missing.values() for key in texts)
            vectors = _vectors(shelves, wanted, indices, store.memory_bytes)
            if len(vectors) == len(shelves):
                break
        else:
            raise CacheError(f"store: '{store.root}' reads back damaged what was just written; check the disk")
    union = {key: text for texts in wanted.values() for key, text in texts.items()}
    counts = (len(done), len(union) - len(done), tokens)
    return [replace(_embeddings(one, vectors, indices, store, counts), reusable=reusable) for one in examples]


def _shelf(store: Store, encoder: Encoder, pooling: str) -> Shelf:
    return store.shelf(encoder.digest, pooling, encoder.hidden_size)


def _passing_shelf(store: Store, encoder: Encoder, pooling: str) -> Shelf:
    """A shelf whose key cannot come again: its files go with the object, or after a kill with the next program."""
    kept = ExitStack()
    folder = kept.enter_context(temporary_folder(store.root.expanduser() / "live"))
    shelf = _shelf(replace(store, root=folder), encoder, pooling)
    weakref.finalize(shelf, kept.close)
    return shelf


def made_with(device: torch.device, precision: str, store: Store, examples: Sequence[Examples]) -> dict[str, Any]:
    """What the last bits of embeddings depend on, beside the weights: the batch plan's limits and the arithmetic."""
    return {
        "max_batch_tokens": store.max_batch_tokens or BATCH_TOKENS.get(device.type, BATCH_TOKENS["cpu"]),
        "emb_batch_size": min(one.task.emb_batch_size for one in examples),
        "device": device.type,
        "precision": precision,
        "matmul_precision": torch.get_float32_matmul_precision(),
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
    }


def precision_of(encoder: Encoder) -> str:
    """The precision of an encoder that says it."""
    return str(getattr(encoder, "precision", "its own"))


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """A line on how a checkpoint was measured in training, where it was measured otherwise; none if the same."""
    found = [f"{key} {there[key]} there and {here[key]} here" for key in there if there[key] != here.get(key)]
    if not found:
        return []
    return [f"in training it was measured with {', '.join(found)}: scores may differ from the callback's"]


def _embed_missing(
    missing: dict[str, dict[bytes, str]],
    shelves: dict[str, Shelf],
    encoder: Encoder,
    plan: Mapping[str, Any],
    examples: Sequence[Examples],
) -> int:
    """One pass of the encoder over the union of what the shelves lack; how many tokens that has."""
    union = {key: text for texts in missing.values() for key, text in texts.items()}
    if not union:
        return 0
    tokens = 0
    unknown = _check(union, missing.get("none", {}), encoder, examples)
    with ExitStack() as stack:
        beside, packed = encoder.device.type != "cpu", bool(getattr(encoder, "packs", False))
        made = {**plan, "packed": packed}
        writers = {pooling: stack.enter_context(shelves[pooling].writer(made, beside)) for pooling in missing}
        advance = stack.enter_context(progress("embed", sum(map(len, union.values())), "residues"))
        plans = batches(union, plan["max_batch_tokens"], plan["emb_batch_size"], packed)
        passes = (forward(batch, union, missing, encoder) for batch in plans)
        for arriving in one_behind(passes) if beside else passes:
            for pooling, (keys, counts, rows) in arriving.rows.items():
                writers[pooling].add(keys, [unknown[key] for key in keys], counts, rows.array())
            for writer in writers.values():
                writer.count(arriving.tokens)
            if any(writer.is_full for writer in writers.values()):
                for writer in writers.values():
                    writer.flush()
            tokens += arriving.tokens
            advance(arriving.residues)
    return tokens


def check_sequences(examples: Sequence[Examples], encoder: Encoder) -> None:
    """Raises what `embed` would for a sequence that the encoder cannot take, without embedding any."""
    texts = [(one.task.level, text) for one in examples for part in one.parts.values() for text in part.sequences]
    union = {sequence_key(text): text for _, text in texts}
    aligned = {sequence_key(text): text for level, text in texts if level == "token"}
    _check(union, aligned, encoder, examples)


def _check(
    union: dict[bytes, str], aligned: dict[bytes, str], encoder: Encoder, examples: Sequence[Examples]
) -> dict[bytes, int]:
    """Counts unknown tokens before anything is embedded; an encoder that cannot serve a task is found out here."""
    counts: dict[bytes, int] = {}
    keys = list(union)
    for begin in range(0, len(keys), 1024):
        chunk = keys[begin : begin + 1024]
        for key, (unknown, tokens) in zip(chunk, encoder.count_unknown([union[key] for key in chunk]), strict=True):
            if unknown == tokens:
                tokens_of = getattr(encoder, "tokens", None)
                why = tokens_of.why_unknown(union[key]) if isinstance(tokens_of, Tokens) else ""
                raise _all_unknown(union[key], examples, why)
            if key in aligned and tokens != len(union[key]):
                raise CheckpointError(misaligned(union[key], tokens))
            counts[key] = unknown
    return counts


def _all_unknown(text: str, examples: Sequence[Examples], why: str) -> DataError:
    for one in examples:
        for name, part in one.parts.items():
            if text in part.sequences:
                file, _, row = part.rows[part.sequences.index(text)].rpartition(":")
                path = Path(one.task.dataset_path) / name / file
                where = f"{path}:{line_of(path, int(row))}: column '{one.task.sequence_column}'"
                shown = text if len(text) <= 60 else text[:57] + "..."
                return DataError(
                    f"{where}: expected a sequence with characters the encoder knows, found {shown!r}{why}"
                )
    raise AssertionError("a sequence that stands in no task was embedded")


def _vectors(
    shelves: dict[str, Shelf],
    wanted: dict[str, dict[bytes, str]],
    indices: dict[str, dict[bytes, Entry]],
    memory_bytes: int,
) -> dict[str, Vectors]:
    """What is wanted of each shelf; nothing of one that turns out to have damaged shards, which are dropped."""
    found = {}
    for pooling, shelf in shelves.items():
        try:
            found[pooling] = Vectors(shelf, [indices[pooling][key] for key in wanted[pooling]], memory_bytes)
        except DamagedShardsError as error:
            logger.warning("%s", error)
            for shard, _ in error.damaged:
                shelf.drop(shard)
    return found


def _embeddings(
    one: Examples,
    vectors: dict[str, Vectors],
    indices: dict[str, dict[bytes, Entry]],
    store: Store,
    counts: tuple[int, int, int],
) -> Embeddings:
    pooling = POOLING[one.task.level]
    index = indices[pooling]
    entries = {name: [index[sequence_key(text)] for text in part.sequences] for name, part in one.parts.items()}
    distinct = {sequence_key(text): text for part in one.parts.values() for text in part.sequences}
    unknown = sum(index[key].unknown for key in distinct)
    notes = []
    if unknown:
        few = sum(bool(index[key].unknown) for key in distinct)
        notes.append(f"{unknown} tokens in {few} of {len(distinct)} sequences are unknown to the tokenizer")
    mine = vectors[pooling]
    key, memory_bytes = mine.shelf.folder.name, store.memory_bytes
    return Embeddings(one, key, mine, entries, memory_bytes, *counts, tuple(notes))
