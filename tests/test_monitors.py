"""`ModelCheckpoint` and `EarlyStopping` on downstream metrics, Lightning's own and this project's companions."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl

from pipeline import DownstreamEarlyStopping, DownstreamModelCheckpoint, setup_dwnstr_task_validation_callbacks
from pipeline.config.task import Task
from pipeline.errors import DataError
from tests.support.data import planted_task
from tests.support.training import Busy, loader, section, trainer

LOSS = "dwnstr_task_val_loss"


@pytest.fixture
def task(tmp_path: Path) -> Task:
    return planted_task(tmp_path / "data", num_epochs=1)


@pytest.fixture
def values(monkeypatch: pytest.MonkeyPatch) -> list[float | None]:
    """What the measurements find, in order, in place of the real loss; None for one that fails."""
    planned: list[float | None] = []
    coming: list[float | None] = []
    from pipeline import validation
    from pipeline.score import score as real

    def scripted(*args: Any) -> Any:
        if not coming:
            coming.extend(planned)
        value = coming.pop(0)
        if value is None:
            raise DataError("injected")
        scores = real(*args)
        results = [replace(one, value=value) if one.name == LOSS else one for one in scores.results]
        return replace(scores, results=tuple(results))

    monkeypatch.setattr(validation, "score", scripted)
    return planned


def train(module: Busy, folder: Path, task: Task, monitors: list[Any], first: bool = True, **options: Any) -> Any:
    (callback,) = setup_dwnstr_task_validation_callbacks(section(folder, task, **options))
    callbacks = [callback, *monitors] if first else [*monitors, callback]
    fit = trainer(folder, callbacks, max_epochs=6)
    fit.fit(module, loader(), loader(shuffle=False))
    return callback, fit


@pytest.mark.parametrize("first", [True, False], ids=["callback first", "callback last"])
@pytest.mark.parametrize("own", [True, False], ids=["companions", "Lightning's"])
def test_the_best_is_kept_and_patience_counts(
    own: bool, first: bool, task: Task, tmp_path: Path, tracking: str, model_folder: Any, values: list[float | None]
) -> None:
    """Losses 5, 3, 4, 4.5: the second is the best, and with patience 2 the fourth is the last."""
    values += [5.0, 3.0, 4.0, 4.5, 1.0]
    save: Any = DownstreamModelCheckpoint if own else pl.callbacks.ModelCheckpoint
    stop: Any = DownstreamEarlyStopping if own else pl.callbacks.EarlyStopping
    monitors = [save(tmp_path / "best", "{step}", monitor=LOSS), stop(LOSS, patience=2)]
    callback, fit = train(Busy(model_folder("esm")), tmp_path, task, monitors, first)
    assert [metrics[LOSS] for _, metrics in callback.curve] == [5.0, 3.0, 4.0, 4.5]
    assert fit.current_epoch == 4
    assert [path.name for path in (tmp_path / "best").iterdir()] == ["step=8.ckpt"]
    assert float(monitors[0].best_model_score) == 3.0


@pytest.mark.parametrize("first", [True, False], ids=["callback first", "callback last"])
def test_every_second_validation(
    first: bool, task: Task, tmp_path: Path, tracking: str, model_folder: Any, values: list[float | None]
) -> None:
    """Measured at epochs 0, 2 and 4: nothing is saved or counted at the others."""
    values += [3.0, 4.0, 5.0]
    monitors = [
        DownstreamModelCheckpoint(tmp_path / "best", "{step}", monitor=LOSS, save_top_k=3),
        DownstreamEarlyStopping(LOSS, patience=2),
    ]
    callback, fit = train(Busy(model_folder("esm")), tmp_path, task, monitors, first, every_n_validations=2)
    assert [step for step, _ in callback.curve] == [4, 12, 20]
    assert fit.current_epoch == 5
    assert {path.name for path in (tmp_path / "best").iterdir()} == {"step=4.ckpt", "step=12.ckpt", "step=20.ckpt"}


def test_lightnings_own_monitors_are_warned_of(task: Task, tmp_path: Path, tracking: str, model_folder: Any) -> None:
    monitors = [pl.callbacks.EarlyStopping("val_loss"), pl.callbacks.ModelCheckpoint(tmp_path / "best", monitor=LOSS)]
    with pytest.warns(UserWarning, match="use pipeline.DownstreamModelCheckpoint in its place") as seen:
        train(Busy(model_folder("esm")), tmp_path, task, monitors, every_n_validations=2)
    assert not any("EarlyStopping" in str(one.message) for one in seen)


def test_a_name_without_its_task_is_warned_of(task: Task, tmp_path: Path, tracking: str, model_folder: Any) -> None:
    """In a list of tasks the metrics begin with the task's name."""
    monitors = [DownstreamEarlyStopping(LOSS, strict=False), pl.callbacks.EarlyStopping("val_loss", strict=False)]
    (callback,) = setup_dwnstr_task_validation_callbacks(section(tmp_path, [task]))
    fit = trainer(tmp_path, [callback, *monitors], max_epochs=1, limit_val_batches=0)
    with pytest.warns(UserWarning, match=f"no metric '{LOSS}' is measured, but '{task.task_name}/{LOSS}'") as seen:
        fit.fit(Busy(model_folder("esm")), loader(), loader(shuffle=False))
    assert len([one for one in seen if "is measured" in str(one.message)]) == 1


