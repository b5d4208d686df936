"""The command `downstream`: its help, what scripts read, and `doctor`."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from pipeline import Store, open_encoder, read_config, validate
from pipeline.__main__ import main
from pipeline.command.cost import estimate
from pipeline.command.doctor import Findings
from pipeline.config.task import Task
from pipeline.config.yaml_file import to_yaml
from pipeline.load import load
from tests.support.data import TEXTS, make_task, proteins, token_task
from tests.support.encoders import FakeEncoder
from tests.support.programs import ROOT, loaded_after
from tests.support.training import section

COMMANDS = ["measure", "compare", "replay", "config", "doctor"]


@pytest.fixture(autouse=True)
def signals() -> Iterator[None]:
    """`main` takes over signals, which are given back."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def job(tmp_path: Path, model_folder: Callable[..., Path]) -> list[str]:
    """Arguments that measure a small model on a small task, with everything in `tmp_path`."""
    rows = [{"sequence": text, "share": text.count("L") / len(text)} for text in proteins(60, 1)]
    task = make_task(tmp_path / "data", rows, num_epochs=1, task_name="leucine")
    (tmp_path / "my.yaml").write_text(to_yaml(section(tmp_path, task)))
    return [f"--config={tmp_path / 'my.yaml'}", f"--ckpt={model_folder('esm')}"]


