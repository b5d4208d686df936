"""Never in the way: servers that are killed, silent, or whose answers are lost; and the journal that outlives them."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import mlflow
import pytest
import pytorch_lightning as pl
from filelock import FileLock
from hypothesis import given
from hypothesis import strategies as st
from mlflow import MlflowClient, environment_variables

from pipeline import DownstreamValidation, JournalLogger
from pipeline.__main__ import main
from pipeline.statistics.metrics import metrics_of_kind
from pipeline.tracking import runs
from pipeline.tracking import sender as sending
from pipeline.tracking.client import fail_fast
from pipeline.tracking.delivery import RefusedError, Sink, lock_for_sending
from pipeline.tracking.journal import Journal, Record
from pipeline.tracking.journal_run import JournalRun
from pipeline.tracking.runs import OpenRun
from pipeline.tracking.sender import Sender
from tests.support import servers
from tests.support.data import planted_task
from tests.support.programs import ROOT
from tests.support.training import Busy, loader, section, trainer

VOLATILE = {"pipeline.writer", "pipeline.journal", "mlflow.user"}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the tests wait for is what happens, not these times."""
    monkeypatch.setattr(sending, "FIRST_PAUSE", 0.05)
    monkeypatch.setattr(sending, "LONGEST_PAUSE", 0.2)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, empty_database: Path) -> Iterator[servers.MlflowServer]:
    folder = tmp_path_factory.mktemp("server")
    (folder / "mlflow.db").write_bytes(empty_database.read_bytes())
    with servers.running(folder) as server:
        yield server


def state(uri: str, name: str) -> dict[str, Any]:
    """Everything that MLflow has of the run of this name, ids and times out."""
    client = MlflowClient(uri)
    (run,) = [one for one in client.search_runs(["0"]) if one.info.run_name == name]
    run_id = run.info.run_id
    models = {model.model_id: model for model in client.search_logged_models(["0"]) if model.source_run_id == run_id}
    linked = run.outputs.model_outputs if run.outputs else []
    return {
        "status": run.info.status,
        "params": run.data.params,
        "tags": {key: value for key, value in run.data.tags.items() if key not in VOLATILE},
        "metrics": {
            key: [(point.step, point.value) for point in client.get_metric_history(run_id, key)]
            for key in run.data.metrics
        },
        "data": sorted((one.dataset.name, one.dataset.digest) for one in run.inputs.dataset_inputs),  # type: ignore[union-attr]
        "models": sorted((models[one.model_id].name, one.step) for one in linked),
        "ranked": sorted(
            (model.name, metric.key, metric.value, metric.step, metric.dataset_name)
            for model in models.values()
            for metric in model.metrics or []
        ),
        "files": sorted(files(client, run_id)),
    }


def files(client: MlflowClient, run_id: str, folder: str | None = None) -> Iterator[str]:
    for one in client.list_artifacts(run_id, folder):
        if one.is_dir:
            yield from files(client, run_id, one.path)
        else:
            yield one.path


class At(pl.Callback):
    """Does something in the middle of the training."""

    def __init__(self, batch: int, act: Callable[[], None]) -> None:
        self.batch, self.act = batch, act

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, index: int) -> None:
        if trainer.global_step == self.batch:
            self.act()


def train(folder: Path, esm: Path, uri: str, act: Callable[[], None] = lambda: None) -> Path:
    """A training of 8 steps with two measurements, logged by way of the journal that is returned."""
    folder.mkdir()
    task = planted_task(folder / "data")
    task.dataset_path = str(folder / "data")
    journal = folder / "journal.jsonl"
    logger = JournalLogger("training", tracking_uri=uri, journal=journal)
    callback = DownstreamValidation(section(folder, task))
    pl.seed_everything(7, verbose=False)
    fit = trainer(folder, [callback, At(3, act)], logger=logger, log_every_n_steps=1)
    fit.fit(Busy(esm), loader(), loader(shuffle=False))
    assert fit.state.finished
    assert [step for step, _ in callback.curve] == [4, 8]
    return journal


def sent(journal: Path) -> int:
    """How many bytes of a journal have arrived."""
    path = journal.with_suffix(".sent")
    return int(path.read_text()) if path.exists() else 0


@pytest.fixture
def senders(monkeypatch: pytest.MonkeyPatch) -> list[Sender]:
    """Those that a test makes."""
    made: list[Sender] = []

    def make(*arguments: Any) -> Sender:
        made.append(Sender(*arguments))
        return made[-1]

    monkeypatch.setattr(runs, "Sender", make)
    return made


