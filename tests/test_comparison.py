"""Several checkpoints side by side: measured together, or before."""

from __future__ import annotations

import gc
import json
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from mlflow import MlflowClient
from mlflow.artifacts import load_text

from pipeline.__main__ import main
from pipeline.checkpoints.names import expand, names_of, step_of, with_step
from pipeline.checkpoints.opening import open_encoder
from pipeline.encoders.protocol import Encoder
from pipeline.errors import CheckpointError, ConfigError
from pipeline.report.comparison import Row, choose, comparable, leaderboard
from pipeline.report.page import leaderboard_page
from tests.support.encoders import FakeEncoder
from tests.support.lab import STAGES, VALUE, Lab, furnished, own_signals, write_checkpoint
from tests.support.readers import in_tensorboard, in_wandb, pictures_in_tensorboard

SPEARMAN = "test_value_spearman"
OWN = "tests.test_comparison."
WIDTH = {"ckpt.hidden_size": "32"}


class Counted(FakeEncoder):
    """Knows how many of its kind there are when it is made."""

    alive: ClassVar[weakref.WeakSet[Encoder]] = weakref.WeakSet()
    most: ClassVar[list[int]] = []

    @classmethod
    def from_checkpoint(cls, path: str) -> Counted:
        gc.collect()
        encoder = cls(name=path)
        encoder.max_seq_length = 5 if "step=0" in path else None
        cls.alive.add(encoder)
        cls.most.append(len(cls.alive))
        return encoder


class Broken(FakeEncoder):
    """With a mistake in a user's own code: the limit is a text."""

    @classmethod
    def from_checkpoint(cls, path: str) -> Broken:
        encoder = cls(name=path)
        vars(encoder)["max_seq_length"] = "many"
        return encoder


@pytest.fixture
def lab(tmp_path: Path, model_folder: Callable[..., Path], tracking: str) -> Iterator[Lab]:
    """With checkpoints of five steps, the last two of the same weights."""
    with own_signals():
        lab = furnished(tmp_path / "lab", model_folder, tracking)
        for step in (0, 50, 100, 1000, 1050):
            write_checkpoint(lab, step, noise=0 if step >= 1000 else 3 - step / 50)
        yield lab


def measure(lab: Lab, ckpt: str, **section: Any) -> int:
    entry, _, config = lab.command(VALUE, **section)
    return main([entry, f"--ckpt={ckpt}", config])


