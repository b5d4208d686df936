"""A loop of one's own that is measured in the background, by nobody unless a test says by whom."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, EsmForMaskedLM, set_seed

from pipeline import Downstream
from pipeline.config.background import Background
from pipeline.config.task import Task
from tests.support.training import section

NOBODY = "true {folder}"  # a command that has nobody measure


def loop_of(
    folder: Path, task: Task, esm: Path, on_error: str = "warn", options: Any = None, **background: Any
) -> tuple[Downstream, Any]:
    """The loop, and its model; `options` are further keys of the section."""
    own = Background(**{"worker_command": NOBODY, "drain_timeout": 0.0, **background})
    given = {"mode": "background", "on_start": True, "on_error": on_error, **(options or {})}
    config = section(folder, task, background=own, **given)
    set_seed(1)
    model: Any = EsmForMaskedLM.from_pretrained(esm)
    return Downstream(config, tokenizer=AutoTokenizer.from_pretrained(esm), folder=folder / "out"), model


def pending(downstream: Downstream) -> list[int]:
    """The steps that are not measured yet."""
    found: list[int] = downstream.state_dict()["background"]["pending"]
    return found


def snapshots(folder: Path) -> set[str]:
    """The names of the snapshots that are there."""
    return {path.parent.name for path in folder.glob("out/downstream/*/step=*/weights.ckpt")}


def place_of(folder: Path) -> Path:
    """The folder of the snapshots of the only training."""
    (place,) = (folder / "out/downstream").iterdir()
    return place
