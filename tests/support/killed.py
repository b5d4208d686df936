"""Trains with the callback until SIGKILL in the middle of the second measurement. Started by test_resume.py."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytorch_lightning as pl

from pipeline import setup_dwnstr_task_validation_callbacks, validation
from pipeline.score import score as real
from tests.support.data import planted_task_at
from tests.support.training import Busy, loader, section, trainer


def main(folder: Path) -> None:
    calls: list[Any] = []

    def score(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args)

    setattr(validation, "score", score)  # noqa: B010
    callbacks = setup_dwnstr_task_validation_callbacks(section(folder, planted_task_at(folder / "data")))
    keep = pl.callbacks.ModelCheckpoint(folder / "kept", "{step}", save_top_k=-1)
    pl.seed_everything(3, verbose=False)
    trainer(folder, [*callbacks, keep], max_epochs=4).fit(Busy(folder / "esm"), loader(), loader(shuffle=False))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
