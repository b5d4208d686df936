"""What notebooks and scripts call: `measure` and `embed_sequences`, as a user writes them, with their types."""

from __future__ import annotations

import random
from collections.abc import Callable
from html import unescape
from pathlib import Path
from types import SimpleNamespace
from typing import Any, assert_type

import numpy as np
import numpy.typing as npt
import pandas as pd
import pytest
import torch
import yaml
from matplotlib.figure import Figure
from mlflow import MlflowClient
from torch import nn
from transformers import AutoModel, AutoTokenizer

import pipeline
from pipeline import Measured, Scores, embed_sequences, measure, open_encoder, read_config
from pipeline.command.keywords import config_of_frames
from pipeline.config.shipped import CKPT, ROOT
from pipeline.config.yaml_file import to_yaml
from pipeline.data.kinds import kind_of
from pipeline.errors import CheckpointError, ConfigError, DataError
from pipeline.progress import progress
from tests.support.data import make_task, proteins
from tests.support.encoders import FakeEncoder
from tests.support.training import section

QUICK: dict[str, Any] = {"num_epochs": 2, "num_seeds": 1, "baselines": False}


def frames(column: str = "length", texts: str = "sequence") -> dict[str, pd.DataFrame]:
    """Numbers that a mean embedding can tell."""
    made = {}
    for seed, (part, rows) in enumerate({"train": 60, "test": 60}.items()):
        found = proteins(rows, seed)
        made[part] = pd.DataFrame({texts: found, column: [text.count("L") / len(text) for text in found]})
    return made


@pytest.fixture
def esm(model_folder: Callable[..., Path]) -> Path:
    return model_folder("esm")


def test_two_frames_need_the_names_of_their_columns_alone(esm: Path, tmp_path: Path) -> None:
    found = measure(esm, frames("share", "protein"), sequence_column="protein", store=str(tmp_path / "store"), **QUICK)
    assert_type(found, Measured)
    assert_type(found.scores, list[Scores])
    assert_type(found.metrics, dict[str, float])
    assert_type(found.plot(), Figure)
    assert_type(found.report(tmp_path), Path)
    table: pd.DataFrame = found.table
    assert list(table.columns[:4]) == ["task", "metric", "score", "ci_low"]
    (row,) = table.to_dict("records")
    (scores,) = found.scores
    assert (row["task"], row["metric"]) == ("share", "test_share_spearman")
    assert row["score"] == found.metrics["test_share_spearman"] == scores.metrics["test_share_spearman"]
    assert row["probe_ci_low"] == found.metrics["test_share_probe_spearman_ci_low"]
    assert np.isnan(row["constant"])
    assert found.run_id is None
    assert found.notes == (
        "class is read as sequence: 'share' holds numbers",
        "task_type is read as regression: 'share' holds numbers",
        "for 60 sequences: batch_size=32, optim={'name': 'adam', 'lr': 0.001}",
    )


def test_a_result_is_shown(esm: Path, tmp_path: Path) -> None:
    found = measure(esm, frames(), store=str(tmp_path / "store"), **QUICK)
    page = found.report(tmp_path / "new" / "page.html")
    assert page == tmp_path / "new" / "page.html"
    text = page.read_text()
    assert "DataFrame: 60 train, 60 test" in text
    assert text.count("<img") == 3
    assert found.report(tmp_path) == tmp_path / "report.html"
    html = found._repr_html_()
    assert "<table>" in html
    assert "'length' holds numbers" in unescape(html)
    assert "test_length_spearman" in str(found)
    figure: Any = found.plot()
    assert figure._repr_png_().startswith(b"\x89PNG")
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["length: length spearman"]
    (score, probe) = (line.get_xdata()[0] for line in axes.lines if line.get_marker() == "o")
    assert [score, probe] == [found.metrics["test_length_spearman"], found.metrics["test_length_probe_spearman"]]
    with pytest.raises(
        ConfigError, match=r"report: '.*x000.csv/page.html' cannot be written \(.+\); give another path"
    ):
        (tmp_path / "x000.csv").touch()
        found.report(tmp_path / "x000.csv" / "page.html")


