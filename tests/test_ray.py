"""`engine: ray` on a local Ray with two workers: the bytes and numbers of one process, through failures too."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("ray", reason="needs the extra ray")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import ray

from pipeline.__main__ import main
from tests.support.data import proteins, write_csv
from tests.support.lab import STATE, VALUE, Lab, furnished, own_signals, write_checkpoint
from tests.support.ray_encoders import FATAL

ON_RAY: dict[str, Any] = {"engine": "ray", "ray": {"threads": 1, "workers": 2}, "max_batch_tokens": 64}
ALONE: dict[str, Any] = {"max_batch_tokens": 64}
OWN = "tests.support.ray_encoders."


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
    assert found["ray"] == found["alone"]
    assert bytes_of(lab.folder / "ray") == bytes_of(lab.folder / "alone")
    assert len(bytes_of(lab.folder / "ray")) == 6  # of two tables a lock, a manifest and a shard
    assert runs["ray"] - {"heads and scores"} == runs["alone"]


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
    assert [sorted(one) for one in found[0][0]] == 2 * [["label", "metrics", "step"]] + [["error", "label", "metrics"]]


def everything(lab: Lab, run: Any, above: str = "") -> dict[str, Any]:
    """A run and those nested in it by name: status, metrics but for times and memory, files, description."""
    metrics = {key: value for key, value in run.data.metrics.items() if not key.endswith(("seconds", "_mb", "_second"))}
    files = sorted(file.path for file in lab.client.list_artifacts(run.info.run_id))
    note = run.data.tags.get("mlflow.note.content", "")
    found = {above: (run.info.status, metrics, files, note.partition("measured")[0])}
    for name, nested in lab.nested(run).items():
        found |= everything(lab, nested, f"{above}/{name}")
    return found
