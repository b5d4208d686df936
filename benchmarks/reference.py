"""The reference's procedure, written plainly: what it does at each validation, to be timed beside ours.

Sequences go through the model in file order, in batches padded to the longest. Each example is a row of a `Dataset`,
padded to `max_seq_length`, and comes through a `DataLoader` with one worker. Losses are means over unmasked positions:
what the reference computes is wrong (it multiplies logits by the mask), and to be wrong takes as long.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset

from pipeline import HuggingFaceEncoder

BATCH_SIZE = 128


@torch.inference_mode()
def embed(encoder: HuggingFaceEncoder, sequences: Sequence[str], batch_size: int = BATCH_SIZE) -> list[Tensor]:
    """The hidden states of each sequence, shape (length, hidden_size): batches in file order, padded to the longest."""
    before, after, states = len(encoder.tokens.before), len(encoder.tokens.after), list[Tensor]()
    padding = encoder.tokens.padding
    for begin in range(0, len(sequences), batch_size):
        rows = [token_ids(encoder, text) for text in sequences[begin : begin + batch_size]]
        longest = max(map(len, rows))
        ids = torch.tensor([row + [padding] * (longest - len(row)) for row in rows])
        mask = (torch.arange(longest)[None] < torch.tensor([len(row) for row in rows])[:, None]).long()
        output = encoder.model(input_ids=ids, attention_mask=mask).last_hidden_state
        states += [state[before : len(row) - after].clone() for state, row in zip(output, rows, strict=True)]
    return states


def token_ids(encoder: HuggingFaceEncoder, text: str) -> list[int]:
    """With special tokens."""
    return [*encoder.tokens.before, *encoder.tokens.ids(text).tolist(), *encoder.tokens.after]


class TokenData(Dataset[dict[str, Any]]):
    """A row per sequence: everything padded to `max_seq_length`, labels one-hot."""

    def __init__(
        self,
        states: Sequence[Tensor],
        labels: Sequence[npt.NDArray[Any]],
        masks: Sequence[npt.NDArray[np.bool_]],
        classes: int,
        max_seq_length: int,
    ) -> None:
        """States of shape (length, hidden_size), labels and masks of shape (length,)."""
        self.rows = list(zip(states, labels, masks, strict=True))
        self.eye = np.eye(classes, dtype=np.float32)
        self.max_seq_length = max_seq_length

    def __len__(self) -> int:
        """How many sequences."""
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Shapes (max_seq_length, hidden_size), (max_seq_length, classes) and (max_seq_length,)."""
        state, label, mask = self.rows[index]
        rest = self.max_seq_length - len(state)
        one_hot = torch.from_numpy(self.eye[np.where(mask, label, 0)])
        return {
            "states": functional.pad(state, (0, 0, 0, rest)),
            "labels": functional.pad(one_hot, (0, 0, 0, rest)),
            "mask": functional.pad(torch.from_numpy(mask).float(), (0, rest)),
            "length": len(state),
        }


class ValueData(Dataset[dict[str, Any]]):
    """A row per sequence: its mean hidden state and its label."""

    def __init__(self, pooled: Tensor, labels: Tensor) -> None:
        """Shapes (sequences, hidden_size) and (sequences,)."""
        self.pooled, self.labels = pooled, labels

    def __len__(self) -> int:
        """How many sequences."""
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Shapes (hidden_size,) and ()."""
        return {"states": self.pooled[index], "labels": self.labels[index]}


class ConvNet(nn.Module):
    """2-D convolutions over padded batches."""

    def __init__(self, hidden_size: int, classes: int) -> None:
        """One head."""
        super().__init__()
        self.body = nn.Conv2d(hidden_size, 32, (7, 1), padding=(3, 0))
        self.dropout = nn.Dropout(0.25)
        self.head = nn.Conv2d(32, classes, (7, 1), padding=(3, 0))

    def forward(self, states: Tensor, inside: Tensor) -> Tensor:
        """Shape (n, longest, hidden_size) to (n, longest, classes); `inside`, shape (n, longest), is 0 in padding."""
        hidden = functional.relu(self.body(states.permute(0, 2, 1).unsqueeze(-1)))
        hidden = self.dropout(hidden) * inside[:, None, :, None]
        output: Tensor = self.head(hidden).squeeze(-1).permute(0, 2, 1)
        return output


def mlp(hidden_size: int, outputs: int) -> nn.Sequential:
    """Hidden layers of `hidden_size`, 256 and 128."""
    widths, layers = [hidden_size, hidden_size, 256, 128], list[nn.Module]()
    for into, out in pairwise(widths):
        layers += [nn.Linear(into, out), nn.ReLU(), nn.Dropout(0.1)]
    return nn.Sequential(*layers, nn.Linear(widths[-1], outputs))


def token_loss(head: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Cross-entropy over unmasked positions."""
    longest = int(batch["length"].max())
    inside = (torch.arange(longest)[None] < batch["length"][:, None]).float()
    output = head(batch["states"][:, :longest], inside)
    each = functional.cross_entropy(
        output.permute(0, 2, 1), batch["labels"][:, :longest].permute(0, 2, 1), reduction="none"
    )
    mask = batch["mask"][:, :longest]
    return (each * mask).sum() / mask.sum()


def value_loss(head: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Squared error."""
    return functional.mse_loss(head(batch["states"])[:, 0], batch["labels"].float())


def epochs(head: nn.Module, data: Dataset[Any], lr: float, persistent: bool = False) -> Iterator[float]:
    """Trains an epoch whenever the next is asked for; its mean loss."""
    loader = DataLoader(data, batch_size=BATCH_SIZE, num_workers=1, persistent_workers=persistent)
    adam, loss_of = torch.optim.Adam(head.parameters(), lr=lr), token_loss if isinstance(head, ConvNet) else value_loss
    while True:
        total = 0.0
        for batch in loader:
            loss = loss_of(head, batch)
            adam.zero_grad()
            loss.backward()
            adam.step()
            total += loss.item() * len(batch["states"])
        yield total / len(data)  # type: ignore[arg-type]


@torch.no_grad()
def score(head: nn.Module, data: Dataset[Any]) -> float:
    """Accuracy over unmasked positions, or the mean squared error, over the whole of `data`."""
    wrong, count = 0.0, 0.0
    for batch in DataLoader(data, batch_size=BATCH_SIZE, num_workers=1):
        if isinstance(head, ConvNet):
            inside = (torch.arange(batch["states"].shape[1])[None] < batch["length"][:, None]).float()
            missed = head(batch["states"], inside).argmax(2) != batch["labels"].argmax(2)
            wrong, count = wrong + float((missed * batch["mask"]).sum()), count + float(batch["mask"].sum())
        else:
            wrong += float(((head(batch["states"])[:, 0] - batch["labels"]) ** 2).sum())
            count += len(batch["labels"])
    return wrong / count if not isinstance(head, ConvNet) else 1 - wrong / count
