"""Folders of accelerate, and of Lightning under FSDP, as two ranks of the real libraries write them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator  # type: ignore[import-untyped]
from accelerate.utils import ProjectConfiguration  # type: ignore[import-untyped]
from transformers import EsmForMaskedLM

from pipeline import EncoderOptions, Store, open_encoder, validate
from pipeline.__main__ import main
from pipeline.checkpoints.names import step_of
from pipeline.config.yaml_file import to_yaml
from tests.support.data import planted_task
from tests.support.lab import every_metric, newest_run, own_signals
from tests.support.programs import run_two_ranks
from tests.support.sharded import in_training
from tests.support.training import section

TEXTS = ["MKVLAAGIVG", "ACD", "WWWWWWW"]
KINDS = ["ddp", "fsdp1-sharded", "fsdp2-sharded", "fsdp2-full"]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory, model_folder: Callable[..., Path]) -> Path:
    """A folder with what two ranks wrote; see `tests/support/fsdp.py`."""
    folder = tmp_path_factory.mktemp("fsdp")
    shutil.copytree(model_folder("esm"), folder / "esm")
    codes = run_two_ranks("tests.support.fsdp", [str(folder), str(folder / "esm")], folder)
    assert codes == [0, 0], (folder / "rank-0.log").read_text()[-3000:] + (folder / "rank-1.log").read_text()[-3000:]
    return folder


def of(folder: Path) -> EncoderOptions:
    return EncoderOptions(device="cpu", architecture=str(folder / "esm"))


@pytest.mark.parametrize(("name", "step"), [*((f"accelerate-{kind}", None) for kind in KINDS), ("sharded.ckpt", 2)])
def test_hidden_states_are_those_of_the_training(written: Path, name: str, step: int | None) -> None:
    path = written / name
    found = open_encoder(str(path), of(written))
    live = in_training(written, name.removesuffix(".ckpt")).hidden_states(TEXTS)
    start = open_encoder(str(written / "esm"), EncoderOptions(device="cpu")).hidden_states(TEXTS)
    for ours, theirs, before in zip(found.hidden_states(TEXTS), live, start, strict=True):
        assert torch.equal(ours, theirs)
        assert not torch.equal(ours, before)
    assert step_of(str(path), found) == step


def test_the_command_line_gives_the_scores_of_the_training(written: Path, tmp_path: Path, tracking: str) -> None:
    task = planted_task(tmp_path / "data", num_epochs=1)
    (expected,) = validate(in_training(written, "accelerate-fsdp2-sharded"), task, Store(tmp_path / "live"))
    config = section(tmp_path / "cli", task, architecture=str(written / "esm"))
    (tmp_path / "task.yaml").write_text(to_yaml(config))
    with own_signals():
        ckpt = written / "accelerate-fsdp2-sharded"
        assert main(["main", f"--ckpt={ckpt}", f"--config={tmp_path / 'task.yaml'}"]) == 0
    metrics = every_metric(newest_run())
    assert {name: metrics[name] for name in expected.metrics} == expected.metrics


def test_a_count_of_saves_is_not_a_step(tmp_path: Path, model_folder: Callable[..., Path]) -> None:
    """accelerate's own names count; a name that the user gives has the step."""
    settings = ProjectConfiguration(project_dir=str(tmp_path), automatic_checkpoint_naming=True)
    accelerator: Any = Accelerator(cpu=True, project_config=settings)
    accelerator.prepare(EsmForMaskedLM.from_pretrained(model_folder("esm")))
    accelerator.save_state()
    accelerator.save_state()
    accelerator.free_memory()
    counted = tmp_path / "checkpoints" / "checkpoint_1"
    options = EncoderOptions(device="cpu", architecture=str(model_folder("esm")))
    encoder = open_encoder(str(counted), options)
    assert step_of(str(counted), encoder) is None
    assert step_of("runs:/0123/checkpoint_1", encoder) is None
    for name in ("step_300", "checkpoint-300"):
        assert step_of(str(counted.rename(tmp_path / name)), encoder) == 300
        (tmp_path / name).rename(counted)
