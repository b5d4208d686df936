"""Pre-trains a small ESM by masked language modelling, and measures on the way what its embeddings are worth.

    python examples/pretrain.py [--steps 600] [--config configs/pretrain.yaml] [--out FOLDER]

A Lightning script like any other: the curve takes the two lines that are marked (1) and (2). `mlflow run . -e pretrain`
runs it too. Run it from the root of the project.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR
from torch.utils.data import DataLoader, Dataset
from transformers import DataCollatorForLanguageModeling, EsmConfig, EsmForMaskedLM

from pipeline import (
    Config,
    JournalLogger,
    read_config,
    setup_dwnstr_task_validation_callbacks,  # (1)
)
from pipeline.command.program import check_tracking, links, run_program
from pipeline.data import tables
from pipeline.encoders.esm import VOCABULARY, make_tokenizer
from pipeline.errors import ConfigError
from pipeline.load import load_all
from pipeline.report.tables import step_table
from pipeline.tracking.journal_run import JournalRun
from pipeline.tracking.runs import open_run
from pipeline.validation import check


@dataclass(frozen=True)
class Settings:
    """Size of the model and of its training. `crop` is in residues: a member of the sample family is as long."""

    layers: int = 2
    hidden_size: int = 96
    heads: int = 6
    steps: int = 600
    validations: int = 6
    batch_size: int = 32
    crop: int = 40
    lr: float = 0.003
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
        self.model.esm.contact_head.requires_grad_(False)  # it has no part in the loss, and DDP waits for gradients

    def training_step(self, batch: Mapping[str, Tensor], _index: int) -> Tensor:
        """The loss at the masked residues."""
        loss: Tensor = self.model(**batch).loss
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Mapping[str, Tensor], _index: int) -> None:
        """The loss on sequences that are not trained on."""
        self.log("val_loss", self.model(**batch).loss, prog_bar=True, batch_size=len(batch["input_ids"]))

    def configure_optimizers(self) -> Any:
        """AdamW; warm-up over 5 % of the steps, then a cosine to zero."""
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.settings.lr, betas=(0.9, 0.98), weight_decay=0.01)
        warmup = max(1, self.settings.steps // 20)
        schedule = SequentialLR(
            optimizer,
            [
                LinearLR(optimizer, start_factor=1 / warmup, total_iters=warmup - 1),
                CosineAnnealingLR(optimizer, T_max=max(1, self.settings.steps - warmup)),
            ],
            milestones=[warmup],
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def read_sequences(folder: Path, files: str, max_length: int = 1022) -> list[str]:
    """The column `sequence` of CSV files, without empty ones and those over `max_length` characters."""
    table = tables.read(folder, files, ["sequence"])
    return [text for text in table.columns["sequence"] if 0 < len(text) <= max_length]


def pretrain(
    sequences: Sequence[str],
    out: Path,
    settings: Settings,
    config: Config,
    loggers: Sequence[Any] = (),
    callbacks: Sequence[Any] = (),
) -> list[Any]:
    """Trains from scratch, measuring as `config` says, and writes checkpoints, model and tokenizer to `out`.

    Returns:
        The `DownstreamValidation`, which has the curve; none where `config` is not enabled.

    Raises:
        ConfigError: there are too few sequences.
    """
    pl.seed_everything(settings.seed, verbose=False)
    module = MaskedLanguageModel(settings)
    train, val = make_loaders(sequences, module.tokenizer, settings)
    downstream: list[Any] = setup_dwnstr_task_validation_callbacks(config)  # (2)
    interval = max(1, settings.steps // settings.validations)
    trainer = pl.Trainer(
        devices=os.environ.get("LOCAL_WORLD_SIZE", "auto"),  # of torchrun: on CPUs Lightning would take one alone
        max_steps=settings.steps,
        val_check_interval=interval,
        log_every_n_steps=min(50, interval),
        check_val_every_n_epoch=None,
        gradient_clip_val=1.0,
        logger=list(loggers),
        callbacks=[
            *downstream,
            *callbacks,
            pl.callbacks.ModelCheckpoint(out / "checkpoints", "{step}", monitor="step", mode="max", save_top_k=-1),
        ],
        default_root_dir=out,
        enable_model_summary=False,
    )
    trainer.fit(module, train, val)
    if trainer.is_global_zero:
        module.model.save_pretrained(out)
        module.tokenizer.save_pretrained(out)
    return downstream


def count_kept(sequences: Sequence[str], settings: Settings) -> int:
    """How many of the sequences are kept for validation. Raises ConfigError where too few are left to train on."""
    kept = max(1, len(sequences) // 20)
    if len(sequences) - kept < settings.batch_size:
        expected = f"expected more than {settings.batch_size} sequences to train on"
        raise ConfigError(f"data: {expected}, found {len(sequences)}")
    return kept


def make_loaders(sequences: Sequence[str], tokenizer: Any, settings: Settings) -> tuple[Any, Any]:
    """Batches to train on, and of the first twentieth of the sequences, which are kept for validation."""
    kept = count_kept(sequences, settings)
    collate = DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.15)
    options: dict[str, Any] = {"batch_size": settings.batch_size, "collate_fn": collate}
    train = Windows(sequences[kept:], tokenizer, settings.crop)
    val = Windows(sequences[:kept], tokenizer, settings.crop)
    return DataLoader(train, shuffle=True, drop_last=True, **options), DataLoader(val, **options)


def make_loggers(out: Path, run: JournalRun) -> list[Any]:
    """Loggers for MLflow, TensorBoard and W&B, which stays offline, without an account, unless `WANDB_MODE` is set."""
    os.environ.setdefault("WANDB_MODE", "offline")
    os.environ.setdefault("WANDB_SILENT", "true")
    out.mkdir(parents=True, exist_ok=True)
    return [
        JournalLogger(run=run),
        pl.loggers.TensorBoardLogger(out, name="", version="tensorboard"),
        pl.loggers.WandbLogger(project="downstream-validation", save_dir=out, mode=os.environ["WANDB_MODE"]),
    ]


def run(options: argparse.Namespace) -> None:
    """Trains and measures in an MLflow run, and prints the curve and where everything is, on the first rank."""
    check_tracking(options.tracking_uri)
    for name in ("steps", "validations"):
        if getattr(options, name) < 1:
            raise ConfigError(f"{name}: expected at least 1, found {getattr(options, name)}")
    logging.getLogger("pipeline.validation").setLevel(logging.WARNING)  # else every measurement logs its stages
    config = read_config(options.config, options.overrides)
    sequences = read_sequences(Path(options.data), options.files)
    settings = Settings(steps=options.steps, validations=options.validations, seed=options.seed)
    count_kept(sequences, settings)
    check(config.dataset)
    load_all(config.dataset)  # a mistake is found on every rank, before there is a run that would have failed for it
    if getattr(pl.utilities.rank_zero_only, "rank", 0) > 0:  # the first has the MLflow run, the loggers and `out`
        pretrain(sequences, Path(options.out or "pretrained"), settings, config)
        return
    if options.out and Path(options.out).exists() and any(Path(options.out).iterdir()):
        raise ConfigError(f"out: '{options.out}' is not empty; give a new folder, or remove it")
    name = f"pretrain seed={settings.seed} steps={settings.steps} on {config.title}"
    with open_run(name, config, options.tracking_uri) as opened:
        out = Path(options.out or f"pretrained/{os.environ.get('MLFLOW_RUN_ID', opened.run.key)[:8]}")
        loggers = make_loggers(out, opened.run)
        measured = pretrain(sequences, out, settings, config, loggers)
        for callback in measured:
            opened.run.describe(callback.summary)
        loggers[-1].experiment.finish()  # W&B's process would still be writing when the program ends
    for callback in measured:
        print(step_table(callback.curve, config.headlines).text())
        if callback.overview:
            print(callback.overview.text())
    print(f"Measure it:     mlflow run . --env-manager local -P ckpt={out}")
    print(f"All of them:    mlflow run . --env-manager local -P ckpt='{out}/checkpoints/*' -P config={options.config}")
    print(f"TensorBoard:    tensorboard --logdir {out}")
    print(f"W&B:            wandb sync {out}/wandb/offline-run-*")
    print("\n".join(links(opened)))


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the script. Returns its exit code: 0, or 2 for a user's mistake."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw, allow_abbrev=False)
    parser.add_argument("--config", default="configs/pretrain.yaml", help="YAML file with model.dwnstr_task_validation")
    parser.add_argument("--overrides", default="", help="dot-list, such as 'dataset.num_epochs=3 device=cpu'")
    parser.add_argument("--data", default="sample/data/family/train", help="folder of CSV files")
    parser.add_argument("--files", default="x000", help="file or range of files with a column `sequence`")
    parser.add_argument("--out", default="", help="new folder for checkpoints and model; by default pretrained/RUN")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--validations", type=int, default=6, help="how often it is measured on the way")
    parser.add_argument("--seed", type=int, default=1234)
    parser.add_argument("--tracking-uri", "--tracking_uri", default="", help="MLflow server or database")
    return run_program(parser, run, arguments)


if __name__ == "__main__":
    sys.exit(main())
