"""The whole path with an encoder whose hidden states are known: alignment, masks, and scores that repeat to the bit."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from sklearn.metrics import accuracy_score, r2_score, roc_auc_score

from pipeline.config.task import Files, Task
from pipeline.embed import embed
from pipeline.errors import ConfigError, DataError
from pipeline.heads.batches import Data
from pipeline.load import load
from pipeline.report.tables import score_table
from pipeline.score import Scores, by_reason, score
from pipeline.statistics.intervals import intervals
from pipeline.statistics.metrics import LOSS, Interval, Metric, metric_name
from pipeline.statistics.predictions import from_table
from pipeline.store.embedding_table import Store
from pipeline.train_head import train_head
from pipeline.validation import validate
from tests.support.data import ADAM, column, make_task, planted, planted_task, planted_task_at, proteins, write_csv
from tests.support.encoders import FakeEncoder

CPU = torch.device("cpu")


def measure(task: Task, store: Store, encoder: FakeEncoder | None = None) -> Scores:
    (scores,) = validate(encoder or FakeEncoder(), task, store)
    return scores


def test_a_signal_planted_at_known_residues_is_found(tmp_path: Path, store: Store) -> None:
    task = planted_task(tmp_path)
    assert measure(task, store).metrics["test_label_accuracy"] > 0.98
    numbers = replace(task, task_type="regression", target_column=["number"], num_epochs=150)
    assert measure(numbers, store).metrics["test_number_r2"] > 0.9


def test_a_signal_in_the_pooled_embedding_is_found(tmp_path: Path, store: Store) -> None:
    def rows(texts: list[str]) -> list[dict[str, object]]:
        return [{"sequence": text, "y": 3 * text.count("W") / len(text)} for text in texts]

    task = make_task(tmp_path, rows(proteins(200, 3)), rows(proteins(50, 4)), num_epochs=60, batch_size=16, optim=ADAM)
    assert measure(task, store).metrics["test_y_r2"] > 0.8


def test_every_metric_has_the_interval_that_the_stored_predictions_give(tmp_path: Path, store: Store) -> None:
    task = make_task(tmp_path, planted(proteins(60, 1)), level="token", optim=ADAM)
    write_csv(tmp_path / "test" / "x000.csv", [{**row, "other": row["label"]} for row in planted(proteins(60, 2))])
    write_csv(tmp_path / "train" / "x000.csv", [{**row, "other": row["label"]} for row in planted(proteins(60, 1))])
    kind, columns = "classification", ["label", "other"]
    scores = measure(replace(task, task_type=kind, target_column=columns, target_sizes=[2, 2], num_epochs=20), store)
    pq.write_table(scores.table, tmp_path / "predictions.parquet")
    stored = pq.read_table(tmp_path / "predictions.parquet")
    expected: dict[str, float] = {}
    for target, probe in product(("label", "other"), (False, True)):
        for name, interval in intervals(from_table(stored, target, probe)).values.items():
            key = f"test_{target}_probe_{name}" if probe else f"test_{target}_{name}"
            assert interval.low < scores.metrics[key] < interval.high
            expected |= {f"{key}_ci_low": interval.low, f"{key}_ci_high": interval.high}
    assert {name: value for name, value in scores.metrics.items() if "_ci_" in name} == expected
    assert {"test_label_auroc_ci_low", "test_other_probe_auroc_ci_low"} < set(expected)
    assert "_ci_" not in str(scores.notes)


def test_what_is_said_of_the_head_and_the_probe_is_said_once(tmp_path: Path, store: Store) -> None:
    rows = [{"sequence": text, "y": 1.0} for text in proteins(10, 1)]
    notes = measure(make_task(tmp_path, [{**row, "y": i} for i, row in enumerate(rows)], rows), store).notes
    names = "test_y_r2, test_y_pearson, test_y_spearman and the probe's"
    assert notes[0] == f"{names} are left out: the test values are all equal"
    few = "an interval takes at least 50 test sequences with labels, and there are 10"
    assert notes[1] == f"test_y_mse, test_y_rmse, test_y_mae and the probe's: {few}"


def test_a_perfect_task_is_told_of_in_one_line(tmp_path: Path, store: Store) -> None:
    def rows(seed: int) -> list[dict[str, object]]:
        return [{"sequence": text + 30 * "WA"[i % 2], "y": "wa"[i % 2]} for i, text in enumerate(proteins(60, seed))]

    task = make_task(tmp_path, rows(1), rows(2), task_type="classification", optim=ADAM, num_epochs=40)
    scores = measure(task, store)
    names = ("balanced_accuracy", "macro_f1", "mcc", "average_precision", "auroc")
    assert {scores.metrics[f"test_y_{name}"] for name in ("accuracy", *names)} == {1.0}
    assert scores.metrics["test_y_probe_accuracy"] == 1.0
    same = "the same whichever test sequence is left out, so without an interval"
    assert scores.notes == (f"{', '.join(f'test_y_{name}' for name in names)} and the probe's: {same}",)


def test_who_has_a_reason_in_common_is_named_once() -> None:
    names = ("test_y_mcc", "test_y_auroc", "test_y_probe_mcc", "test_y_probe_macro_f1")
    assert by_reason(dict.fromkeys(names, "why"), ("is", "are")) == {
        "why": "test_y_mcc and the probe's, test_y_auroc, test_y_probe_macro_f1 are"
    }
    assert by_reason({"test_y_mcc": "why", "test_x_mcc": "else"}) == {"why": "test_y_mcc", "else": "test_x_mcc"}


def test_the_printed_table_has_the_probe_beside_the_head_and_their_intervals() -> None:
    results = (
        Metric("", "", LOSS, 2.0),
        Metric("", "y", "mse", 1.5, 2.0, Interval(1.25, 1.75)),
        Metric("", "y", "mse", 1.0, 2.0, Interval(0.5, 2.0), probe=True),
        Metric("", "y", "spearman", 0.25, probe=True),  # the head's predictions are all equal
    )
    table = score_table([SimpleNamespace(results=results, baselines={})])  # type: ignore[list-item]
    assert list(table.columns) == ["metric", "score", "95 %", "probe", "95 %", "constant guess"]
    assert table.rows == [
        [LOSS, "2.0000", "", "", "", ""],
        ["test_y_mse", "1.5000", "1.250, 1.750", "1.0000", "0.500, 2.000", "2.0000"],
        ["test_y_spearman", "", "", "0.2500", "", ""],
    ]
    assert max(len(line) for line in table.text().splitlines()) <= 120


def test_the_probe_s_metrics_are_those_of_its_predictions(tmp_path: Path, store: Store) -> None:
    """For classes and numbers, from the table, by scikit-learn; the scores of a ridge regression rank as they are."""
    task = planted_task(tmp_path, num_epochs=0)
    table, found = (scores := measure(task, store)).table, scores.metrics
    mask = np.array(column(table, "label_mask"))
    true, predicted = (np.array(column(table, f"label_{what}"))[mask] for what in ("target", "probe_prediction"))
    answers = np.array(column(table, "label_probe_probabilities"))[mask]
    names = sorted(set(true))
    assert list(np.array(names)[answers.argmax(1)]) == list(predicted)
    assert found["test_label_probe_accuracy"] == accuracy_score(true, predicted)
    assert found["test_label_probe_auroc"] == roc_auc_score(true == names[1], answers[:, 1])
    assert found["test_label_probe_accuracy"] != found["test_label_accuracy"]
    assert scores.constant["test_label_probe_accuracy"] == scores.constant["test_label_accuracy"]
    numbers = replace(task, task_type="regression", target_column=["number"])
    table, found = (scores := measure(numbers, store)).table, scores.metrics
    mask = np.array(column(table, "number_mask"))
    true, predicted = (np.array(column(table, f"number_{what}"))[mask] for what in ("target", "probe_prediction"))
    assert found["test_number_probe_r2"] == pytest.approx(r2_score(true, predicted))
    assert "number_probe_probabilities" not in table.column_names
    none = measure(replace(numbers, probe="none"), store)
    assert "probe" not in " ".join([*none.metrics, *none.table.column_names])
    assert list(score_table([none]).columns) == ["metric", "score", "constant guess"]


def test_too_few_test_sequences_for_an_interval_are_said_once(tmp_path: Path, store: Store) -> None:
    scores = measure(planted_task(tmp_path), store)
    assert not any("_ci_" in name for name in scores.metrics)
    said = [note for note in scores.notes if "interval" in note]
    assert len(said) == 1
    assert said[0].endswith("an interval takes at least 50 test sequences with labels, and there are 30")


def test_shuffled_test_rows_give_the_same_score_and_shuffled_labels_do_not(tmp_path: Path, store: Store) -> None:
    task = planted_task(tmp_path)
    before = measure(task, store)
    rows = planted(proteins(30, 2))
    random.Random(5).shuffle(rows)
    write_csv(tmp_path / "test" / "x000.csv", rows)
    after = measure(task, store)
    assert after.metrics == pytest.approx(before.metrics, abs=1e-6)
    write_csv(tmp_path / "test" / "x000.csv", [{**row, "label": str(row["label"])[::-1]} for row in rows])
    assert measure(task, store).metrics["test_label_accuracy"] < before.metrics["test_label_accuracy"] - 0.05


def test_a_moved_mask_changes_exactly_what_is_counted(tmp_path: Path, store: Store) -> None:
    task = planted_task(tmp_path)
    before = measure(task, store).table
    rows = planted(proteins(30, 2))
    moved = [{**row, "seen": str(row["seen"])[1:] + str(row["seen"])[0]} for row in rows]
    write_csv(tmp_path / "test" / "x000.csv", moved)
    scores = measure(task, store)
    after = scores.table
    assert column(after, "label_prediction") == column(before, "label_prediction")
    assert column(after, "label_probabilities") == column(before, "label_probabilities")
    mask = [letter == "1" for row in moved for letter in str(row["seen"])]
    assert column(after, "label_mask") == mask
    truth = [
        letter if seen else None for letter, seen in zip("".join(str(r["label"]) for r in moved), mask, strict=True)
    ]
    assert column(after, "label_target") == truth
    pairs = zip(truth, column(after, "label_prediction"), strict=True)
    expected = np.mean([true == predicted for true, predicted in pairs if true is not None])
    assert scores.metrics["test_label_accuracy"] == pytest.approx(expected)


def test_masked_train_labels_do_not_reach_the_head(tmp_path: Path, store: Store) -> None:
    before = measure(planted_task(tmp_path), store).metrics
    rows = planted(proteins(80, 1))
    hidden = [
        {
            **row,
            "label": "".join(y if m == "1" else "?" for y, m in zip(str(row["label"]), str(row["seen"]), strict=True)),
        }
        for row in rows
    ]
    write_csv(tmp_path / "train" / "x000.csv", hidden)
    assert measure(planted_task_at(tmp_path), Store(tmp_path / "other")).metrics == before


def test_a_sequence_scores_the_same_alone_and_in_any_batch(tmp_path: Path, store: Store) -> None:
    for task in (
        planted_task(tmp_path),
        replace(planted_task(tmp_path), target_column=["number"], task_type="regression"),
    ):
        (embeddings,) = embed([load(task)], FakeEncoder(), store)
        head = train_head(embeddings, store, CPU).head
        part = embeddings.examples.test
        data = Data(embeddings.rows("test"), part, CPU)
        whole = data.batch(np.arange(len(part)))
        together = head(whole.rows, whole.counts)[0].split(part.counts.tolist())
        for index in range(len(part)):
            one = data.batch(np.array([index]))
            torch.testing.assert_close(head(one.rows, one.counts)[0], together[index], atol=1e-5, rtol=0)


@pytest.mark.parametrize("memory_bytes", [0, 10**9])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_batches_in_an_order_are_those_of_the_sequences_asked_for(
    tmp_path: Path, level: str, memory_bytes: int
) -> None:
    texts = proteins(30, 2)
    rows: list[dict[str, object]] = [{"sequence": text, "y": len(text)} for text in texts]
    task = planted_task(tmp_path) if level == "token" else make_task(tmp_path, rows, rows)
    (embeddings,) = embed([load(task)], FakeEncoder(), Store(tmp_path / "store", memory_bytes=memory_bytes))
    part = embeddings.examples.test
    data, other = (Data(embeddings.rows("test"), part, CPU) for _ in range(2))
    order = np.random.default_rng(0).permutation(len(part))
    count = 0
    for batch, begin in zip(data.batches(order, 7), range(0, len(part), 7), strict=True):
        expected = other.batch(order[begin : begin + 7])
        pairs = [
            (batch.rows, expected.rows),
            (batch.counts, expected.counts),
            *zip(batch.values, expected.values, strict=True),
        ]
        assert all(torch.equal(one, its) for one, its in pairs)
        for one, its in zip(batch.masks, expected.masks, strict=True):
            assert one is its is None if its is None else one is not None and torch.equal(one, its)
        count += len(batch.counts)
    assert count == len(part)
    assert (part.counts == 1).all() == (level == "sequence")


def test_scores_repeat_to_the_last_bit(tmp_path: Path) -> None:
    """Twice, cold, fully warm, from memory and from disk; with the global random state changed in between."""
    task = planted_task(tmp_path)
    cold = measure(task, Store(tmp_path / "a"))
    torch.manual_seed(99)
    warm = Store(tmp_path / "b")
    measure(replace(task, num_epochs=1), warm)
    (from_disk,) = validate(FakeEncoder(), task, replace(warm, memory_bytes=0))
    again = measure(task, Store(tmp_path / "c"))
    reused = measure(task, Store(tmp_path / "c"))
    for other in (from_disk, again, reused):
        assert other.metrics == cold.metrics
        assert other.table == cold.table
        assert other.losses == cold.losses


def test_other_tasks_beside_change_nothing_but_the_prefix(tmp_path: Path) -> None:
    task = planted_task(tmp_path / "one", task_name="one")
    other = planted_task(tmp_path / "two", task_name="two", target_column=["number"], task_type="regression")
    alone = measure(task, Store(tmp_path / "a"))
    beside = validate(FakeEncoder(), [task, other], Store(tmp_path / "b"))
    assert [scores.task_name for scores in beside] == ["one", "two"]
    assert beside[0].metrics == pytest.approx({f"one/{name}": value for name, value in alone.metrics.items()})
    listed = validate(FakeEncoder(), [task], Store(tmp_path / "a"))[0]
    assert listed.metrics == {f"one/{name}": value for name, value in alone.metrics.items()}


def test_a_fit_changes_no_global_state(tmp_path: Path, store: Store) -> None:
    before = torch.random.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # type: ignore[index]
    with torch.inference_mode():
        measure(planted_task(tmp_path, num_epochs=2), store)
        assert torch.is_inference_mode_enabled()
    assert torch.equal(torch.random.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]  # type: ignore[index]
    assert random.getstate() == before[2]


def test_what_a_head_depends_on_is_in_its_key(tmp_path: Path, store: Store) -> None:
    task = planted_task(tmp_path, num_epochs=2)
    (embeddings,) = embed([load(task)], FakeEncoder(), store)
    assert not train_head(embeddings, store, CPU).reused
    assert train_head(embeddings, store, CPU).reused
    for change in (
        {"num_epochs": 3},
        {"random_seed": 1},
        {"shuffle": False},
        {"batch_size": 8},
        {"optim": {"lr": 0.02}},
    ):
        changed = replace(embeddings, examples=replace(embeddings.examples, task=replace(task, **change)))
        assert not train_head(changed, store, CPU).reused


def test_several_heads_with_a_mask_for_one_of_them(tmp_path: Path, store: Store) -> None:
    targets = {"target_column": ["label", "seen"], "target_sizes": [2, 2], "mask_column": ["seen", None]}
    scores = measure(planted_task(tmp_path, **targets), store)
    assert scores.metrics["test_label_accuracy"] > 0.95
    assert scores.metrics["test_seen_accuracy"] > 0.99
    assert "label_mask" in scores.table.column_names
    assert all(column(scores.table, "seen_mask"))


def test_stages_stop_where_they_are_told(tmp_path: Path, store: Store, fake: FakeEncoder) -> None:
    task = planted_task(tmp_path)
    assert validate(fake, task, store, until="load") == []
    assert not fake.seen
    assert validate(fake, task, store, until="embed") == []
    assert fake.seen
    assert not (store.root / "heads").exists()
    assert validate(fake, task, store, until="train_head") == []
    assert len(list((store.root / "heads").iterdir())) == 1


def test_unknown_residues_are_counted_and_warned_of(tmp_path: Path, store: Store, fake: FakeEncoder) -> None:
    rows = [{"sequence": "MK?V", "y": 1}, {"sequence": "MKV", "y": 2}]
    (scores,) = validate(fake, make_task(tmp_path, rows, num_epochs=1), store)
    assert "1 tokens in 1 of 2 sequences are unknown to the tokenizer, such as in 'MK?V'" in scores.earlier_notes


def test_a_loss_that_is_no_number_is_an_error(tmp_path: Path, store: Store) -> None:
    with pytest.raises(DataError, match=r"the training loss is nan.*; lower optim\.lr"):
        measure(planted_task(tmp_path, optim={"name": "adam", "lr": 1e30}), store)
    assert not (store.root / "heads").exists()


def test_names_that_a_tracker_refuses(tmp_path: Path, store: Store) -> None:
    assert metric_name("log P (octanol/water) µ@25%") == "log P _octanol_water_ µ_25_"
    rows = [{"sequence": "MKV", "a/b": "HHH", "a_b": "HHE"}]
    task = make_task(tmp_path, rows, level="token", task_type="classification", target_column=["a/b", "a_b"])
    with pytest.raises(ConfigError, match="a/b and a_b both become 'a_b'"):
        measure(task, store)


def test_the_constant_guess_is_the_most_frequent_class_or_the_mean(tmp_path: Path, store: Store) -> None:
    train = [{"sequence": "MK", "y": letter} for letter in "aab"]
    test = [{"sequence": "MK", "y": letter} for letter in "abbb"]
    classes = make_task(tmp_path / "c", train, test, task_type="classification", num_epochs=0)
    (embeddings,) = embed([load(classes)], FakeEncoder(), store)
    guess = score(embeddings, train_head(embeddings, store, CPU)).constant
    assert guess["test_y_accuracy"] == 0.25
    numbers = [{"sequence": "MK", "y": value} for value in (1, 3)]
    scores = measure(make_task(tmp_path / "n", numbers, [{"sequence": "MK", "y": 4}], num_epochs=0), store)
    assert scores.constant["test_y_mse"] == 4.0


def test_a_label_beyond_float32_is_no_number_to_train_on(tmp_path: Path) -> None:
    task = make_task(tmp_path, [{"sequence": "MK", "y": 1}, {"sequence": "MV", "y": 1e200}])
    with pytest.raises(DataError, match=r"x000\.csv:3: column 'y': expected a number, found '1e\+200'"):
        load(task)


def test_a_val_part_that_is_not_used_changes_nothing(tmp_path: Path) -> None:
    rows = [{"sequence": "MK", "y": letter} for letter in "aab"]
    task = make_task(tmp_path, rows, task_type="classification", num_epochs=2)
    before = measure(task, Store(tmp_path / "a")).metrics
    write_csv(tmp_path / "val" / "x000.csv", [{"sequence": "MK", "y": "c"}])
    assert measure(replace(task, dataset=Files(val="x000")), Store(tmp_path / "b")).metrics == before


def test_worse_than_a_constant_guess_is_said(tmp_path: Path, store: Store) -> None:
    rows = [{"sequence": text, "y": 50 + index} for index, text in enumerate(proteins(10, 6))]
    scores = measure(make_task(tmp_path, rows, num_epochs=1), store)
    assert any("test_y_mse is no better than a constant guess, after 1 optimizer step:" in x for x in scores.notes)
