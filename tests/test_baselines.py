"""Baselines: what they see of a sequence, what they reach beside a checkpoint, and that they are measured once."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mlflow import MlflowClient

from pipeline import baseline_scores, setup_dwnstr_task_validation_callbacks
from pipeline.config.task import Task
from pipeline.embed import embed
from pipeline.encoders.baselines import BASELINES, Composition, Windows
from pipeline.errors import ConfigError
from pipeline.load import load
from pipeline.report import figures
from pipeline.report.figures import curves, numbers
from pipeline.report.overview import overview, overview_frame
from pipeline.report.page import page
from pipeline.report.tables import score_table
from pipeline.score import Scores, score
from pipeline.statistics.intervals import changes
from pipeline.statistics.predictions import from_table
from pipeline.store.embedding_table import Store
from pipeline.train_head import train_head
from pipeline.validation import validate
from tests.support.data import ADAM, make_task, planted_task, proteins
from tests.support.encoders import FakeEncoder
from tests.support.training import Busy, loader, section, trainer

CPU = torch.device("cpu")


def composed(folder: Path, **options: Any) -> Task:
    """A number that is the share of W, which composition knows all about."""
    draw = random.Random(1)

    def rows(texts: list[str]) -> list[dict[str, object]]:
        return [{"sequence": text, "y": 25 * text.count("W") / len(text) + draw.gauss(0, 0.3)} for text in texts]

    settings = {"num_epochs": 20, "batch_size": 16, "optim": ADAM, "baselines": True, **options}
    return make_task(folder, rows(proteins(150, 3)), rows(proteins(80, 4)), **settings)


class Blind(FakeEncoder):
    """Noise alone, by sequence."""

    def state(self, sequence: str) -> torch.Tensor:
        state = super().state(sequence)
        state[:, :20] = 0
        return state


def measured(task: Task, folder: Path, encoder: FakeEncoder | None = None) -> Scores:
    (scores,) = validate(encoder or FakeEncoder(), task, Store(folder / "store"))
    return scores


def test_composition_by_hand() -> None:
    """Of train AAC and CCCC the shares of A are 2/3 and 0, of C 1/3 and 1: means 1/3 and 2/3, variances 1/9."""
    encoder = Composition(["AAC", "CCCC", "AAC"])
    assert encoder.hidden_size == 2
    embedding = encoder.hidden_states(["CAAAB"])[0]
    assert embedding.shape == (5, 2)
    torch.testing.assert_close(embedding.mean(0), torch.tensor([3 * (3 / 5 - 1 / 3), 3 * (1 / 5 - 2 / 3)]))
    assert encoder.digest == Composition(["CCCC", "AAC"]).digest
    assert encoder.digest != Composition(["CCCC", "AAAC"]).digest


def test_smiles_have_n_grams() -> None:
    """CCO has six n-grams: C twice, O, CC, CO and CCO, at three positions."""
    encoder = Composition(["CCO", "c1ccccc1", "CC(=O)O"])
    assert encoder.hidden_size == 256
    counts = [one * encoder._scale + encoder._mean for one in map(np.asarray, encoder.hidden_states(["CCO", "OCC"]))]
    totals = [one.sum(0).round(4) for one in counts]
    assert [sorted(one[one > 0]) for one in totals] == [[1, 1, 1, 1, 2], [1, 1, 1, 1, 2]]
    assert (totals[0] != totals[1]).any()  # CO and CCO are not OC and OCC
    assert Composition(["CCO", "CC"]).hidden_size == 2  # capital letters alone
    assert encoder.hidden_states(["C"])[0].shape == (1, 256)


def test_windows_at_the_ends() -> None:
    """Of AB the columns are position -3 to 3, each A and B; what is not in train, and beyond the ends, is 0."""
    encoder = Windows(["AB", "BB"])
    assert encoder.hidden_size == 14
    rows = encoder.hidden_states(["AB?"])[0] / 2**0.5
    expected = torch.zeros(3, 7, 2)
    for position in range(3):
        for letter, place in ((0, 0), (1, 1)):  # A at 0, B at 1
            if 0 <= place - position + 3 < 7:
                expected[position, place - position + 3, letter] = 1
    torch.testing.assert_close(rows, expected.reshape(3, 14))
    long = encoder.hidden_states(["A" * 9])[0] / 2**0.5
    assert long.sum(1).tolist() == pytest.approx([4, 5, 6, 7, 7, 7, 6, 5, 4])


@pytest.mark.parametrize("level", ["sequence", "token"])
def test_the_lines_are_what_the_stages_give(tmp_path: Path, level: str) -> None:
    """Of head and probe, with the settings of the task, under names of their own."""
    task = composed(tmp_path) if level == "sequence" else planted_task(tmp_path, num_epochs=2, baselines=True)
    scores = measured(task, tmp_path)
    examples = load(task)
    (embeddings,) = embed([examples], BASELINES[level](examples.train.sequences), Store(tmp_path / "by hand"))
    by_hand = score(embeddings, train_head(embeddings, Store(tmp_path / "by hand"), CPU)).metrics
    target, name = ("y", "spearman") if level == "sequence" else ("label", "accuracy")
    for who in ("", "_probe"):
        value = by_hand[f"test_{target}{who}_{name}"]
        assert scores.baselines[f"test_{target}{who}_{name}"] == value
        assert scores.metrics[f"test_{target}_baseline{who}_{name}"] == value
    assert len([key for key in scores.metrics if "_baseline" in key]) == 2
    assert not list((tmp_path / "store").glob("live/*"))
    assert len(list((tmp_path / "store" / "embeddings").iterdir())) == 1


def test_names_in_a_list_begin_with_the_task(tmp_path: Path) -> None:
    (scores,) = validate(FakeEncoder(), [composed(tmp_path, task_name="w")], Store(tmp_path / "store"))
    assert {"w/test_y_baseline_spearman", "w/test_y_baseline_probe_spearman"} <= set(scores.metrics)
    undefined = [one for one in scores.results if one.name != "spearman"]
    assert "w/test_y_baseline_spearman" in replace(scores, results=tuple(undefined)).metrics
    assert set(scores.baselines) == {"w/test_y_spearman", "w/test_y_probe_spearman"}


def test_no_baseline_where_none_is_wanted(tmp_path: Path) -> None:
    scores = measured(composed(tmp_path, baselines=False), tmp_path)
    assert scores.baselines == {}
    assert not any("baseline" in name for name in scores.metrics)
    assert not (tmp_path / "store" / "baselines").exists()


def test_a_target_that_a_baseline_s_metrics_would_be_taken_for(tmp_path: Path) -> None:
    task = planted_task(tmp_path, target_column=["x", "x_baseline"], mask_column=None)
    task.check()
    with pytest.raises(ConfigError, match="another target's baseline begin with; rename it, or write baselines: false"):
        replace(task, baselines=True).check()


@pytest.fixture
def fits(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Gets the arguments of each fit of a baseline's heads; the fit is made all the same."""
    fits: list[Any] = []
    real = train_head

    def counted(*args: Any) -> Any:
        fits.append(args)
        return real(*args)

    monkeypatch.setattr(baseline_scores, "train_head", counted)
    return fits