def test_file_content_and_keywords_are_one_configuration(esm: Path, tmp_path: Path) -> None:
    """Of the section and of its tasks; an override is in the file, so a keyword has the last word."""
    parts = frames()
    records: dict[str, Any] = {part: frame.to_dict("records") for part, frame in parts.items()}
    task = make_task(tmp_path / "data", records["train"], records["test"], **{**QUICK, "num_epochs": 5})
    content = yaml.safe_load(to_yaml(section(tmp_path, task)))
    first = measure(esm, content, overrides="dataset.num_epochs=3", num_epochs=2, max_batch_tokens=512)
    assert (first.config.max_batch_tokens, first.config.dataset[0].num_epochs) == (512, 2)
    again = measure(str(esm), first.config)
    assert again.metrics == first.metrics
    training: dict[str, Any] = {
        "batch_size": task.batch_size,
        "optim": task.optim,
    }  # what frames have by default is their own
    in_memory = measure(esm, parts, store=str(tmp_path / "other"), max_batch_tokens=512, **training, **QUICK)
    assert in_memory.metrics == first.metrics
    (tmp_path / "my.yaml").write_text(yaml.safe_dump(content))
    renamed = measure(esm, content, labels_col="length", sequence_col="sequence", max_batch_tokens=512, num_epochs=2)
    assert renamed.metrics == first.metrics
    assert measure(esm, tmp_path / "my.yaml", num_epochs=2, max_batch_tokens=512).metrics == first.metrics
    with pytest.raises(ConfigError, match="overrides: a Config takes none"):
        measure(esm, first.config, overrides="device=cpu")


def test_a_module_is_measured_as_its_checkpoint_and_stays_as_it_is(esm: Path, tmp_path: Path) -> None:
    model, tokenizer = AutoModel.from_pretrained(esm), AutoTokenizer.from_pretrained(esm)
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    stored = measure(esm, frames(), store=str(tmp_path / "a"), **QUICK)
    states = torch.get_rng_state(), random.getstate()
    live = measure(model, frames(), tokenizer=tokenizer, store=str(tmp_path / "b"), **QUICK)
    assert live.metrics == stored.metrics
    assert live.facts["checkpoint"] == "live weights"
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1] == random.getstate()
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    wrapped = nn.ModuleDict({"inner": model})
    again = embed_sequences(["MKV"], wrapped, tokenizer=tokenizer, store=tmp_path / "b")
    assert np.array_equal(again, embed_sequences(["MKV"], esm, store=tmp_path / "a"))


def test_tracked_where_that_is_asked_for(esm: Path, tmp_path: Path, tracking: str) -> None:
    client = MlflowClient(tracking)
    found = measure(esm, frames(), store=str(tmp_path / "store"), **QUICK)
    assert not client.search_runs(["0"])
    tracked = measure(esm, frames(), track=tracking, store=str(tmp_path / "store"), **QUICK)
    assert tracked.run_id is not None
    run = client.get_run(tracked.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.metrics["test_length_spearman"] == pytest.approx(found.metrics["test_length_spearman"])
    assert "report.html" in {file.path for file in client.list_artifacts(tracked.run_id)}
    made = len(client.search_runs(["0"]))
    with pytest.raises(DataError, match="expected a column 'width'"):
        measure(esm, frames(), track=tracking, store=str(tmp_path / "store"), **{**QUICK, "target_column": "width"})
    assert len(client.search_runs(["0"])) == made


@pytest.mark.parametrize(
    ("labels", "kind"),
    [
        ([0.5, 2.0], ("sequence", "regression")),
        ([0, 1], ("sequence", "classification")),
        ([True, False], ("sequence", "classification")),
        (["inner", "outer"], ("sequence", "classification")),
        (["HHC", "CC"], ("token", "classification")),
        (["HHC", "C"], ("sequence", "classification")),
        ([[0.5, None, 1.0], [0.5, 1.0]], ("token", "regression")),
        (["0.5", "2"], ("sequence", "regression")),
        (["0", "1"], ("sequence", "classification")),
        (["0.1", "-2"], ("sequence", "regression")),
        (["010", "11"], ("token", "classification")),
        (["0.5", "none"], ("sequence", "classification")),
        (pd.Categorical(["0.5", "0.7"]), ("sequence", "classification")),
    ],
)
def test_the_kind_of_task_is_in_the_labels(labels: list[Any], kind: tuple[str, str]) -> None:
    assert kind_of(pd.DataFrame({"s": ["MKV", "MK"], "y": labels}), "s", "y")[:2] == kind


@pytest.mark.parametrize("kind", [int, str])
def test_many_whole_numbers_are_numbers(kind: type) -> None:
    labels = [kind(number) for number in range(21)]
    assert kind_of(pd.DataFrame({"s": ["A"] * 21, "y": labels}), "s", "y")[:2] == ("sequence", "regression")


@pytest.mark.parametrize("labels", [[number / 10 for number in range(40)], [0.5, "1.5", *range(38)]])
def test_numbers_in_a_column_of_objects_are_numbers(labels: list[Any]) -> None:
    frame = pd.DataFrame({"sequence": ["MKVLA"] * 40, "tm": pd.Series(labels, dtype=object)})
    notes: list[str] = []
    config = config_of_frames({"train": frame, "test": frame}, {}, notes)
    assert (config.dataset[0].level, config.dataset[0].task_type) == ("sequence", "regression")
    assert notes[0].endswith("'tm' holds numbers")


def test_a_label_per_token_that_is_too_short_is_named(tmp_path: Path) -> None:
    """Also where the user says the level; with `sequence` the texts are classes."""
    frame = pd.DataFrame({"sequence": ["MKVLAW"] * 60, "y": [f"{number:06b}" for number in range(60)]})
    frame["y"] = frame["y"].str.replace("1", "H").str.replace("0", "C")
    frame.loc[7, "y"] = "HHHHH"
    parts = {"train": frame, "test": frame}
    message = "59 of 60 labels have a character for each of the sequence, row 7 has 5 for a sequence of 6; correct"
    with pytest.raises(DataError, match=message):
        measure(FakeEncoder(), parts, store=str(tmp_path), **QUICK)
    with pytest.raises(DataError, match="row 7: column 'y': expected 6 characters"):
        measure(FakeEncoder(), parts, store=str(tmp_path), level="token", **QUICK)
    with pytest.raises(DataError, match="60 labels are 60 different texts"):
        measure(FakeEncoder(), parts, store=str(tmp_path), level="sequence", **QUICK)


NEARLY = [str(number / 10) for number in range(39)]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([*NEARLY[:5], ">70", *NEARLY[5:]], "39 of 40 labels are numbers, row 5 is '>70'; clean"),
        ([*NEARLY[:5], None, *NEARLY[5:]], "39 of 40 labels are numbers, row 5 is None; clean"),
        ([*map(float, NEARLY), "abc"], "39 of 40 labels are numbers, row 39 is 'abc'; clean"),
        ([f"p{number}" for number in range(40)], "40 labels are 40 different texts, too many for classes; name"),
    ],
)
def test_texts_that_are_hardly_classes_are_refused(labels: list[Any], message: str, tmp_path: Path) -> None:
    """Unless the user says what they are."""
    frame = pd.DataFrame({"sequence": ["MKVLA"] * 40, "tm": pd.Series(labels, dtype=object)})
    parts = {"train": frame, "test": frame.head(5)}
    with pytest.raises(DataError) as found:
        measure(None, parts, store=str(tmp_path), **QUICK)
    assert str(found.value).startswith(f"frames['train']: column 'tm': {message}")
    assert str(found.value).endswith("or set task_type to regression or classification")
    with pytest.raises(CheckpointError, match="does not exist"):
        measure(str(tmp_path / "none"), parts, store=str(tmp_path), task_type="classification", **QUICK)