def leave(senders: list[Sender]) -> None:
    """As if the program had ended: what is not sent stays in the journals."""
    assert senders
    for sender in senders:
        sender.close(0.1, 0.1)
    join_threads()


def join_threads() -> None:
    """Waits for the end of the threads that send."""
    for thread in threading.enumerate():
        if thread.name == "journal":
            thread.join(60)


def wait(sender: Sender) -> None:
    """Until everything has arrived, whatever fails meanwhile."""
    for _ in range(6000):
        if sender.settle(60):
            return
        time.sleep(0.01)
    raise AssertionError(sender.failure)


def same(found: dict[str, Any], wanted: dict[str, Any]) -> bool:
    """Apart from the folder of the data, which is in the configuration."""
    return bool(without_folders(found) == without_folders(wanted))


def without_folders(what: dict[str, Any]) -> Any:
    folders = ("cfg.dataset.dataset_path", "cfg.store")
    params = {key: value for key, value in what["params"].items() if key not in folders}
    return {**what, "params": params}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, model_folder: Any, empty_database: Path) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("undisturbed")
    uri = f"sqlite:///{folder}/mlflow.db"
    (folder / "mlflow.db").write_bytes(empty_database.read_bytes())
    train(folder / "training", model_folder("esm"), uri)
    return state(uri, "training")


def test_a_training_with_a_server(
    server: servers.MlflowServer, undisturbed: dict[str, Any], tmp_path: Path, model_folder: Any
) -> None:
    journal = train(tmp_path / "t", model_folder("esm"), server.uri)
    assert undisturbed["status"] == "FINISHED"
    assert [step for step, _ in undisturbed["metrics"]["train_loss"]] == list(range(8))
    assert [step for step, _ in undisturbed["metrics"]["test_label_accuracy"]] == [4, 8]
    assert undisturbed["models"] == [("step=4", 4), ("step=8", 8)]
    assert {key for _, key, *_ in undisturbed["ranked"]} == {
        "dwnstr_task_val_loss",
        *(f"embedding_{name}" for name in ("rank_me", "mean_cosine", "dead_dimensions")),
        *(f"test_label{who}_{name}" for who in ("", "_probe") for name in metrics_of_kind("classification", "token")),
    }
    assert same(state(server.uri, "training"), undisturbed)
    assert sent(journal) == journal.stat().st_size


def test_a_server_killed_in_the_middle(
    undisturbed: dict[str, Any],
    tmp_path: Path,
    model_folder: Any,
    empty_database: Path,
    senders: list[Sender],
    capsys: Any,
) -> None:
    (tmp_path / "mlflow.db").write_bytes(empty_database.read_bytes())
    with servers.running(tmp_path) as server:
        journal = train(tmp_path / "t", model_folder("esm"), server.uri, server.kill)
        lines = [json.loads(line) for line in journal.read_text().splitlines()]
        written = [line["step"] for line in lines if "train_loss" in line.get("values", {})]
        assert written == list(range(8))
        assert sent(journal) < journal.stat().st_size
        leave(senders)
        server.start()
        for _ in range(2):
            assert main(["replay", str(journal)]) == 0
        assert same(state(server.uri, "training"), undisturbed)
        assert "0 records sent" in capsys.readouterr().out.splitlines()[-1]


def test_a_server_that_never_answers(
    undisturbed: dict[str, Any], tmp_path: Path, model_folder: Any, tracking: str, senders: list[Sender], capsys: Any
) -> None:
    with servers.silent() as uri:
        journal = train(tmp_path / "t", model_folder("esm"), uri)
    assert sent(journal) < len(journal.read_text().splitlines()[0]) + 2  # at most the head, which is for nobody
    leave(senders)
    assert main(["replay", str(journal)]) == 2
    assert "start it, and replay again" in capsys.readouterr().err
    assert main(["replay", str(journal), f"--tracking-uri={tracking}"]) == 0
    assert same(state(tracking, "training"), undisturbed)


