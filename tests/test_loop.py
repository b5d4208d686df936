"""Any loop: one call measures, on one rank or several, and the training is bit for bit what it would have been."""

from __future__ import annotations

import gc
import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from mlflow import MlflowClient
from torch import nn
from torch.distributed.fsdp import fully_shard

from pipeline import DESCRIPTION, Downstream, LiveModel, PipelineError, open_encoder, untouched, validation
from pipeline.config.task import Task
from pipeline.config.trackers import Logging
from pipeline.errors import ConfigError, DataError
from pipeline.report.tables import FOOTNOTE
from pipeline.score import score
from pipeline.tracking.earlier_runs import read_runs
from pipeline.tracking.sender import flush
from pipeline.training.host import LogHost
from pipeline.training.lines import Lines
from pipeline.training.unwrapped import unwrapped
from tests.support.data import planted, planted_task, proteins, write_csv
from tests.support.loops import Scaler, loop, make_model, snapshot
from tests.support.own_model import OwnTokenizer
from tests.support.readers import assert_in_wandb, in_tensorboard
from tests.support.training import section
from tests.support.two_ranks_of import both_ranks

NAME = "test_label_accuracy"


@pytest.fixture
def task(tmp_path: Path) -> Task:
    return planted_task(tmp_path / "data", num_epochs=1)


@pytest.fixture(scope="module")
def undisturbed() -> list[Any]:
    found: list[Any] = loop(lambda *_: None)["seen"]
    return found


def test_a_loop_is_measured_and_not_changed(task: Task, tmp_path: Path, tracking: str, undisturbed: Any) -> None:
    write_csv(Path(task.dataset_path) / "test/x000.csv", planted(proteins(60, 2)))  # enough for intervals
    config = section(tmp_path, task, on_start=True, on_error="raise", every_n_validations=2)
    with Downstream(config, tokenizer=OwnTokenizer(), name="by hand") as downstream:
        assert loop(downstream)["seen"] == undisturbed
        assert [step for step, _ in downstream.curve] == [0, 1, 3]
        assert f"{NAME}_delta_start" in downstream.curve[-1][1]
    flush()
    (run,) = MlflowClient(tracking).search_runs(["0"])
    history = MlflowClient(tracking).get_metric_history(run.info.run_id, NAME)
    assert [(one.step, one.value) for one in history] == [(step, found[NAME]) for step, found in downstream.curve]
    assert (run.info.run_name, run.info.status) == ("by hand", "FINISHED")
    assert "since step 0" in run.data.tags["mlflow.note.content"]
    assert downstream.overview is not None
    assert "since step 0" in downstream.summary


