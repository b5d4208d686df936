"""Trains with measurements in the background until SIGKILL at step 10. Started by test_background_killed.py."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl

from pipeline import DownstreamValidation, setup_dwnstr_task_validation_callbacks
from pipeline.config.background import Background
from pipeline.config.schema import Config
from tests.support.data import planted_task_at
from tests.support.training import Busy, loader, section, trainer


class Killer(pl.Callback):
    """Kills this process, after the results have come where `wait` is set."""

    def __init__(self, measured: DownstreamValidation, wait: bool) -> None:
        self.measured, self.wait = measured, wait

    def on_train_batch_end(self, fit: pl.Trainer, *_: Any) -> None:
        if fit.global_step < 10:
            return
        while self.wait and len(self.measured.curve) < 3:
            self.measured.session.poll()
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGKILL)


def config(folder: Path, mode: str = "background", timeout: float = 600.0, **background: Any) -> Config:
    own = Background(**{"max_pending": 9, **background})
    task = planted_task_at(folder / "data")
    return section(folder, task, mode=mode, background=own, on_start=True, timeout=timeout)


def train(
    folder: Path, where: Path, callbacks: list[Any], path: str | None = None, epochs: int = 4, **options: Any
) -> Any:
    pl.seed_everything(3, verbose=False)
    one = trainer(where, callbacks, max_epochs=epochs)
    one.fit(Busy(folder / "esm"), loader(shuffle=False), loader(shuffle=False), ckpt_path=path, **options)
    return one


def main(folder: Path, wait: bool) -> None:
    own: dict[str, Any] = {} if wait else {"worker_command": "true {folder}"}  # nobody measures
    (callback,) = setup_dwnstr_task_validation_callbacks(config(folder, **own))
    assert isinstance(callback, DownstreamValidation)
    keep = pl.callbacks.ModelCheckpoint(folder / "kept", "{step}", save_top_k=-1)
    train(folder, folder, [callback, keep, Killer(callback, wait)])


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2] == "measured")
