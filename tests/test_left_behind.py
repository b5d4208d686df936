"""What killed programs leave goes with the next, what the living hold stays; and errors that can be traced."""

from __future__ import annotations

import ast
import contextlib
import gc
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from filelock import FileLock
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from transformers import EsmConfig, EsmModel

from pipeline.__main__ import main
from pipeline.embed import embed
from pipeline.encoders.packing import Packing
from pipeline.errors import CacheError, TrackingError
from pipeline.load import load
from pipeline.store import shards
from pipeline.store.embedding_table import Store
from pipeline.store.temporary import host_mark, temporary_folder
from pipeline.tracking import delivery
from pipeline.tracking import sender as sending
from pipeline.tracking.client import connect
from pipeline.tracking.earlier_runs import catch_up, replay_journal
from pipeline.tracking.journal import Journal, Record
from pipeline.tracking.journal_owner import KEY, lives, lock_path, writer_tags
from pipeline.tracking.journal_run import JournalRun
from pipeline.tracking.runs import OpenRun
from pipeline.tracking.sender import Sender
from tests.support.data import token_task
from tests.support.encoders import FakeEncoder
from tests.support.programs import ROOT

# --- kills


def killed(script: str, *arguments: str, before: Sequence[str] = ()) -> None:
    """Runs a script that kills itself."""
    command = [*before, sys.executable, "-c", script, *arguments]
    ended = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert ended.returncode == -signal.SIGKILL, ended.stderr


@pytest.mark.slow
def test_kills_leave_nothing_and_change_nothing(tmp_path: Path) -> None:
    """A short version of the benchmark, which kills two hundred."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "benchmarks/kills.py", "--kills=8", "--models=2", f"--json={tmp_path}/said.json"]
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    said = json.loads((tmp_path / "said.json").read_text())
    assert (said["killed"], said["left"], said["differ"]) == (8, [], [])
    assert said["left by the killed"] > 0
    assert said["compared"] > 40


BEGUN = """
import os, sys
from pathlib import Path
from pipeline.tracking.runs import OpenRun
opened = OpenRun(Path(sys.argv[1]), sys.argv[2], True, name="killed")
with opened.run.stage("inner"):
    opened.run.metrics({"x": 0.5}, 3)
    assert opened.sender.settle(60)
    os.kill(os.getpid(), 9)
"""


def statuses() -> dict[str, str]:
    return {str(run.info.run_name): run.info.status for run in MlflowClient().search_runs(["0"])}


def test_a_journal_of_which_all_has_arrived_goes_with_the_next_program(tmp_path: Path, tracking: str) -> None:
    killed(BEGUN, str(tmp_path / "j" / "a.jsonl"), tracking)
    journal = Journal(tmp_path / "j" / "a.jsonl", write=False)
    assert journal.sent == journal.end
    assert statuses() == {"killed": "RUNNING", "inner": "RUNNING"}
    assert OpenRun(tmp_path / "j" / "b.jsonl", tracking, True, name="next").sender.close()
    assert statuses() == {"killed": "KILLED", "inner": "KILLED", "next": "RUNNING"}
    assert list((tmp_path / "j").iterdir()) == []


@pytest.mark.parametrize(
    "parts", [["lock"], ["writer.lock", "sent"], ["sent.tmp"], ["files"], ["jsonl", "writer.lock"]]
)
def test_what_is_left_of_a_journal_goes_too(parts: list[str], tmp_path: Path) -> None:
    """Its program was killed as it made or removed it; another host's may be at that now."""
    for part in parts:
        for name in (f"x=1.5-a{host_mark()}", "x=1.5-a@elsewhere", "x=1.5-a"):
            path = tmp_path / f"{name}.{part}"
            path.mkdir() if part == "files" else path.touch()
    (tmp_path / "another.txt").touch()
    list(catch_up(tmp_path, "sqlite:///nothing.db"))
    left = {path.name for path in tmp_path.iterdir() if not path.name.endswith(".writer.lock")}
    kept = {f"{name}.{part}" for name in ("x=1.5-a@elsewhere", "x=1.5-a") for part in parts if part != "writer.lock"}
    assert left == {"another.txt", *kept}
    assert not list(tmp_path.glob(f"*{host_mark()}*"))


