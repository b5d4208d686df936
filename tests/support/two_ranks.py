"""One rank of two: trains as the scenarios say, and writes what it saw. Started twice by test_ranks.py."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, IterableDataset

from pipeline import (
    DownstreamEarlyStopping,
    DownstreamModelCheckpoint,
    JournalLogger,
    setup_dwnstr_task_validation_callbacks,
    sharing,
    validation,
)
from pipeline.errors import DataError
from pipeline.training.ranks import Ranks
from tests.support.data import planted_task_at
from tests.support.training import Busy, loader, plain, section, trainer

LOSS = "dwnstr_task_val_loss"
RANK = int(os.environ["RANK"])
STAGES: dict[str, tuple[Any, str]] = {
    "load": (validation, "data_of"),
    "embed": (validation, "embed"),
    "train_head": (sharing, "fit_seeds"),
    "score": (sharing, "score"),
}


class Uneven(IterableDataset[str]):
    """Three batches on rank 0, none on rank 1."""

    def __iter__(self) -> Iterator[str]:
        yield from ["MKVLA"] * (12 if RANK == 0 else 0)


class Stray(pl.Callback):
    """Something happens to a rank in the first validation."""

    def __init__(self, what: str) -> None:
        self.what = what

    def on_validation_batch_end(self, fit: pl.Trainer, *_: Any) -> None:
        if fit.sanity_checking:
            return
        if self.what == "late" and RANK == 1:
            time.sleep(600)
        if self.what == "dead" and RANK == 1:
            os._exit(9)
        if self.what == "killed" and RANK == 1:
            setattr(sharing, "fit_probe", lambda *_: os.kill(os.getpid(), signal.SIGKILL))  # noqa: B010
        if self.what == "stuck" and RANK == 0:
            setattr(sharing, "fit_seeds", lambda *_: time.sleep(600))  # noqa: B010


def fit(folder: Path, name: str, callbacks: list[Any], val: Any = None, **options: Any) -> dict[str, Any]:
    """Trains on both ranks. Gives the curve, what was kept, and a digest of the weights."""
    pl.seed_everything(11, verbose=False)
    module = Busy(folder / "esm")
    given: dict[str, Any] = {"devices": 2, "strategy": "ddp_find_unused_parameters_true", "max_epochs": 3, **options}
    ours = trainer(folder / name, callbacks, **given)
    error = ""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            ours.fit(module, loader(), loader(shuffle=False) if val is None else val)
        except Exception as found:
            error = f"{type(found).__name__}: {found}"
            traceback.print_exc()
    seen = sorted({str(one.message) for one in caught if "downstream" in str(one.message)})
    curve = next((one.curve for one in callbacks if hasattr(one, "curve")), None)
    keys = {name: float(value) for name, value in ours.callback_metrics.items() if "test_" in name or name == LOSS}
    return {
        "error": error,
        "curve": curve,
        "metrics": keys,
        "epochs": ours.current_epoch,
        "weights": hash(tuple(plain(value) for value in module.parameters())),
        "buffers": hash(tuple(plain(value) for value in module.buffers())),  # of batch norm: each rank has its own
        "said": seen,
    }


def monitors(folder: Path, own: bool) -> list[Any]:
    save: Any = DownstreamModelCheckpoint if own else pl.callbacks.ModelCheckpoint
    stop: Any = DownstreamEarlyStopping if own else pl.callbacks.EarlyStopping
    return [save(folder, "{step}", monitor=LOSS, save_top_k=2), stop(LOSS, patience=1, min_delta=100.0)]


def everything(folder: Path) -> dict[str, Any]:
    """The scenarios that ranks survive, one after another."""
    task = planted_task_at(folder / "data")
    task.num_epochs = 1

    def callback(**options: Any) -> list[Any]:
        return list(setup_dwnstr_task_validation_callbacks(section(folder, task, timeout=60.0, **options)))

    found = {"without": fit(folder, "without", []), "with": fit(folder, "with", callback(on_start=True, on_end=True))}
    found["monitors"] = fit(folder, "monitors", callback() + monitors(folder / "best", own=False))
    logger = JournalLogger("two ranks", journal=folder / "journal.jsonl")
    found["journal"] = fit(folder, "journal", callback(), logger=logger, log_every_n_steps=1)
    own = monitors(folder / "every", own=True) + callback(every_n_validations=2)
    found["every"] = fit(folder, "every", own, max_epochs=5)
    # Else DDP itself waits for the other rank at every validation batch, to share its buffers.
    lonely = pl.strategies.DDPStrategy(find_unused_parameters=True, broadcast_buffers=False)
    found["uneven"] = fit(folder, "uneven", callback(), DataLoader(Uneven(), batch_size=4), strategy=lonely)
    both = [task, replace(task, task_name="another")]  # so that each rank has heads to train, and scores
    for stage in STAGES:
        for on_error in ("warn", "raise"):
            for rank in (0, 1):
                case = f"{stage} {on_error} {rank}"
                callbacks = setup_dwnstr_task_validation_callbacks(
                    section(folder, both, timeout=60.0, on_error=on_error)
                )
                found[case] = sabotaged(stage, rank, partial(fit, folder, case, callbacks))
    found["interrupted"] = {"error": interrupted()}
    task.dataset.train = "x999"
    found["setup"] = fit(folder, "setup", callback())
    return found


def interrupted() -> str:
    """What each rank makes of Ctrl-C on rank 0."""
    ranks = Ranks(60.0)
    ranks.open()

    def stop() -> None:
        raise KeyboardInterrupt

    try:
        ranks.on_rank_zero(stop)
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def sabotaged(stage: str, rank: int, work: Any) -> Any:
    where, name = STAGES[stage]
    real = getattr(where, name)

    def fail(*_: Any, **__: Any) -> None:
        raise DataError("injected")

    def fail_in_earnest(examples: Any, *rest: Any) -> Any:  # not in the sanity check, which would find out
        return fail() if len(examples[0].train) > 1 else real(examples, *rest)

    if rank == RANK:
        setattr(where, name, fail_in_earnest if name == "embed" else fail)
    try:
        return work()
    finally:
        setattr(where, name, real)


def main(scenario: str, folder: Path) -> None:
    torch.set_num_threads(1)
    if scenario == "everything":
        found = everything(folder)
    else:
        task = planted_task_at(folder / "data")
        callbacks = setup_dwnstr_task_validation_callbacks(section(folder, task, timeout=20.0))
        found = {scenario: fit(folder, scenario, [Stray(scenario), *callbacks])}
    (folder / f"rank-{RANK}.json").write_text(json.dumps(found))
    os._exit(0)  # without waiting for a rank that is lost


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
