"""A model of its own class, whose file is saved beside its weights; it imports nothing of this project."""

from __future__ import annotations

from typing import Any

import torch
from transformers import EsmConfig, EsmForMaskedLM, EsmTokenizer


class RemoteConfig(EsmConfig):
    """With a setting that its ancestor does not know."""

    model_type = "remote_esm"

    def __init__(self, gain: float = 1.0, **options: Any) -> None:
        super().__init__(**options)
        self.gain = gain


class RemoteForMaskedLM(EsmForMaskedLM):
    """Multiplies the last hidden states by a weight of its own."""

    config_class = RemoteConfig

    def __init__(self, config: RemoteConfig) -> None:
        super().__init__(config)
        self.own_gain = torch.nn.Parameter(torch.full((config.hidden_size,), config.gain))

    def forward(self, *inputs: Any, **options: Any) -> Any:
        output = super().forward(*inputs, **{**options, "output_hidden_states": True})
        output.hidden_states = (*output.hidden_states[:-1], output.hidden_states[-1] * self.own_gain)
        return output


class RemoteTokenizer(EsmTokenizer):
    """By another name."""
