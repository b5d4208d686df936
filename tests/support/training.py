"""A Lightning module with everything that a careless callback would disturb, and what records whether it did."""

from __future__ import annotations

import hashlib
import pickle
import random
from collections.abc import Sequence
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, EsmConfig, EsmForMaskedLM

from pipeline.config.schema import Config
from pipeline.config.task import Task
from pipeline.config.trackers import Logging
from pipeline.tracking.sender import flush
from tests.support.models import RESIDUES

# How a trainer is asked to read a checkpoint without running code; earlier releases are not.
INERT: dict[str, Any] = {"weights_only": True} if "weights_only" in signature(pl.Trainer.fit).parameters else {}


class Busy(pl.LightningModule):
    """An ESM with dropout, batch norm in both modes, frozen layers and buffers that training writes to."""

    ema: Tensor
    calls: Tensor

    def __init__(self, folder: Path, compiled: bool = False) -> None:
        super().__init__()
        config = EsmConfig.from_pretrained(folder, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1)
        self.model: Any = EsmForMaskedLM(config)
        if compiled:
            self.model = torch.compile(self.model, backend="eager")
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        width = config.hidden_size
        self.drop, self.norm, self.out = nn.Dropout(0.3), nn.BatchNorm1d(width), nn.Linear(width, 1)
        self.frozen = nn.Sequential(nn.Linear(width, width), nn.BatchNorm1d(width)).requires_grad_(False)
        self.register_buffer("ema", torch.zeros(width))
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def on_train_start(self) -> None:
        self.frozen.eval()  # as users do; `module.train()` would undo it

    def forward(self, sequences: Sequence[str]) -> Tensor:
        """Shape (sequences, 1)."""
        self.calls.add_(1)
        tokens = self.tokenizer(list(sequences), return_tensors="pt", padding=True)
        hidden = self.model(**tokens, output_hidden_states=True).hidden_states[-1].mean(1)
        self.ema.lerp_(hidden.detach().mean(0).to(self.ema.dtype), 0.1)
        result: Tensor = self.out(self.norm(self.drop(hidden)) + self.frozen(hidden))
        return result

    def training_step(self, batch: Sequence[str], _index: int) -> Tensor:
        noise = random.random() + float(np.random.rand())
        loss: Tensor = ((self(batch) - noise) ** 2).mean()
        self.log("train_loss", loss, batch_size=len(batch))
        return loss

    def validation_step(self, batch: Sequence[str], _index: int) -> None:
        self.log("val_loss", (self(batch) ** 2).mean(), batch_size=len(batch))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW([one for one in self.parameters() if one.requires_grad], lr=1e-2)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 2), "interval": "step"},
        }


class WithMethod(Busy):
    """Gives hidden states itself, and is careless about it."""

    def hidden_states(self, sequences: Sequence[str]) -> list[Tensor]:
        self(sequences)
        torch.rand(3)
        random.random()
        self.train()
        self.requires_grad_(True)
        torch.set_grad_enabled(True)
        self.eval()
        return [one_state(self.model, self.tokenizer, sequence) for sequence in sequences]


class FromModule:
    """A user's encoder class."""

    def __init__(self, module: Busy) -> None:
        self.module = module
        self.hidden_size = module.out.in_features

    @classmethod
    def from_module(cls, module: Busy) -> FromModule:
        return cls(module)

    @classmethod
    def from_checkpoint(cls, path: str) -> FromModule:
        stored = torch.load(path, weights_only=False)
        module = Busy(Path(stored["hyper_parameters"]["folder"]))
        module.load_state_dict(stored["state_dict"])
        return cls(module.eval())

    def hidden_states(self, sequences: Sequence[str]) -> list[Tensor]:
        return [one_state(self.module.model, self.module.tokenizer, sequence) for sequence in sequences]


def one_state(model: Any, tokenizer: Any, sequence: str) -> Tensor:
    """The last hidden states of one sequence, shape (length, hidden_size)."""
    tokens = tokenizer(sequence, return_tensors="pt")
    states: Tensor = model(**tokens, output_hidden_states=True).hidden_states[-1][0, 1:-1]
    return states


class Recorder(pl.Callback):
    """The state of everything, as a digest, at each training batch and at the end."""

    def __init__(self) -> None:
        self.states: list[dict[str, str]] = []
        self.end: dict[str, str] = {}

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, index: int) -> None:
        self.states.append(snapshot(trainer, pl_module))

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.end = snapshot(trainer, pl_module)


def snapshot(trainer: pl.Trainer, module: pl.LightningModule) -> dict[str, str]:
    what = {
        "weights": {name: value.detach().clone() for name, value in module.state_dict().items()},
        "keys": list(module.state_dict()),
        "optimizer": [one.state_dict() for one in trainer.optimizers],
        "schedule": [one.scheduler.state_dict() for one in trainer.lr_scheduler_configs],
        "gradients": [parameter.grad for parameter in module.parameters()],
        "random": (random.getstate(), np.random.get_state(), torch.get_rng_state()),
        "requires_grad": [parameter.requires_grad for parameter in module.parameters()],
        "modes": [submodule.training for submodule in module.modules()],
        "dtypes": [value.dtype for value in module.state_dict().values()],
        "torch": (torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), torch.get_default_dtype()),
        "inference": torch.is_inference_mode_enabled(),
        "hooks": [len(submodule._forward_hooks) for submodule in module.modules()],
    }
    return {name: hashlib.sha256(pickle.dumps(plain(value))).hexdigest() for name, value in what.items()}


def plain(value: Any) -> Any:
    """With tensors as bytes, so that equal means bit for bit, and pickles do not depend on identity."""
    if isinstance(value, Tensor):
        return value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes() if value.numel() else b""
    if isinstance(value, np.ndarray):
        return value.tobytes()
    if isinstance(value, dict):
        return repr([(key, plain(one)) for key, one in value.items()])
    if isinstance(value, (list, tuple)):
        return repr([plain(one) for one in value])
    return repr(value)


def sequences(number: int = 16) -> list[str]:
    chance = random.Random(7)
    return ["".join(chance.choices(RESIDUES, k=chance.randint(5, 12))) for _ in range(number)]


def loader(number: int = 16, shuffle: bool = True) -> DataLoader[Any]:
    return DataLoader(sequences(number), batch_size=4, shuffle=shuffle)  # type: ignore[arg-type]


class Trainer(pl.Trainer):
    """Waits at the end until MLflow has everything, as the program's end would."""

    def fit(self, *args: Any, **options: Any) -> None:
        try:
            super().fit(*args, **options)
        finally:
            flush()

    def validate(self, *args: Any, **options: Any) -> Any:
        try:
            return super().validate(*args, **options)
        finally:
            flush()


def trainer(folder: Path, callbacks: Sequence[pl.Callback] = (), **options: Any) -> pl.Trainer:
    """A quiet trainer on the CPU that keeps everything in `folder`."""
    given: dict[str, Any] = {
        "max_epochs": 2,
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": any(isinstance(one, pl.callbacks.ModelCheckpoint) for one in callbacks),
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": folder,
        "callbacks": list(callbacks),
    }
    return Trainer(**{**given, **options})


def section(folder: Path, tasks: Task | list[Task], **options: Any) -> Config:
    """A configuration of one task, or of a list, that keeps everything in `folder`."""
    several = isinstance(tasks, list)
    given: dict[str, Any] = {
        "store": str(folder / "store"),
        "logging": Logging(figures=False),
        "on_start": False,
        **options,
    }
    return Config(dataset=tasks if isinstance(tasks, list) else [tasks], is_list=several, **given)
