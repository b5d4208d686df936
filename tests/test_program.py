"""What every program here shares: what it prints at the start, and how an error is printed."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import mlflow
import pytest

from pipeline.__main__ import main
from tests.support.programs import ROOT


@pytest.fixture(autouse=True)
def level() -> Iterator[None]:
    """`main` sets the level of the loggers, which is put back."""
    logger = logging.getLogger("pipeline")
    before = logger.level
    yield
    logger.setLevel(before)


@pytest.mark.parametrize(
    ("ckpt", "start"),
    [([], "sample/checkpoint (the default: give --ckpt)"), (["--ckpt=my/model"], "my/model")],
)
def test_a_measurement_says_at_the_start_what_is_measured(
    ckpt: list[str], start: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Here the program ends at once: its run is said to be on another server."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.setenv("MLFLOW_RUN_ID", "0" * 32)
    assert main(["main", "--config=configs/pretrain.yaml", "--tracking-uri=http://127.0.0.1:9", *ckpt]) == 2
    assert f"measuring   {start} as in configs/pretrain.yaml" in caplog.messages


@pytest.mark.parametrize(
    ("command", "arguments", "start"),
    [
        ("measure", [], "measuring   sample/checkpoint (the default: give --ckpt) as in"),
        ("measure", ["--ckpt=sample/checkpoint"], "measuring   sample/checkpoint as in"),
        ("load", ["--ckpt=sample/checkpoint"], "measuring   sample/checkpoint as in"),
        ("measure", ["--until=load"], "reading     the data of"),
        ("load", ["--ckpt="], "reading     the data of"),  # of MLproject
    ],
)
def test_the_default_is_named_where_nothing_was_given(
    command: str,
    arguments: list[str],
    start: str,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    tracking: str,
    tmp_path: Path,
) -> None:
    """The program ends at once: nothing can be stored below a file."""
    monkeypatch.chdir(ROOT)
    (tmp_path / "file").touch()
    overrides = f"--overrides=store={tmp_path}/file/store logging.journal={tmp_path}/file/journal"
    assert main([command, "--config=configs/pretrain.yaml", overrides, *arguments]) == 2
    assert f"{start} configs/pretrain.yaml" in caplog.messages


@pytest.mark.parametrize("command", ["doctor", "config", "worker"])
def test_a_command_without_a_run_leaves_that_of_a_training_alone(
    command: str, tracking: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    client = mlflow.MlflowClient(tracking)
    run = client.create_run("0", tags={"mlflow.note.content": "a training"})
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking)
    monkeypatch.setenv("MLFLOW_RUN_ID", run.info.run_id)
    arguments = {"doctor": ["--quick", "--overrides=nonsense=1"], "config": ["nowhere.yaml"], "worker": [str(tmp_path)]}
    assert main([command, *arguments[command]]) == 2
    after = client.get_run(run.info.run_id)
    assert (after.data.tags["mlflow.note.content"], after.info.status) == ("a training", "RUNNING")


@pytest.mark.parametrize("arguments", [["--traceback", "config"], ["config", "--traceback"]], ids="first last".split())
def test_traceback_is_accepted_before_and_after_the_entry_point(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """The error itself is printed once, in the last line."""
    assert main([*arguments, "nowhere.yaml"]) == 2
    printed = capsys.readouterr().err
    message = "config: expected a YAML file, found 'nowhere.yaml'"
    assert "Traceback" in printed
    assert "yaml_file.py" in printed
    assert "FileNotFoundError" in printed  # where it comes from
    assert printed.count(message) == printed.splitlines()[-1].count(f"error: {message}") == 1


def test_traceback_is_in_the_help_of_the_program(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match=r"^0$"):
        main(["--help"])
    assert "--traceback" in capsys.readouterr().out
