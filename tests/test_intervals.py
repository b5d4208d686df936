"""Intervals: by hand, against scipy and brute force, and what must hold on any data. Coverage is a benchmark."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from pipeline.errors import DataError
from pipeline.statistics.classification import classification
from pipeline.statistics.intervals import BY_CLASS, Changes, changes, intervals
from pipeline.statistics.jackknife import jackknife
from pipeline.statistics.metrics import LOWER_IS_BETTER, Interval, Metric, metrics_of_kind
from pipeline.statistics.per_sequence import per_sequence, per_sequence_mean
from pipeline.statistics.predictions import Predictions, from_table
from pipeline.statistics.regression import regression

Order = npt.NDArray[np.int64]
CLASSES = ("a", "b", "c")


def numbers(seed: int = 0, sequences: int = 80, error: float = 0.5, longest: int = 1, digits: int = 9) -> Predictions:
    """Labels are the same for every `error`."""
    rng = np.random.default_rng(seed)
    counts = rng.integers(1, longest + 1, sequences)
    true, noise = np.round(rng.standard_normal((2, int(counts.sum()))), digits)
    rows = tuple(f"x000.csv:{row}" for row in range(sequences))
    return Predictions(true, 0.7 * true + error * noise, counts, None, rows)


def classes(seed: int = 0, sequences: int = 120, signal: float = 1.0, longest: int = 1, names: int = 3) -> Predictions:
    """Labels are the same for every `signal`."""
    rng = np.random.default_rng(seed)
    counts = rng.integers(1, longest + 1, sequences)
    true = np.arange(int(counts.sum())) % names
    logits = rng.standard_normal((len(true), names))
    logits[np.arange(len(true)), true] += signal
    rows = tuple(f"x000.csv:{row}" for row in range(sequences))
    return Predictions(true, np.exp(logits) / np.exp(logits).sum(1, keepdims=True), counts, CLASSES[:names], rows)


def chosen(one: Predictions, order: Order) -> Predictions:
    """The sequences of a set that `order` names, in that order."""
    starts = np.cumsum(one.counts) - one.counts
    units = np.concatenate([np.arange(starts[index], starts[index] + one.counts[index]) for index in order])
    rows = tuple(one.rows[index] for index in order)
    return Predictions(one.true[units], one.predicted[units], one.counts[order], one.classes, rows)


def values(one: Predictions) -> dict[str, float]:
    within = per_sequence_mean(one).values if one.counts.max() > 1 else {}
    if one.classes is None:
        return regression(np.asarray(one.true, np.float64), one.predicted).values | within
    return classification(np.asarray(one.true, np.int64), one.predicted, one.classes).values | within


def ends(one: Interval) -> tuple[float, float]:
    return one.low, one.high


EVERY = {
    "numbers": numbers(),
    "numbers with ties": numbers(digits=0),
    "classes": classes(),
    "two classes": classes(names=2),
}
TOKENS = {"numbers of tokens": numbers(longest=9), "classes of tokens": classes(longest=9)}


@pytest.mark.parametrize("one", [*EVERY.values(), *TOKENS.values()], ids=[*EVERY, *TOKENS])
def test_the_values_are_those_that_are_logged_and_lie_within(one: Predictions) -> None:
    found = jackknife(one)
    assert found.values == pytest.approx(values(one), abs=1e-12)
    within = intervals(one)
    assert not within.refused
    level = "token" if one.counts.max() > 1 else "sequence"
    assert set(within.values) == set(metrics_of_kind("regression" if one.classes is None else "classification", level))
    assert all(interval.low < found.values[name] < interval.high for name, interval in within.values.items())


@pytest.mark.parametrize(("name", "one"), [*EVERY.items(), *TOKENS.items()])
def test_what_a_metric_is_without_a_sequence_is_what_it_is_without_it(name: str, one: Predictions) -> None:
    found, n = jackknife(one), len(one)
    brute = [values(chosen(one, np.delete(np.arange(n), index))) for index in range(n)]
    for metric, without in found.without.items():
        exact = np.array([found[metric] for found in brute])
        linear = metric == "spearman" or (metric in ("auroc", "average_precision") and name in TOKENS)
        assert without.std() == pytest.approx(exact.std(), rel=0.03 if linear else 1e-9), metric
        assert without == pytest.approx(
            exact, abs=0.05 * np.abs(exact - found.values[metric]).max() if linear else 1e-12
        )


@pytest.mark.parametrize("one", [*EVERY.values(), *TOKENS.values()], ids=[*EVERY, *TOKENS])
def test_one_metric_alone_is_as_among_all(one: Predictions) -> None:
    every = jackknife(one)
    for name in every.values:
        alone = jackknife(one, name)
        assert set(alone.values) == {name}
        np.testing.assert_array_equal(alone.without[name], every.without[name])


def test_wilson_by_hand() -> None:
    """60 sequences of which 45 are right: Wilson's interval with t in place of z and n - 1 = 59 draws."""
    true = np.zeros(60, np.int64)
    sure = np.repeat([[0.9, 0.1], [0.2, 0.8]], [45, 15], axis=0)
    found = intervals(Predictions(true, sure, np.ones(60, np.int64), ("a", "b"))).values["accuracy"]
    z, p, n = stats.t.ppf(0.975, 59), 0.75, 59
    half = z * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    assert ends(found) == pytest.approx((middle - half, middle + half))