def test_the_journal_of_a_living_program_stays(tmp_path: Path, tracking: str) -> None:
    other = JournalRun.begin(Journal(tmp_path / "a.jsonl", tracking, remove=True), name="alive")
    list(catch_up(tmp_path, tracking))
    assert {path.name for path in tmp_path.glob("a.*")} == {"a.jsonl", "a.writer.lock"}
    other.journal.close()
    list(catch_up(tmp_path, tracking))
    assert list(tmp_path.glob("a.*")) == []


def test_a_journal_with_refused_records_stays(tmp_path: Path, tracking: str) -> None:
    opened = OpenRun(tmp_path / "j" / "a.jsonl", tracking, True, name="mixed")
    opened.run.metrics({"b@d": 1.0})
    assert opened.sender.close()
    list(catch_up(tmp_path / "j", tracking))
    journal = Journal(tmp_path / "j" / "a.jsonl", write=False)
    assert (journal.sent, journal.refused) == (journal.end, 1)


MAKES = """
import os, signal, sqlite3, sys
from pathlib import Path
import sqlalchemy
from pipeline.tracking.client import connect

@sqlalchemy.event.listens_for(sqlalchemy.engine.Engine, "before_cursor_execute")
def kill(connection, cursor, statement, *_):
    if "CREATE TABLE" in statement and "webhooks" in statement:
        os.kill(os.getpid(), signal.SIGKILL)

connect(sys.argv[1])
"""


def test_a_database_that_was_being_made_is_made_again(tmp_path: Path) -> None:
    """MLflow alone can neither finish nor open what a kill in the middle leaves."""
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    killed(MAKES, uri)
    assert not (tmp_path / "mlflow.db").exists()
    with contextlib.chdir(tmp_path):
        client = connect(uri)
    assert client.create_run("0").info.status == "RUNNING"
    assert {path.name for path in tmp_path.iterdir()} == {"mlflow.db", "mlflow.db.lock"}


def test_a_journal_has_one_writing_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.tracking.journal_owner.PATIENCE", 0)
    with FileLock(lock_path(tmp_path / "a.jsonl")), pytest.raises(OSError, match="another program writes"):
        Journal(tmp_path / "a.jsonl")


