"""`engine: ray` on a local Ray with two workers: the bytes and numbers of one process, through failures too."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import BuiltinFunctionType, SimpleNamespace
from typing import Any

import mlflow
import pytest
import torch
from transformers import AutoTokenizer, EsmForMaskedLM

pytest.importorskip("ray", reason="needs the extra ray")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import ray

from pipeline import Downstream, measure
from pipeline.__main__ import main
from pipeline.engines.elsewhere import Answer
from pipeline.engines.ray_engine import Needs, RayEngine, connected
from pipeline.errors import ConfigError
from tests.support.data import proteins, write_csv
from tests.support.lab import STATE, VALUE, Lab, furnished, own_signals, write_checkpoint
from tests.support.programs import ROOT
from tests.support.ray_encoders import FATAL

ON_RAY: dict[str, Any] = {"engine": "ray", "ray": {"threads": 1, "workers": 2}, "max_batch_tokens": 64}
ALONE: dict[str, Any] = {"max_batch_tokens": 64}
OWN = "tests.support.ray_encoders."


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As each worker has: sums over two threads are others in the last digits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A Ray of this module, which measurements use and leave running."""
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_BACKEND_LOG_LEVEL": "fatal"}
    with own_signals():
        ray.init("local", num_cpus=2, object_store_memory=2 * 10**8, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture
def lab(tmp_path: Path, model_folder: Callable[..., Path], tracking: str) -> Iterator[Lab]:
    with own_signals():
        yield furnished(tmp_path, model_folder, tracking)


def answer(command: list[str], capsys: pytest.CaptureFixture[str], code: int = 0) -> dict[str, Any]:
    """What a command prints as JSON."""
    capsys.readouterr()
    assert main([*command, "--json"]) == code
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def bytes_of(store: Path) -> dict[str, bytes]:
    """The embeddings in a store."""
    return {str(path.relative_to(store)): path.read_bytes() for path in sorted(store.glob("embeddings/*/*"))}


def test_tables_and_scores_are_those_of_one_process(
    cluster: None, lab: Lab, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of two tasks, of sequences and of tokens, with a baseline beside them."""
    found, runs = {}, {}
    for name, how in (("ray", ON_RAY), ("alone", ALONE)):
        lab.task["baselines"] = True
        command = lab.command(VALUE, STATE, store=str(lab.folder / name), **how)
        found[name] = answer(command, capsys)["checkpoints"][0]["metrics"]
        runs[name] = set(lab.nested(lab.parents()[0]))
        assert lab.parents()[0].data.tags["downstream.encoder"] == "esm"
    assert found["ray"] == found["alone"]
    assert bytes_of(lab.folder / "ray") == bytes_of(lab.folder / "alone")
    assert len(bytes_of(lab.folder / "ray")) == 6  # of two tables a lock, a manifest and a shard
    assert runs["ray"] - {"heads and scores"} == runs["alone"]


class GoneError(Exception):
    """Ray's, where the cluster is lost."""


class Inline:
    """What `RayEngine.answers` takes of Ray, in this process: of two jobs the later is done first."""

    exceptions = SimpleNamespace(RayError=GoneError)
    cloudpickle = SimpleNamespace(dumps=repr)

    def __init__(self, most: int) -> None:
        self.begun: list[int] = []
        self.most = most  # jobs that are begun, until the cluster is lost

    def nodes(self) -> list[dict[str, Any]]:
        return [{"Alive": True, "Resources": {"CPU": 2}}]

    def put(self, content: Any) -> Any:
        return content

    def remote(self, **_: Any) -> Any:
        return lambda _: SimpleNamespace(remote=self.begin)

    def begin(self, _: Any, job: int) -> int:
        if len(self.begun) == self.most:
            raise GoneError("no cluster")
        self.begun.append(job)
        return job

    def wait(self, running: list[int], num_returns: int) -> tuple[list[int], list[int]]:
        return running[-num_returns:], running[:-num_returns]

    def get(self, job: int) -> Answer:
        return Answer(job)

    def cancel(self, job: int, force: bool) -> None:
        """It is done already."""


def test_no_job_is_begun_while_many_answers_wait() -> None:
    inline = Inline(most=10)
    answers = RayEngine(inline, Needs(1)).answers(str, range(10))
    assert next(answers).value == 0
    assert inline.begun == [0, 1, 2, 3]
    assert [one.value for one in answers] == [*range(1, 10)]


def test_each_job_is_told_that_the_cluster_is_lost() -> None:
    """Those whose answer is here have it."""
    answers = list(RayEngine(Inline(most=3), Needs(1)).answers(str, range(6)))
    assert [one.value for one in answers] == [None, 1, 2, None, None, None]
    assert [str(one.error)[:44] for one in answers if one.error] == 4 * ["engine: Ray gave up: GoneError: no cluster; "]


class Own:
    """A checkpoint of an encoder of `tests.support.ray_encoders`, and measurements of it."""

    def __init__(self, lab: Lab) -> None:
        self.lab, self.seen = lab, lab.folder / "seen"
        self.seen.mkdir()
        (lab.folder / "own.ckpt").write_text(str(self.seen))
        rows = [{"sequence": text, "value": str(len(text))} for text in (*proteins(12, seed=3), FATAL)]
        write_csv(lab.folder / "test" / "x000.csv", rows)

    def command(self, encoder: str, store: str, **how: Any) -> list[str]:
        self.lab.task["infer_target"] = OWN + encoder
        entry, _, config = self.lab.command(VALUE, store=str(self.lab.folder / store), **how)
        return [entry, f"--ckpt={self.lab.folder / 'own.ckpt'}", config]

    def processes(self) -> set[str]:
        """Those that have embedded something."""
        return {path.name for path in self.seen.glob("pid-*")} - {f"pid-{os.getpid()}"}


@pytest.fixture
def own(lab: Lab) -> Own:
    return Own(lab)


def test_a_worker_that_is_killed_is_made_good(cluster: None, own: Own, capsys: pytest.CaptureFixture[str]) -> None:
    """It is killed as it embeds; another takes its place, and nothing is lost or twice there."""
    on_ray = answer(own.command("KilledOnce", "ray", **ON_RAY), capsys)
    assert (own.seen / "killed").exists()
    assert len(own.processes()) >= 2
    assert on_ray["checkpoints"] == answer(own.command("KilledOnce", "alone", **ALONE), capsys)["checkpoints"]
    assert bytes_of(own.lab.folder / "ray") == bytes_of(own.lab.folder / "alone")
    assert isinstance(print, BuiltinFunctionType)  # as before: Ray has put nothing in its place


def test_workers_use_the_server_that_the_option_names(
    cluster: None, own: Own, capsys: pytest.CaptureFixture[str], empty_database: Path
) -> None:
    """A checkpoint may be there: `models:/...`."""
    uri = f"sqlite:///{shutil.copy(empty_database, own.lab.folder / 'other.db')}"
    before = mlflow.get_tracking_uri()
    try:
        answer(["measure", *own.command("Asks", "ray", **ON_RAY)[1:], f"--tracking-uri={uri}", "--until=load"], capsys)
    finally:
        mlflow.set_tracking_uri(before)
    assert {path.read_text() for path in own.seen.glob("uri-*")} == {uri}


def test_a_host_ends_with_an_error_too(cluster: None) -> None:
    """Also where Ray itself goes on, since it was there before."""
    with pytest.raises(KeyError), connected(Needs(1)) as engine:
        process = engine.host(dict).ask(lambda _: os.getpid())
        raise KeyError
    for _ in range(300):
        if not Path(f"/proc/{process}").exists():
            break
        time.sleep(0.1)
    assert not Path(f"/proc/{process}").exists()


ONE = {**ON_RAY, "ray": {"threads": 1, "workers": 1}}


def test_an_error_of_a_worker_is_said_as_here(cluster: None, own: Own, capsys: pytest.CaptureFixture[str]) -> None:
    """In one line, without a word of Ray's; what was embedded before it stays."""
    said = [answer(own.command("Wrong", name, **how), capsys, 2) for name, how in (("ray", ONE), ("alone", ALONE))]
    assert said[0] == said[1]
    assert "infer_target: hidden_states: expected 2 tensors of shape (tokens, 24), found" in said[0]["error"]


def test_checkpoints_are_measured_at_once(cluster: None, lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    """With the runs, files and metrics of one process; one that cannot be opened is passed over, as there."""
    for step in (1, 2):
        write_checkpoint(lab, step, 0.1 * step)
    (lab.folder / "run" / "step=3.ckpt").write_bytes(b"no checkpoint")
    found, runs = [], []
    for name, how in (("ray", ON_RAY), ("alone", ALONE)):
        entry, _, config = lab.command(VALUE, store=str(lab.folder / name), logging={"figures": True}, **how)
        content = answer([entry, f"--ckpt={lab.folder}/run/step=*.ckpt", config], capsys, 2)
        found.append([content["checkpoints"], content["table"]])
        runs.append(everything(lab, lab.parents()[0]))
    assert found[0] == found[1]
    assert runs[0] == runs[1]
    assert [sorted(one) for one in found[0][0]] == 2 * [["label", "metrics", "step"]] + [
        ["error", "label", "metrics", "step"]
    ]


@pytest.mark.parametrize(
    ("section", "said"),
    [
        (
            {"ray": {"gpus": 1}},
            "ray: expected a machine with 1 processors and 1 GPUs for a worker, found one with 2 and 0",
        ),
        ({"ray": {"threads": 3}}, "ray: expected a machine with 3 processors and 0 GPUs for a worker"),
        ({"ray": {"workers": 0}}, "ray.workers is 0, expected at least 1"),
        ({"ray": {"gpus": 1.5}}, "ray.gpus is 1.5, expected a part of one, such as 0.5, or a whole number"),
        ({"device": "cuda:1"}, "device: engine ray gives each worker a GPU of its own; expected auto, cuda or cpu"),
        ({"engine": "rya"}, "engine: expected one of local, ray, found 'rya'; did you mean 'ray'?"),
    ],
)
def test_what_a_worker_takes(
    cluster: None, lab: Lab, capsys: pytest.CaptureFixture[str], section: dict[str, Any], said: str
) -> None:
    """What is not there, or cannot be, is said before a run is begun."""
    command = lab.command(VALUE, **{"engine": "ray", "device": "auto", "ray": {"threads": 1}, **section})
    assert said in answer(command, capsys, 2)["error"]
    assert lab.runs() == []


def test_workers_are_as_many_as_there_is_room_for(cluster: None) -> None:
    for needs, workers, gpus in ((Needs(1), 2, 0), (Needs(2), 1, 0), (Needs(1, most=1), 1, 0), (Needs(1, 0.0), 2, 0)):
        with connected(needs) as engine:
            assert (engine.workers, engine.gpus) == (workers, gpus)
    assert ray.is_initialized()  # it was there before


def test_without_the_extra_the_error_names_it(lab: Lab) -> None:
    """As on a machine where it is not installed."""
    command = lab.command(VALUE, engine="ray")
    code = f"import sys\nsys.modules['ray'] = None\nfrom pipeline.__main__ import main\nsys.exit(main({command!r}))"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 2
    assert run.stderr.splitlines()[-1].endswith("pip install 'downstream-validation[ray]'")
    assert "Traceback" not in run.stderr


def test_a_cluster_that_is_not_there_is_named(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a process of its own, which has no connection yet."""
    monkeypatch.setenv("RAY_ADDRESS", "somewhere:1:2")
    command = [sys.executable, "-m", "pipeline", *lab.command(VALUE, engine="ray")]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 2
    assert "error: engine: Ray at 'somewhere:1:2' cannot be reached" in run.stderr.splitlines()[-1]


def test_a_module_is_refused(cluster: None, lab: Lab) -> None:
    config = lab.command(VALUE, **ON_RAY)[2].removeprefix("--config=")
    with pytest.raises(ConfigError, match="expected a checkpoint that Ray's workers can open, found a Linear; save it"):
        measure(torch.nn.Linear(2, 2), config)


@pytest.mark.slow
def test_a_worker_that_is_killed_each_time_is_an_error(
    cluster: None, own: Own, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not an endless loop; and what came before it in the plan is stored."""
    said = answer(own.command("KilledAlways", "ray", **ONE), capsys, 2)["error"]
    assert said.startswith("engine: 4 worker processes have ended, one after another, with the same sequences; ")


@pytest.mark.slow
def test_an_error_of_the_user_s_own_code_keeps_its_traceback(cluster: None, own: Own) -> None:
    with pytest.raises(KeyError, match="of the user's own code") as caught:
        main(own.command("Raises", "ray", **ONE))
    assert "in come_to_it" in "".join(caught.value.__notes__)


@pytest.mark.slow
def test_a_checkpoint_whose_worker_is_killed_is_measured_again(
    cluster: None, own: Own, capsys: pytest.CaptureFixture[str]
) -> None:
    """Beside another one, of which nothing is seen."""
    (own.lab.folder / "other.ckpt").write_text(str(own.seen))
    found = []
    for name, how in (("ray", ON_RAY), ("alone", ALONE)):
        entry, _, config = own.command("KilledOnce", name, **how)
        found.append(answer([entry, f"--ckpt={own.lab.folder}/o*.ckpt", config], capsys)["checkpoints"])
    assert (own.seen / "killed").exists()
    assert found[0] == found[1]
    assert len(found[0]) == 2


@pytest.mark.slow
def test_random_weights_beside_a_checkpoint(cluster: None, lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    """In `measure`, too."""
    found = []
    for name, how in (("ray", ON_RAY), ("alone", ALONE)):
        config = lab.command(VALUE, store=str(lab.folder / name), baseline="random_init", **how)[2]
        measured = measure(str(lab.ckpt), config.removeprefix("--config="))
        found.append((measured.metrics, bytes_of(lab.folder / name)))
    assert found[0] == found[1]
    assert len(found[0][1]) == 6  # of two tables a lock, a manifest and a shard


def test_a_training_measures_by_itself(lab: Lab, caplog: pytest.LogCaptureFixture) -> None:
    """And says so, once."""
    config = lab.command(VALUE, engine="ray", on_start=True)[2].removeprefix("--config=")
    model, tokens = EsmForMaskedLM.from_pretrained(lab.ckpt), AutoTokenizer.from_pretrained(lab.ckpt)
    with caplog.at_level("INFO", "pipeline"), Downstream(config, tokenizer=tokens) as downstream:
        assert downstream(model, 0)
    assert "engine: ray is for the command line; in a training its ranks measure, see mode" in caplog.messages
    assert not any("workers of" in message for message in caplog.messages)


def everything(lab: Lab, run: Any, above: str = "") -> dict[str, Any]:
    """A run and those nested in it by name: status, metrics but for times and memory, files, description, tags."""
    metrics = {key: value for key, value in run.data.metrics.items() if not key.endswith(("seconds", "_mb", "_second"))}
    files = sorted(file.path for file in lab.client.list_artifacts(run.info.run_id))
    note = run.data.tags.get("mlflow.note.content", "")
    tags = {key: value for key, value in run.data.tags.items() if key.startswith("downstream.")}
    found = {above: (run.info.status, metrics, files, note.partition("measured")[0], tags)}
    for name, nested in lab.nested(run).items():
        found |= everything(lab, nested, f"{above}/{name}")
    return found
