"""The demonstration: pre-trains a small ESM by masked language modelling, and watches its embeddings get better.

An ordinary Lightning script. What it takes to have the curve are the two lines with
`setup_dwnstr_task_validation_callbacks`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from pytorch_optimizer import Muon
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import DataCollatorForLanguageModeling, EsmConfig, EsmForMaskedLM

from pipeline.config.schema import Config
from pipeline.data import tables
from pipeline.encoders.esm import VOCABULARY, make_tokenizer
from pipeline.errors import ConfigError
from pipeline.tracking.journal_run import JournalRun
from pipeline.training.lightning import setup_dwnstr_task_validation_callbacks
from pipeline.training.lightning_package import pl
from pipeline.training.loggers import JournalLogger

# The vocabulary of ESM-2.


@dataclass(frozen=True)
class Settings:
    """Size of the model, and its training. `crop` is in residues: short windows train fast, and see whole helices."""

    layers: int = 2
    hidden_size: int = 96
    heads: int = 6
    steps: int = 1800
    validations: int = 6
    batch_size: int = 32
    crop: int = 32
    lr: float = 0.02
    seed: int = 1234


class Windows(Dataset[dict[str, list[int]]]):
    """Sequences as token ids, each cut to a window of at most `crop` residues at a random place."""

    def __init__(self, sequences: Sequence[str], tokenizer: Any, crop: int) -> None:
        self.sequences, self.tokenizer, self.crop = sequences, tokenizer, crop

    def __len__(self) -> int:
        return len(self.sequences)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        sequence = self.sequences[index]
        first = int(torch.randint(max(1, len(sequence) - self.crop + 1), ()))
        return {"input_ids": self.tokenizer(sequence[first : first + self.crop])["input_ids"]}


class MaskedLanguageModel(pl.LightningModule):
    """An ESM that learns to fill in masked residues."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.settings = settings
        self.save_hyperparameters(asdict(settings))
        self.tokenizer = make_tokenizer()
        self.model = EsmForMaskedLM(
            EsmConfig(
                vocab_size=len(VOCABULARY),
                hidden_size=settings.hidden_size,
                num_hidden_layers=settings.layers,
                num_attention_heads=settings.heads,
                intermediate_size=4 * settings.hidden_size,
                hidden_dropout_prob=0.0,
                attention_probs_dropout_prob=0.0,
                pad_token_id=self.tokenizer.pad_token_id,
                mask_token_id=self.tokenizer.mask_token_id,
                max_position_embeddings=1026,
                position_embedding_type="rotary",
                token_dropout=True,
            )
        )

    def training_step(self, batch: Mapping[str, Tensor], _index: int) -> Tensor:
        """The loss at the masked residues."""
        loss: Tensor = self.model(**batch).loss
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Mapping[str, Tensor], _index: int) -> None:
        """The same on sequences that are not trained on."""
        self.log("val_loss", self.model(**batch).loss, prog_bar=True, batch_size=len(batch["input_ids"]))

    def configure_optimizers(self) -> Any:
        """Muon for the weight matrices, Adam for the rest; warm-up over 5 % of the steps, then a cosine to zero."""
        matrices = [value for name, value in self.model.esm.encoder.named_parameters() if value.ndim == 2]
        others = [value for value in self.parameters() if all(value is not matrix for matrix in matrices)]
        rate = self.settings.lr
        groups = [
            {"params": matrices, "lr": rate, "weight_decay": 0.01, "use_muon": True},
            {"params": others, "lr": rate / 5, "betas": (0.9, 0.98), "weight_decay": 0.01, "use_muon": False},
        ]
        optimizer = Muon(groups)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _share(step, self.settings.steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def read_sequences(folder: Path, files: str, max_length: int = 1022) -> list[str]:
    """The column `sequence` of CSV files, sequences over `max_length` left out."""
    table = tables.read(folder, files, ["sequence"])
    return [text for text in table.columns["sequence"] if 0 < len(text) <= max_length]


def pretrain(
    sequences: Sequence[str],
    out: Path,
    settings: Settings,
    config: Config,
    loggers: Sequence[Any] = (),
    callbacks: Sequence[Any] = (),
) -> list[tuple[int, dict[str, float]]]:
    """Trains from scratch, measuring as `config` says, and writes checkpoints, model and tokenizer to `out`.

    Returns:
        The step and the metrics of each measurement.

    Raises:
        ConfigError: there are too few sequences.
    """
    held = max(1, len(sequences) // 20)
    if len(sequences) - held < settings.batch_size:
        raise ConfigError(
            f"data: expected more than {settings.batch_size} sequences to train on, found {len(sequences)}"
        )
    pl.seed_everything(settings.seed, verbose=False)
    module = MaskedLanguageModel(settings)
    collate = DataCollatorForLanguageModeling(module.tokenizer, mlm_probability=0.15)
    options: dict[str, Any] = {"batch_size": settings.batch_size, "collate_fn": collate}
    train = Windows(sequences[held:], module.tokenizer, settings.crop)
    val = Windows(sequences[:held], module.tokenizer, settings.crop)
    measuring: list[Any] = setup_dwnstr_task_validation_callbacks(config)
    interval = max(1, settings.steps // settings.validations)
    trainer = pl.Trainer(
        max_steps=settings.steps,
        val_check_interval=interval,
        log_every_n_steps=min(50, interval),
        check_val_every_n_epoch=None,
        gradient_clip_val=1.0,
        logger=list(loggers),
        callbacks=[
            *measuring,
            *callbacks,
            pl.callbacks.ModelCheckpoint(out / "checkpoints", "{step}", monitor="step", mode="max", save_top_k=-1),
        ],
        default_root_dir=out,
        enable_model_summary=False,
    )
    loader = DataLoader(train, shuffle=True, drop_last=True, **options)
    trainer.fit(module, loader, DataLoader(val, **options))
    module.model.save_pretrained(out)
    module.tokenizer.save_pretrained(out)
    return [point for one in measuring for point in one.curve]


def make_loggers(out: Path, run: JournalRun) -> list[Any]:
    """MLflow by way of a journal, TensorBoard, and W&B: offline, with no account, unless `WANDB_MODE` says otherwise.

    Raises:
        ConfigError: `out` holds something already.
    """
    if out.exists() and any(out.iterdir()):
        raise ConfigError(f"out: '{out}' is not empty; give a new folder, or remove it")
    os.environ.setdefault("WANDB_MODE", "offline")
    os.environ.setdefault("WANDB_SILENT", "true")
    out.mkdir(parents=True, exist_ok=True)
    return [
        JournalLogger(run=run),
        pl.loggers.TensorBoardLogger(out, name="", version="tensorboard"),
        pl.loggers.WandbLogger(project="downstream-validation", save_dir=out, mode=os.environ["WANDB_MODE"]),
    ]


def _share(step: int, steps: int) -> float:
    """The share of the learning rate at `step`."""
    warmup = max(1, steps // 20)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
