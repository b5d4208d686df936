"""An encoder whose hidden states are known."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from pipeline.encoders.protocol import Encoder
from tests.support.models import RESIDUES


class FakeEncoder(Encoder):
    """Hidden states worked out by hand: one-hot residues, then noise that depends on the sequence alone."""

    device = torch.device("cpu")

    def __init__(self, hidden_size: int = 24, name: str = "fake") -> None:
        self.hidden_size = hidden_size
        self.digest = f"{name}-{hidden_size}"
        self.seen: list[str] = []

    def hidden_states(self, sequences: Sequence[str]) -> list[Tensor]:
        self.seen += sequences
        return [self.state(sequence) for sequence in sequences]

    def state(self, sequence: str) -> Tensor:
        """Shape (length, hidden_size)."""
        index = torch.tensor([RESIDUES.find(letter) for letter in sequence])
        one_hot = torch.nn.functional.one_hot(index.clamp(min=0), 20).float()
        seed = int.from_bytes(hashlib.sha256(sequence.encode()).digest()[:4], "big")
        noise = torch.randn(len(sequence), self.hidden_size - 20, generator=torch.Generator().manual_seed(seed))
        return torch.cat([one_hot, 0.1 * noise], 1)

    def count_unknown(self, sequences: Sequence[str]) -> list[tuple[int, int]]:
        return [(sum(letter not in RESIDUES for letter in text), len(text)) for text in sequences]
