"""`baseline: random_init`: beside a checkpoint, the same model with random weights, and what lies between the two."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoTokenizer, EsmModel

from pipeline.__main__ import main
from pipeline.checkpoints.opening import open_encoder
from pipeline.config.yaml_file import read_config
from pipeline.encoders.huggingface import HuggingFaceEncoder
from pipeline.encoders.options import EncoderOptions
from pipeline.random_init import RandomInit
from pipeline.statistics.intervals import changes
from pipeline.statistics.predictions import from_table
from pipeline.store.embedding_table import Store
from pipeline.tracking.protocol import NullTracker
from pipeline.validation import validate
from tests.support.encoders import FakeEncoder
from tests.support.lab import STATE, VALUE, Lab, furnished, own_signals, write_checkpoint

CPU = EncoderOptions(device="cpu")


@pytest.fixture
def wide(tmp_path: Path, model_folder: Callable[..., Path], tracking: str) -> Iterator[Lab]:
    """Test sequences enough for intervals."""
    with own_signals():
        lab = furnished(tmp_path, model_folder, tracking)
        lab.write("test", 40, 100)
        yield lab


@pytest.mark.parametrize("kind", ["esm", "prott5", "smiles_bart"])
def test_the_weights_are_drawn_from_the_seed_alone(model_folder: Callable[..., Path], kind: str) -> None:
    encoder = open_encoder(str(model_folder(kind)), CPU)
    first, again, other = (encoder.untrained(seed) for seed in (1, 1, 2))
    torch.randn(3)  # whatever was drawn elsewhere
    assert first is not None
    assert again is not None
    assert other is not None
    assert first.digest == again.digest
    assert len({first.digest, other.digest, encoder.digest}) == 3
    text = "CCO" if kind == "smiles_bart" else "MKV"
    assert first.hidden_states([text])[0].shape == encoder.hidden_states([text])[0].shape


def test_the_generator_of_the_program_is_left_alone(model_folder: Callable[..., Path]) -> None:
    encoder = open_encoder(str(model_folder("esm")), CPU)
    state = torch.random.get_rng_state()
    encoder.untrained(0)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_it_is_what_transformers_gives_for_that_seed_and_keeps_the_layer(model_folder: Callable[..., Path]) -> None:
    path = str(model_folder("esm"))
    untrained = open_encoder(path, EncoderOptions(device="cpu", layer=1)).untrained(7)
    torch.manual_seed(7)
    theirs = EsmModel(AutoConfig.from_pretrained(path), add_pooling_layer=False).eval()
    own = HuggingFaceEncoder(theirs, AutoTokenizer.from_pretrained(path), EncoderOptions(device="cpu", layer=1))
    assert untrained is not None
    assert torch.equal(untrained.hidden_states(["MKVLA"])[0], own.hidden_states(["MKVLA"])[0])


def test_the_change_is_the_paired_difference_between_the_two(wide: Lab, tmp_path: Path) -> None:
    config = read_config(wide.command(VALUE, STATE, baseline="random_init")[2].removeprefix("--config="))
    encoder, store = open_encoder(str(wide.ckpt), CPU), Store(tmp_path / "store")
    scores = validate(encoder, config.tasks, store)
    start = RandomInit(encoder, config, store, NullTracker(), 0)
    found = start.compare(scores)
    by_hand = validate(start._untrained, config.tasks, Store(tmp_path / "other"))
    for one, other, mine in zip(scores, by_hand, start.scores, strict=True):
        assert mine.metrics == other.metrics
        for metric in (metric for metric in one.results if metric.is_headline):
            pair = (from_table(table, metric.target, metric.probe) for table in (one.table, other.table))
            change = changes(*pair).values[metric.name]
            assert found.values[f"{metric.key}_delta_random_init"] == change.value
            assert found.values[f"{metric.key}_delta_random_init_ci_low"] == change.interval.low
            assert found.values[f"{metric.key}_p_improved"] == change.p_improved


def test_table_report_and_run_say_it(wide: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    command = wide.command(STATE, baseline="random_init", logging={"figures": True})
    assert main(command) == 0
    (parent,) = wide.parents()
    name = "test_state_accuracy_delta_random_init"
    assert {name, f"{name}_ci_low", f"{name}_ci_high"} <= parent.data.metrics.keys()
    assert "since random weights (seed 1234)" in parent.data.tags["mlflow.note.content"]
    printed = " ".join(capsys.readouterr().out.split())
    assert "random" in printed
    report = Path(wide.client.download_artifacts(parent.info.run_id, "report.html")).read_text()
    assert f"{parent.data.metrics[name]:+.3f}" in report


def test_among_several_checkpoints_it_has_a_row_of_its_own(wide: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    for step in (1, 2):
        write_checkpoint(wide, step, 0.01 * step)
    command = wide.command(VALUE, baseline="random_init")
    assert main([command[0], f"--ckpt={wide.folder}/run/step=*.ckpt", *command[2:]]) == 0
    cells = [[cell.strip() for cell in line.split("│")] for line in capsys.readouterr().out.splitlines()]
    ((*_, verdict, _),) = [row for row in cells if len(row) > 2 and row[2] == "random weights (seed 1234)"]
    assert verdict == ""  # it was not held against the baselines
    ids = [run.info.run_id for run in wide.parents() if run.data.metrics]
    histories = [wide.client.get_metric_history(one, "test_value_spearman") for one in ids]
    assert [1, 2] in [sorted(point.step for point in history) for history in histories]  # a curve of the checkpoints


def test_an_encoder_that_cannot_be_made_anew_is_refused(wide: Lab, tmp_path: Path) -> None:
    config = read_config(wide.command(VALUE, baseline="random_init")[2].removeprefix("--config="))
    with pytest.raises(Exception, match=r"FakeEncoder cannot be made anew with random weights; leave baseline out"):
        RandomInit(FakeEncoder(), config, Store(tmp_path), NullTracker(), 0)


def test_another_word_is_refused(wide: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(wide.command(VALUE, baseline="random")) == 2
    assert "baseline: expected random_init or null, found 'random'" in capsys.readouterr().err