IN_TEMPORARY = """
import os, sys
from pathlib import Path
from pipeline.store.temporary import temporary_folder
with temporary_folder(Path(sys.argv[1]) if sys.argv[1:] else None) as folder:
    (folder / "x").touch()
    os.kill(os.getpid(), 9)
"""


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """TMPDIR for this test and its subprocesses."""
    path = tmp_path / "tmp"
    path.mkdir()
    monkeypatch.setenv("TMPDIR", str(path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return path


def test_a_temporary_folder_of_a_killed_program_goes_with_the_next(temporary: Path) -> None:
    killed(IN_TEMPORARY)
    (own,) = temporary.iterdir()
    assert len(list(own.iterdir())) == 2  # the folder and its lock
    with temporary_folder() as outer, temporary_folder() as inner:
        assert {path.name for path in own.iterdir() if path.is_dir()} == {outer.name, inner.name}
        assert outer.stat().st_mode & 0o777 == own.stat().st_mode & 0o777 == 0o700
    assert list(own.iterdir()) == []


def test_temporary_folders_of_another_host_stay(tmp_path: Path) -> None:
    """On a shared file system that keeps locks to each host, the lock of a living program looks free."""
    elsewhere = "import socket\nsocket.gethostname = lambda: 'else where'\n"
    killed(elsewhere + IN_TEMPORARY, str(tmp_path / "live"))
    (folder,) = (tmp_path / "live").glob("*/")
    killed(IN_TEMPORARY, str(tmp_path / "live"))
    Store(tmp_path).clear()
    assert {path.name for path in (tmp_path / "live").iterdir()} == {folder.name, f"{folder.name}.lock"}
    assert folder.name.endswith("@else_where")
    killed(elsewhere + IN_TEMPORARY, str(tmp_path / "live"))
    assert not folder.exists()


@pytest.mark.parametrize("kind", ["link", "file"])
def test_a_folder_that_another_made_in_the_users_place_is_not_used(kind: str, temporary: Path) -> None:
    with temporary_folder() as folder:
        own = folder.parent
    own.rmdir()
    (temporary / "elsewhere").mkdir()
    if kind == "link":
        own.symlink_to(temporary / "elsewhere")
    else:
        own.touch()
    with pytest.raises(CacheError, match="set TMPDIR to another folder"), temporary_folder():
        pass
    assert list((temporary / "elsewhere").iterdir()) == []


def test_no_other_temporary_folders_are_made() -> None:
    """Python's own stay behind when a program is killed."""
    for path in (ROOT / "pipeline").rglob("*.py"):
        names = {
            alias.name
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Import)
            for alias in node.names
        }
        assert ("tempfile" in names) == (path.name == "temporary.py"), path


def test_unfinished_files_of_the_store_go_with_the_next_program(tmp_path: Path, fake: FakeEncoder) -> None:
    """In other tables too, and only where nobody is writing."""
    some = Store(tmp_path / "store")
    embed([load(token_task(tmp_path))], fake, some)
    (shelf,) = (tmp_path / "store" / "embeddings").iterdir()
    whole = {path.name for path in shelf.iterdir()}
    killed(IN_TEMPORARY, str(tmp_path / "store" / "live"))
    killed(IN_TEMPORARY, str(tmp_path / "store" / "heads"))
    for name in ("shard-00007.tmp", "shard-00006.parquet", "manifest.json.1.tmp"):
        (shelf / name).touch()
    with FileLock(shelf / "lock"):
        some.clear()
        assert len({path.name for path in shelf.iterdir()} - whole) == 3
    some.clear()
    assert {path.name for path in shelf.iterdir()} == whole
    assert [list((tmp_path / "store" / name).iterdir()) for name in ("live", "heads")] == [[], []]


EMBEDS = """
import os, sys
from pathlib import Path
import numpy as np
from pipeline.embed import embed
from pipeline.load import load
from pipeline.store.embedding_table import Store
from tests.support.encoders import FakeEncoder
from tests.support.data import token_task
encoder = FakeEncoder()
encoder.reusable = False
(embeddings,) = embed([load(token_task(Path(sys.argv[1])))], encoder, Store(Path(sys.argv[2])))
assert embeddings.rows("train").gather(np.array([0])).numel() > 0
if sys.argv[3:]:
    os.kill(os.getpid(), 9)
"""


def files_of(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def test_embeddings_that_cannot_be_found_again_go_with_the_next_program(tmp_path: Path) -> None:
    some = Store(tmp_path / "store")
    killed(EMBEDS, str(tmp_path), str(some.root), "kill")
    assert any(path.suffix == ".parquet" for path in files_of(some.root))
    some.clear()
    assert files_of(some.root) == []
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", EMBEDS, str(tmp_path), str(some.root)], env=environment, check=True)
    assert files_of(some.root) == []


def test_embeddings_that_cannot_be_found_again_go_with_what_reads_them(tmp_path: Path, fake: FakeEncoder) -> None:
    """In a training there are some at each measurement."""
    some = Store(tmp_path / "store", memory_bytes=0)
    fake.reusable = False
    (embeddings,) = embed([load(token_task(tmp_path))], fake, some)
    rows = embeddings.rows("train")
    del embeddings
    gc.collect()
    assert any(path.suffix == ".parquet" for path in files_of(some.root))
    assert rows.gather(np.array([0])).numel() > 0
    del rows
    gc.collect()
    assert files_of(some.root) == []


# --- who lives


HOLDS = """
import os, sys, time
from pathlib import Path
from pipeline.tracking.runs import OpenRun
opened = OpenRun(Path(sys.argv[1]), sys.argv[2], True, name="alive")
assert opened.sender.settle(60)
print("ready", flush=True)
time.sleep(600)
"""
SWEEPS = """
import sys
from pathlib import Path
from pipeline.tracking.runs import OpenRun
for path in sys.argv[2:]:
    opened = OpenRun(Path(path), sys.argv[1], True, name="sweeping")
    opened.run.end("FINISHED")
    assert opened.sender.close()
"""


def apart() -> list[str]:
    """A command that gives a process ids of its own, where the system lets it."""
    command = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
    if not shutil.which("unshare") or subprocess.run([*command, "true"], capture_output=True).returncode:
        pytest.skip("needs the right to make a namespace of process ids: run as root on Linux")
    return command


def test_processes_of_two_containers_do_not_end_one_anothers_runs(tmp_path: Path, tracking: str) -> None:
    """They share a host name, but not their process ids; with folders of journals in common, and of their own."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    sweep = [
        *apart(),
        sys.executable,
        "-c",
        SWEEPS,
        tracking,
        *(str(tmp_path / name / "b.jsonl") for name in ("j", "own")),
    ]
    holds = [*apart(), sys.executable, "-c", HOLDS, str(tmp_path / "j" / "a.jsonl"), tracking]
    with subprocess.Popen(holds, env=environment, stdout=subprocess.PIPE, text=True) as alive:
        try:
            assert alive.stdout is not None
            assert alive.stdout.readline() == "ready\n"
            subprocess.run(sweep, env=environment, check=True)
            assert statuses() == {"alive": "RUNNING", "sweeping": "FINISHED"}
        finally:
            alive.kill()
    while lives(tmp_path / "j" / "a.jsonl"):  # until the system has ended all of it
        pass
    opened = OpenRun(tmp_path / "own" / "c.jsonl", tracking, True, name="next")
    assert opened.sender.close()
    assert statuses() == {"alive": "KILLED", "sweeping": "FINISHED", "next": "RUNNING"}


def test_replay_of_a_copy_does_not_end_runs_of_a_living_program(tmp_path: Path, tracking: str) -> None:
    path, copy = tmp_path / "j" / "a.jsonl", tmp_path / "copies" / "a.jsonl"
    copy.parent.mkdir()
    opened = OpenRun(path, tracking, True, name="alive")
    assert opened.sender.settle(60)
    shutil.copy(path, copy)
    replay_journal(str(copy))
    assert statuses() == {"alive": "RUNNING"}
    list(catch_up(copy.parent, tracking))
    assert statuses() == {"alive": "RUNNING"}
    assert copy.exists()
    opened.run.end("FINISHED")
    assert opened.sender.close()
    assert statuses() == {"alive": "FINISHED"}


def test_replay_ends_the_journals_own_runs_alone(
    tmp_path: Path, tracking: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two containers may use the same path on different file systems; and a link to a folder is that folder."""
    path, client = tmp_path / "j" / "a.jsonl", MlflowClient()
    client.create_run("0", tags={**writer_tags(path), KEY: "another"}, run_name="alive")
    given = client.create_run("0", run_name="given").info.run_id
    journal = Journal(path, tracking)
    JournalRun.begin(journal, name="made")
    JournalRun.begin(journal, run_id=given)
    journal.close()
    (tmp_path / "link").symlink_to(tmp_path / "j")
    monkeypatch.chdir(tmp_path / "link")
    replay_journal("a.jsonl")
    assert statuses() == {"alive": "RUNNING", "given": "KILLED", "made": "KILLED"}


WITHOUT_FLOCK = """
import errno, fcntl, os, sys, time
from pathlib import Path
def flock(*_):
    raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
fcntl.flock = flock
from pipeline.store.temporary import temporary_folder
from pipeline.tracking.journal import Journal
from pipeline.tracking.journal_owner import lives
live, path = Path(sys.argv[1]), Path(sys.argv[2])
if not path.exists():
    journal = Journal(path)
    with temporary_folder(live):
        print("ready", flush=True)
        sys.stdin.read()
else:
    with temporary_folder(live):
        print(lives(path), len(list(live.glob("*/"))))
"""


def test_without_flock_the_living_are_not_taken_for_dead(tmp_path: Path) -> None:
    """Such as on some mounts of Lustre."""
    command = [sys.executable, "-c", WITHOUT_FLOCK, str(tmp_path / "live"), str(tmp_path / "a.jsonl")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}

    def look() -> str:
        return subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout

    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=environment, **pipes) as holder:
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == "ready\n"
            assert look() == "True 2\n"
            assert look() == "True 2\n"  # also after one has looked
        finally:
            holder.kill()


FORKS = """
import os, signal, sys, time
from pathlib import Path
from pipeline.store.temporary import temporary_folder
from pipeline.tracking.journal import Journal
journal = Journal(Path(sys.argv[1]))
with temporary_folder(Path(sys.argv[2])):
    if os.fork() == 0:
        print(os.getpid(), flush=True)  # by the worker: it has let go of the locks by now
        signal.pause()
    sys.stdin.read()
"""


def test_a_forked_worker_does_not_keep_the_locks_of_a_dead_program(tmp_path: Path) -> None:
    command = [sys.executable, "-c", FORKS, str(tmp_path / "a.jsonl"), str(tmp_path / "live")]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, **pipes) as owner:
        assert owner.stdout is not None
        worker = int(owner.stdout.readline())
        try:
            assert lives(tmp_path / "a.jsonl")
            owner.kill()
            owner.wait()
            os.kill(worker, 0)  # it is there
            assert not lives(tmp_path / "a.jsonl")
            with temporary_folder(tmp_path / "live"):
                assert len(list((tmp_path / "live").glob("*/"))) == 1
        finally:
            os.kill(worker, signal.SIGKILL)