def test_it_is_measured_once(tmp_path: Path, fits: list[Any]) -> None:
    """Another checkpoint pays nothing; other labels, settings or a damaged file have it measured again."""
    task = composed(tmp_path / "data")
    first = measured(task, tmp_path)
    again = measured(task, tmp_path, FakeEncoder(name="another"))
    assert len(fits) == 1
    assert first.baselines == again.baselines
    (path,) = (tmp_path / "store" / "baselines").glob("*")
    content = path.read_bytes()
    middle = len(content) // 3
    for damaged in (b"", content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]):
        path.write_bytes(damaged)
        assert measured(task, tmp_path).baselines == first.baselines
    assert len(fits) == 3
    assert path.read_bytes() == content
    others = replace(task, num_epochs=19), replace(task, num_seeds=2), replace(task, probe="none")
    for number, other in enumerate(others, 4):
        measured(other, tmp_path)
        assert len(fits) == number
    csv = tmp_path / "data" / "test" / "x000.csv"
    csv.write_text("\n".join(csv.read_text().splitlines()[:-1]) + "\n")  # a row less to be scored on
    measured(task, tmp_path)
    assert len(fits) == 7


def test_a_checkpoint_that_is_no_better_is_said_to_be(tmp_path: Path) -> None:
    """Neither head nor probe; one that sees what the baseline does not is not."""
    scores = measured(composed(tmp_path, num_seeds=2), tmp_path, Blind())
    (note,) = (note for note in scores.notes if "better than composition" in note)
    baseline = baseline_scores.measure_baseline(scores.examples, Store(tmp_path / "store"), CPU)
    for who, probe in (("", False), ("_probe", True)):
        key = f"test_y{who}_spearman"
        tables = [from_table(table, "y", probe) for table in (scores.table, baseline.table)]
        interval = changes(*tables).values["spearman"].interval
        assert interval.high < 0
        both = f"{scores.metrics[key]:.3f} against {scores.baselines[key]:.3f}"
        ends = f"{interval.low:.3f} to {interval.high:.3f}"
        words = f"nor is {key}" if probe else f"{key} is not better than composition"
        assert f"{words} ({both}, interval of the difference {ends})" in note
    (row,) = overview([scores]).rows
    assert "not better than its baseline" in row[-1]