def test_a_pattern_gives_a_leaderboard_and_a_curve(lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    board = lab.folder / "board"
    logging = {"wandb": "offline", "tensorboard": str(board), "figures": True}
    assert measure(lab, f"{lab.folder}/run/*.ckpt", logging=logging) == 0
    printed = capsys.readouterr().out
    (parent,) = lab.parents()
    children = lab.nested(parent)
    steps = [0, 50, 100, 1000, 1050]
    scores = [run.data.metrics[SPEARMAN] for run in children.values()]
    named = [f"step={step}: value {score:.3f}" for step, score in zip(steps, scores, strict=True)]
    assert list(children) == named
    assert parent.info.run_name == "5 checkpoints on value"
    command = f"downstream compare {parent.info.run_id} --by=test_value_probe_spearman"
    assert f"By another:     {command}" in printed.splitlines()
    for step, child in zip(steps, children.values(), strict=True):
        assert set(lab.nested(child)) == set(STAGES)
        own = {key: value for key, value in child.data.params.items() if key not in parent.data.params}
        assert (own.pop("ckpt.step"), own.pop("ckpt.source")) == (str(step), f"{lab.folder}/run/step={step}.ckpt")
        assert own == {"ckpt.digest": child.data.tags["downstream.checkpoint"], "ckpt.encoder": "esm", **WIDTH}
        assert parent.data.params.items() <= child.data.params.items()
        assert child.data.tags["version.torch"] == parent.data.tags["version.torch"]
    values = {step: child.data.metrics for step, child in zip(steps, children.values(), strict=True)}
    for name in values[0]:
        curve = [(point.step, point.value) for point in lab.client.get_metric_history(parent.info.run_id, name)]
        assert curve == [(step, values[step][name]) for step in steps]
        (folder,) = board.iterdir()
        assert [step for step, _ in in_tensorboard(folder, name)] == steps
        (file,) = (lab.folder / "store" / "wandb").glob("offline-run-*/*.wandb")
        assert in_wandb(file, name) == curve
    table = json.loads(load_text(f"{parent.info.artifact_uri}/leaderboard.json"))
    rows = [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
    assert [row[SPEARMAN] for row in rows] == sorted((one[SPEARMAN] for one in values.values()), reverse=True)
    assert {row["step"]: {name: row[name] for name in values[0]} for row in rows} == values
    ranked = lab.client.search_logged_models(
        ["0"], order_by=[{"field_name": f"metrics.{SPEARMAN}", "ascending": False, "dataset_name": "value test"}]
    )
    assert [one.name for one in ranked] == list(dict.fromkeys(model_of(row["step"]) for row in rows))
    lines = [line for line in printed.splitlines() if "step=" in line]
    assert [line.split("│")[2].strip() for line in lines] == [row["checkpoint"] for row in rows]
    assert {one.path for one in lab.client.list_artifacts(parent.info.run_id, "curves")} == {"curves/curve.png"}
    page = load_text(f"{parent.info.artifact_uri}/report.html")
    assert all(f'<th scope="row">{row["checkpoint"]}</th>' in page for row in rows)
    assert f"| 1 | {rows[0]['checkpoint']} |" in parent.data.tags["mlflow.note.content"]


def model_of(step: int) -> str:
    """The same weights are one model, under the name that they were first seen with."""
    return f"step={1000 if step == 1050 else step}"


def test_one_checkpoint_is_mirrored(lab: Lab) -> None:
    """The same numbers at the same step everywhere, and the pictures."""
    board = lab.folder / "board"
    logging = {"wandb": "offline", "tensorboard": str(board), "figures": True}
    assert measure(lab, f"{lab.folder}/run/step=50.ckpt", logging=logging) == 0
    (parent,) = lab.parents()
    (folder,) = board.iterdir()
    (file,) = (lab.folder / "store" / "wandb").glob("offline-run-*/*.wandb")
    scored = lab.nested(parent)["score"]
    assert parent.data.metrics.items() <= scored.data.metrics.items()
    for name, value in scored.data.metrics.items():
        if name in ("seconds", "peak_memory_mb"):
            continue
        (point,) = lab.client.get_metric_history(scored.info.run_id, name)
        assert (point.step, point.value) == (50, value)
        assert in_wandb(file, name) == [(50, value)]
        assert in_tensorboard(folder, name) == [(50, float(np.float32(value)))]
    pictures = [one.path for one in lab.client.list_artifacts(parent.info.run_id, "figures/value")]
    assert [Path(one).name for one in pictures] == ["learning_curve.png", "lengths.png", "value_predicted.png"]
    for path in pictures:
        tag = path.removesuffix(".png")
        assert [step for step, _ in pictures_in_tensorboard(folder, tag)] == [50]
        assert [step for step, _ in in_wandb(file, f"{tag}/path")] == [50]
    page = load_text(f"{parent.info.artifact_uri}/report.html")
    assert f"{parent.data.metrics[SPEARMAN]:.4f}" in page


def test_what_checkpoints_have_in_common_is_done_once(lab: Lab) -> None:
    assert measure(lab, f"{lab.folder}/run/step={{1000,1050}}.ckpt") == 0
    first, second = lab.nested(lab.parents()[0]).values()
    done = [lab.nested(one) for one in (first, second)]
    assert [one["embed"].data.metrics["embedded"] for one in done] == [40, 0]
    assert [one["train_head"].data.metrics["reused"] for one in done] == [0, 1]
    assert first.data.metrics == second.data.metrics


def test_one_that_cannot_be_measured_does_not_stop_the_others(
    lab: Lab, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    (lab.folder / "run" / "step=70.ckpt").write_bytes(b"not a checkpoint")
    assert (
        measure(lab, f"{lab.folder}/run/step=50.ckpt,{lab.folder}/run/step=70.ckpt,{lab.folder}/run/step=100.ckpt") == 2
    )
    said = capsys.readouterr()
    assert said.err.splitlines()[-1].startswith("error: step=70: ckpt: ")
    assert "failed" in next(line for line in said.out.splitlines() if "step=70" in line)
    (parent,) = lab.parents()
    assert parent.info.status == "FAILED"
    assert {name.partition(":")[0]: run.info.status for name, run in lab.nested(parent).items()} == {
        "step=50": "FINISHED",
        "step=70": "FAILED",
        "step=100": "FINISHED",
    }
    assert "- step=70: ckpt: " in parent.data.tags["mlflow.note.content"]
    assert [point.step for point in lab.client.get_metric_history(parent.info.run_id, SPEARMAN)] == [50, 100]
    assert main(["compare", parent.info.run_id, f"--tracking-uri={lab.uri}"]) == 0
    assert f"run {parent.info.run_id}: left out, as they have no scores: step=70" in caplog.text


def test_one_encoder_is_in_memory_at_a_time(lab: Lab) -> None:
    """And what one of them takes does not stop the others: the first takes 5 residues, and no sequence is so short."""
    lab.task["infer_target"] = OWN + "Counted"
    Counted.most.clear()
    assert measure(lab, f"{lab.folder}/run/step={{0,50,100}}.ckpt") == 2
    statuses = [run.info.status for run in lab.nested(lab.parents()[0]).values()]
    assert statuses == ["FAILED", "FINISHED", "FINISHED"]
    assert measure(lab, f"{lab.folder}/run/step={{50,100,1000}}.ckpt") == 0
    assert set(Counted.most) == {1}


def test_a_failure_that_is_no_mistake_is_that_of_a_run(lab: Lab) -> None:
    lab.task["infer_target"] = OWN + "Broken"
    with pytest.raises(TypeError):
        measure(lab, f"{lab.folder}/run/step=50.ckpt")
    (parent,) = lab.parents()
    assert parent.info.status == "FAILED"
    assert "not supported between instances" in parent.data.tags["mlflow.note.content"]


@pytest.mark.parametrize(
    ("ckpt", "column", "message"),
    [
        ("{run}/step=50.ckpt,{run}/step=70.ckpt", "value", "error: ckpt: '{run}/step=70.ckpt' does not exist; give "),
        ("{run}/step=50.ckpt,{run}/step=100.ckpt", "nothing", "x000.csv:1: expected a column 'nothing'"),
        ("{run}/torn.ckpt,{run}/step=100.ckpt", "nothing", "x000.csv:1: expected a column 'nothing'"),
    ],
)
def test_a_mistake_that_is_every_checkpoints_leaves_no_run(
    ckpt: str, column: str, message: str, lab: Lab, capsys: pytest.CaptureFixture[str]
) -> None:
    (lab.folder / "run" / "torn.ckpt").write_bytes(b"not a checkpoint")
    lab.task["target_column"] = column
    entry, _, config = lab.command({key: VALUE[key] for key in ("class", "task_type")})
    assert main([entry, f"--ckpt={ckpt.format(run=lab.folder / 'run')}", config]) == 2
    assert message.format(run=lab.folder / "run") in capsys.readouterr().err.splitlines()[-1]
    assert lab.runs() == []


def test_runs_made_before_are_compared(lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    for step in (50, 100):
        assert measure(lab, f"{lab.folder}/run/step={step}.ckpt") == 0
    assert measure(lab, f"{lab.folder}/run/step=*0.ckpt") == 0
    several, late, early = lab.parents()
    capsys.readouterr()
    runs = [run.info.run_id for run in (early, late, several)]
    assert main(["compare", *runs, f"--tracking-uri={lab.uri}", "--by=test_value_mse"]) == 0
    printed = capsys.readouterr().out
    made = lab.parents()[0]
    assert made.info.run_name == "7 measurements compared"
    ranked = [*runs[:2], *(run.info.run_id for run in lab.nested(several).values())]
    assert made.data.params == {"compare.by": "test_value_mse", "compare.runs": ", ".join(ranked)}
    table = json.loads(load_text(f"{made.info.artifact_uri}/leaderboard.json"))
    column = table["columns"].index("test_value_mse")
    found = [row[column] for row in table["data"]]
    assert found == sorted(found)
    assert len(found) == 2 + 5
    assert "Checkpoints by test_value_mse" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], "check the run's id"),
        (["{stage}"], "holds no measurement; give runs of measurements or of trainings"),
        (["{run}", "--by=test_value_accuracy"], "by: expected a metric of the runs, found 'test_value_accuracy'; did"),
    ],
)
def test_what_cannot_be_compared_is_one_line(
    arguments: list[str], message: str, lab: Lab, capsys: pytest.CaptureFixture[str]
) -> None:
    assert measure(lab, f"{lab.folder}/run/step=50.ckpt") == 0
    (parent,) = lab.parents()
    ids = {"run": parent.info.run_id, "stage": lab.nested(parent)["load"].info.run_id}
    before = len(lab.runs())
    assert main(["compare", *(one.format(**ids) for one in arguments), f"--tracking-uri={lab.uri}"]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert message in errors[0]
    assert len(lab.runs()) == before


def test_lists_and_patterns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("step=2.ckpt", "step=10.ckpt", "step=1.ckpt", "a,b"):
        Path(name).touch()
    assert expand("step=*.ckpt") == ["step=1.ckpt", "step=2.ckpt", "step=10.ckpt"]
    assert expand("a,b") == ["a,b"]
    assert expand("org/model, step=2.ckpt ,runs:/x/y,step=2.ckpt") == ["org/model", "step=2.ckpt", "runs:/x/y"]
    assert expand("step={2,10}.ckpt,x") == ["step=2.ckpt", "step=10.ckpt", "x"]
    assert expand("") == [""]
    with pytest.raises(CheckpointError, match=r"no checkpoint matches 'nothing\*'"):
        expand("step=1.ckpt,nothing*")


def test_names() -> None:
    assert names_of(["a/step=1.ckpt", "a/step=2.ckpt"]) == ["step=1", "step=2"]
    assert names_of(["runs/a/last.ckpt", "runs/b/last.ckpt"]) == ["a/last", "b/last"]
    assert names_of(["models:/n/3", "org/model"]) == ["n/3", "model"]
    assert with_step("last", 7) == "step=7 last"
    assert with_step("model-512", 1) == "step=1 model-512"
    assert with_step("step=7", 7) == "step=7"


def test_steps(tmp_path: Path, model_folder: Callable[..., Path], lab: Lab) -> None:
    """What the checkpoint says, then what Hugging Face's trainer wrote, then the name."""
    folder = model_folder("esm")
    encoder = open_encoder(str(folder))
    names = {"checkpoint-500": 500, "step_20": 20, "epoch=3-step=1500": 1500, "esm2_t6_8M": None, "step=1.5": None}
    assert {name: step_of(f"some/{name}", encoder) for name in names} == names
    saved = tmp_path / "checkpoint-7"
    saved.mkdir()
    (saved / "trainer_state.json").write_text('{"global_step": 9}')
    assert step_of(str(saved), encoder) == 9
    renamed = (lab.folder / "run" / "step=50.ckpt").rename(lab.folder / "step=3.ckpt")
    assert step_of(str(renamed), open_encoder(str(renamed))) == 50


def test_ranks() -> None:
    mse, accuracy = "test_x_mse", "test_y_accuracy"
    rows = [Row("a", 1, {mse: 2.0, accuracy: 0.5}), Row("b", 2, {mse: 1.0}), Row("c", 3, {}, "broken")]
    board = leaderboard(rows, [mse]).frame
    assert list(board.columns) == ["rank", "checkpoint", "step", mse, accuracy, "error"]
    assert list(board["checkpoint"]) == ["b", "a", "c"]
    assert list(board["rank"]) == [1, 2, 3]
    assert list(board["step"]) == [2, 1, 3]
    assert list(leaderboard(rows, [accuracy]).frame["checkpoint"]) == ["a", "b", "c"]
    assert choose(rows[:2]) == [accuracy]
    assert choose(rows[:2], mse) == [mse, accuracy]
    with pytest.raises(ConfigError, match=f"did you mean '{mse}'"):
        choose(rows, "test_x_mes")


def test_the_probe_stands_beside_the_head_and_the_head_ranks() -> None:
    """Whatever the order in which a server gives the names, here that of the alphabet."""
    names = ["test_a_probe_accuracy", "test_a_accuracy", "test_b_probe_accuracy", "test_b_accuracy", "test_c_probe_mse"]
    rows = [Row(label, None, dict.fromkeys(names, value)) for label, value in (("low", 0.25), ("high", 0.5))]
    shown = choose(rows)
    assert shown == ["test_a_accuracy", "test_a_probe_accuracy", "test_b_accuracy", "test_b_probe_accuracy"]
    assert list(leaderboard(rows, shown).frame["checkpoint"]) == ["high", "low"]
    assert choose(rows, "test_b_probe_accuracy")[:2] == ["test_b_probe_accuracy", "test_a_accuracy"]
    assert list(leaderboard(rows, choose(rows, "test_c_probe_mse")).frame["checkpoint"]) == ["low", "high"]
    rows = [Row("a", None, {name: 0.5 for name in names if name != "test_a_accuracy"}), rows[0]]
    assert choose(rows)[0] == "test_a_probe_accuracy"


def test_a_leaderboard_as_a_table() -> None:
    rows = [Row("a|b", None, {"test_x_mse": 2.0}), Row("<b>[bold]", 2, {}, "broken")]
    board = leaderboard(rows, ["test_x_mse", "test_x_r2"])
    table = board.table
    assert table.rows == [["1", "a|b", "2.0000", ""], ["2", "<b>[bold]", "failed", ""]]
    assert table.markdown().splitlines() == [
        "| # | checkpoint | test_x_mse | test_x_r2 |",
        "| ---: | --- | ---: | ---: |",
        "| 1 | a/b | 2.0000 |  |",
        "| 2 | <b>[bold] | failed |  |",
    ]
    lines = table.text().splitlines()
    assert lines[0].strip() == "Checkpoints by test_x_mse"
    assert [cell.strip() for cell in lines[-2].split("│")[1:-1]] == table.rows[1]
    html = leaderboard_page("Title <1>", board)
    assert "<title>Title &lt;1&gt;</title>" in html
    assert '<th scope="row">&lt;b&gt;[bold]</th><td class="number">failed</td><td class="number"></td>' in html
    assert "<li>&lt;b&gt;[bold]: broken</li>" in html


def test_the_page_says_what_p_improved_is_where_it_shows_it() -> None:
    for further, shown in (({}, 0), ({"test_x_mse_p_improved": 0.75}, 1)):
        html = leaderboard_page("title", leaderboard([Row("a", 1, {"test_x_mse": 1.0, **further})], ["test_x_mse"]))
        assert html.count("not the probability that the later checkpoint is better") == shown


def test_a_first_row_that_is_no_better_than_its_baseline_is_no_winner() -> None:
    said = ("still learning; not better than its baseline", "not better than its baseline")
    rows = [Row(label, 1, {"a/test_x_r2": 0.5}, verdicts={"a": text}) for label, text in zip("no", said, strict=True)]
    rows.append(Row("broken", None, {}, "no weights"))
    board = leaderboard(rows, ["a/test_x_r2"])
    assert board.table.columns[-1] == "verdict"
    assert [row[-1] for row in board.table.rows] == [*said, ""]
    assert list(board.frame["verdict"]) == [*said, ""]
    none = "None of these is better than its baseline in a/test_x_r2: that one is the first says little."
    assert board.remarks[-1] == none
    rows[1] = Row("good", 1, {"a/test_x_r2": 0.75}, verdicts={"a": "learns"})
    assert none not in leaderboard(rows, ["a/test_x_r2"]).remarks
    assert rows[0].verdict("test_x_r2") == said[0]
    assert Row("old", 1, {"test_x_r2": 0.5}).verdict("test_x_r2") == ""
    rows = [rows[0], Row("random weights", None, {"a/test_x_r2": 0.25})]
    assert none.replace("these", "those with a verdict") in leaderboard(rows, ["a/test_x_r2"]).remarks


def test_of_several_targets_the_verdict_is_that_of_the_metric() -> None:
    said = {"t": "a: not better than its baseline; improved (head, probe), b _2_: learns; improved (head, probe)"}
    rows = [Row("one", 1, {"t/test_a_accuracy": 0.5, "t/test_b _2__accuracy": 0.75}, verdicts=said)]
    board = leaderboard(rows, ["t/test_b _2__accuracy", "t/test_a_accuracy"])
    assert [*board.frame["verdict"]] == ["learns; improved (head, probe)"]
    assert not board.remarks
    assert leaderboard(rows, ["t/test_a_accuracy"]).remarks[0].startswith("None of these is better")


def test_rows_of_other_test_sets_are_told_apart() -> None:
    one, other = frozenset({"1"}), frozenset({"2"})
    rows = [Row("a", 1, {"m": 1.0}, data=one), Row("b", 2, {"m": 1.0}, data=other), Row("c", 3, {}, "broken")]
    assert not comparable(rows)
    assert comparable([rows[0], rows[2]])
    assert "The test sets differ between rows" in leaderboard(rows, ["m"]).summary


def test_search_finds_checkpoints_by_step(lab: Lab) -> None:
    assert measure(lab, f"{lab.folder}/run/step=50.ckpt") == 0
    (model,) = MlflowClient().search_logged_models(["0"], "params.global_step = '50'")
    assert model.name == "step=50"
