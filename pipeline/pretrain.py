"""Pre-trains a small ESM on protein sequences by masked language modelling: the checkpoint that the project ships.

A plain loop over transformers' own `EsmForMaskedLM`, saved as a Hugging Face folder that `ckpt` takes.
"""

from __future__ import annotations

import logging
import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from pipeline import tables
from pipeline.errors import ConfigError
from pipeline.progress import progress
from pipeline.tracking import NullTracker, Tracker

logger = logging.getLogger(__name__)

# The vocabulary of ESM-2.
VOCABULARY = ["<cls>", "<pad>", "<eos>", "<unk>", *"LAGVSERTIDPKQNFYMHWCXBUZO.-", "<null_1>", "<mask>"]
SPECIAL = 4  # the first tokens, which are never masked
MASKED = 0.15


@dataclass(frozen=True)
class Settings:
    """Size of the model and length of its training."""

    layers: int = 4
    hidden_size: int = 96
    heads: int = 6
    steps: int = 1000
    batch_size: int = 32
    lr: float = 3e-3
    seed: int = 1234


def read_sequences(folder: Path, files: str, max_length: int = 1022) -> list[str]:
    """The column `sequence` of CSV files, sequences over `max_length` left out."""
    table = tables.read(folder, files, ["sequence"])
    return [text for text in table.columns["sequence"] if 0 < len(text) <= max_length]


def pretrain(sequences: Sequence[str], out: Path, settings: Settings, tracker: Tracker | None = None) -> float:
    """Trains from scratch and writes model and tokenizer to `out`. Returns the mean loss of the last 50 steps.

    Raises:
        ConfigError: `out` holds something already, or there are no sequences.
    """
    tracker = tracker or NullTracker()
    if out.exists() and any(out.iterdir()):
        raise ConfigError(f"out: '{out}' is not empty; give a new folder, or remove it")
    if not sequences:
        raise ConfigError("data: expected sequences to train on, found none")
    model, tokenizer = _fresh(settings)
    generator = torch.Generator().manual_seed(settings.seed)
    ids = [torch.tensor(tokenizer(sequence)["input_ids"]) for sequence in sequences]
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.lr, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, settings.steps))
    losses: list[float] = []
    model.train()
    with progress("pretrain", settings.steps, "steps") as advance:
        for step in range(settings.steps):
            some = torch.randint(len(ids), (settings.batch_size,), generator=generator)
            tokens, labels = _mask([ids[index] for index in some], generator)
            loss = model(input_ids=tokens, attention_mask=(tokens != 1).long(), labels=labels).loss
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
            if (step + 1) % 50 == 0:
                tracker.metrics({"pretrain_loss": sum(losses[-50:]) / 50}, step=step + 1)
            advance(1)
    tokenizer.save_pretrained(out)
    model.save_pretrained(out)
    last = sum(losses[-50:]) / len(losses[-50:])
    logger.info(
        "pretrain    %d steps, loss %.3f (perplexity %.2f), saved to %s", len(losses), last, math.exp(last), out
    )
    return last


def _fresh(settings: Settings) -> tuple[Any, Any]:
    from transformers import EsmConfig, EsmForMaskedLM, EsmTokenizer

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "vocab.txt"
        path.write_text("\n".join(VOCABULARY), encoding="utf-8")
        tokenizer = EsmTokenizer(str(path))
    torch.manual_seed(settings.seed)
    config = EsmConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=settings.hidden_size,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        intermediate_size=4 * settings.hidden_size,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        pad_token_id=1,
        mask_token_id=len(VOCABULARY) - 1,
        max_position_embeddings=1026,
        position_embedding_type="rotary",
        token_dropout=True,
    )
    return EsmForMaskedLM(config), tokenizer


def _mask(rows: list[Tensor], generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """BERT's masking (Devlin et al. 2019): of 15 % of the residues, 80 % are masked, 10 % replaced, 10 % kept.

    Returns:
        Token ids and labels, each of shape (sequences, longest); labels are -100 where nothing is to be predicted.
    """
    tokens = pad_sequence(rows, batch_first=True, padding_value=1)
    chosen = (torch.rand(tokens.shape, generator=generator) < MASKED) & (tokens >= SPECIAL)
    labels = tokens.masked_fill(~chosen, -100)
    fate = torch.rand(tokens.shape, generator=generator)
    other = torch.randint(SPECIAL, SPECIAL + 20, tokens.shape, generator=generator)
    masked = tokens.masked_fill(chosen & (fate < 0.8), len(VOCABULARY) - 1)
    return torch.where(chosen & (fate >= 0.9), other, masked), labels


def _rate(step: int, steps: int) -> float:
    """Linear warm-up over 5 % of the steps, then a cosine to zero: the fraction of the learning rate at `step`."""
    warmup = max(1, steps // 20)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
