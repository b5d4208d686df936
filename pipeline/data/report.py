"""What a reader of a score should know about its data: sequences of test in train, shifted or constant labels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from pipeline.data.parts import Part, Target
from pipeline.statistics.leakage import every, nearly_the_same

LEVEL = 1e-3  # of the tests of shift: one clean random split in a thousand warns
MOSTLY = 0.5  # the share of masked labels that is worth a warning
EXPECTED = 5  # sequences, of a class too, that a test of shift takes; rarer classes are counted together


@dataclass(frozen=True)
class DataReport:
    """What was found in a task's data.

    Attributes:
        metrics: by name: `test_in_train` and `test_near_train`, the shares of test sequences that are in train, letter
            for letter, or nearly so (the two do not overlap); `<part>_masked`, the share of units without a label.
        notes: warnings; none where nothing was found.
    """

    metrics: dict[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def data_report(targets: Sequence[Target], parts: dict[str, Part], where: Callable[[str], str] = str) -> DataReport:
    """Looks through the train and test part; `where` says to a reader where a row of test stands, see `Part.rows`."""
    train, test = parts["train"], parts["test"]
    metrics, notes = _leaks(train, test, where)
    for index, target in enumerate(targets):
        constant = _constant(index, target, parts)
        notes += constant or _shift(index, target, train, test)
        notes += _masked(index, target, parts)
    masked = {f"{name}_masked": 1 - float(np.mean(np.stack(part.masks))) for name, part in parts.items()}
    return DataReport(metrics | masked, tuple(notes))


def _leaks(train: Part, test: Part, where: Callable[[str], str]) -> tuple[dict[str, float], list[str]]:
    known = set(train.sequences)
    same = [row for row, sequence in zip(test.rows, test.sequences, strict=True) if sequence in known]
    others = [place for place, sequence in enumerate(test.sequences) if sequence not in known]
    others_of_test = [test.sequences[place] for place in others]
    near = nearly_the_same(others_of_test, train.sequences)
    near_rows = [test.rows[place] for place, found in zip(others, near, strict=True) if found]
    notes = []
    if same:
        notes.append(f"{len(same)} of {len(test)} test sequences are in train too, such as that of {where(same[0])}")
    if near_rows:
        notes.append(
            f"{len(near_rows)} of {len(test)} test sequences are nearly the same as one in train (they share half of"
            f" their 6-mers and more), such as that of {where(near_rows[0])}: scores say little about other families"
        )
    left_out = {"train": every(train.sequences), "test": every(others_of_test)}
    notes += [
        f"of {name} 1 of {step} sequences was compared for sequences that are nearly the same: there may be more"
        for name, step in left_out.items()
        if step > 1
    ]
    return {"test_in_train": len(same) / len(test), "test_near_train": len(near_rows) / len(test)}, notes


def _constant(index: int, target: Target, parts: dict[str, Part]) -> list[str]:
    notes = []
    for name in ("train", "test"):
        labels = np.unique(parts[name].values[index][parts[name].masks[index]])
        if len(labels) == 1:
            label = f"{labels[0]:g}" if target.classes is None else target.classes[int(labels[0])]
            what = "a head has nothing to learn" if name == "train" else "scores cannot tell heads apart"
            notes.append(f"{target.name}: all {name} labels are {label}: {what}")
    return notes


def _masked(index: int, target: Target, parts: dict[str, Part]) -> list[str]:
    shares = {name: 1 - float(part.masks[index].mean()) for name, part in parts.items()}
    return [
        f"{target.name}: {share:.0%} of the {name} labels are masked"
        for name, share in shares.items()
        if share > MOSTLY
    ]


def _shift(index: int, target: Target, train: Part, test: Part) -> list[str]:
    """Whether the labels of test differ from those of train by more than chance, by sequence."""
    from scipy.stats import ks_2samp

    names = target.classes or ("",)
    if target.classes is not None and (train.counts == 1).all() and (test.counts == 1).all():
        return _class_shift(index, target, train, test)
    ours, theirs = (_by_sequence(part, index, target.classes) for part in (train, test))
    if min(len(ours), len(theirs)) < EXPECTED:
        return []  # nothing that so few show is beyond chance
    found = []
    for column, name in enumerate(names):
        a, b = ours[:, column], theirs[:, column]
        if ks_2samp(a, b, method="asymp").pvalue < LEVEL / len(names):
            found.append(f"{name + ' ' if name else ''}{a.mean():.3g} in train and {b.mean():.3g} in test")
    what = "the labels" if target.classes is None else "the classes of a sequence"
    test_name = f"Kolmogorov-Smirnov, level {LEVEL:g}"
    return [f"{target.name}: {what} differ between the parts, mean {'; '.join(found)} ({test_name})"] if found else []


def _by_sequence(part: Part, index: int, classes: Sequence[str] | None) -> npt.NDArray[np.float64]:
    """The mean label of each sequence, or its share of each class: shape (sequences with labels, columns)."""
    mask, values = part.masks[index], part.values[index]
    columns = values[:, None] if classes is None else values[:, None] == np.arange(len(classes))
    starts = np.cumsum(part.counts) - part.counts
    sums = np.add.reduceat(np.where(mask[:, None], columns, 0).astype(np.float64), starts, axis=0)
    labelled = np.add.reduceat(mask, starts, dtype=np.int64)
    return np.asarray(sums[labelled > 0] / labelled[labelled > 0, None])


def _class_shift(index: int, target: Target, train: Part, test: Part) -> list[str]:
    """A chi-squared test of the number of sequences of each class."""
    from scipy.stats import chi2_contingency

    classes = target.classes or ()
    counts = np.stack(
        [np.bincount(part.values[index][part.masks[index]], minlength=len(classes)) for part in (train, test)]
    )
    expected = counts.sum(0) * counts.sum(1).min() / counts.sum()
    common, rare = counts[:, expected >= EXPECTED], counts[:, expected < EXPECTED].sum(1, keepdims=True)
    table = np.hstack([common, rare]) if rare.sum() * counts.sum(1).min() / counts.sum() >= EXPECTED else common
    if table.shape[1] < 2 or chi2_contingency(table, correction=False).pvalue >= LEVEL:
        return []
    shares = counts / counts.sum(1, keepdims=True)
    most = int(np.abs(shares[1] - shares[0]).argmax())
    moved = f"{shares[0, most]:.0%} of train and {shares[1, most]:.0%} of test are {classes[most]}"
    return [f"{target.name}: the labels differ between the parts: {moved} (chi-squared, level {LEVEL:g})"]
