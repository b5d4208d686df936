"""What a measurement leaves in an MLflow database: runs, parameters, metrics, models; and how runs end."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import mlflow
import pyarrow.parquet as pq
import pytest
import torch
from mlflow import MlflowClient
from mlflow.artifacts import download_artifacts
from mlflow.entities import Run
from transformers import AutoTokenizer, EsmForMaskedLM

from pipeline import EncoderOptions, Store, open_encoder, read_config, validate
from pipeline.__main__ import main
from pipeline.config.yaml_file import to_mapping
from pipeline.encoders.description import DESCRIPTION, describe
from pipeline.tracking.journal import Journal
from pipeline.tracking.journal_owner import HOST, KEY, WRITER
from tests.support.lab import STAGES, STATE, VALUE, Lab, furnished, own_signals
from tests.support.programs import ROOT


@pytest.fixture
def lab(tmp_path: Path, model_folder: Callable[..., Path], tracking: str) -> Iterator[Lab]:
    with own_signals():
        yield furnished(tmp_path / "a b;c='d' -e", model_folder, tracking)


def test_one_task(lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(lab.command(VALUE)) == 0
    printed = capsys.readouterr().out
    (parent,) = lab.parents()
    config = read_config(lab.folder / "config.yaml")
    scores = validate(
        open_encoder(str(lab.ckpt), EncoderOptions(device="cpu")), config.tasks, Store(lab.folder / "another store")
    )
    assert lab.statuses(parent) == dict.fromkeys(["main", *STAGES], "FINISHED")
    assert "test_value_mse" in scores[0].metrics
    # Of 20 sequences there is no interval.
    first = ["test_value_spearman", "test_value_probe_spearman", "dwnstr_task_val_loss", "test_value_mse"]
    assert dict(parent.data.metrics) == {name: scores[0].metrics[name] for name in first}
    assert scores[0].metrics.items() <= lab.nested(parent)["score"].data.metrics.items()
    assert parent.info.run_name == f"{lab.ckpt.name}: value {scores[0].metrics[first[0]]:.3f}"
    (line,) = (line for line in printed.splitlines() if "test_value_spearman" in line)
    for name in ("test_value_spearman", "test_value_probe_spearman"):
        assert f"{scores[0].metrics[name]:.4f}" in line
    for metric in scores[0].results:  # the probe's stand in the rows of the head's
        rows = [
            line for line in parent.data.tags["mlflow.note.content"].splitlines() if f"| {metric.beside.key} |" in line
        ]
        assert any(f"{metric.value:.4f}" in row for row in rows)
    assert f"/#/experiments/0/runs/{parent.info.run_id}?workflowType=machine_learning" in printed
    assert f"mlflow ui --backend-store-uri {lab.uri}" in printed.replace("\n", "")
    losses = lab.client.get_metric_history(lab.nested(parent)["train_head"].info.run_id, "train_loss")
    assert [(metric.step, metric.value) for metric in losses] == list(enumerate(scores[0].losses, 1))


def test_parameters_and_configuration(lab: Lab) -> None:
    assert main(lab.command(VALUE)) == 0
    (parent,) = lab.parents()
    config = read_config(lab.folder / "config.yaml")
    assert read_config(artifact(lab, parent, "config.yaml")) == config
    assert {key.partition(".")[0] for key in parent.data.params} == {"cfg", "ckpt"}
    assert parent.data.params["ckpt.source"] == str(lab.ckpt)
    assert parent.data.params["ckpt.encoder"] == "esm"
    plain = {key: str(value) for key, value in to_mapping(config).items() if not isinstance(value, (dict, list))}
    assert plain.items() <= {key.removeprefix("cfg."): value for key, value in parent.data.params.items()}.items()
    assert parent.data.params["cfg.dataset.dataset.train"] == "x000"
    assert parent.data.params["cfg.dataset.optim.lr"] == "0.0001"
    assert parent.data.params["cfg.dataset.class"] == "sequence"


def test_artifacts_data_and_model(lab: Lab) -> None:
    assert main(lab.command(VALUE)) == 0
    (parent,) = lab.parents()
    predictions = pq.read_table(artifact(lab, parent, "predictions_value.parquet"))
    assert predictions["row"].to_pylist() == [f"x000.csv:{row}" for row in range(20)]
    assert {"value_target", "value_mask", "value_prediction"} <= set(predictions.column_names)
    for run in (parent, lab.nested(parent)["load"]):
        assert run.inputs
        data = {given.dataset.name: {tag.key: tag.value for tag in given.tags} for given in run.inputs.dataset_inputs}
        assert data == {
            "value train": {"mlflow.data.context": "train", "rows": "30", "left_out": "1"},
            "value test": {"mlflow.data.context": "test", "rows": "20", "left_out": "1"},
        }
    (model,) = mlflow.search_logged_models(["0"], "metrics.test_value_mse > 0", output_format="list")
    every = lab.nested(parent)["score"].data.metrics
    assert {metric.key: metric.value for metric in model.metrics or []} == {
        name: value for name, value in every.items() if name not in ("seconds", "peak_memory_mb")
    }
    assert parent.data.metrics.items() <= every.items()
    assert model.source_run_id == parent.info.run_id
    assert model.tags["ckpt.source"] == str(lab.ckpt)
    assert "| test_value_mse |" in parent.data.tags["mlflow.note.content"]


def artifact(lab: Lab, run: Run, name: str) -> str:
    return str(download_artifacts(run_id=run.info.run_id, artifact_path=name, tracking_uri=lab.uri))


def test_a_list_of_two_tasks(lab: Lab) -> None:
    assert main(lab.command(VALUE, STATE)) == 0
    (parent,) = lab.parents()
    stages = ["load", "embed", "train_head value", "score value", "train_head state", "score state"]
    assert lab.statuses(parent) == dict.fromkeys(["main", *stages], "FINISHED")
    names = {"value/test_value_spearman", "state/test_state_accuracy"}
    probes = {"value/test_value_probe_spearman", "state/test_state_probe_accuracy"}
    losses = {"value/dwnstr_task_val_loss", "value/test_value_mse", "state/dwnstr_task_val_loss"}
    assert parent.data.metrics.keys() == names | probes | losses
    assert {file.path for file in lab.client.list_artifacts(parent.info.run_id)} == {
        "config.yaml",
        "predictions_value.parquet",
        "predictions_state.parquet",
        "classes_state.csv",
    }
    assert parent.data.params["cfg.dataset.1.task_name"] == "state"


def test_runs_are_found_by_their_tags(lab: Lab) -> None:
    assert main(lab.command(VALUE, STATE)) == 0
    (parent,) = lab.parents()
    (model,) = mlflow.search_logged_models(["0"], output_format="list")
    tags = {name.removeprefix("downstream."): text for name, text in parent.data.tags.items() if "downstream." in name}
    expected = {"kind": "measurement", "tasks": "value, state", "encoder": "esm"}
    assert expected.items() <= tags.items()
    assert model.tags["ckpt.digest"].startswith(tags["checkpoint"])
    said = f"tags.`downstream.verdict.value` LIKE '%{tags['verdict.value'][2:]}%'"
    wanted = f"tags.`downstream.kind` = 'measurement' and {said}"
    assert [run.info.run_id for run in lab.client.search_runs(["0"], wanted)] == [parent.info.run_id]
    stages = lab.client.search_runs(["0"], "tags.`downstream.kind` = 'stage'")
    assert {run.info.run_name for run in stages} == lab.nested(parent).keys()


def test_names_that_look_alike_keep_their_predictions(lab: Lab) -> None:
    assert main(lab.command({**VALUE, "task_name": "a b"}, {**VALUE, "task_name": "a_b"})) == 0
    files = [file.path for file in lab.client.list_artifacts(lab.parents()[0].info.run_id)]
    assert len(files) == 3, files


def test_a_second_run_embeds_nothing_and_more_data_only_what_is_new(lab: Lab) -> None:
    found = []
    for last in (40, 40, 45):
        lab.write("test", 20, last)
        assert main(lab.command(VALUE)) == 0
        nested = lab.nested(lab.parents()[0])
        embed, head = nested["embed"].data.metrics, nested["train_head"].data.metrics
        found.append((embed["embedded"], embed["cached"], head["reused"]))
    assert found == [(40, 0, 0), (0, 40, 1), (5, 40, 1)]
    first, second = lab.parents()[2], lab.parents()[1]
    assert first.data.metrics == second.data.metrics


@pytest.mark.parametrize("name", ["epoch=3-step=1.5.ckpt", "a \"b\": 'c' 50%"])
def test_a_checkpoint_of_any_name(name: str, lab: Lab) -> None:
    path = lab.folder / name
    if path.suffix == ".ckpt":
        model = EsmForMaskedLM.from_pretrained(lab.ckpt)
        description = describe(model, AutoTokenizer.from_pretrained(lab.ckpt), "model.")
        state = {f"model.{key}": value for key, value in model.state_dict().items()}
        torch.save({"state_dict": state, DESCRIPTION: description}, path)
    else:
        path.symlink_to(lab.ckpt)
    lab.ckpt = path
    assert main(lab.command(VALUE)) == 0
    (logged,) = mlflow.search_logged_models(["0"], "metrics.test_value_mse > 0", output_format="list")
    assert lab.parents()[0].info.run_name.startswith(f"{name.removesuffix('.ckpt')}: value ")
    assert logged.tags["ckpt.source"] == str(path)


@pytest.mark.parametrize("entry", STAGES)
def test_an_entry_point_stops_where_it_should(entry: str, lab: Lab) -> None:
    assert main(lab.command(VALUE, entry=entry)) == 0
    (parent,) = lab.parents()
    begun = STAGES[: STAGES.index(entry) + 1]
    assert lab.statuses(parent) == dict.fromkeys(["main", *begun], "FINISHED")
    made = {path.suffix for path in (lab.folder / "store").rglob("*") if path.suffix in (".parquet", ".safetensors")}
    assert made == {"embed": {".parquet"}}.get(entry, {".parquet", ".safetensors"} if len(begun) > 2 else set())
    assert bool(parent.data.metrics) == (entry == "score")


@dataclass
class Ends:
    """How three measurements ended: exit codes, statuses by measurement and run at three moments, and files left."""

    codes: dict[str, int] = field(default_factory=dict)
    left: dict[str, dict[str, str]] = field(default_factory=dict)
    swept: dict[str, dict[str, str]] = field(default_factory=dict)
    ended: dict[str, dict[str, str]] = field(default_factory=dict)
    files: list[str] = field(default_factory=list)


def wait_for(what: str, there: Callable[[], bool], process: subprocess.Popen[str], seconds: float = 300) -> None:
    """Polls until something is there; a process that ends early, or the deadline, is a failure."""
    deadline = time.monotonic() + seconds
    while not there():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline, f"no {what} after {seconds} s"
        time.sleep(0.2)


def begin(lab: Lab, name: str) -> subprocess.Popen[str]:
    """A measurement that would take days."""
    task = {**VALUE, "num_epochs": 10**7}
    arguments = lab.command(task, name=name, store=str(lab.folder / name))
    arguments[1] = f"--ckpt={lab.folder / name}"
    (lab.folder / name).symlink_to(lab.ckpt)
    command = [sys.executable, "-m", "pipeline", *arguments, f"--tracking-uri={lab.uri}"]
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # an ignored signal would be inherited
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    signal.signal(signal.SIGINT, before)
    return process


def end(process: subprocess.Popen[str], number: signal.Signals, *again: signal.Signals) -> int:
    """Sends a signal, and others over and over until the process ends: Ctrl-C under `mlflow run` is followed by two."""
    process.send_signal(number)
    for _ in range(20_000):
        if not again or process.poll() is not None:
            break
        for further in again:
            process.send_signal(further)
        time.sleep(0.002)
    _, said = process.communicate(timeout=60)
    assert ("the same command goes on from there" in said) == (number != signal.SIGKILL)
    return process.returncode


@pytest.fixture(scope="module")
def ends(
    tmp_path_factory: pytest.TempPathFactory, model_folder: Callable[..., Path], empty_database: Path
) -> Iterator[Ends]:
    """Three measurements at once: one is killed, and another measurement sweeps up; then the others are told to end."""
    folder = tmp_path_factory.mktemp("ends")
    lab = furnished(folder, model_folder, f"sqlite:///{shutil.copy(empty_database, folder / 'mlflow.db')}")
    before = mlflow.get_tracking_uri()
    ends, processes = Ends(), {name: begin(lab, name) for name in ("killed", "terminated", "interrupted")}

    def statuses() -> dict[str, dict[str, str]]:
        runs = {run.info.run_name.removesuffix(" on value"): run for run in lab.parents()}
        return {name: lab.statuses(run) for name, run in runs.items() if name in processes}

    def training(name: str) -> bool:
        return "train_head" in statuses().get(name, {})

    try:
        for name, process in processes.items():
            wait_for("training", partial(training, name), process)
        ends.codes["killed"] = end(processes["killed"], signal.SIGKILL)
        ends.left = statuses()
        with own_signals():
            assert main([*lab.command(VALUE, entry="load"), f"--tracking-uri={lab.uri}"]) == 0
        ends.swept = statuses()
        ends.codes["terminated"] = end(processes["terminated"], signal.SIGTERM)
        ends.codes["interrupted"] = end(processes["interrupted"], signal.SIGINT, signal.SIGTERM, signal.SIGINT)
        ends.ended = statuses()
        ends.files = [path.name for path in folder.rglob("*") if path.suffix in (".tmp", ".safetensors")]
        yield ends
    finally:
        for process in processes.values():
            process.kill()
            process.communicate()
        mlflow.set_tracking_uri(before)


def in_training(status: str) -> dict[str, str]:
    return {"main": status, "load": "FINISHED", "embed": "FINISHED", "train_head": status}


@pytest.mark.parametrize(("name", "code"), [("terminated", 143), ("interrupted", 130)])
def test_a_signal_ends_the_runs(name: str, code: int, ends: Ends) -> None:
    assert ends.codes[name] == code
    assert ends.ended[name] == in_training("KILLED")
    assert not ends.files


def test_a_sigkill_is_swept_up_by_the_next_measurement(ends: Ends) -> None:
    assert ends.codes["killed"] == -signal.SIGKILL
    assert ends.left["killed"] == in_training("RUNNING")
    assert ends.swept["killed"] == in_training("KILLED")


@pytest.mark.parametrize("name", ["terminated", "interrupted"])
def test_a_live_measurement_is_not_swept(name: str, ends: Ends) -> None:
    assert ends.swept[name] == in_training("RUNNING")


@pytest.mark.parametrize(
    ("host", "journal", "status"),
    [
        (socket.gethostname(), "killed", "KILLED"),
        (socket.gethostname(), "alive", "RUNNING"),
        (socket.gethostname(), "another run's", "RUNNING"),  # of the same name, in another container
        (socket.gethostname(), "not here", "RUNNING"),
        ("elsewhere", "killed", "RUNNING"),
    ],
)
def test_only_runs_whose_program_is_gone_are_swept(host: str, journal: str, status: str, lab: Lab) -> None:
    path = lab.folder / f"{journal}.jsonl"
    run = lab.client.create_run("0", tags={HOST: host, WRITER: str(path), KEY: "its key"})
    if journal != "not here":
        held = Journal(path)
        held.append({"op": "run", "run": "another" if journal == "another run's" else "its key"})
        if journal != "alive":
            held.close()
    assert main(lab.command(VALUE, entry="load")) == 0
    assert lab.client.get_run(run.info.run_id).info.status == status


def test_the_data_alone(lab: Lab) -> None:
    """No checkpoint is opened: rows are left out as the task says, and not for an encoder that nobody named."""
    entry, _, config = lab.command({**VALUE, "max_seq_length": None}, entry="load")
    assert main([entry, config]) == 0
    (parent,) = lab.parents()
    assert parent.info.run_name == "data of value"
    assert lab.statuses(parent) == {"main": "FINISHED", "load": "FINISHED"}
    logged = lab.nested(parent)["load"].data.metrics
    assert (logged["value/train_rows"], logged["value/train_left_out"]) == (31, 0)
    assert "value/read_seconds" in logged
    assert {key.partition(".")[0] for key in parent.data.params} == {"cfg"}


def test_a_mistake_of_the_trackers_beside_it_leaves_no_run(lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    (lab.folder / "file").touch()
    assert main(lab.command(VALUE, logging={"tensorboard": str(lab.folder / "file" / "board")})) == 2
    assert "error: logging.tensorboard: " in capsys.readouterr().err
    assert lab.runs() == []


def test_a_leading_dash_is_data(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(lab.folder)
    Path("-e model").symlink_to(lab.ckpt)
    entry, _, config = lab.command(VALUE, entry="load")
    assert main([entry, "--ckpt=-e model", config]) == 0
    assert lab.parents()[0].info.run_name == "-e model on value"


def test_mlflow_run_passes_everything_as_data(lab: Lab) -> None:
    """Nested runs are under the run that mlflow made, and what a shell would stumble over reaches the program."""
    name = "it's; a=b -c"
    lab.command({**VALUE, "dataset_path": "nowhere"})
    overrides = [f"dataset.dataset_path={lab.folder}", f"dataset.task_name={name}", "device=cpu"]
    values = {"ckpt": lab.ckpt, "config": lab.folder / "config.yaml", "overrides": shlex.join(overrides)}
    given = [argument for key, value in values.items() for argument in ("-P", f"{key}={value}")]
    command = [sys.executable, "-m", "mlflow", "run", ".", "--env-manager", "local", "-e", "score", *given]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    ended = subprocess.run(command, cwd=ROOT, env={**os.environ, "PATH": path}, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    (parent,) = lab.parents()
    assert lab.statuses(parent) == dict.fromkeys(["main", *STAGES], "FINISHED")
    assert parent.data.tags["mlflow.project.entryPoint"] == "score"
    assert parent.info.run_name.startswith(f"{lab.ckpt.name}: value ")
    params = parent.data.params
    assert params["cfg.dataset.dataset_path"] == str(lab.folder)
    assert params["cfg.dataset.task_name"] == name
    assert {key for key in params if not key.startswith(("cfg.", "ckpt."))} == set(values)
    assert "test_value_spearman" in parent.data.metrics


AT_ONCE = """
import sys, time
from pathlib import Path
from mlflow import MlflowClient
from pipeline.tracking.protocol import Data
from pipeline.tracking.runs import OpenRun
opened = OpenRun(Path(sys.argv[1] + ".jsonl"))
assert opened.sender.settle(30)
client = MlflowClient()
Path(sys.argv[1]).touch()
while not all(Path(name).exists() for name in sys.argv[1:]):
    time.sleep(0.001)
for index in range(20):
    opened.run.data(Data("task", "train", ".", f"digest {index}", 1, 0))
assert opened.sender.settle(60)
print(len(client.get_run(opened.ids[1]).inputs.dataset_inputs))
"""


def test_two_processes_may_log_the_same_data_at_once(tracking: str, tmp_path: Path) -> None:
    marks = [str(tmp_path / name) for name in "ab"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", AT_ONCE, *order], env=environment, stdout=subprocess.PIPE, text=True, cwd=tmp_path
        )
        for order in (marks, marks[::-1])
    ]
    assert [run.communicate(timeout=120)[0].strip() for run in runs] == ["20", "20"]
    assert len(MlflowClient(tracking).search_runs(["0"])) == 2
