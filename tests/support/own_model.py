"""A model as people write their own: of a subclass of a transformers class, its configuration and tokenizer likewise.

Its layers differ from those of the class it is made from in their forward pass, their weights, and in what they keep of
a forward pass in plain attributes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import EsmConfig, EsmForMaskedLM, PreTrainedTokenizer

from pipeline.encoders.esm import VOCABULARY
from tests.support.models import RESIDUES


class OwnConfig(EsmConfig):
    """With settings that its ancestor does not know."""

    model_type = "own_esm"

    def __init__(self, bottleneck: int = 8, **options: Any) -> None:
        super().__init__(**options)
        self.bottleneck = bottleneck


class Gate(nn.Module):
    """Adds to hidden states what a bottleneck makes of them, by positions worked out once and kept."""

    scale: Tensor
    table: Tensor | None

    def __init__(self, width: int, bottleneck: int) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(width, bottleneck), nn.Linear(bottleneck, width)
        self.register_buffer("scale", torch.ones(width))
        self.table = None
        self.calls = 0

    def forward(self, states: Tensor) -> Tensor:
        self.calls += 1
        if self.table is None or self.table.shape[0] != states.shape[1]:
            self.table = torch.arange(states.shape[1], dtype=self.scale.dtype)[:, None] / 64
        gated: Tensor = self.up(torch.tanh(self.down(states))) * self.table * self.scale
        return states + gated


class OwnForMaskedLM(EsmForMaskedLM):
    """The gate stands behind the encoder, and before the head."""

    config_class = OwnConfig

    def __init__(self, config: OwnConfig) -> None:
        super().__init__(config)
        self.esm.add_module("gate", Gate(config.hidden_size, config.bottleneck))

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **options: Any) -> Any:
        output = super().forward(input_ids, attention_mask=attention_mask, **{**options, "output_hidden_states": True})
        last = self.esm.get_submodule("gate")(output.hidden_states[-1])
        output.logits = self.lm_head(last)
        output.hidden_states = (*output.hidden_states[:-1], last)
        return output


class OwnTokenizer(PreTrainedTokenizer):
    """One token per residue, written in Python alone."""

    vocab_files_names = {"vocab_file": "vocab.txt"}  # noqa: RUF012
    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012

    def __init__(self, vocab_file: str | None = None, **options: Any) -> None:
        words = Path(vocab_file).read_text().splitlines() if vocab_file else VOCABULARY
        self.words = {word: number for number, word in enumerate(words)}
        names = {"unk_token": "<unk>", "cls_token": "<cls>", "pad_token": "<pad>", "mask_token": "<mask>"}
        super().__init__(**{**names, "eos_token": "<eos>", **options})  # type: ignore[no-untyped-call]

    @property
    def vocab_size(self) -> int:
        return len(self.words)

    def get_vocab(self) -> dict[str, int]:
        return dict(self.words)

    def _tokenize(self, text: str, **_: Any) -> list[str]:
        return list(text.replace(" ", ""))

    def _convert_token_to_id(self, token: str) -> int:
        return self.words.get(token, self.words["<unk>"])

    def _convert_id_to_token(self, index: int) -> str:
        words: list[str] = list(self.words)
        return words[index]

    def build_inputs_with_special_tokens(self, ids: list[int], _second: list[int] | None = None) -> list[int]:
        return [self.words["<cls>"], *ids, self.words["<eos>"]]

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str]:
        path = Path(save_directory) / f"{filename_prefix or ''}vocab.txt"
        path.write_text("\n".join(self.words))
        return (str(path),)


class Collate:
    """An object among the hyper-parameters."""

    def __init__(self, tokenizer: OwnTokenizer) -> None:
        self.tokenizer = tokenizer

    def __call__(self, sequences: Sequence[str]) -> Any:
        return self.tokenizer(list(sequences), return_tensors="pt", padding=True)


class OwnModule(pl.LightningModule):
    """Masked language modelling, with a configuration and a function among its hyper-parameters."""

    def __init__(self, config: OwnConfig, collate: Collate | None = None, lr: float = 1e-2) -> None:
        super().__init__()
        self.model = OwnForMaskedLM(config)
        for parameter in self.model.parameters():  # away from the initial near-zero weights
            parameter.data.normal_(0, 0.2) if parameter.dim() > 1 else None
        self.tokenizer = OwnTokenizer()
        self.lr = lr
        self.save_hyperparameters(logger=False)

    def training_step(self, batch: Sequence[str], _index: int) -> Tensor:
        tokens = Collate(self.tokenizer)(batch)
        labels = tokens["input_ids"].clone()
        tokens["input_ids"] = torch.where(torch.rand(labels.shape) < 0.15, self.tokenizer.mask_token_id, labels)
        logits = self.model(**tokens).logits
        loss: Tensor = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        self.log("train_loss", loss, batch_size=len(batch))
        return loss

    def validation_step(self, batch: Sequence[str], _index: int) -> None:
        logits = self.model(**Collate(self.tokenizer)(batch)).logits
        self.log("val_loss", logits.square().mean(), batch_size=len(batch))

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=self.lr)


def make_config(**options: Any) -> OwnConfig:
    given: dict[str, Any] = {
        "vocab_size": len(VOCABULARY),
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "pad_token_id": 1,
        "mask_token_id": VOCABULARY.index("<mask>"),
        "max_position_embeddings": 66,
        "position_embedding_type": "rotary",
        "hidden_dropout_prob": 0.1,
    }
    return OwnConfig(**{**given, **options})


def make_module(seed: int = 0, **options: Any) -> OwnModule:
    pl.seed_everything(seed, verbose=False)
    return OwnModule(make_config(**options), Collate(OwnTokenizer()))


def make_function(config: Any) -> OwnForMaskedLM:
    """A factory that is no class: it is given the stored configuration as a dictionary."""
    return OwnForMaskedLM(OwnConfig.from_dict(config))


def loader(shuffle: bool = True, length: int = 12) -> DataLoader[Any]:
    """Sequences of one length, so that what is kept of a forward pass is used again."""
    generator = torch.Generator().manual_seed(3)
    letters = [[RESIDUES[i] for i in torch.randint(20, (length,), generator=generator)] for _ in range(16)]
    return DataLoader(["".join(row) for row in letters], batch_size=4, shuffle=shuffle)  # type: ignore[arg-type]


class Scaled(nn.Module):
    """A module with a method of its own, and a setting that no weight and no configuration holds."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.embedding = nn.Embedding(128, 4)
        nn.init.ones_(self.embedding.weight)

    def hidden_states(self, sequences: Sequence[str]) -> list[Tensor]:
        return [self.scale * self.embedding(torch.tensor([ord(letter) for letter in text])) for text in sequences]


def make_scaled_by_one() -> Scaled:
    return Scaled(1.0)


def make_scaled_by_two() -> Scaled:
    return Scaled(2.0)