def test_all_right_is_no_certainty() -> None:
    one = Predictions(np.zeros(60, np.int64), np.tile([0.9, 0.1], (60, 1)), np.ones(60, np.int64), ("a", "b"))
    found = intervals(one).values["accuracy"]
    assert found.high == 1
    assert 0.9 < found.low < 0.95


def test_pearson_by_hand() -> None:
    """Fisher's scale, the standard error from numpy's correlation with each pair left out."""
    one = numbers(sequences=50)
    every = np.arange(50)
    z = np.arctanh([np.corrcoef(np.delete(one.true, index), np.delete(one.predicted, index))[0, 1] for index in every])
    error = np.sqrt(49 / 50 * np.sum((z - z.mean()) ** 2))
    middle = np.arctanh(np.corrcoef(one.true, one.predicted)[0, 1])
    expected = np.tanh(middle + np.array([-1, 1]) * stats.t.ppf(0.975, 49) * error)
    assert ends(intervals(one).values["pearson"]) == pytest.approx(tuple(expected))


def test_a_mean_is_as_scipys_bootstrap_has_it() -> None:
    """BCa corrects skewness too, so with many sequences both are alike, and beyond a symmetric interval."""
    rng = np.random.default_rng(3)
    true, error = np.linspace(0, 9, 1000), rng.laplace(size=1000)
    found = intervals(Predictions(true, true + error, np.ones(1000, np.int64)))
    theirs = stats.bootstrap((error**2,), np.mean, n_resamples=4000, rng=rng, method="BCa").confidence_interval
    width, ours = theirs.high - theirs.low, found.values["mse"]
    assert ends(ours) == pytest.approx((theirs.low, theirs.high), abs=0.06 * width)
    assert ours.high - np.mean(error**2) > 1.05 * (np.mean(error**2) - ours.low)
    assert ends(found.values["rmse"]) == pytest.approx((ours.low**0.5, ours.high**0.5))


def test_a_paired_difference_by_hand() -> None:
    first, second = numbers(error=0.5), numbers(error=0.4)
    difference = (second.predicted - second.true) ** 2 - (first.predicted - first.true) ** 2
    expected = stats.ttest_1samp(difference, 0)
    found = changes(second, first).values["mse"]
    assert found.value == pytest.approx(difference.mean())
    assert ends(found.interval) == pytest.approx(tuple(expected.confidence_interval(0.95)))
    assert found.p_improved == pytest.approx(1 - expected.pvalue / 2)


def test_tokens_of_one_sequence_are_no_independent_draws() -> None:
    """Each token nine times more says nothing new."""
    one = classes(sequences=90)
    repeated = Predictions(
        np.repeat(np.asarray(one.true, np.int64), 9), np.repeat(one.predicted, 9, axis=0), one.counts * 9, CLASSES
    )
    for name, interval in intervals(one).values.items():
        rel = 0.02 if name == "average_precision" else 0.01
        assert ends(intervals(repeated).values[name]) == pytest.approx(ends(interval), rel=rel), name


