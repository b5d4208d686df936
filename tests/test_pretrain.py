"""The demonstration and the examples, as a user runs them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mlflow import MlflowClient

from examples.pretrain import main
from pipeline import Store, open_encoder, read_config, validate
from tests.support.programs import ROOT, run_two_ranks
from tests.support.readers import in_tensorboard, in_wandb, pictures_in_tensorboard

ACCURACY = "secondary_structure/test_3state_accuracy"


def python(*command: str, tracking: str, cwd: Path = ROOT) -> str:
    """What a script printed."""
    return both(*command, tracking=tracking, cwd=cwd).stdout


def both(*command: str, tracking: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """A script that has run, with what it printed and said."""
    environment = {**os.environ, "MLFLOW_TRACKING_URI": tracking, "PYTHONPATH": str(ROOT)}
    run = subprocess.run([sys.executable, *command], cwd=cwd, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    return run


@pytest.fixture(scope="module")
def demonstration(tmp_path_factory: pytest.TempPathFactory, empty_database: Path) -> tuple[Path, str, str]:
    """A short run: the folder, the tracking URI, and what was printed."""
    folder = tmp_path_factory.mktemp("demonstration")
    tracking = f"sqlite:///{folder}/mlflow.db"
    (folder / "mlflow.db").write_bytes(empty_database.read_bytes())
    overrides = f"dataset.num_epochs=1 store={folder}/store"
    command = ["examples/pretrain.py", "--steps=20", "--validations=2", f"--out={folder}/out"]
    return folder, tracking, python(*command, f"--overrides={overrides}", tracking=tracking)


def test_the_curve_is_in_all_three_trackers(demonstration: tuple[Path, str, str]) -> None:
    folder, tracking, printed = demonstration
    client = MlflowClient(tracking)
    (run,) = client.search_runs(["0"])
    curve = [(point.step, point.value) for point in client.get_metric_history(run.info.run_id, ACCURACY)]
    assert [step for step, _ in curve] == [0, 10, 20]
    assert run.info.status == "FINISHED"
    assert {"train_loss", "val_loss"} <= set(run.data.metrics)
    for step, value in curve:
        assert f"| {step} | {value:.4f} |" in run.data.tags["mlflow.note.content"]
    shown = in_tensorboard(folder / "out" / "tensorboard", ACCURACY)
    assert shown == [(step, float(np.float32(value))) for step, value in curve]
    (file,) = (folder / "out" / "wandb").glob("offline-run-*/*.wandb")
    assert in_wandb(file, ACCURACY) == curve
    for step, value in curve:
        assert any(str(step) in line and f"{value:.4f}" in line for line in printed.splitlines())


def test_the_pictures_are_in_all_three_trackers(demonstration: tuple[Path, str, str]) -> None:
    folder, tracking, _ = demonstration
    client = MlflowClient(tracking)
    (run,) = client.search_runs(["0"])
    name = "figures/secondary_structure/3state_confusion"
    for step in (0, 10, 20):
        kept = {one.path for one in client.list_artifacts(run.info.run_id, f"downstream/step={step}")}
        assert f"downstream/step={step}/report.html" in kept
        kept = {
            one.path for one in client.list_artifacts(run.info.run_id, f"downstream/step={step}/{Path(name).parent}")
        }
        assert f"downstream/step={step}/{name}.png" in kept
    (file,) = (folder / "out" / "wandb").glob("offline-run-*/*.wandb")
    assert [step for step, _ in in_wandb(file, f"{name}/path")] == [0, 10, 20]
    assert [step for step, _ in pictures_in_tensorboard(folder / "out" / "tensorboard", name)] == [0, 10, 20]
    curves = [Path(one.path).name for one in client.list_artifacts(run.info.run_id, "downstream/curves")]
    assert curves == ["curve_fitness.png", "curve_secondary_structure.png", "resolution.md"]
    assert not list((folder / "store" / "journal").iterdir())  # everything has arrived


def test_its_checkpoints_give_the_same_numbers(demonstration: tuple[Path, str, str], monkeypatch: Any) -> None:
    folder, tracking, _ = demonstration
    monkeypatch.chdir(ROOT)
    config = read_config("configs/pretrain.yaml", "dataset.num_epochs=1")
    client = MlflowClient(tracking)
    (run,) = client.search_runs(["0"])
    curve = {point.step: point.value for point in client.get_metric_history(run.info.run_id, ACCURACY)}
    paths = {10: "out/checkpoints/step=10.ckpt", 20: "out"}
    for step, path in paths.items():
        scores = validate(open_encoder(str(folder / path)), config.tasks, Store(folder / str(step)))
        assert scores[0].metrics[ACCURACY] == curve[step]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps=0"], "steps: expected at least 1, found 0"),
        (["--overrides=on_error=never"], "on_error: expected one of warn, raise, found 'never'"),
        (["--overrides=dataset.dataset.train=x999", "--out={tmp}/new"], "expected a CSV file at "),
        (["--overrides=dataset.optim.name=adom"], "optim.name: unknown optimiser 'adom'"),
        (["--files=x999"], "expected a CSV file at "),
        (["--out={tmp}"], "is not empty; give a new folder, or remove it"),
    ],
)
def test_a_mistake_is_one_line_before_the_first_step(
    arguments: list[str], message: str, tmp_path: Path, tracking: str, monkeypatch: Any, capfd: Any
) -> None:
    monkeypatch.chdir(ROOT)
    given = [one.replace("{tmp}", str(tmp_path)) for one in arguments]
    assert main(["--out=" + str(tmp_path / "out"), *given]) == 2
    said = capfd.readouterr().err
    assert len([line for line in said.splitlines() if line.startswith("error: ")]) == 1
    assert message in said[said.index("error: ") :]  # several defects of data have a line each below it
    assert MlflowClient().search_runs(["0"]) == []


def test_the_hand_written_loop(tmp_path: Path, tracking: str) -> None:
    overrides = f"dataset.num_epochs=1 store={tmp_path}/store logging.figures=false"
    out = tmp_path / "model.pt"
    command = ["examples/hand_written_loop.py", "--steps=2", f"--out={out}", f"--overrides={overrides}"]
    said = both(*command, tracking=tracking).stderr
    (run,) = MlflowClient().search_runs(["0"])
    for step in (0, 1, 2):  # without any configuration of logging
        assert said.count(f"downstream validation at step {step}: ") == 1
    assert said.count("downstream validation, what each score can tell apart:") == 1
    assert said.count("downstream validation logs to MLflow: ") == 1
    assert said.count(f"This run:       http://127.0.0.1:5000/#/experiments/0/runs/{run.info.run_id}?") == 1
    history = MlflowClient().get_metric_history(run.info.run_id, ACCURACY)
    assert [point.step for point in history] == [0, 1, 2]
    assert run.info.status == "FINISHED"
    assert open_encoder(str(out)).max_seq_length


def test_the_hugging_face_trainer(tmp_path: Path, tracking: str, monkeypatch: Any) -> None:
    """The last point of the curve is what the saved model scores."""
    out = tmp_path / "out"
    options = ["--steps=4", f"--out={out}", "--report-to=tensorboard"]
    options.append("--overrides=dataset.num_epochs=1 logging.figures=false")
    python("examples/huggingface_trainer.py", *options, tracking=tracking)
    (folder,) = (out / "runs").iterdir()
    curve = in_tensorboard(folder, f"eval/{ACCURACY}")
    assert [step for step, _ in curve] == [0, 2, 4]
    monkeypatch.chdir(ROOT)
    config = read_config("configs/pretrain.yaml", "dataset.num_epochs=1")
    scores = validate(open_encoder(str(out)), config.tasks, Store(tmp_path / "store"))
    assert scores[0].metrics[ACCURACY] == pytest.approx(curve[-1][1])


LIGHTNING = """
import sys
import lightning.pytorch as pl
from pipeline import DownstreamEarlyStopping, DownstreamValidation
assert issubclass(DownstreamValidation, pl.Callback)
assert issubclass(DownstreamEarlyStopping, pl.callbacks.EarlyStopping)
assert "pytorch_lightning" not in sys.modules
"""


def test_the_package_lightning_will_do(tracking: str) -> None:
    """The callback is of the package that the script imported."""
    python("-c", LIGHTNING, tracking=tracking)


@pytest.mark.slow
def test_two_ranks_have_one_run(tmp_path: Path, tracking: str) -> None:
    arguments = ["--steps=4", "--validations=1", f"--out={tmp_path}/out", f"--tracking-uri={tracking}"]
    arguments += [
        f"--overrides=dataset.num_epochs=1 dataset.num_seeds=1 dataset.baselines=false store={tmp_path}/store"
    ]
    codes = run_two_ranks("examples.pretrain", arguments, tmp_path)
    first, second = ((tmp_path / f"rank-{rank}.log").read_text() for rank in range(2))
    assert codes == [0, 0], f"{first[-2000:]}\n{second[-2000:]}"
    (run,) = MlflowClient(tracking).search_runs(["0"])
    assert run.info.status == "FINISHED"
    assert [point.step for point in MlflowClient(tracking).get_metric_history(run.info.run_id, ACCURACY)] == [0, 4]
    assert "This run:" in first
    assert "This run:" not in second
    assert (tmp_path / "out" / "config.json").exists()
