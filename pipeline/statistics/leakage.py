"""Test sequences that are nearly in the train part, found by the k-mers that they share."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

K = 6
SHARED = 0.5  # of the distinct k-mers of both sequences (Jaccard); about 95 % identity, substitutions spread out
LEAST = 20  # distinct k-mers of a sequence: shorter ones resemble one another by chance
ROUNDS = 12
MOST = 20_000_000  # characters that are looked at in each part: of more, sequences at even distances

Hashes = npt.NDArray[np.uint64]


def nearly_the_same(sequences: Sequence[str], known: Sequence[str]) -> npt.NDArray[np.bool_]:
    """Which sequences share half and more of their 6-mers with a known one, shape (sequences,).

    Candidates are found by MinHash (Broder 1997): in each round, the first known sequence with the same smallest k-mer,
    in an order of its own. Each candidate is then compared in full, so what is found is right. A few are missed where
    many known sequences resemble one another, each other pair that shares just half once in 2**12.
    """
    found = np.zeros(len(sequences), dtype=np.bool_)
    ours, theirs = _looked_at(sequences), _looked_at(known)
    if not len(ours) or not len(theirs):
        return found
    first, second = _KMers([sequences[row] for row in ours]), _KMers([known[row] for row in theirs])
    for salt in range(ROUNDS):
        open_ = np.flatnonzero(~found[ours[first.rows]])
        keys, places = np.unique(second.smallest(salt), return_index=True)
        if not len(open_) or not len(keys):
            break
        wanted = first.smallest(salt)[open_]
        near = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
        hit = keys[near] == wanted
        pairs = open_[hit], places[near[hit]]
        close = pairs[0][_jaccard(first, second, *pairs) >= SHARED]
        found[ours[first.rows[close]]] = True
    return found


def every(sequences: Sequence[str]) -> int:
    """Each how many-th sequence is looked at: 1 where all are."""
    return max(1, -(-sum(map(len, sequences)) // MOST))


def _looked_at(sequences: Sequence[str]) -> npt.NDArray[np.int64]:
    """The places of the sequences that are looked at."""
    return np.arange(0, len(sequences), every(sequences))


class _KMers:
    """The k-mers, hashed, of the sequences that have enough of them.

    Attributes:
        rows: the places of these sequences in the list.
        hashes: one sequence after another, repeated where a sequence repeats a k-mer.
        starts: where each sequence begins in `hashes`.
        counts: how many each has.
    """

    def __init__(self, sequences: Sequence[str]) -> None:
        codes = np.frombuffer("".join(sequences).encode("utf-32-le"), dtype="<u4").astype(np.uint64)
        owner = np.repeat(np.arange(len(sequences)), [len(one) for one in sequences])
        size = max(0, len(codes) - K + 1)
        mixed = np.zeros(size, np.uint64)
        for shift in range(K):
            mixed = mixed * np.uint64(0x100000001B3) + codes[shift : shift + size]
        counts = np.maximum(np.array([len(one) for one in sequences], np.int64) - K + 1, 0)
        keep = (owner[:size] == owner[len(owner) - size :]) & (counts >= LEAST)[owner[:size]]
        self.rows, self.hashes = np.flatnonzero(counts >= LEAST), _scrambled(mixed[keep])
        self.counts = counts[self.rows]
        self.starts = np.cumsum(self.counts) - self.counts

    def smallest(self, salt: int) -> Hashes:
        """The smallest k-mer of each sequence, in an order that the salt decides."""
        if not len(self.rows):
            return np.zeros(0, np.uint64)
        odd = _scrambled(np.array([salt], np.uint64)) | np.uint64(1)
        return np.asarray(np.minimum.reduceat(self.hashes * odd, self.starts))

    def of(self, places: npt.NDArray[np.int64]) -> tuple[Hashes, npt.NDArray[np.int64]]:
        """The hashes of some sequences, and for each hash which of them it belongs to."""
        counts = self.counts[places]
        owner = np.repeat(np.arange(len(places)), counts)
        return self.hashes[
            np.arange(counts.sum()) + np.repeat(self.starts[places] - np.cumsum(counts) + counts, counts)
        ], owner


def _jaccard(
    first: _KMers, second: _KMers, ours: npt.NDArray[np.int64], theirs: npt.NDArray[np.int64]
) -> npt.NDArray[np.float64]:
    """The share of distinct k-mers that the two sequences of each pair have in common; 0 where one has too few."""
    one, other = (_distinct(*part.of(places)) for part, places in ((first, ours), (second, theirs)))
    sizes = [np.bincount(owner, minlength=len(ours)) for _, owner in (one, other)]
    _, owner = _distinct(np.r_[one[0], other[0]], np.r_[one[1], other[1]])
    together = np.bincount(owner, minlength=len(ours))
    enough = np.minimum(*sizes) >= LEAST
    return np.asarray(np.where(enough, (sizes[0] + sizes[1] - together) / np.maximum(together, 1), 0.0))


def _distinct(hashes: Hashes, owner: npt.NDArray[np.int64]) -> tuple[Hashes, npt.NDArray[np.int64]]:
    """Each hash of each owner once."""
    order = np.lexsort((hashes, owner))
    hashes, owner = hashes[order], owner[order]
    new = np.r_[True, (owner[1:] != owner[:-1]) | (hashes[1:] != hashes[:-1])][: len(owner)]
    return hashes[new], owner[new]


def _scrambled(values: Hashes) -> Hashes:
    """Hashes that look random (SplitMix64)."""
    mixed = values + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(mixed ^ (mixed >> np.uint64(31)))
