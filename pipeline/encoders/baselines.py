"""Baselines: encoders without a model, which know which characters a sequence has and nothing else.

What a checkpoint's scores are held against. They depend on the train part alone, so the scores of a baseline are the
same for every checkpoint.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pipeline.encoders.protocol import Encoder

VERSION = 1  # part of every digest: raise it when a baseline gives other numbers
LETTERS = 64  # the most characters that have a column of their own: the most frequent ones of the train part
LONGEST = 3  # characters of an n-gram
BITS = 8  # of an n-gram's hash, which is its column: 256 of them
WINDOW = 7  # positions, as a kernel of the ConvNet has
MIX = 0x9E3779B97F4A7C15  # 2**64 by the golden ratio: products with it spread over the highest bits
Indices = npt.NDArray[np.int64]


class Baseline(Encoder):
    """What baselines have in common.

    Attributes:
        name: in words.
    """

    name: str
    device = torch.device("cpu")
    precision = "fp32"

    def _rows(self, sequence: str) -> npt.NDArray[np.float32]:
        """The rows of a sequence, shape (characters, hidden_size)."""
        raise NotImplementedError

    def hidden_states(self, sequences: Sequence[str]) -> list[Tensor]:
        """See `Encoder.hidden_states`: a row per character."""
        return [torch.from_numpy(self._rows(sequence)) for sequence in sequences]


class Composition(Baseline):
    """Sequence-level: the share of each character; of n-grams where characters are not all capital letters.

    Proteins are written in capital letters, and each letter has a column. In SMILES a character alone says little, so
    n-grams of one to three characters are counted, each in the column that a hash of it names. The mean over a
    sequence's rows is its composition, less the mean composition of the train part, by one number for all columns: the
    mean variance is then 1, so that a head learns from it at the learning rate of a model's embeddings.
    """

    name = "composition"

    def __init__(self, sequences: Sequence[str]) -> None:
        """Of the train part's `sequences`; neither their order nor their repeats matter."""
        distinct = sorted(set(sequences))
        alphabet = set().union(*distinct)
        self.residues = all("A" <= letter <= "Z" for letter in alphabet)
        self._letters = _letters(distinct)
        self.hidden_size = len(self._letters) if self.residues else 2**BITS
        self._mean, self._scale = np.zeros(self.hidden_size), 1.0
        total, squares = np.zeros(self.hidden_size), np.zeros(self.hidden_size)
        for sequence in distinct:
            share = self._counts(sequence).mean(0)
            total += share
            squares += share**2
        self._mean = total / len(distinct)
        self._scale = float(np.maximum(squares / len(distinct) - self._mean**2, 0).mean() ** 0.5) or 1.0
        self.digest = _digest(self.name, self._letters.tolist(), self._mean.tolist(), self._scale)

    def _rows(self, sequence: str) -> npt.NDArray[np.float32]:
        return ((self._counts(sequence) - self._mean) / self._scale).astype(np.float32)

    def _counts(self, sequence: str) -> npt.NDArray[np.float64]:
        """How often each column's character, or the n-grams that begin there, are at each position."""
        counts = np.zeros((len(sequence), self.hidden_size))
        if self.residues:
            places, columns = _columns(sequence, self._letters)
            counts[places, columns] = 1
            return counts
        for columns in _hashes(sequence):
            counts[np.arange(len(columns)), columns] += 1
        return counts


class Windows(Baseline):
    """Token-level: which characters are at a position and at the three before and behind it, one-hot.

    A row's entries are multiplied by the root of the number of characters, so that its length is that of a model's
    embedding with as many columns.
    """

    name = f"one-hot windows of {WINDOW}"

    def __init__(self, sequences: Sequence[str]) -> None:
        """Of the train part's `sequences`; neither their order nor their repeats matter."""
        self._letters = _letters(sorted(set(sequences)))
        self.hidden_size = WINDOW * len(self._letters)
        self.digest = _digest(self.name, self._letters.tolist())

    def _rows(self, sequence: str) -> npt.NDArray[np.float32]:
        letters = len(self._letters)
        padded = np.zeros((len(sequence) + WINDOW - 1, letters), np.float32)
        places, columns = _columns(sequence, self._letters)
        padded[places + WINDOW // 2, columns] = letters**0.5
        windows = np.lib.stride_tricks.sliding_window_view(padded, WINDOW, axis=0)  # (characters, letters, WINDOW)
        return np.array(windows.transpose(0, 2, 1), order="C").reshape(len(sequence), -1)  # a view is read-only


BASELINES: dict[str, type[Composition] | type[Windows]] = {"sequence": Composition, "token": Windows}  # by level


def _letters(sequences: Sequence[str]) -> Indices:
    """The code points of the most frequent characters, in ascending order."""
    counts: Counter[str] = Counter()
    for sequence in sequences:
        counts.update(sequence)
    found = sorted(counts, key=lambda letter: (-counts[letter], letter))[:LETTERS]
    return np.array(sorted(map(ord, found)), np.int64)


def _codes(sequence: str) -> Indices:
    return np.frombuffer(sequence.encode("utf-32-le", "surrogatepass"), np.uint32).astype(np.int64)


def _columns(sequence: str, letters: Indices) -> tuple[Indices, Indices]:
    """The positions of a sequence whose characters are among `letters`, and their columns."""
    codes = _codes(sequence)
    columns = np.minimum(np.searchsorted(letters, codes), len(letters) - 1)
    places = np.flatnonzero(letters[columns] == codes)
    return places, columns[places]


def _hashes(sequence: str) -> list[Indices]:
    """For each length of n-grams, the columns of those that begin at each position at which one fits."""
    codes = _codes(sequence).astype(np.uint64)
    found = []
    for length in range(1, min(LONGEST, len(sequence)) + 1):
        number = np.zeros(len(sequence) - length + 1, np.uint64)
        for offset in range(length):  # wraps around at 2**64
            number = (number + codes[offset : len(sequence) - length + 1 + offset] + np.uint64(1)) * np.uint64(MIX)
        found.append((number >> np.uint64(64 - BITS)).astype(np.int64))
    return found


def _digest(*parts: object) -> str:
    return hashlib.sha256(json.dumps([VERSION, *parts]).encode()).hexdigest()