def test_a_checkpoint_that_is_better_is_not_warned_of(tmp_path: Path) -> None:
    """Which half of a sequence has more W is what composition cannot tell."""

    def more_in_front(text: str) -> int:
        return text[: len(text) // 2].count("W") - text[len(text) // 2 :].count("W")

    class Knows(FakeEncoder):
        def state(self, sequence: str) -> torch.Tensor:
            state = super().state(sequence)
            state[:, 20:] += more_in_front(sequence)
            return state

    train, test = ([{"sequence": text, "y": more_in_front(text)} for text in proteins(150, seed)] for seed in (3, 4))
    task = make_task(tmp_path / "halves", train, test, num_epochs=20, batch_size=16, optim=ADAM, baselines=True)
    scores = measured(task, tmp_path, Knows())
    assert scores.metrics["test_y_spearman"] > scores.baselines["test_y_spearman"] + 0.3
    assert not any("not better than" in note for note in scores.notes)


def test_a_baseline_that_fails_takes_nothing_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> Any:
        raise ConfigError("no luck")

    monkeypatch.setattr(baseline_scores, "measure_baseline", fails)
    scores = measured(composed(tmp_path), tmp_path)
    assert "there is no baseline: no luck" in scores.notes
    assert scores.metrics["test_y_spearman"] > 0.5


def test_lines_in_tables_the_page_and_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = measured(composed(tmp_path), tmp_path)
    values = [scores.baselines[f"test_y{who}_spearman"] for who in ("", "_probe")]
    head, probe = (f"{value:.4f}" for value in values)
    both = " / ".join(f"{value:.3f}" for value in values)
    for table, expected in ((score_table([scores]), [head, probe]), (overview([scores]), [both])):
        (row,) = (row for row in table.rows if row[0] == "test_y_spearman")
        assert [cell for cell, name in zip(row, table.columns, strict=True) if "baseline" in name] == expected
        html = page("title", [scores], {}, {}, "")
        assert all(f">{cell}</td>" in html or f">{cell}</dd>" in html for cell in expected)
    assert overview_frame([scores])[["baseline", "probe_baseline"]].to_numpy().tolist() == [values]
    target = scores.examples.targets[0]
    assert f"baseline {scores.baselines['test_y_spearman']:.3f}" in figures._headline(scores, target)
    drawn: list[Any] = []
    monkeypatch.setattr(numbers, "save", lambda figure, _path: drawn.append(figure))
    names = ("test_y_spearman", "test_y_probe_spearman", "test_y_baseline_spearman", "test_y_baseline_probe_spearman")
    curves([(step, {name: scores.metrics[name] for name in names}) for step in (0, 4)], tmp_path)
    (axes,) = drawn[0].axes
    level = [line for line in axes.get_lines() if line.get_linestyle() == ":"]
    assert [line.get_ydata()[0] for line in level] == [scores.metrics[name] for name in names[2:]]
    assert len(axes.get_lines()) == 4
    assert "dotted: the baseline" in drawn[0].artists[0].get_text().replace("\n", " ")


def test_a_training_has_the_line_and_pays_once(
    tmp_path: Path, tracking: str, model_folder: Any, fits: list[Any]
) -> None:
    """Embeddings of live weights go after each measurement; the scores of the baseline stay."""
    callbacks = setup_dwnstr_task_validation_callbacks(section(tmp_path, composed(tmp_path, num_epochs=2)))
    trainer(tmp_path, callbacks, max_epochs=3).fit(Busy(model_folder("esm")), loader(), loader(shuffle=False))
    (run,) = MlflowClient(tracking).search_runs(["0"])
    history = MlflowClient(tracking).get_metric_history(run.info.run_id, "test_y_baseline_spearman")
    assert [point.step for point in history] == [4, 8, 12]
    assert len({point.value for point in history}) == 1
    assert len(fits) == 1
    assert len(list((tmp_path / "store" / "baselines").iterdir())) == 1