# --- errors that can be traced


class Sink(delivery.Sink):
    """Fails with one error for some records, or when it is asked whether it answers."""

    def __init__(self, error: Exception, op: str = "bad") -> None:
        self.error, self.op = error, op
        self.records: list[Record] = []

    def apply(self, records: Sequence[Record]) -> None:
        if records[0]["op"] == self.op:
            raise self.error
        self.records += records

    def answers(self) -> bool:
        return False


@pytest.fixture
def debug(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.LogCaptureFixture]:
    monkeypatch.setattr(sending, "FIRST_PAUSE", 0.01)
    with caplog.at_level(logging.DEBUG, "pipeline"):
        yield caplog


def traced(caplog: pytest.LogCaptureFixture) -> list[str]:
    """The types of the errors that were logged at DEBUG with a traceback."""
    return [str(one.exc_info[0].__name__) for one in caplog.records if one.exc_info and one.exc_info[0]]


def test_a_mistake_in_the_program_is_no_server_that_does_not_answer(tmp_path: Path, debug: Any) -> None:
    sink = Sink(KeyError("values"))
    journal = Journal(tmp_path / "a.jsonl")
    sender = Sender(journal, lambda: sink, remove=True)
    for op in ("x", "bad", "y"):
        journal.append({"op": op})
    assert sender.close(60, 60)
    assert [record["op"] for record in sink.records] == ["journal", "x", "y"]
    assert "bad is not sent, by a mistake in the program: KeyError: 'values'" in debug.text
    assert "does not answer" not in debug.text
    assert traced(debug) == ["KeyError"]
    assert (journal.refused, journal.path.exists()) == (1, True)