@pytest.mark.parametrize("path", ["runs/create", "logged-models", "runs/log-batch", "runs/outputs", "runs/log-inputs"])
def test_an_answer_that_is_lost(
    path: str, server: servers.MlflowServer, undisturbed: dict[str, Any], tmp_path: Path, model_folder: Any
) -> None:
    """The server did what it was asked; asked again, it must not do it twice."""
    lost: list[str] = []

    def loses(method: str, url: str) -> bool:
        hit = method == "POST" and url.split("?")[0].endswith(path) and not lost
        lost.extend([url] if hit else [])
        return hit

    before = len(MlflowClient(server.uri).search_logged_models(["0"]))
    with servers.between(server, loses) as uri:
        opened = OpenRun(tmp_path / "journal.jsonl", uri, name=f"lost {path}")
        write_everything(opened.run, digest=path)
        wait(opened.sender)
        assert len(lost) == 1
    found = state(server.uri, f"lost {path}")
    assert found["metrics"] == {"x": [(3, 0.5), (4, 0.25)]}
    assert found["models"] == [("weights", 3)]
    assert found["status"] == "FINISHED"
    assert len(MlflowClient(server.uri).search_logged_models(["0"])) == before + 1


def write_everything(run: JournalRun, digest: str) -> None:
    from pipeline.tracking.protocol import Data

    data = Data("task", "test", ".", f"0123456789{digest}", 3, 0)
    run.data(data)
    run.parameters({"a": 1})
    run.checkpoint("weights", digest, ".", 3)
    run.metrics({"x": 0.5}, 3, data)
    run.text("hello", "notes/hello.txt")
    run.metrics({"x": 0.25}, 4, data)
    run.end("FINISHED")


KILLED = """
import os, sys
from pathlib import Path
from pipeline.tracking.runs import OpenRun
opened = OpenRun(Path(sys.argv[1]), sys.argv[2], name="killed")
opened.run.metrics({"x": 0.5}, 3)
opened.run.text("hello", "hello.txt")
os.write(os.open(sys.argv[1], os.O_WRONLY | os.O_APPEND), b'{"op":"metrics","run":')
os.kill(os.getpid(), 9)
"""


def test_a_program_that_is_killed(tmp_path: Path, tracking: str) -> None:
    """What it had written arrives, and its run does not stay RUNNING."""
    journal = tmp_path / "journal.jsonl"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with servers.silent() as uri:
        code = subprocess.run([sys.executable, "-c", KILLED, str(journal), uri], env=environment).returncode
    assert code == -signal.SIGKILL
    assert main(["replay", str(journal), f"--tracking-uri={tracking}"]) == 0
    found = state(tracking, "killed")
    assert found["metrics"] == {"x": [(3, 0.5)]}
    assert found["files"] == ["hello.txt"]
    assert found["status"] == "KILLED"


def test_the_next_program_sends_what_a_killed_one_left(tmp_path: Path, tracking: str) -> None:
    """From the folder where journals are by default; not what another process is still writing."""
    other = JournalRun.begin(Journal(tmp_path / "b.jsonl", tracking), name="alive")
    other.metrics({"x": 1.0})
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "WAIT": "60"}
    command = [sys.executable, "-c", KILLED.replace("name=", "remove=True, name="), str(tmp_path / "a.jsonl"), tracking]
    with FileLock(tmp_path / "a.lock"):  # nobody sends it meanwhile
        assert subprocess.run(command, env=environment).returncode == -signal.SIGKILL
    opened = OpenRun(tmp_path / "c.jsonl", tracking, True, name="next")
    assert opened.sender.close()
    assert state(tracking, "killed")["metrics"] == {"x": [(3, 0.5)]}
    assert state(tracking, "killed")["status"] == "KILLED"
    assert {run.info.run_name for run in MlflowClient().search_runs(["0"])} == {"killed", "next"}
    assert not list(tmp_path.glob("[ac].*"))


