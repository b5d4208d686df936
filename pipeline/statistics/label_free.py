"""What embeddings are like, whatever the labels: signs of a collapse that scores of one task may not show."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

MOST = 1_000  # sequences that are looked at: the first in the order of their digests
DEAD = 1e-6  # of the largest standard deviation of a dimension


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
    gram = values.T @ values if values.shape[1] <= values.shape[0] else values @ values.T
    singular = np.sqrt(np.maximum(np.linalg.eigvalsh(gram), 0))
    found = {"rank_me": 0.0}
    if singular.sum() > 0:
        share = singular / singular.sum()
        share = share[share > 0]
        found["rank_me"] = float(np.exp(-np.sum(share * np.log(share))))
    n, lengths = len(values), np.linalg.norm(values, axis=1)
    if n > 1:
        total = (values / np.where(lengths > 0, lengths, 1.0)[:, None]).sum(0)
        found["mean_cosine"] = float((total @ total - (lengths > 0).sum()) / (n * (n - 1)))
    deviations = values.std(0)
    dead = deviations <= DEAD * deviations.max() if n > 1 else np.zeros(1)
    return {**found, "dead_dimensions": float(np.mean(dead))}