@pytest.mark.parametrize(("error", "mistake"), [(AttributeError("no x"), True), (MlflowException("down"), False)])
def test_whose_fault_it_is_that_nothing_can_be_sent(
    error: Exception, mistake: bool, tmp_path: Path, debug: Any
) -> None:
    def fail() -> Sink:
        raise error

    sender = Sender(Journal(tmp_path / "a.jsonl"), fail)
    assert not sender.close(60, 60)
    assert ("results cannot be sent by a mistake in the program (AttributeError: no x)" in debug.text) == mistake
    assert ("MLflow does not answer (down)" in debug.text) != mistake
    assert any(one.exc_info and one.exc_info[1] is error for one in debug.records)


def test_replay_says_whose_fault_it_is(tmp_path: Path, debug: Any) -> None:
    class Torn(Journal):
        def note_sent(self, offset: int, refused: int) -> None:
            raise ZeroDivisionError("by zero")

    with pytest.raises(TrackingError, match="by a mistake in the program: ZeroDivisionError: by zero"):
        delivery.replay(Torn(tmp_path / "a.jsonl"), Sink(OSError()))
    journal = Journal(tmp_path / "b.jsonl")
    journal.append({"op": "bad"})
    with pytest.raises(TrackingError, match="MLflow does not answer after 0 records"):
        delivery.replay(journal, Sink(ConnectionRefusedError()))