def in_process(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, Any]:
    capsys.readouterr()
    code = main(arguments)
    return code, json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_fits_a_terminal(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit, match=r"^0$"):
        main([command, "--help"] if command else ["--help"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 24
    assert max(map(len, lines)) <= 80
    assert all(any(line.startswith(f"  {code}  ") for line in lines) for code in ("0", "1", "2", "130, 143"))
    if not command:
        assert all(any(line.startswith(f"    {name}  ") for line in lines) for name in COMMANDS)


def test_help_does_not_wait_for_libraries() -> None:
    code = """
from pipeline.__main__ import main
for command in ("measure", "compare", "replay", "config", "doctor"):
    try:
        main([command, "--help"])
    except SystemExit:
        pass
"""
    assert not {"torch", "mlflow", "transformers", "pandas", "numpy", "pyarrow"} & loaded_after(code)


def test_scripts_get_one_object(job: list[str], tracking: str, tmp_path: Path) -> None:
    """In a process of its own, where libraries print as they like; the numbers are the run's."""
    command = [sys.executable, "-m", "pipeline", "measure", "--json", *job]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    (checkpoint,) = found["checkpoints"]
    (row,) = found["table"]
    assert row["metric"] == "test_share_spearman"
    assert row["score"] == pytest.approx(checkpoint["metrics"]["test_share_spearman"], abs=1e-12)
    assert row["baseline"] is row["probe_baseline"] is None
    assert found["run"]["tracking_uri"] == tracking
    assert "measuring   " in run.stderr
    from mlflow import MlflowClient

    logged = MlflowClient(tracking).get_run(found["run"]["run_id"])
    assert logged.data.metrics["test_share_spearman"] == pytest.approx(row["score"])


def test_a_checkpoint_that_fails_is_in_the_object(
    job: list[str], tracking: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ckpt = job.pop().removeprefix("--ckpt=")
    (tmp_path / "torn.ckpt").touch()
    code, found = in_process(["measure", "--json", *job, f"--ckpt={ckpt},{tmp_path / 'torn.ckpt'}"], capsys)
    assert code == 2
    good, bad = found["checkpoints"]
    assert "test_share_spearman" in good["metrics"]
    assert "error" not in good
    assert "torn.ckpt" in bad["error"]
    assert [row["checkpoint"] for row in found["table"]] == [good["label"], bad["label"]]
    again = ["compare", "--json", "--by=test_share_spearman", found["run"]["run_id"]]
    code, compared = in_process(again, capsys)
    assert (code, compared["by"]) == (0, "test_share_spearman")
    assert compared["leaderboard"][0]["test_share_spearman"] == pytest.approx(good["metrics"]["test_share_spearman"])


def test_an_error_is_an_object_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert in_process(["config", "nowhere.yaml", "--json"], capsys) == (
        2,
        {"error": "config: expected a YAML file, found 'nowhere.yaml' (No such file or directory)"},
    )
    assert main(["--json"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "see downstream --help" in captured.err
    assert main(["measure", "--ckp=x"]) == 2
    assert "--ckp=x; did you mean '--ckpt'?; see downstream measure --help" in capsys.readouterr().err
    code, found = in_process(["replay", "nowhere.jsonl", "--json"], capsys)
    assert code == 2
    assert "nowhere.jsonl" in found["journals"]["nowhere.jsonl"]["error"]


def test_the_configuration_as_an_object_and_as_a_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is printed in any folder can be kept as a file, and edited."""
    monkeypatch.chdir(tmp_path)
    assert main(["config"]) == 0
    Path("mine.yaml").write_text(capsys.readouterr().out)
    code, found = in_process(["config", "mine.yaml", "--json"], capsys)
    assert (code, found["notes"]) == (0, [])
    assert found["config"]["dataset"][0]["dataset_path"] == str(ROOT / "sample/data/variants")
    assert yaml.safe_load(Path("mine.yaml").read_text())["model"]["dwnstr_task_validation"] == found["config"]
    assert "| `num_epochs`" in in_process(["config", "--schema", "--json"], capsys)[1]["schema"]


def test_whoever_reads_may_stop_reading(tmp_path: Path) -> None:
    script = f"{sys.executable} -m pipeline config --schema | head -1; echo ${{PIPESTATUS[0]}}"
    run = subprocess.run(["bash", "-c", script], capture_output=True, text=True, cwd=ROOT, check=True)
    assert run.stdout.splitlines()[1:] == ["0"]
    assert run.stderr == ""


def test_whoever_reads_may_stop_before_an_error() -> None:
    """The exit code is that of the work."""
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "pipeline", "config", "nowhere.yaml", "--json"]
    run = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, cwd=ROOT, check=False)
    os.close(write)
    assert run.returncode == 2
    assert run.stderr.startswith("error: config: expected a YAML file")
    assert "Traceback" not in run.stderr


def test_what_is_no_number_in_json_is_null(capsys: pytest.CaptureFixture[str]) -> None:
    code, found = in_process(["config", "--json", "--overrides=dataset.gradient_clip_val=.inf"], capsys)
    assert (code, found["config"]["dataset"][0]["gradient_clip_val"]) == (0, None)


def test_doctor_finds_nothing_wrong(
    job: list[str], tracking: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    heads = "--overrides=dataset.num_epochs=3 dataset.num_seeds=2 dataset.batch_size=32"
    code, found = in_process(["doctor", "--json", *job, heads], capsys)
    assert (code, found["problems"]) == (0, [])
    assert found["versions"]["python"] == sys.version.split()[0]
    assert found["versions"]["torch"]
    assert set(found["extras"]) == {"hydra", "peft", "ray", "train"}
    assert found["device"]["device"] in ("cpu", "cuda")
    assert found["tracker"] == {"tracking_uri": tracking, "answers": True}
    assert found["cost"]["rows"] == {"leucine": {"train": 60, "test": 60}}
    assert (found["cost"]["sequences"], found["cost"]["stored"]) == (60, 0)
    heads = found["cost"]["heads"]["leucine"]
    assert (heads["stored"], heads["steps"]) == (0, 2 * 3 * 2)  # two batches in each epoch of each head
    assert not (tmp_path / "store").exists()
    assert main(["doctor", *job]) == 0
    said = capsys.readouterr().out
    assert "60 distinct, 0 already stored" in said
    assert f"tokens     {found['cost']['tokens']:,} to embed" in said
    assert "cost" not in in_process(["doctor", "--json", "--quick", *job], capsys)[1]


def test_doctor_names_each_problem(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing listens at port 9; the other findings come all the same."""
    (tmp_path / "file").touch()
    options = [
        "--tracking-uri=http://127.0.0.1:9",
        f"--overrides=store={tmp_path / 'file' / 'store'}",
        "--ckpt=./none.ckpt",
    ]
    code, found = in_process(["doctor", "--json", *options, f"--config={ROOT}/configs/default.yaml"], capsys)
    assert code == 2
    folder, tracker, ckpt = found["problems"]
    assert folder.startswith("store: expected a folder that can be written")
    assert tracker.startswith("MLflow at 'http://127.0.0.1:9' does not answer: Connection refused; give")
    assert "./none.ckpt" in ckpt
    assert found["device"]
    assert found["tracker"]["answers"] is False
    uri = f"--tracking-uri=sqlite:///{tmp_path}/new.db"
    task = f"--overrides=dataset.dataset_path={tmp_path} store={tmp_path}"
    job = [f"--config={ROOT}/configs/sequence_regression.yaml", task, "--ckpt=./none.ckpt", uri]
    assert main(["doctor", *job]) == 2
    lines = dict(line.split(None, 1) for line in capsys.readouterr().out.splitlines())
    assert lines["checkpoint"].startswith("PROBLEM: ckpt: './none.ckpt'")
    assert lines["data"].startswith(f"PROBLEM: expected a CSV file at {tmp_path}/train/x0")
    code, found = in_process(["doctor", "--json", "--quick", "--config=nowhere.yaml", uri], capsys)
    assert (code, len(found["problems"])) == (2, 1)


def test_doctor_leaves_the_device_to_the_engine(
    job: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a node without a GPU too, as this process needs none."""
    pytest.importorskip("ray", reason="needs the extra ray")
    uri = f"--tracking-uri=sqlite:///{tmp_path}/new.db"
    assert main(["doctor", *job, uri, "--overrides=engine=ray device=cuda"]) == 0
    assert "device        cuda, on the workers of engine ray, which are not asked here" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("error", "problem"),
    [
        (PermissionError(13, "Permission denied", "/closed"), "PermissionError: [Errno 13] Permission denied: '/clos"),
        (torch.OutOfMemoryError("CUDA out of memory.\nMore of it"), "OutOfMemoryError: CUDA out of memory."),
        (RuntimeError(), "RuntimeError: no message"),
    ],
)
def test_doctor_goes_on_after_errors_of_the_system(error: Exception, problem: str) -> None:
    def look() -> None:
        raise error

    found = Findings()
    found.attempt("store", look)
    assert found.problems[0].startswith(f"store: {problem}")
    assert found.lines == [f"store         PROBLEM: {found.problems[0]}"]
    assert "\n" not in found.problems[0]


def test_doctor_hints_at_an_extra_of_another_version(
    job: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And says what random weights cost beside the checkpoint."""
    (tmp_path / "site/peft-0.1.dist-info").mkdir(parents=True)
    (tmp_path / "site/peft-0.1.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: peft\nVersion: 0.1\n")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    uri = f"--tracking-uri=sqlite:///{tmp_path}/new.db"
    assert main(["doctor", *job, uri, "--overrides=baseline=random_init"]) == 0
    out = capsys.readouterr().out
    assert "peft 0.1; expected peft>=0.14: pip install -U 'downstream-validation[peft]'" in out
    assert "baseline   random_init: embedded too, the first time; that is not counted above" in out


@pytest.mark.parametrize("uri", ["sqlite:///{}/new.db", "file://{}/mlruns", "{}/mlruns"])
def test_doctor_makes_no_database(tmp_path: Path, capsys: pytest.CaptureFixture[str], uri: str) -> None:
    options = [f"--tracking-uri={uri.format(tmp_path)}", f"--overrides=store={tmp_path / 'store'}"]
    code, found = in_process(["doctor", "--json", "--quick", *options], capsys)
    assert (code, found["tracker"]["answers"]) == (0, True)
    assert not list(tmp_path.iterdir())


def test_the_cost_is_what_embedding_then_takes(tmp_path: Path, fake: FakeEncoder, store: Store) -> None:
    """By hand: of six sequences one is in the other task alone; float32 rows, one each or one per residue."""
    rows: list[dict[str, object]] = [{"sequence": text, "y": 0.5 + place} for place, text in enumerate([*TEXTS, "MKV"])]
    rows.append({"sequence": "HHH", "y": 9.0})
    tasks: list[Task] = [make_task(tmp_path / "s", rows, num_epochs=0), token_task(tmp_path, num_epochs=0)]
    examples = [load(task) for task in tasks]
    cost = estimate(examples, fake, store)
    assert not store.root.exists()
    residues = sum(map(len, TEXTS))
    assert (cost.sequences, cost.stored, cost.tokens) == (7, 0, residues + 3)
    assert {name: one.steps for name, one in cost.heads.items()} == {"downstream": 0, "tokens": 0}
    assert cost.disk_bytes == 4 * fake.hidden_size * (7 + residues)
    assert cost.rows == {"downstream": {"train": 8, "test": 8}, "tokens": {"train": 6, "test": 6}}
    assert cost.seconds is not None
    assert cost.seconds > 0
    assert 2 <= cost.timed <= cost.batches
    validate(fake, tasks[1:], store, until="embed")
    assert estimate(examples[1:], fake, store).seconds is None
    part = estimate(examples, fake, store)  # of the sequence-level task none is stored
    assert (part.stored, part.disk_bytes) == (0, 4 * fake.hidden_size * 7)
    validate(fake, tasks, store, until="embed")
    table = store.table(fake.digest, "mean", fake.hidden_size)
    with table.lock():  # of another program that is embedding
        done = estimate(examples, fake, store)
    assert (done.stored, done.tokens, done.seconds, done.disk_bytes, done.batches) == (7, 0, None, 0, 0)
    (shard,) = table.folder.glob("shard-*")
    shard.write_bytes(bytes(shard.stat().st_size))
    listed = (table.folder / "manifest.json").read_bytes()
    assert estimate(examples, fake, store).disk_bytes == 4 * fake.hidden_size * 7
    assert (table.folder / "manifest.json").read_bytes() == listed


def test_the_cost_of_heads_is_that_of_those_that_are_not_stored(
    tmp_path: Path, fake: FakeEncoder, store: Store
) -> None:
    """One of three heads is there; then all, and the baseline's. Six sequences are two batches of three."""
    task = replace(token_task(tmp_path, num_epochs=4), batch_size=3, baselines=True)
    first = estimate([load(task)], fake, store)
    validate(fake, [task], store, until="train_head")
    task = replace(task, num_seeds=3)
    second = estimate([load(task)], fake, store)
    validate(fake, [task], store)
    third = estimate([load(task)], fake, store)
    found = [(one.heads["tokens"], one.baselines["tokens"]) for one in (first, second, third)]
    counts = [[(cost.stored, cost.steps) for cost in pair] for pair in found]
    assert counts == [[(0, 8), (0, 8)], [(1, 16), (0, 24)], [(3, 0), (3, 0)]]
    assert first.head_seconds > 0
    assert third.head_seconds == 0


@pytest.mark.slow
def test_the_wheel_measures_the_sample_from_an_empty_folder(tmp_path: Path) -> None:
    """Built from the sdist, and installed into a virtual environment where nothing else is, with the exact versions."""
    source, dist, empty = tmp_path / "source", tmp_path / "dist", tmp_path / "empty"
    unwanted = shutil.ignore_patterns(".git", ".*_cache", "build", "*.egg-info", "__pycache__", "mlruns", "mlflow.db*")
    shutil.copytree(ROOT, source, ignore=unwanted)
    build = f"from setuptools import build_meta; print(build_meta.build_sdist({str(dist)!r}))"
    subprocess.run([sys.executable, "-c", build], cwd=source, check=True, capture_output=True)
    (sdist,) = dist.glob("*.tar.gz")
    shutil.unpack_archive(sdist, dist)
    (unpacked,) = (path for path in dist.iterdir() if path.is_dir())
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(dist)]
    subprocess.run([*pip, str(unpacked)], check=True, capture_output=True)
    (wheel,) = dist.glob("*.whl")

    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
    (site,) = venv.glob("lib/python*/site-packages")
    install = [str(venv / "bin/pip"), "install", "-q", "-c", str(ROOT / "constraints.txt"), str(wheel)]
    own = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}  # where pip might find us already
    subprocess.run(install, cwd=tmp_path, check=True, capture_output=True, env=own)

    empty.mkdir()
    here = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    downstream = str(venv / "bin/downstream")

    def call(*command: str) -> str:
        run = subprocess.run(command, cwd=empty, env=here, capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stderr
        return run.stdout

    assert "usage: downstream" in call(downstream, "--help")
    call(str(venv / "bin/python"), "-c", "from pipeline import Downstream, embed_sequences, measure")
    found = json.loads(call(downstream, "measure", "--json"))
    assert {row["task"] for row in found["table"]} == {"fitness", "secondary_structure", "exposure", "location"}
    assert (empty / "mlflow.db").exists()
    doctor = json.loads(call(downstream, "doctor", "--json"))
    assert (site / "pipeline/py.typed").is_file()
    assert doctor["config"] == str(site / "pipeline/shipped/configs/default.yaml")
    assert doctor["cost"]["stored"] == doctor["cost"]["sequences"] == 1920


def test_the_default_configuration_is_read_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for path in (ROOT / "configs").glob("*.yaml"):
        for task in read_config(path).dataset:
            assert Path(task.dataset_path, "train").is_dir()
    assert open_encoder(str(ROOT / "sample/checkpoint")).hidden_size == 96
