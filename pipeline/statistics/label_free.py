"""What embeddings are like, whatever the labels: signs of a collapse that scores of one task may not show.

Neither RankMe nor the mean cosine alone tells a collapse. Useful encoders have a cosine of 0.9 and more, as all their
embeddings share a large mean (Ethayarajh 2019); and where the sequences are variants of one protein, embeddings are
alike because the sequences are: the sample's checkpoint has a RankMe of 1.2 and a cosine of 0.9999 on GB1, as have
models with random weights. So embeddings are held against the composition of the same sequences, which needs no model:
by how far they lie apart, and by how many directions they vary along. Both are of each dimension by itself, since a few
huge ones ("rogue dimensions", Timkey and van Schijndel 2021) hide nothing from a head that is fitted.
`benchmarks/collapse.py` has the cases behind `ALIKE` and `FEW`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

MOST = 1_000  # sequences that are looked at: the first in the order of their digests
DEAD = 1e-6  # of the largest standard deviation of a dimension
LEAST = 50  # distinct sequences, below which nothing is said of a collapse
ALIKE = 0.03  # of how far the compositions lie apart: collapsed encoders are at 0.025 and below, useful ones from 0.1
# Of the directions that the compositions vary along: useful encoders are at 0.5 and above, models whose pre-training
# came to nothing under a large weight decay at 0.17 to 0.25.
FEW = 0.25
Array = npt.NDArray[np.float64]


def sample(keys: Sequence[bytes]) -> list[int]:
    """The places of at most `MOST` distinct sequences, which their digests decide."""
    first = {key: place for place, key in enumerate(keys)}
    return [first[key] for key in sorted(first)[:MOST]]


def label_free(embeddings: npt.NDArray[np.float32]) -> dict[str, float]:
    """The effective rank of embeddings, their mean cosine, and the share of dimensions that are dead.

    Args:
        embeddings: pooled, a row for each sequence, shape (sequences, hidden_size).

    Returns:
        `rank_me`: RankMe (Garrido et al. 2023), the exponential of the entropy of the singular values, 1 to the smaller
        side of the matrix; `mean_cosine`: over all pairs of sequences, left out where there is one sequence;
        `dead_dimensions`: the share of those whose standard deviation is at most a millionth of the largest.
    """
    values = np.asarray(embeddings, np.float64)
    found = {"rank_me": _rank_me(values)}
    n, lengths = len(values), np.linalg.norm(values, axis=1)
    if n > 1:
        total = (values / np.where(lengths > 0, lengths, 1.0)[:, None]).sum(0)
        found["mean_cosine"] = float((total @ total - (lengths > 0).sum()) / (n * (n - 1)))
    deviations = values.std(0)
    dead = deviations <= DEAD * deviations.max() if n > 1 else np.zeros(1)
    return {**found, "dead_dimensions": float(np.mean(dead))}


def collapse(embeddings: npt.NDArray[np.float32], sequences: Sequence[str]) -> str:
    """What shows that embeddings have collapsed, in words; empty where nothing does, or below `LEAST` sequences.

    Args:
        embeddings: pooled, a row for each sequence, shape (sequences, hidden_size).
        sequences: which are all different.
    """
    values, known = np.asarray(embeddings, np.float64), composition(sequences)
    if len(values) < LEAST or not np.isfinite(values).all() or not known.std(0).any():
        return ""
    share = apart(values, known)
    if share < ALIKE:
        return f"are almost the same for all sequences, {100 * share:.2f} % as far apart as the sequences' compositions"
    found, expected = directions(values), directions(known)
    if found < FEW * min(expected, values.shape[1]):
        few = f"{found:.1f} of {values.shape[1]} directions alone"
        return f"vary along {few}, and the sequences' compositions along {expected:.1f}"
    return ""


def _rank_me(values: Array) -> float:
    """The exponential of the entropy of the singular values; 0 where all are 0."""
    gram = values.T @ values if values.shape[1] <= values.shape[0] else values @ values.T
    singular = np.sqrt(np.maximum(np.linalg.eigvalsh(gram), 0))
    if not singular.sum() > 0:
        return 0.0
    share = singular / singular.sum()
    share = share[share > 0]
    return float(np.exp(-np.sum(share * np.log(share))))


def composition(sequences: Sequence[str]) -> Array:
    """The share of each character in each sequence, shape (sequences, characters)."""
    letters = {letter: place for place, letter in enumerate(sorted(set().union(*sequences)))}
    shares = np.zeros((len(sequences), len(letters)))
    for row, text in enumerate(sequences):
        for letter, count in Counter(text).items():
            shares[row, letters[letter]] = count / len(text)
    return shares


def apart(values: Array, known: Array) -> float:
    """How far the embeddings lie apart, of the median dimension that is not dead, beside how far the compositions do.

    `known` are the compositions. Each is a standard deviation beside the root mean square; 0 where all are dead.
    """
    alive = _alive(values)
    if not alive.shape[1]:
        return 0.0
    median = np.median(alive.std(0) / np.sqrt((alive**2).mean(0)))
    return float(median / np.sqrt(known.var(0).sum() / (known**2).sum(1).mean()))


def directions(values: Array) -> float:
    """RankMe of what is left without the mean, each dimension that is not dead scaled to the same deviation."""
    alive = _alive(values)
    return _rank_me((alive - alive.mean(0)) / alive.std(0))


def _alive(values: Array) -> Array:
    """The dimensions that are not dead, shape (sequences, of them)."""
    deviations = values.std(0)
    return values[:, deviations > DEAD * deviations.max()]