@pytest.mark.parametrize("one", [*EVERY.values(), *TOKENS.values()], ids=[*EVERY, *TOKENS])
def test_nothing_changes_from_a_checkpoint_to_itself(one: Predictions) -> None:
    found = changes(one, one)
    assert set(found.values) == set(values(one))
    for change in found.values.values():
        assert (change.value, ends(change.interval), change.p_improved) == (0, (0, 0), 0.5)


def test_one_class_for_all_has_no_interval_of_its_correlation() -> None:
    one = classes(sequences=60, names=2)
    majority = Predictions(one.true, np.tile([0.7, 0.3], (60, 1)), one.counts, one.classes)
    found = intervals(majority)
    assert found.refused["mcc"] == "the same whichever test sequence is left out, so without an interval"
    assert "accuracy" in found.values


def test_the_same_classes_with_other_probabilities_are_not_the_same() -> None:
    one = classes(sequences=60, names=2)
    surer = Predictions(one.true, one.predicted**2, one.counts, one.classes, one.rows)
    found = changes(surer, one)
    accuracy = found.values["accuracy"]
    assert (accuracy.value, accuracy.p_improved) == (0, 0.5)
    half = stats.t.ppf(0.975, 59) * 2**0.5 / 62
    assert ends(accuracy.interval) == pytest.approx((-half, half))
    assert found.refused["mcc"] == "the difference is the same whichever test sequence is left out"


cases = st.builds(
    lambda kind, seed, longest: kind(seed=seed, longest=longest),
    st.sampled_from([numbers, classes]),
    st.integers(0, 99),
    st.sampled_from([1, 5]),
)


def other(one: Predictions) -> Predictions:
    noise = np.random.default_rng(1).standard_normal(one.predicted.shape)
    return Predictions(one.true, one.predicted * np.exp(0.2 * noise), one.counts, one.classes, one.rows)


def flat(found: Changes) -> dict[str, list[float]]:
    return {name: [one.value, *ends(one.interval), one.p_improved] for name, one in found.values.items()}


@settings(max_examples=25, deadline=None)
@given(cases, st.randoms(use_true_random=False))
def test_the_order_of_the_sequences_does_not_matter(one: Predictions, random: st.DataObject) -> None:
    order = np.array(random.sample(range(len(one)), len(one)))  # type: ignore[attr-defined]
    again = intervals(chosen(one, order)).values
    for name, interval in intervals(one).values.items():
        assert ends(again[name]) == pytest.approx(ends(interval), rel=1e-6)
    first, second = flat(changes(other(one), one)), flat(changes(chosen(other(one), order), chosen(one, order)))
    for name, numbers_of in first.items():
        assert second[name] == pytest.approx(numbers_of, rel=1e-6, abs=1e-9)


@settings(max_examples=25, deadline=None)
@given(cases)
def test_a_change_turns_round_with_its_checkpoints(one: Predictions) -> None:
    there, back = changes(other(one), one).values, changes(one, other(one)).values
    assert set(there) == set(back)
    for name, change in there.items():
        assert -back[name].value == pytest.approx(change.value)
        assert (-back[name].interval.high, -back[name].interval.low) == pytest.approx(ends(change.interval))
        assert 1 - back[name].p_improved == pytest.approx(change.p_improved)
        sure = change.interval.low > 0 or change.interval.high < 0
        assert sure == (change.p_improved > 0.975 or change.p_improved < 0.025)
        better = change.value < 0 if name in LOWER_IS_BETTER else change.value > 0
        assert better == (change.p_improved > 0.5)


@settings(max_examples=25, deadline=None)
@given(cases)
def test_nothing_is_random(one: Predictions) -> None:
    assert intervals(one) == intervals(one)
    assert changes(other(one), one) == changes(other(one), one)


@pytest.mark.parametrize("one", [numbers(sequences=49), classes(sequences=49, longest=9)], ids=["numbers", "tokens"])
def test_fewer_than_50_sequences_give_no_interval(one: Predictions) -> None:
    reason = "an interval takes at least 50 test sequences with labels, and there are 49"
    assert intervals(one).refused == dict.fromkeys(values(one), reason)
    assert changes(other(one), one).refused == dict.fromkeys(values(one), reason)
    assert not intervals(one).values
    assert not changes(other(one), one).values