def test_a_journal_that_cannot_be_finished_does_not_hold_up_others(tmp_path: Path, tracking: str, debug: Any) -> None:
    """A folder has the name of one."""
    (tmp_path / "j" / f"a{host_mark()}.jsonl").mkdir(parents=True)
    opened = OpenRun(tmp_path / "j" / "b.jsonl", tracking, True, name="next")
    assert opened.sender.close(60, 60)
    assert f"a{host_mark()}.jsonl' of an earlier program stays: [Errno 21] Is a directory" in debug.text
    assert "IsADirectoryError" in traced(debug)
    assert statuses() == {"next": "RUNNING"}


@pytest.mark.parametrize("line", [b"[1]\n", b'{"x": 1}\n', b'{"op": "metrics"}\n', b'{"op": "end", "run": "k"}\n'])
def test_a_line_that_is_no_record_does_not_stop_the_journal(line: bytes, tmp_path: Path, tracking: str) -> None:
    opened = OpenRun(tmp_path / "a.jsonl", tracking, name="torn")
    with opened.sender.journal.path.open("ab") as stream:
        stream.write(line)
    opened.run.metrics({"x": 1.0})
    assert opened.sender.close(60, 60)
    (run,) = MlflowClient().search_runs(["0"])
    assert run.data.metrics == {"x": 1.0}


@pytest.mark.parametrize("given", [[], ["--traceback"]])
@pytest.mark.parametrize("entry", [["main", "--config"], ["config"]])
def test_the_command_line_prints_where_an_error_is_from(entry: list[str], given: list[str], capsys: Any) -> None:
    level = logging.getLogger("pipeline").level
    try:
        assert main([*entry, "nowhere.yaml", *given]) == 2
    finally:
        logging.getLogger("pipeline").setLevel(level)
    said = capsys.readouterr().err
    assert ("Traceback" in said and "yaml_file.py" in said) == bool(given)
    assert said.splitlines()[-1].startswith("error: ")


def test_every_entry_point_takes_traceback(capsys: Any) -> None:
    for entry in ("main", "load", "embed", "train_head", "score", "compare", "replay", "config"):
        with pytest.raises(SystemExit, match=r"^0$"):
            main([entry, "--help"])
        assert "--traceback" in capsys.readouterr().out


class Own(EsmModel):
    """Fails on sequences that are packed, with what is asked for."""

    error: Exception = RuntimeError("not in a row")

    def forward(self, input_ids: Any, position_ids: Any = None, **options: Any) -> Any:
        if position_ids is not None:
            raise self.error
        return super().forward(input_ids, position_ids=position_ids, **options)


def own(kind: type[Own] = Own) -> Any:
    size: dict[str, Any] = {"vocab_size": 33, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = EsmConfig(**size, intermediate_size=8, pad_token_id=1, mask_token_id=32)
    return kind(config, add_pooling_layer=False).train(False)


def test_packing_that_is_given_up_says_so_once_of_a_class(debug: Any) -> None:
    class New(Own):
        pass

    for _ in range(2):
        assert Packing.fit(own(New), [4, 5, 6, 7], 1) is None
    (said,) = [one for one in debug.records if one.levelno == logging.INFO]
    assert said.getMessage().endswith(
        "New: sequences are padded, not packed, which takes longer: RuntimeError: not in a row"
    )
    assert set(traced(debug)) == {"RuntimeError"}


@pytest.mark.parametrize(
    "error", [MemoryError(), torch.cuda.OutOfMemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_memory_that_runs_out_is_not_a_reason_to_pad(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Own, "error", error)
    with pytest.raises(type(error)):
        Packing.fit(own(), [4, 5, 6, 7], 1)


def test_another_layout_of_a_file_is_an_error_of_the_store(
    tmp_path: Path, fake: FakeEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "read_group", lambda *_: False)
    with pytest.raises(CacheError, match="found another layout"):
        embed([load(token_task(tmp_path))], fake, Store(tmp_path / "store"))
    assert not list(tmp_path.rglob("shard-*"))