def test_mirrors_by_configuration(task: Task, tmp_path: Path, tracking: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_SILENT", "true")
    trackers = Logging(figures=False, tensorboard=str(tmp_path / "tb"), wandb="offline")
    with Downstream(section(tmp_path, task, on_start=True, logging=trackers), OwnTokenizer()) as downstream:
        loop(downstream, last=1)
    expected: list[Any] = [(step, pytest.approx(found[NAME])) for step, found in downstream.curve]
    (events,) = (tmp_path / "tb").iterdir()
    assert in_tensorboard(events, NAME) == expected
    (file,) = (tmp_path / "store").rglob("run-*.wandb")
    assert_in_wandb(file, NAME, expected)


@pytest.mark.filterwarnings("ignore")  # of dynamo, on what it cannot compile
@pytest.mark.parametrize("wrapper", ["compile", "accelerate", "mixed"])
def test_wrapped_models(
    task: Task, tmp_path: Path, tracking: str, wrapper: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The numbers are those of the bare model, and the wrapper stays as it is."""
    accelerate = pytest.importorskip("accelerate")
    AcceleratorState, PartialState = accelerate.state.AcceleratorState, accelerate.state.PartialState
    accelerator: Any = None
    if wrapper != "compile":
        AcceleratorState._reset_state(True)
        accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16" if wrapper == "mixed" else "no")

    def prepare(model: Any, optimizer: Any) -> tuple[Any, Any]:
        if accelerator is None:
            return torch.compile(model, backend="eager"), optimizer
        prepared: tuple[Any, Any] = accelerator.prepare(model, optimizer)
        return prepared

    try:
        config = section(tmp_path, task, on_start=True, on_error="raise")
        backward = accelerator.backward if accelerator else None
        without = loop(lambda *_: None, prepare, backward=backward, last=2)
        downstream = Downstream(config, OwnTokenizer())
        found = loop(downstream, prepare, backward=backward, last=2)
        assert found["seen"] == without["seen"]
        assert vars(found["model"]).get("forward") is vars(unwrapped(found["wrapped"])).get("forward")
        bare = make_model()
        bare.load_state_dict(found["model"].state_dict())
        other = Downstream(config, OwnTokenizer())
        assert other(bare, 2)[NAME] == downstream.curve[-1][1][NAME]
        downstream.close()
        other.close()
    finally:
        if accelerator is not None:
            AcceleratorState._reset_state(True)
            PartialState._reset_state()


def test_stop_and_resume(task: Task, tmp_path: Path, tracking: str, undisturbed: Any) -> None:
    """By way of torch.save: one MLflow run, one curve, and changes since the first start."""
    config = section(tmp_path, task, on_start=True, on_error="raise")
    with Downstream(config, OwnTokenizer()) as whole:
        loop(whole)
    first = Downstream(config, OwnTokenizer())
    stopped = loop(first, last=2)
    torch.save(first.state_dict(), tmp_path / "state.pt")
    first.close("KILLED")
    with Downstream(config, OwnTokenizer()) as second:
        second.load_state_dict(torch.load(tmp_path / "state.pt"))
        resumed = loop(second, first=3, model=stopped["model"], optimizer=stopped["optimizer"])
    del resumed
    points = second.state_dict()["points"]
    assert [step for step, _ in points] == [0, 1, 2, 3, 4]
    assert "since step 0" in second.summary
    flush()
    runs = MlflowClient(tracking).search_runs(["0"])
    assert len(runs) == 2
    steps = [[one.step for one in MlflowClient(tracking).get_metric_history(r.info.run_id, NAME)] for r in runs]
    assert steps == [[0, 1, 2, 3, 4]] * 2


def test_a_run_that_nobody_closes_ends_with_the_program(
    task: Task, tmp_path: Path, tracking: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where `downstream` was a name in a function that has returned, as in most scripts."""
    at_exit: list[Callable[[], None]] = []
    registry = SimpleNamespace(register=at_exit.append, unregister=at_exit.remove)
    monkeypatch.setattr("pipeline.training.session.atexit", registry)
    monkeypatch.delattr(sys, "last_value", raising=False)
    Downstream(section(tmp_path, task, on_start=True, on_error="raise"), OwnTokenizer())(make_model(), 0)
    gc.collect()
    (close,) = at_exit
    close()
    flush()
    (run,) = MlflowClient(tracking).search_runs(["0"])
    assert run.info.status == "FINISHED"


def test_a_failure_warns_or_raises(
    task: Task, tmp_path: Path, tracking: str, undisturbed: Any, monkeypatch: Any, caplog: Any
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        torch.rand(3)
        raise DataError("injected")

    monkeypatch.setattr(validation, "score", fail)
    said = logging.getLogger("pipeline.training")
    said.addHandler(caplog.handler)  # MLflow 3.1 takes it off the root logger when it makes a database
    with Downstream(section(tmp_path, task, on_start=True), OwnTokenizer()) as downstream:
        assert loop(downstream)["seen"] == undisturbed
    said.removeHandler(caplog.handler)
    assert "failed at step 0, training goes on: injected" in caplog.text
    assert downstream.curve == []
    strict = Downstream(section(tmp_path, task, on_error="raise"), OwnTokenizer())
    with strict, pytest.raises(DataError, match="injected"):
        strict(make_model(), 3)


def test_a_measurement_that_failed_is_a_gap_in_all_that_is_drawn(
    task: Task, tmp_path: Path, tracking: str, monkeypatch: Any
) -> None:
    model = make_model()

    def fail(*_: Any) -> Any:
        raise DataError("injected")

    settings = section(tmp_path, task, on_start=True, logging=Logging(figures=True))
    with Downstream(settings, OwnTokenizer()) as downstream:
        for step in (0, 5, 10, 15):
            monkeypatch.setattr(validation, "score", fail if step == 10 else score)
            downstream(model, step)
    assert [step for step, _ in downstream.curve] == [0, 5, 15]
    flush()
    client = MlflowClient(tracking)
    (run,) = client.search_runs(["0"])
    for step in (5, 15):
        path = client.download_artifacts(run.info.run_id, f"downstream/step={step}/report.html", str(tmp_path))
        assert ("gaps: no value" in Path(path).read_text()) == (step == 15)
    assert "| 10 | not measured |" in run.data.tags["mlflow.note.content"]
    (earlier,) = read_runs([run.info.run_id], tracking)
    assert earlier.missed == (10,)


@pytest.mark.parametrize("level", [logging.WARNING, logging.INFO])
def test_configured_logging_decides_what_is_shown(level: int, tmp_path: Path, capsys: Any, caplog: Any) -> None:
    """The root logger has handlers here, pytest's."""
    with caplog.at_level(level):
        LogHost(tmp_path).say("at step 3")
    assert [one.message for one in caplog.records] == (["at step 3"] if level == logging.INFO else [])
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(("level", "shown"), [("INFO", True), ("DEBUG", True), ("WARNING", False)])
def test_without_a_handler_lines_are_on_stderr(level: str, shown: bool, tmp_path: Path) -> None:
    """What Python does then with the logger alone would hide them, whatever its level."""
    lines = ["import logging", "from pathlib import Path", "from pipeline.training.host import LogHost"]
    lines += [f"logging.getLogger('pipeline.training').setLevel('{level}')", "LogHost(Path()).say('at step 3')"]
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=True)
    assert ("at step 3" in done.stderr) == shown


def test_a_checkpoint_with_the_description_opens_as_it_is(
    task: Task, tmp_path: Path, tracking: str, model_folder: Any
) -> None:
    """The hidden states are those of the live model, to the last bit."""
    from transformers import EsmForMaskedLM, EsmTokenizer

    folder = model_folder("esm")
    model, tokenizer = EsmForMaskedLM.from_pretrained(folder), EsmTokenizer.from_pretrained(folder)
    with Downstream(section(tmp_path, task, save=True, on_error="raise"), tokenizer, folder=tmp_path) as downstream:
        path = tmp_path / "model.pt"
        content = {"state_dict": model.state_dict(), "global_step": 7, DESCRIPTION: downstream.describe(model)}
        torch.save(content, path)
        measured = downstream(model, 7)
    expected = LiveModel(model, tokenizer=tokenizer).encoder(model).hidden_states(["MKVLAW"])[0]
    found = open_encoder(str(path)).hidden_states(["MKVLAW"])[0]
    assert torch.equal(torch.as_tensor(found), torch.as_tensor(expected))
    saved = open_encoder(str(tmp_path / "downstream/step=7.ckpt")).hidden_states(["MKVLAW"])[0]
    assert torch.equal(torch.as_tensor(saved), torch.as_tensor(expected))
    assert NAME in measured


def test_off_and_at_the_start(task: Task, tmp_path: Path, tracking: str) -> None:
    with Downstream(section(tmp_path, task, enabled=False)) as off:
        assert off(nn.Linear(1, 1), 0) == {}
    with Downstream(section(tmp_path, task), OwnTokenizer()) as downstream:
        assert downstream(make_model(), 0) == {}
        assert downstream(make_model(), 5)
    with pytest.raises(PipelineError, match="hidden_states"):
        Downstream(section(tmp_path, task))(nn.Linear(1, 1), 0)


def test_sharded_models_are_refused_in_words(task: Task, tmp_path: Path) -> None:
    model = make_model()
    next(model.parameters()).ds_id = 0
    with pytest.raises(ConfigError, match=r"ZeRO-3, which has 'esm.*in parts; downstream validation needs all weights"):
        Downstream(section(tmp_path, task), OwnTokenizer())(model, 0)


def test_a_module_of_fsdp2_is_measured_as_it_is(task: Task, tmp_path: Path, tracking: str) -> None:
    """On one rank the parts are the whole; on two, see test_fsdp.py."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/ranks", rank=0, world_size=1)
    try:
        whole, parts = make_model(), fully_shard(make_model())
        found = [Downstream(section(tmp_path, task), OwnTokenizer())(model, 1) for model in (whole, parts)]
    finally:
        dist.destroy_process_group()
    assert found[0]
    assert found[1] == pytest.approx(found[0], abs=1e-4)


def test_an_engine_of_deepspeed_is_taken_off() -> None:
    """Stands for DeepSpeed's own, which test_deepspeed.py measures where it is installed; stages are no whole model."""
    model = make_model()
    engine: Any = type("DeepSpeedEngine", (nn.Module,), {})()
    engine.module = model
    assert unwrapped(engine) is model
    stages = type("PipelineEngine", (type(engine),), {})()
    stages.module = model
    with pytest.raises(ConfigError, match="is sharded: a DeepSpeed engine of pipeline stages"):
        unwrapped(stages)


def test_state_of_layers_that_scale(task: Task, tmp_path: Path, tracking: str) -> None:
    """Buffers and extra state that change in a forward pass are put back; training changes them."""

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.scaler = nn.Embedding(128, 4), Scaler()

        def hidden_states(self, sequences: Any) -> list[torch.Tensor]:
            ids = [torch.tensor([*map(ord, one)]) for one in sequences]
            return [self.scaler(self.embedding(one)) for one in ids]

    torch.manual_seed(0)
    model = Scaled()
    model.hidden_states(["MKV"])
    optimizer = torch.optim.AdamW(model.parameters())
    before, state = snapshot(model, optimizer), dict(model.scaler.get_extra_state())
    assert state["count"] == 1
    with Downstream(section(tmp_path, task, on_error="raise")) as downstream:
        assert downstream(model, 1)
    assert snapshot(model, optimizer) == before
    assert model.scaler.get_extra_state() == state
    model.hidden_states(["MKV"])
    assert snapshot(model, optimizer) != before


def test_extra_state_that_is_not_taken_back() -> None:
    """It is left alone: torch itself can only write it."""

    class OneWay(nn.Module):
        def get_extra_state(self) -> Any:
            return {"counts": self.counts}

    module = OneWay()
    module.counts = type("Counts", (), {})()
    with untouched(module):
        pass
    assert module.training


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory, empty_database: Path) -> Any:
    folder = tmp_path_factory.mktemp("ranks")
    found = both_ranks("loop", folder, empty_database)
    logs = [(folder / f"rank-{rank}.log").read_text() for rank in range(2)]
    return [{**rank, "log": log} for rank, log in zip(found, logs, strict=True)]


def test_two_ranks_under_ddp(ranks: Any) -> None:
    first, second = ranks
    for rank in ranks:
        assert rank["with"] == rank["without"]
        assert rank["failing"] == rank["without"]
        assert rank["failing curve"] == []
    assert first["curve"] == second["curve"]
    assert [step for step, _ in first["curve"]] == [0, 1, 2, 3, 4]
    assert first["log"].count("downstream validation at step 4: ") == 1
    assert "downstream validation" not in second["log"]
    assert first["error"] == "DataError: injected"
    assert second["error"] == "RankError: rank 0: DataError: injected"


def test_the_line_of_a_step_has_the_interval_of_the_change() -> None:
    ends = {
        "test_x_mcc_delta_start_ci_low": -0.125,
        "test_x_mcc_delta_start_ci_high": 0.25,
        "test_x_mcc_delta_start": 0.1,
    }
    lines = Lines(["test_x_mcc"])
    assert "at step 7: test_x_mcc 0.5000 (1.2 s; " in lines.of_measurement(7, {"test_x_mcc": 0.5}, 1.2)
    both = "test_x_mcc 0.5000 (+0.100 since the start, 95 %: -0.125 to +0.250) (1.2 s; "
    assert both in lines.of_measurement(7, {"test_x_mcc": 0.5, **ends}, 1.2)


def test_the_first_line_with_a_score_that_hangs_on_its_seeds_says_what_the_mark_means() -> None:
    numbers = {"test_x_mcc": 0.5, "test_x_mcc_ci_low": 0.4, "test_x_mcc_ci_high": 0.6, "test_x_mcc_seed_std": 0.05}
    noisy, lines = numbers | {"test_x_mcc_seed_std": 0.25}, Lines(["test_x_mcc"])
    said = [lines.of_measurement(step, metrics, 1.2) for step, metrics in enumerate((numbers, noisy, noisy))]
    assert "test_x_mcc 0.5000 (95 %: 0.400 to 0.600) (1.2 s; " in said[0]
    assert all("test_x_mcc 0.5000 ± 0.2500 † (95 %: 0.400 to 0.600) (1.2 s; " in line for line in said[1:])
    assert [line.partition("\n")[2] for line in said] == ["", FOOTNOTE, ""]


def test_time_of_the_background_is_counted_once() -> None:
    """The line of an arrival repeats what was counted as the training waited for it."""
    lines = Lines(["test_x_mcc"])
    lines._began -= 100
    lines.waited(5)
    assert "3.0 s in the background, 5.00 s here; measurements took 5 % of" in lines.of_measurement(
        7, {"test_x_mcc": 0.5}, 5.0, 3.0
    )
    assert "waited 10.0 s at its end; measurements took 15 % of" in lines.of_the_end(10.0)
