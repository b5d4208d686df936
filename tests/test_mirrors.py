"""W&B, TensorBoard and a trainer's loggers: what is read back from them, and that none of them stops the work."""

from __future__ import annotations

import csv
import io
import os
import pty
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Event
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.config.trackers import Logging
from pipeline.config.yaml_file import config_from, read_config, to_mapping, to_yaml
from pipeline.errors import ConfigError
from pipeline.tracking.mirrors import LoggerTracker, mirrors
from pipeline.tracking.protocol import Tracker
from pipeline.tracking.tensorboard import open_tensorboard
from tests.support.programs import ROOT
from tests.support.readers import in_tensorboard, in_wandb, pictures_in_tensorboard, run_in_wandb

EARLY, LATE = 0.1 + 0.2, 1 / 3  # neither is a number in single precision
TASK = {"dataset_path": "d", "target_column": "y"}


@pytest.fixture
def wandb_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """W&B as in a new process: it writes nowhere else, and what a test sets in the environment goes."""
    import wandb

    wandb.teardown()
    monkeypatch.chdir(tmp_path)
    for name in ("DIR", "DATA_DIR", "CACHE_DIR", "CONFIG_DIR"):
        monkeypatch.setenv(f"WANDB_{name}", str(tmp_path / "elsewhere"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    for name in ("API_KEY", "PROJECT", "TAGS"):
        monkeypatch.delenv(f"WANDB_{name}", raising=False)
    yield
    wandb.teardown()


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    """A PNG file of one colour, with an edge."""
    pixels = np.full((12, 20, 3), (200, 30, 60), np.uint8)
    pixels[:, 10:] = 7
    path = tmp_path / "curve.png"
    Image.fromarray(pixels).save(path)
    return path


def pixels_of(file: Path | io.BytesIO) -> Any:
    with Image.open(file) as picture:
        return np.asarray(picture.convert("RGB"))


def wait_for_wandb(file: Path, name: str) -> None:
    """Until the file has a metric: W&B's process writes it, and may be behind."""
    for _ in range(100):
        if in_wandb(file, name):
            break
        time.sleep(0.1)


def tell(tracker: Tracker, picture: Path) -> None:
    """A result at step 8, one at step 4 that comes late, a picture, and what is not shown."""
    with tracker.stage("embed") as stage:
        stage.metrics({"seconds": 3.0}, 1)
        stage.note("noted")
    tracker.metrics({"a/score": EARLY, "b": 2.0}, 8)
    tracker.metrics({"a/score": LATE}, 4)
    with TemporaryDirectory() as folder:
        tracker.artifact(Path(shutil.copy(picture, folder)), "figures", 8)
    tracker.artifact(picture.with_name("absent.csv"), "figures", 8)
    tracker.note("noted")


def written_config(folder: Path, logging: str) -> Path:
    path = folder / "config.yaml"
    path.write_text(
        "model:\n  dwnstr_task_validation:\n    dataset: {dataset_path: d, target_column: y}\n"
        f"    logging:\n      {logging}\n"
    )
    return path


def test_the_section_logging(tmp_path: Path) -> None:
    assert config_from({"dataset": TASK}).logging == Logging()
    path = written_config(tmp_path, "tags: protein")
    config = read_config(path, "logging.wandb=offline logging.tensorboard=tb logging.figures=off logging.entity=us")
    expected = Logging("offline", entity="us", tags=["protein"], tensorboard="tb", figures=False)
    assert config.logging == expected
    assert to_mapping(config)["logging"]["tags"] == ["protein"]
    path.write_text(to_yaml(config))
    assert read_config(path) == config


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("wandb: onlin", "logging.wandb: expected one of online, offline, disabled, found 'onlin'; did you mean"),
        ("wandb: off", "found 'false', which YAML reads for on, off, yes and no; for off, write disabled"),
        ("wandb: null", "config.yaml:5: wandb: Incompatible value 'None'"),
        ("wand: offline", "config.yaml:5: unknown key 'wand'; did you mean 'wandb'?"),
        ("tensorboard: off", "logging.tensorboard: expected a folder, or null, found 'False'"),
        ("journal: ''", "logging.journal: expected a folder, or null, found ''"),
        ("project: us/ours", "logging.project: expected 1 to 128 characters without"),
        ("tags: [[a]]", "tags: expected a list of str, found ['a']"),
        ("tags: ['']", "logging.tags: expected 1 to 64 characters in a tag, found ''"),
        ("figures: some", "config.yaml:5: figures: Value 'some' is not a valid bool"),
    ],
)
def test_wrong_values_of_the_section_logging(tmp_path: Path, line: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_config(written_config(tmp_path, line))
    assert message in str(caught.value)


@pytest.mark.usefixtures("wandb_alone")
def test_mirrors_of_a_measurement(
    tmp_path: Path, picture: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside a run that the user has, which stays as it was; the second one fails."""
    import wandb

    monkeypatch.setenv("WANDB_RUN_ID", "sweeps1")  # as a sweep sets it
    quiet = wandb.Settings(silent=True, console="off")
    own = wandb.init(mode="offline", project="mine", dir=str(tmp_path), settings=quiet)
    own.log({"loss": 1.0, "trainer/global_step": 1})
    report = tmp_path / "report.html"
    report.write_text("<html><body>42 %</body></html>")
    logging = Logging("offline", "ours", "us", ["protein", "esm"], str(tmp_path / "tb"))
    with mirrors(logging, "esm/last.ckpt", {"dataset": {"lr": 1e-4}}, tmp_path / "out") as trackers:
        for tracker in trackers:
            tell(tracker, picture)
            tracker.artifact(report, "", 8)
    with pytest.raises(RuntimeError, match="injected"), mirrors(logging, "b", {}, tmp_path / "failed"):
        raise RuntimeError("injected")

    assert wandb.run is own
    own.log({"loss": 0.5, "trainer/global_step": 2})
    own.finish()
    assert capfd.readouterr() == ("", "")
    (file,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    wait_for_wandb(file, "loss")
    assert in_wandb(file, "loss") == [(1, 1.0), (2, 0.5)]
    assert in_wandb(file, "a/score") == []
    (failed,) = (tmp_path / "failed" / "wandb").glob("offline-run-*/*.wandb")
    assert run_in_wandb(failed)[1] == [1]
    check_wandb(tmp_path / "out", picture, report)
    second, first = sorted((tmp_path / "tb").iterdir())
    assert second.name.startswith("b-")
    assert first.name.startswith("esm_last.ckpt-")
    check_tensorboard(first, picture)


def check_wandb(out: Path, picture: Path, report: Path) -> None:
    (file,) = (out / "wandb").glob("offline-run-*/*.wandb")
    run, exits = run_in_wandb(file)
    assert (run.display_name, run.project, run.entity) == ("esm/last.ckpt", "ours", "us")
    assert [*run.tags] == ["protein", "esm"]
    assert run.run_id != "sweeps1"
    assert {item.key: item.value_json for item in run.config.update}["dataset"] == '{"lr":0.0001}'
    assert exits == [0]
    assert in_wandb(file, "a/score") == [(8, EARLY), (4, LATE)]
    assert in_wandb(file, "b") == [(8, 2.0)]
    assert in_wandb(file, "seconds") == []
    ((step, kept),) = in_wandb(file, "figures/curve/path")
    assert step == 8
    assert np.array_equal(pixels_of(file.parent / "files" / kept), pixels_of(picture))
    ((step, kept),) = in_wandb(file, "report/path")
    assert step == 8
    assert (file.parent / "files" / kept).read_text() == report.read_text()


def check_tensorboard(folder: Path, picture: Path) -> None:
    """In single precision; pictures are decoded, for they are packed anew."""
    assert in_tensorboard(folder, "a/score") == [(8, float(np.float32(EARLY))), (4, float(np.float32(LATE)))]
    assert in_tensorboard(folder, "b") == [(8, 2.0)]
    ((step, content),) = pictures_in_tensorboard(folder, "figures/curve")
    assert step == 8
    assert np.array_equal(pixels_of(io.BytesIO(content)), pixels_of(picture))


ONLINE = """
import logging, sys
from pathlib import Path
from pipeline.config.trackers import Logging
from pipeline.errors import ConfigError
from pipeline.tracking.mirrors import mirrors
logging.basicConfig(format="%(message)s", stream=sys.stderr)
try:
    with mirrors(Logging("online"), "name", {}, Path("online")):
        pass
except ConfigError as error:
    print(f"error: {error}", file=sys.stderr)
with mirrors(Logging("offline"), "name", {}, Path("offline")) as (tracker,):
    tracker.metrics({"a": 1.0}, 3)
"""
NO_ACCOUNT = (
    "error: logging.wandb: online needs an account: No API key configured. Use `wandb login` to log in.; "
    "run `wandb login` or set WANDB_API_KEY; or have it offline"
)


def start_without_account(folder: Path, **streams: Any) -> subprocess.Popen[bytes]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_") and name != "NETRC"}
    environment = {**kept, "HOME": str(folder), "PYTHONPATH": str(ROOT), "TERM": "xterm-256color"}
    return subprocess.Popen([sys.executable, "-c", ONLINE], cwd=folder, env=environment, **streams)


def read_terminal(descriptor: int) -> str:
    """All that is written to a terminal until nobody has it open."""
    text = b""
    while True:
        try:
            more = os.read(descriptor, 4096)
        except OSError:  # Linux says the end so
            more = b""
        if not more:
            return text.decode()
        text += more


@pytest.mark.parametrize("terminal", [False, True])
def test_nobody_is_asked_for_an_account(tmp_path: Path, terminal: bool) -> None:
    """One line with the remedy. The offline run after it says nothing at all, at the end of the program neither."""
    if not terminal:
        script = start_without_account(tmp_path, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE)
        said = script.communicate(timeout=120)[1].decode()
    else:
        ours, theirs = pty.openpty()
        script = start_without_account(tmp_path, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True)
        os.close(theirs)
        said = read_terminal(ours)  # which would not end if somebody waited for an answer: nobody types one
        os.close(ours)
    assert said.splitlines() == [NO_ACCOUNT]
    assert script.wait(timeout=120) == 0
    (file,) = (tmp_path / "offline" / "wandb").glob("offline-run-*/*.wandb")
    assert in_wandb(file, "a") == [(3, 1.0)]


@pytest.mark.parametrize(
    ("module", "logging", "remedy"),
    [
        ("wandb", Logging("offline"), "pip install wandb"),
        ("torch.utils.tensorboard", Logging(tensorboard="tb"), "pip install tensorboard"),
    ],
)
def test_what_is_not_installed_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, logging: Logging, remedy: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match=remedy), mirrors(logging, "name", {}, tmp_path):
        pass
    with mirrors(Logging(), "name", {}, tmp_path) as trackers:
        assert trackers == []
    assert [*tmp_path.iterdir()] == []


def test_a_mirror_that_cannot_be_opened_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    with mirrors(Logging("offline"), "name", {}, tmp_path / "file" / "out") as trackers:
        for tracker in trackers:
            tracker.metrics({"a": 1.0})
    assert [line.split(": ")[0] for line in caplog.messages] == ["W&B failed, work goes on"]


def test_a_folder_that_cannot_be_written_is_a_mistake(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    wanted = mirrors(Logging(tensorboard=str(tmp_path / "file" / "tb")), "name", {}, tmp_path)
    with pytest.raises(ConfigError, match=r"logging\.tensorboard: '.*' cannot be written"), wanted:
        pass


def test_measurements_at_once_get_folders_of_their_own(tmp_path: Path) -> None:
    with open_tensorboard(tmp_path, "a") as one, open_tensorboard(tmp_path, "a") as other:
        one.metrics({"x": 1.0})
        other.metrics({"x": 2.0})
    assert sorted(in_tensorboard(folder, "x")[0][1] for folder in tmp_path.iterdir()) == [1.0, 2.0]


class Blocking:
    """A logger whose calls do not come back until they are let go."""

    def __init__(self) -> None:
        self.go = Event()
        self.told: list[tuple[Mapping[str, float], int]] = []

    def log_metrics(self, values: Mapping[str, float], step: int) -> None:
        self.go.wait()
        self.told.append((values, step))


def test_a_logger_that_does_not_come_back_is_skipped_until_it_does(caplog: pytest.LogCaptureFixture) -> None:
    blocking = Blocking()
    tracker = LoggerTracker(blocking, patience=0.01)
    for step in (1, 2, 3):
        tracker.metrics({"a": 1.0}, step)
    assert caplog.messages == ["Blocking takes more than 0.01 s; work goes on without it"]
    blocking.go.set()
    for thread in threading.enumerate():
        if thread.name == "logging to Blocking":
            thread.join(60)
    tracker.patience = 60
    tracker.metrics({"a": 1.0}, 4)
    assert [step for _, step in blocking.told] == [1, 4]
    assert caplog.messages[1:] == ["Blocking is back; it was not told of 2 results meanwhile"]


def test_a_logger_that_raises_is_a_warning(caplog: pytest.LogCaptureFixture, picture: Path) -> None:
    class WandbLogger:
        experiment = None

        def log_metrics(self, values: Mapping[str, float], step: int) -> None:
            raise OSError("no space\nleft")

    class Mine(WandbLogger):
        pass

    tracker = LoggerTracker(Mine(), patience=60)
    tracker.metrics({"a": 1.0}, 1)
    tracker.artifact(picture, "figures", 1)
    first, second = caplog.messages
    assert first == "Mine failed, work goes on: OSError: no space left"
    assert second.startswith("Mine failed, work goes on: AttributeError")


@pytest.mark.usefixtures("wandb_alone")
def test_loggers_of_lightning(tmp_path: Path, picture: Path, caplog: pytest.LogCaptureFixture) -> None:
    from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger, WandbLogger

    own = WandbLogger(save_dir=tmp_path, project="mine", offline=True, settings={"silent": True, "console": "off"})
    board = TensorBoardLogger(tmp_path, name="", version="tb")
    table = CSVLogger(tmp_path, name="", version="csv")
    for one in (own, board, table):
        tell(LoggerTracker(one, patience=60), picture)
    own.experiment.finish()
    board.finalize("success")
    table.save()

    assert [one for one in caplog.records if one.name.startswith("pipeline")] == []
    (file,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    wait_for_wandb(file, "a/score")
    assert in_wandb(file, "a/score") == [(8, EARLY), (4, LATE)]
    ((step, kept),) = in_wandb(file, "figures/curve/path")
    assert step == 8
    assert np.array_equal(pixels_of(file.parent / "files" / kept), pixels_of(picture))
    check_tensorboard(tmp_path / "tb", picture)
    with (tmp_path / "csv" / "metrics.csv").open() as stream:
        assert [(row["step"], float(row["a/score"])) for row in csv.DictReader(stream)] == [("8", EARLY), ("4", LATE)]