def test_a_rare_class_leaves_accuracy_alone() -> None:
    one = classes(sequences=120)
    true = one.true.copy()
    true[np.flatnonzero(true == 2)[9:]] = 0
    found = intervals(Predictions(true, one.predicted, one.counts, CLASSES))
    reason = "an interval takes at least 10 test sequences of each class, and c in 9"
    assert found.refused == dict.fromkeys(BY_CLASS, reason)
    assert set(found.values) == {"accuracy"}


def test_what_rests_on_one_sequence_is_refused() -> None:
    one = numbers(sequences=60)
    flat_but_one = Predictions(one.true, np.r_[np.zeros(59), 1.0], one.counts)
    found = intervals(flat_but_one)
    assert found.refused == dict.fromkeys(
        ("pearson", "spearman"), "decided by one test sequence, so without an interval"
    )


def test_other_labels_are_not_compared() -> None:
    with pytest.raises(DataError, match="same test sequences and labels only, not on 80 and 80 that differ"):
        changes(numbers(seed=1), numbers(seed=2))


def table_of(one: Predictions, masked: int) -> pa.Table:
    """As `Scores.table` has it, with a first sequence of which every unit is masked, and one masked unit at the end."""
    rows = np.r_[np.zeros(masked, np.int32), 1 + np.repeat(np.arange(len(one)), one.counts), len(one)].astype(np.int32)
    mask = np.r_[np.zeros(masked, bool), np.ones(len(one.true), bool), False]
    around = ((masked, 1), *((0, 0) for _ in one.predicted.shape[1:]))
    true, predicted = np.pad(one.true, around[0]), np.pad(one.predicted, around)
    columns = {"row": pa.DictionaryArray.from_arrays(rows, ["x000.csv:none", *one.rows]), "y_mask": pa.array(mask)}
    if one.classes is None:
        columns |= {"y_target": pa.array(true, mask=~mask), "y_prediction": pa.array(predicted)}
    else:
        names = list(one.classes)
        labels = (pa.array(true.astype(np.int32), mask=~mask), pa.array(predicted.argmax(1).astype(np.int32)))
        columns["y_target"], columns["y_prediction"] = (pa.DictionaryArray.from_arrays(ids, names) for ids in labels)
        columns["y_probabilities"] = pa.FixedSizeListArray.from_arrays(pa.array(predicted.reshape(-1)), len(names))
    return pa.table(columns)


@pytest.mark.parametrize("one", [*EVERY.values(), *TOKENS.values()], ids=[*EVERY, *TOKENS])
def test_predictions_come_back_from_the_stored_table(one: Predictions, tmp_path: Path) -> None:
    pq.write_table(table_of(one, masked=3), tmp_path / "predictions.parquet", row_group_size=50)
    back = from_table(pq.read_table(tmp_path / "predictions.parquet"), "y")
    assert back.rows == one.rows
    assert (back.counts == one.counts).all()
    assert (back.true == one.true).all()
    assert (back.predicted == one.predicted).all()
    assert back.classes == (None if one.classes is None else list(one.classes))
    back.check_same_labels(one)


def long_form(every: list[Predictions]) -> pa.Table:
    """A block of rows for each head seed, with the predictions of the first as a probe's in every block."""
    blocks = []
    for seed, one in enumerate(every):
        block, probe = table_of(one, 2), table_of(every[0], 2)
        for what in ("prediction", "probabilities"):
            if f"y_{what}" in probe.column_names:
                block = block.append_column(f"y_probe_{what}", probe[f"y_{what}"])
        blocks.append(block.append_column("seed", pa.array(np.full(len(block), 1234 + seed))))
    return pa.concat_tables(blocks)


SEVERAL = {
    "numbers": [numbers(error=error) for error in (0.5, 0.7, 0.9)],
    "classes of tokens": [classes(signal=signal, longest=9) for signal in (1.0, 1.2, 0.8)],
}


@pytest.mark.parametrize("every", SEVERAL.values(), ids=SEVERAL)
def test_several_seeds_are_the_mean_of_their_metrics(every: list[Predictions]) -> None:
    table = long_form(every)
    several = from_table(table, "y")
    assert [one.predicted.tolist() for one in several.seeds] == [one.predicted.tolist() for one in every]
    found = jackknife(several)
    for name, value in found.values.items():
        assert value == pytest.approx(np.mean([values(one)[name] for one in every]))
        assert found.without[name] == pytest.approx(np.mean([jackknife(one).without[name] for one in every], 0))
    assert set(intervals(several).values) == set(intervals(every[0]).values)
    assert intervals(from_table(table, "y", probe=True)) == intervals(every[0])
    assert changes(several, several).values["accuracy" if every[0].classes else "mse"].interval == Interval(0.0, 0.0)