def checkpoints(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*.ckpt")}


def test_a_metric_of_a_list_of_tasks_in_the_file_name_makes_no_folders(
    task: Task, tmp_path: Path, tracking: str, model_folder: Any
) -> None:
    """The companion by itself; Lightning's own where it is told, and it is warned of where it is not."""
    shown = f"{task.task_name}/{LOSS}"
    name, file = f"{{step}}-{{{shown}:.1f}}", pl.callbacks.ModelCheckpoint
    keep: dict[str, Any] = {"filename": name, "monitor": shown, "save_top_k": -1}
    monitors = [
        DownstreamModelCheckpoint(tmp_path / "own", save_last=True, **keep),
        file(tmp_path / "told", auto_insert_metric_name=False, mode="max", **keep),
        file(tmp_path / "not told", **keep),
        DownstreamModelCheckpoint(
            tmp_path / "values", auto_insert_metric_name=False, save_last=True, mode="max", **keep
        ),
    ]
    monitors[-1].CHECKPOINT_NAME_LAST = f"{{epoch}}-last-{{{shown}:.1f}}"
    callback: Any = setup_dwnstr_task_validation_callbacks(section(tmp_path, [task]))[0]
    fit = trainer(tmp_path, [callback, *monitors], max_epochs=2)
    rule = f"makes a folder per checkpoint: .* the name {shown}, .* pass auto_insert_metric_name=False"
    with pytest.warns(UserWarning, match=rule) as seen:
        fit.fit(Busy(model_folder("esm")), loader(), loader(shuffle=False))
    assert len([one for one in seen if "makes a folder" in str(one.message)]) == 1
    first, second = (f"{metrics[shown]:.1f}" for _, metrics in callback.curve)
    flat = shown.replace("/", "_")
    assert checkpoints(tmp_path / "own") == {f"step=4-{flat}={first}.ckpt", f"step=8-{flat}={second}.ckpt", "last.ckpt"}
    assert checkpoints(tmp_path / "told") == {f"4-{first}.ckpt", f"8-{second}.ckpt"}
    assert checkpoints(tmp_path / "not told") == {f"step=4-{shown}={first}.ckpt", f"step=8-{shown}={second}.ckpt"}
    assert checkpoints(tmp_path / "values") == {f"4-{first}.ckpt", f"8-{second}.ckpt", f"1-last-{second}.ckpt"}
    assert all(Path(path).is_file() for path in monitors[0].best_k_models)


def test_a_file_name_keeps_the_folders_and_the_formats_that_it_is_given(task: Task, tmp_path: Path) -> None:
    """Only in the names of downstream metrics does `/` become `_`."""
    task.task_name = "a.b"
    name = f"a.b/{LOSS}"
    metrics = {"step": 3, "epoch": 1, name: 0.25, "c": 2.0, "val/loss": 0.5}
    keep = DownstreamModelCheckpoint(tmp_path, f"sub/{{step:04d}}_{{{name}:.1e}}_{{c}}_{{a.b/test_label_mcc:d}}")
    callbacks = [*setup_dwnstr_task_validation_callbacks(section(tmp_path, [task])), keep]
    keep.setup(trainer(tmp_path, callbacks), pl.LightningModule(), "validate")
    expected = f"sub/step=0003_a.b_{LOSS}=2.5e-01_c=2.0_a.b_test_label_mcc=0.ckpt"
    assert keep.format_checkpoint_name(metrics) == str(tmp_path / expected)
    assert keep.format_checkpoint_name(metrics, "{epoch}", ver=2) == str(tmp_path / "epoch=1-v2.ckpt")
    assert keep.format_checkpoint_name(metrics, "{val/loss:.1f}") == str(tmp_path / "val/loss=0.5.ckpt")
    assert DownstreamModelCheckpoint().format_checkpoint_name(metrics) == "epoch=1-step=3.ckpt"


def test_a_failed_measurement_is_neither_saved_nor_counted(
    task: Task, tmp_path: Path, tracking: str, model_folder: Any, values: list[float | None]
) -> None:
    """Also the first one, where Lightning's own would end the training for want of the metric."""
    values += [None, 3.0, None, None, 4.0, 2.0]
    monitors = [
        DownstreamModelCheckpoint(tmp_path / "best", "{step}", monitor=LOSS, save_top_k=-1, save_last=True),
        DownstreamEarlyStopping(LOSS, patience=2),
    ]
    with pytest.warns(UserWarning, match="failed at step (4|12|16), training goes on: injected"):
        callback, fit = train(Busy(model_folder("esm")), tmp_path, task, monitors)
    assert [step for step, _ in callback.curve] == [8, 20, 24]
    assert fit.current_epoch == 6
    kept = {path.name for path in (tmp_path / "best").iterdir()}
    assert kept == {"step=8.ckpt", "step=20.ckpt", "step=24.ckpt", "last.ckpt"}


def test_the_companions_monitor_other_metrics_as_lightnings_do(
    task: Task, tmp_path: Path, tracking: str, model_folder: Any
) -> None:
    monitors = [DownstreamModelCheckpoint(tmp_path / "best", "{step}", monitor="val_loss", save_top_k=-1)]
    train(Busy(model_folder("esm")), tmp_path, task, monitors, every_n_validations=3)
    assert len(list((tmp_path / "best").iterdir())) == 6


def test_the_measurement_at_the_start_counts_for_nothing(
    task: Task, tmp_path: Path, tracking: str, model_folder: Any, values: list[float | None]
) -> None:
    """It is not published: where the first validation fails, there is nothing to act on."""
    values += [1.0, None, 3.0, 4.0]
    monitors = [DownstreamModelCheckpoint(tmp_path / "best", "{step}", monitor=LOSS), DownstreamEarlyStopping(LOSS)]
    with pytest.warns(UserWarning, match="failed at step (4|20), training goes on: injected"):
        callback, _ = train(Busy(model_folder("esm")), tmp_path, task, monitors, on_start=True)
    assert [step for step, _ in callback.curve] == [0, 8, 12, 16, 24]


def test_a_metric_that_is_left_out_is_not_acted_on(
    task: Task, tmp_path: Path, tracking: str, model_folder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was there at the first two measurements; a name that never was is warned of."""
    from pipeline import validation
    from pipeline.score import score as real

    def without(*args: Any) -> Any:
        scores = real(*args)
        seen.append(scores)
        if len(seen) > 2:
            return replace(scores, results=tuple(one for one in scores.results if one.name != "mcc"))
        return scores

    seen: list[Any] = []
    monkeypatch.setattr(validation, "score", without)
    monitors = [
        DownstreamModelCheckpoint(tmp_path / "best", "{step}", monitor="test_label_mcc", save_top_k=-1),
        DownstreamEarlyStopping("test_label_mc", patience=1),
    ]
    with pytest.warns(UserWarning, match="'test_label_mcc?' was not measured; known: dwnstr_task_val_loss, "):
        _, fit = train(Busy(model_folder("esm")), tmp_path, task, monitors)
    assert {path.name for path in (tmp_path / "best").iterdir()} == {"step=4.ckpt", "step=8.ckpt"}
    assert fit.current_epoch == 6


@pytest.mark.parametrize("own", [True, False], ids=["companions", "Lightning's"])
def test_a_metric_of_the_probe_is_monitored(
    own: bool, tmp_path: Path, tracking: str, model_folder: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """The best weights by the probe are kept, and patience counts: with nothing in place of the real measurement."""
    shown = "test_label_probe_auroc"
    task = planted_task(tmp_path / "data", num_epochs=1)
    save: Any = DownstreamModelCheckpoint if own else pl.callbacks.ModelCheckpoint
    stop: Any = DownstreamEarlyStopping if own else pl.callbacks.EarlyStopping
    monitors = [save(tmp_path / "best", "{step}", monitor=shown, mode="max"), stop(shown, mode="max", patience=2)]
    folder = model_folder("esm")
    pl.seed_everything(1)  # with some others the probe finds the same at each step
    callback, fit = train(Busy(folder), tmp_path, task, monitors)
    found = [(step, metrics[shown]) for step, metrics in callback.curve]
    assert len({value for _, value in found}) > 1
    best = max(found, key=lambda point: point[1])
    assert [path.name for path in (tmp_path / "best").iterdir()] == [f"step={best[0]}.ckpt"]
    assert float(monitors[0].best_model_score) == pytest.approx(best[1], abs=1e-7)
    assert fit.current_epoch == min(6, found.index(best) + 3)
    assert callback.config.headlines == ["test_label_accuracy", "test_label_probe_accuracy"]
