"""Writes the current weights of a training as a Lightning checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from pipeline.encoders.description import DESCRIPTION
from pipeline.errors import CheckpointError
from pipeline.training.lightning_package import pl


def save(module: Any, trainer: Any, step: int, description: Mapping[str, Any] | None) -> Path:
    """Writes `downstream/step=N.ckpt` below the trainer's folder, without its callbacks and its barrier.

    Args:
        module: the LightningModule.
        trainer: its trainer.
        step: in the file's name.
        description: what the file needs to be opened; see `encoders.description`.

    Raises:
        CheckpointError: the file cannot be written.
    """
    content = {
        "epoch": trainer.current_epoch,
        "global_step": trainer.global_step,
        "pytorch-lightning_version": vars(pl)["__version__"],
        "state_dict": module.state_dict(),
        "hyper_parameters": dict(module.hparams),
    }
    module.on_save_checkpoint(content)
    if description is not None:
        content[DESCRIPTION] = description
    folder = Path(trainer.default_root_dir) / "downstream"
    path = folder / f"step={step}.ckpt"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(content, path.with_suffix(".tmp"))
        path.with_suffix(".tmp").replace(path)
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"save: '{path}' cannot be written ({error}); set default_root_dir") from error
    return path