def test_seeds_of_other_units_are_refused() -> None:
    table = long_form([numbers(), numbers(error=0.7)])
    with pytest.raises(DataError, match="same test sequences and labels only"):
        from_table(table.slice(0, len(table) - 9), "y")


def test_a_table_without_a_probe_says_so() -> None:
    with pytest.raises(DataError, match="must have the columns y_probe_prediction; found"):
        from_table(table_of(numbers(), 1), "y", probe=True)


def test_an_output_more_than_there_are_classes_is_no_class() -> None:
    one = classes(names=2)
    wider = np.pad(one.predicted, ((0, 0), (0, 1)))
    back = from_table(table_of(Predictions(one.true, wider, one.counts, ("a", "b", "class 2"), one.rows), 0), "y")
    assert back.classes == ["a", "b"]
    assert intervals(back) == intervals(one)


def test_a_table_without_the_target_says_so() -> None:
    with pytest.raises(DataError, match="predictions of 'x' must have the columns x_target, x_prediction, x_mask"):
        from_table(table_of(numbers(), 1), "x")


def test_names_of_intervals_are_no_metrics_of_their_own() -> None:
    change = changes(numbers(error=0.4), numbers()).values["mse"]
    key = Metric("task", "y", "mse").key
    named = change.interval.named(key) | change.named(key, "start") | change.named(key, "best")
    assert list(named) == [
        f"task/test_y_mse_{name}"
        for name in """ci_low ci_high delta_start delta_start_ci_low delta_start_ci_high p_improved
        delta_best delta_best_ci_low delta_best_ci_high""".split()
    ]
    assert not any(Metric.parse(name) for name in named)


@pytest.mark.parametrize("one", TOKENS.values(), ids=TOKENS)
def test_metrics_within_sequences_are_those_of_each_alone(one: Predictions) -> None:
    """By hand, sequences of one label left out; and their interval is the t interval of a mean."""
    expected = []
    for index in range(len(one)):
        alone = chosen(one, np.array([index]))
        if len(alone.true) == 1:
            continue
        if one.classes is None:
            expected.append(stats.spearmanr(alone.true, alone.predicted).statistic)
        else:
            expected.append(float(np.mean(alone.predicted.argmax(1) == alone.true)))
    each = per_sequence(one)
    assert each[~np.isnan(each)] == pytest.approx(expected)
    assert np.isnan(each).sum() == (one.counts == 1).sum() > 0
    ((name, value),) = per_sequence_mean(one).values.items()
    assert value == pytest.approx(np.mean(expected))
    theirs = stats.ttest_1samp(expected, 0).confidence_interval(0.95)
    assert ends(intervals(one).values[name]) == pytest.approx(tuple(theirs), rel=0.01)


def test_ranks_within_a_sequence_have_ties_and_equal_predictions_rank_nothing() -> None:
    true = np.array([1.0, 2, 2, 3, 0, 1, 5, 5, 7, 1, 2])
    predicted = np.array([1.0, 1, 2, 4, 3, 3, 1, 2, 9, 2, 1])
    one = Predictions(true, predicted, np.array([4, 2, 2, 1, 2]))
    expected = [stats.spearmanr(true[:4], predicted[:4]).statistic, 0.0, np.nan, np.nan, -1.0]
    assert per_sequence(one) == pytest.approx(expected, nan_ok=True)
    flat = Predictions(np.ones(6), np.arange(6.0), np.full(3, 2))
    assert per_sequence_mean(flat).omitted == {"per_sequence_spearman": "no test sequence has two labels that differ"}


def test_few_sequences_with_two_labels_have_no_interval_within_them() -> None:
    one = classes(sequences=100, longest=9)
    few = chosen(one, np.r_[np.flatnonzero(one.counts > 1)[:49], np.flatnonzero(one.counts == 1)[:9]])
    reason = "an interval takes at least 50 test sequences with two labels, and there are 49"
    assert intervals(few).refused == {"per_sequence_accuracy": reason}