def test_what_is_written_after_a_torn_line_is_read(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    path.write_bytes(b'{"op":"journal","uri":""}\n{"op":"me')
    Journal(path).append({"op": "next"})
    assert [record["op"] for record, _ in Journal(path).read()] == ["journal", "torn", "next"]


@given(st.lists(st.dictionaries(st.text(), st.integers() | st.text() | st.none()), max_size=5), st.data())
def test_a_journal_cut_anywhere_gives_its_whole_records(
    tmp_path_factory: pytest.TempPathFactory, records: list[Record], data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("journal") / "journal.jsonl"
    journal = Journal(path)
    records = [{**record, "op": "x"} for record in records]
    for record in records:
        journal.append(record)
    journal.close()
    every = list(journal.read())
    cut = data.draw(st.integers(0, 10_000)) % (path.stat().st_size + 1)  # the head names the folder, which changes
    os.truncate(path, cut)
    assert [record for record, _ in every[1:]] == json.loads(json.dumps(records))
    assert list(journal.read()) == [(record, end) for record, end in every if end <= cut]


class FakeSink(Sink):
    """Fails as often as it is told to; refuses what says so."""

    def __init__(self, failures: int = 0) -> None:
        self.failures = failures
        self.records: list[Record] = []

    def apply(self, records: Sequence[Record]) -> None:
        if self.failures:
            self.failures -= 1
            raise OSError("no route to host")
        if any(record["op"] == "bad" for record in records):
            raise RefusedError("not such a one")
        self.records += records

    def answers(self) -> bool:
        return False


def test_a_server_that_comes_back_is_sent_everything_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    sink = FakeSink(failures=3)
    journal = Journal(tmp_path / "a.jsonl")
    sender = Sender(journal, lambda: sink, remove=True)
    for number in range(5):
        journal.append({"op": "x", "number": number})
    wait(sender)
    assert sender.close()
    assert [record.get("number") for record in sink.records] == [None, 0, 1, 2, 3, 4]
    assert caplog.text.count("MLflow does not answer (no route to host)") == 1
    assert caplog.text.count("MLflow answers again") == 1
    assert not list(tmp_path.iterdir())


def test_what_is_refused_is_said_and_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    sink = FakeSink()
    journal = Journal(tmp_path / "a.jsonl")
    sender = Sender(journal, lambda: sink, remove=True)
    for op in ("x", "bad", "y"):
        journal.append({"op": op})
    assert sender.close()
    assert [record["op"] for record in sink.records] == ["journal", "x", "y"]
    assert "MLflow refused not such a one" in caplog.text
    assert journal.path.exists()  # with what was refused in it


def test_one_bad_metric_does_not_spoil_the_others(tmp_path: Path, tracking: str) -> None:
    opened = OpenRun(tmp_path / "a.jsonl", name="mixed")
    for name in ("good", "b@d", "fine"):
        opened.run.metrics({name: 1.0})
    assert opened.sender.close()
    assert set(state(tracking, "mixed")["metrics"]) == {"good", "fine"}


def test_a_journal_that_another_sends_is_left_alone(tmp_path: Path, tracking: str, capsys: Any) -> None:
    journal = Journal(tmp_path / "a.jsonl", tracking)
    JournalRun.begin(journal, name="mine")
    with lock_for_sending(journal):
        assert main(["replay", str(journal.path), f"--tracking-uri={tracking}"]) == 2
        assert "is being sent by another process" in capsys.readouterr().err
    assert main(["replay", str(journal.path), f"--tracking-uri={tracking}"]) == 0


@pytest.mark.parametrize("content", [b"", b"a,b\n", b'{"a": 1}', b"[1]\n", b"PK\x03\xff\xfe"])
def test_replay_of_what_is_no_journal(content: bytes, tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "x.jsonl"
    assert main(["replay", str(path)]) == 2
    path.write_bytes(content)
    assert main(["replay", str(path)]) == 2
    said = capsys.readouterr().err.splitlines()
    assert "is not there" in said[0]
    assert "is no journal" in said[1]
    assert path.read_bytes() == content


def test_a_journal_may_be_sent_elsewhere_too(tmp_path: Path, tracking: str, empty_database: Path) -> None:
    """All of it, though another server has it already."""
    opened = OpenRun(tmp_path / "a.jsonl", name="both")
    write_everything(opened.run, "elsewhere")
    assert opened.sender.close()
    (tmp_path / "other.db").write_bytes(empty_database.read_bytes())
    other = f"sqlite:///{tmp_path}/other.db"
    for _ in range(2):
        assert main(["replay", str(tmp_path / "a.jsonl"), f"--tracking-uri={other}"]) == 0
    assert state(other, "both") == state(tracking, "both")


def test_a_second_logger_goes_on_in_the_same_journal(tmp_path: Path, tracking: str) -> None:
    """In the same process, whose first one holds the lock."""
    for step in range(3):
        JournalLogger("again", journal=tmp_path / "a.jsonl").log_metrics({"x": 1.0}, step)
    assert sending.flush()
    assert state(tracking, "again")["metrics"] == {"x": [(0, 1.0), (1, 1.0), (2, 1.0)]}


def test_a_logger_may_be_used_after_a_training(tmp_path: Path, tracking: str) -> None:
    """Its thread may have ended then; the run's status stays, or becomes that of the last training."""
    logger = JournalLogger("twice", journal=tmp_path / "a.jsonl")
    for step, status in enumerate(("failed", "success")):
        logger.log_metrics({"x": 1.0}, step)
        logger.finalize(status)
        assert sending.flush()
        assert state(tracking, "twice")["status"] == {"failed": "FAILED", "success": "FINISHED"}[status]
    logger.log_metrics({"x": 2.0}, 9)
    assert sending.flush()
    found = state(tracking, "twice")
    assert found["metrics"] == {"x": [(0, 1.0), (1, 1.0), (9, 2.0)]}
    assert found["status"] == "FINISHED"


def test_what_another_process_sends_is_waited_for(tmp_path: Path) -> None:
    sink = FakeSink()
    journal = Journal(tmp_path / "a.jsonl")
    with FileLock(tmp_path / "a.lock"):
        sender = Sender(journal, lambda: sink)
        journal.append({"op": "x"})
        assert not sender.settle(0.1)
        while sender.failure is None:
            time.sleep(0.01)
        assert "another process" in sender.failure
    wait(sender)
    assert [record["op"] for record in sink.records] == ["journal", "x"]
    assert sender.close()


def test_a_file_that_cannot_be_kept_does_not_hold_up_the_rest(
    tmp_path: Path, tracking: str, caplog: pytest.LogCaptureFixture
) -> None:
    nowhere = MlflowClient().create_experiment("nowhere", artifact_location="/dev/null/artifacts")
    opened = OpenRun(tmp_path / "a.jsonl", name="files", experiment={"id": nowhere})
    opened.run.text("hello", "hello.txt")
    opened.run.metrics({"x": 1.0})
    opened.run.end("FINISHED")
    wait(opened.sender)
    (run,) = MlflowClient().search_runs([nowhere])
    assert (run.data.metrics, run.info.status) == ({"x": 1.0}, "FINISHED")
    assert caplog.text.count("MLflow refused artifact: it failed 3 times (") == 1


def test_an_older_journal_does_not_end_a_run_that_went_on(tmp_path: Path, tracking: str) -> None:
    """Killed with the server down, resumed in a journal of its own: then the first is sent, and sent again."""
    with servers.silent() as uri:
        killed = subprocess.run(
            [sys.executable, "-c", KILLED, str(tmp_path / "a.jsonl"), uri], env={**os.environ, "PYTHONPATH": str(ROOT)}
        )
    assert killed.returncode == -signal.SIGKILL
    key = next(iter(Journal(tmp_path / "a.jsonl").runs))
    resumed = OpenRun(tmp_path / "b.jsonl", key=key, name="killed")
    resumed.run.metrics({"x": 0.75}, 4)
    assert resumed.sender.settle(30)
    assert main(["replay", str(tmp_path / "a.jsonl"), f"--tracking-uri={tracking}"]) == 0
    assert state(tracking, "killed")["status"] == "RUNNING"
    resumed.run.end("FINISHED")
    assert resumed.sender.close()
    assert main(["replay", str(tmp_path / "a.jsonl"), f"--tracking-uri={tracking}"]) == 0
    found = state(tracking, "killed")
    assert found["status"] == "FINISHED"
    assert found["metrics"] == {"x": [(3, 0.5), (4, 0.75)]}


def test_names_and_values_that_mlflow_would_refuse(tmp_path: Path, tracking: str, caplog: Any) -> None:
    logger = JournalLogger("odd", journal=tmp_path / "a.jsonl")
    odd: Any = {"a//b": 1.0, "/c@d": 2.0, "e" * 300: 3.0, "nan": float("nan"), "none": None, "text": "x"}
    logger.log_metrics(odd, 1)
    logger.log_hyperparams({"/abs/path": 1, "lr": 0.1})
    assert sending.flush()
    found = state(tracking, "odd")
    assert set(found["metrics"]) == {"a/b", "c_d", "e" * 250, "nan"}
    assert found["params"] == {"abs/path": "1", "lr": "0.1"}
    assert caplog.text.count("expected a number") == 2


def test_a_given_run_is_not_taken_for_ours(tmp_path: Path, tracking: str) -> None:
    """Others sweep up runs whose process is gone; whoever made this one may still be at work."""
    made = MlflowClient().create_run("0", run_name="theirs")
    opened = OpenRun(tmp_path / "a.jsonl", run_id=made.info.run_id)
    opened.run.metrics({"x": 1.0})
    assert opened.sender.close()
    assert not any(key.startswith("pipeline.") for key in MlflowClient().get_run(made.info.run_id).data.tags)


def test_a_full_disk_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    journal = Journal(tmp_path / "a.jsonl")
    journal.close()
    run = JournalRun.begin(journal, name="lost")
    run.metrics({"x": 1.0})
    run.artifact(tmp_path / "nothing.txt")
    assert caplog.text.count("cannot be written") == 1


def test_the_users_own_client_keeps_its_manners() -> None:
    """The sender asks once; other threads of the program ask as often as MLflow does."""
    found: dict[str, tuple[int, int]] = {}

    def ask(name: str) -> None:
        variables: Any = environment_variables
        found[name] = (variables.MLFLOW_HTTP_REQUEST_MAX_RETRIES.get(), variables.MLFLOW_HTTP_REQUEST_TIMEOUT.get())

    def brief() -> None:
        fail_fast()
        ask("sender")

    for name, work in (("before", lambda: ask("before")), ("sender", brief), ("after", lambda: ask("after"))):
        thread = threading.Thread(target=work, name=name)
        thread.start()
        thread.join()
    assert found == {"before": (7, 120), "sender": (0, 10), "after": (7, 120)}


def test_every_thread_of_a_sender_fails_fast(tmp_path: Path, tracking: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its thread ends when there is nothing to send; the next thread uses the connection that there is."""
    found = []
    log_batch = MlflowClient.log_batch

    def ask(*args: Any, **options: Any) -> None:
        variable: Any = environment_variables.MLFLOW_HTTP_REQUEST_MAX_RETRIES
        found.append((threading.current_thread(), variable.get()))
        log_batch(*args, **options)

    monkeypatch.setattr(MlflowClient, "log_batch", ask)
    logger = JournalLogger("bursts", journal=tmp_path / "a.jsonl")
    for step in range(2):
        logger.log_metrics({"x": 1.0}, step)
        assert sending.flush()
        logger.finalize("success")
        assert sending.flush()
        found[-1][0].join(60)
        assert not found[-1][0].is_alive()
    assert [retries for _, retries in found] == [0, 0]


def test_the_end_of_a_program_needs_no_new_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Python 3.12 starts none then."""

    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't create new thread at interpreter shutdown")

    finished = {name: Sender(Journal(tmp_path / f"{name}.jsonl"), FakeSink, remove=True) for name in "ab"}
    for sender in finished.values():
        wait(sender)
    join_threads()
    monkeypatch.setattr(threading.Thread, "start", refuse)
    assert finished["a"].close()
    assert not list(tmp_path.glob("a.*"))
    finished["b"].journal.append({"op": "x"})
    assert not finished["b"].close()
    assert "send it later with" in caplog.text


def test_the_experiment_that_a_script_has_set(tmp_path: Path, tracking: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`mlflow.set_experiment` sets MLFLOW_EXPERIMENT_ID, which takes precedence over a name in the environment."""
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "of the environment")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", "")
    monkeypatch.delenv("MLFLOW_EXPERIMENT_ID")
    for name in ("of the environment", "of the script"):
        opened = OpenRun(tmp_path / f"{name}.jsonl", name="run")
        assert opened.sender.close()
        (experiment,) = [one for one in MlflowClient().search_experiments() if one.name == name]
        assert opened.ids is not None
        assert opened.ids[0] == experiment.experiment_id
        monkeypatch.setattr(mlflow.tracking.fluent, "_active_experiment_id", None, raising=False)
        mlflow.set_experiment("of the script")


def test_the_command_line_goes_on_without_a_server(
    tmp_path: Path, tracking: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capsys: Any
) -> None:
    """A server that is down when a measurement ends has its results from `replay`."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sending, "PATIENCE", 1.0)
    with servers.silent() as uri:
        options = f"store={tmp_path}/store dataset.num_epochs=1 logging.figures=false"
        assert main(["main", f"--tracking-uri={uri}", f"--overrides={options}"]) == 0
    assert "secondary_structure/test_3state_accuracy" in capsys.readouterr().out
    (journal,) = (tmp_path / "store" / "journal").glob("*.jsonl")
    assert f"python -m pipeline replay {journal}" in caplog.text
    logging.getLogger("pipeline").setLevel(logging.INFO)
    assert main(["replay", str(journal), f"--tracking-uri={tracking}"]) == 0
    (run,) = MlflowClient(tracking).search_runs(["0"], "tags.`downstream.kind` = 'measurement'")
    assert run.info.status == "FINISHED"
    assert run.info.run_name.startswith("checkpoint: fitness 0.")