@pytest.mark.parametrize(
    ("config", "settings", "message"),
    [
        (frames(), {"num_epoch": 1}, "measure: unknown setting 'num_epoch'; did you mean 'num_epochs'?"),
        ({"train": frames()["train"]}, {}, "config: expected DataFrames of train, test and, for early stopping, val"),
        (frames("a"), {"target_column": "b"}, "frames['train']: expected a column 'b'"),
        (frames(), {"sequence_column": "text", "target_column": "length"}, "expected a column 'text'"),
        (frames(), {"sequence_column": "text"}, "task 'downstream': target_column is missing"),
        (frames(), {"task_type": "clasification"}, "did you mean 'classification'?"),
        (frames(), {"overrides": "device=cpu"}, "overrides: DataFrames take none; give keywords"),
        (
            frames(),
            {"target_column": "a", "labels_col": "b"},
            "measure: 'labels_col' and 'target_column' are one key with different values; keep one",
        ),
    ],
)
def test_mistakes(config: Any, settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(pipeline.PipelineError) as error:
        measure(FakeEncoder(), config, store=str(tmp_path), **settings)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("ckpt", "message"),
    [
        (frames(), "ckpt: expected a checkpoint, module or encoder, found data; write measure(ckpt, data)"),
        (3, "ckpt: expected a path, a module, or an object with hidden_states and hidden_size, found 3; see"),
    ],
)
def test_mistakes_in_what_is_measured(ckpt: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        embed_sequences(["MKV"], ckpt, store=tmp_path)
    assert message in str(error.value)


def test_an_object_with_the_least_is_an_encoder(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Without a digest nothing of it is used again; with one, it is; and warnings are logged."""
    least: Any = SimpleNamespace(hidden_size=24, hidden_states=FakeEncoder().hidden_states)
    first = embed_sequences(["MKV", "GG"], least, store=tmp_path)
    assert np.array_equal(first, embed_sequences(["MKV", "GG"], FakeEncoder(), store=tmp_path))
    assert "SimpleNamespace has no digest, so embeddings are made anew each time" in caplog.text
    least.digest = "least"
    embed_sequences(["MKV"], least, store=tmp_path)
    seen = least.hidden_states.__self__.seen
    assert seen.count("MKV") == 2
    caplog.clear()
    embed_sequences(["MKV"], least, store=tmp_path)
    assert seen.count("MKV") == 2
    assert not caplog.text
    embed_sequences(["MKV", "?M"], FakeEncoder(), store=tmp_path)
    assert "embed_sequences: 1 tokens in 1 of 2 sequences are unknown to the tokenizer" in caplog.text


def test_a_module_is_not_compiled(esm: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """So its embeddings are those of a plain checkpoint, and are stored as such."""
    caplog.set_level("INFO", "pipeline")
    model, tokenizer = AutoModel.from_pretrained(esm), AutoTokenizer.from_pretrained(esm)
    options: dict[str, Any] = {"tokenizer": tokenizer, "store": tmp_path}
    plain = embed_sequences(["MKV"], model, **options)
    assert np.array_equal(plain, embed_sequences(["MKV"], model, compile=True, **options))
    assert "compile is left out" in caplog.text
    assert len(list((tmp_path / "embeddings").iterdir())) == 1


def test_sequences_are_embedded_in_the_order_given(esm: Path, tmp_path: Path) -> None:
    texts = ["MKVLA", "GG", "MKVLA", "WWWWWWWW"]
    found = embed_sequences(pd.Series(texts), esm, store=tmp_path)
    assert_type(found, npt.NDArray[np.float32])
    assert found.shape == (4, 32)
    assert found.dtype == np.dtype(np.float32)
    expected = [states.mean(0).numpy() for states in open_encoder(str(esm)).hidden_states(texts)]
    assert np.allclose(found, expected, atol=1e-5)
    assert np.array_equal(found[0], found[2])
    last = embed_sequences(texts, esm, pooling="last", device="cpu", store=tmp_path)
    assert np.allclose(last[1], open_encoder(str(esm)).hidden_states(["GG"])[0][-1].numpy(), atol=1e-5)
    assert embed_sequences([], esm, store=tmp_path).shape == (0, 32)


@pytest.mark.parametrize(
    ("sequences", "options", "message"),
    [
        ("MKV", {}, "sequences: expected a list of texts, found one text; write [text]"),
        (["MKV", ""], {}, "sequences[1]: expected a text that is not empty, found ''; leave it out"),
        (["MKV", None], {}, "sequences[1]: expected a text that is not empty, found None; leave it out"),
        (
            ["MKV" * 400],
            {},
            "sequences[0]: expected at most 1022 characters, which is all the encoder takes, found 1200",
        ),
        (["MKV", "???"], {}, "row 1: column 'sequences': expected a sequence with characters the encoder knows"),
        (["MKV"], {"pooling": "max"}, "pooling: expected one of mean, cls, last, found 'max'"),
        (["MKV"], {"precision": "fp31"}, "precision: expected one of auto, fp32, bf16, fp16, found 'fp31'; did you"),
        (["MKV"], {"devise": "cpu"}, "embed_sequences: unknown option 'devise'; did you mean 'device'?"),
    ],
)
def test_mistakes_in_sequences(
    esm: Path, tmp_path: Path, sequences: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises((DataError, ConfigError)) as error:
        embed_sequences(sequences, esm, store=tmp_path, **options)
    assert message in str(error.value)


def test_the_sample_is_found_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert embed_sequences(["MKV"], store=tmp_path).shape == (1, 96)
    config = read_config(ROOT / "configs/default.yaml", "dataset.1.dataset_path=sample/mine")
    assert config.dataset[0].dataset_path == str(ROOT / "sample/data/variants")
    assert config.dataset[1].dataset_path == "sample/mine"
    monkeypatch.chdir(ROOT)
    assert read_config("configs/default.yaml").dataset[0].dataset_path == "sample/data/variants"
    assert Path(CKPT).is_dir()


def test_no_bars_where_no_notebook_shows_them(capsys: pytest.CaptureFixture[str]) -> None:
    with progress("embed", 2, "residues") as advance:
        advance(1)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("rows", "settings", "batch_size", "num_epochs"),
    [
        (60, {}, 32, 100),  # two steps an epoch: 640 would be needed, 100 is the most
        (1_000, {}, 32, 40),  # 32 steps an epoch
        (1_000, {"batch_size": 100}, 100, 100),  # 10 steps: 128 would be needed
        (5_000, {}, 128, 32),  # 40 steps
        (50_000, {}, 128, 10),
        (50_000, {"num_epochs": 3}, 128, 3),
    ],
)
def test_a_head_on_frames_is_trained_long_enough(
    rows: int, settings: dict[str, Any], batch_size: int, num_epochs: int
) -> None:
    frame = pd.DataFrame({"sequence": ["MKTAYIAK"] * rows, "value": np.linspace(0, 1, rows)})
    config = config_of_frames({"train": frame, "test": frame}, settings, [])
    (task,) = config.dataset
    assert (task.batch_size, task.num_epochs, task.optim["lr"]) == (batch_size, num_epochs, 0.001)
