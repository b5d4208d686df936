"""A `MegatronModel` and its tokenizer as an `Encoder`."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from pipeline.encoders.devices import DTYPES, find_device, find_precision
from pipeline.encoders.digests import weights_digest
from pipeline.encoders.layers import find_layer
from pipeline.encoders.megatron import MegatronModel
from pipeline.encoders.megatron_tokens import MegatronTokens
from pipeline.encoders.options import EncoderOptions
from pipeline.encoders.protocol import Encoder, no_first
from pipeline.errors import DataError

VERSION = 1  # part of every digest: raise it when the same archive gives other numbers


class MegatronEncoder(Encoder):
    """A `MegatronModel` and its tokenizer. See `Encoder` for the attributes. Batches are padded, padding is masked."""

    def __init__(
        self, model: MegatronModel, tokens: MegatronTokens, options: EncoderOptions, most_tokens: int | None
    ) -> None:
        """Puts the model on its device and in evaluation mode.

        Args:
            model: with its weights, float32; layers above the chosen layer are removed.
            tokens: its tokenizer, of as many tokens as the model has, or fewer.
            options: device, precision, layer and pooling are used.
            most_tokens: of a sequence, special tokens counted, more than these; None for no limit.

        Raises:
            CheckpointError: the pooling is `cls`.
            ConfigError: the device or the layer is not there.
        """
        self.layer = find_layer(options.layer, model.options)
        self.device = find_device(options.device)
        self.precision = find_precision(options.precision, self.device)
        self.pooling = options.pooling
        if self.pooling == "cls":
            raise no_first("the pooling of .nemo archives is over residues alone")
        self.tokens, self.most_tokens = tokens, most_tokens
        special = len(tokens.before) + len(tokens.after)
        self.max_seq_length = None if most_tokens is None else most_tokens - special
        self.hidden_size = model.options.hidden_size
        if self.layer is not None:
            model.shorten(self.layer)
        self.model = model.to(self.device).eval()

    @cached_property
    def digest(self) -> str:  # type: ignore[override]  # mypy: read-only, though a cached property can be set
        """See `Encoder`. Computed when it is first used: all weights are read."""
        weights = weights_digest(self.model.state_dict().items())
        known = asdict(self.model.options)
        del known["initial_std"]  # which a trained model has no more of
        options = json.dumps(known, sort_keys=True)
        where = "" if self.precision == "fp32" else self.device.type  # as for other models: see `model_digest`
        what = ["megatron", VERSION, weights, options, self.tokens.digest, self.precision, where, self.layer]
        return hashlib.sha256("\n".join(map(str, what)).encode()).hexdigest()

    @torch.no_grad()
    def hidden_states(self, sequences: Sequence[str]) -> list[Tensor]:
        """See `Encoder.hidden_states`: tokens are those of the reference, in which unknown residues may share one.

        Raises:
            DataError: a sequence has no token, or more than the model takes.
        """
        before, after = self.tokens.before, self.tokens.after
        rows = [[*before, *self._ids(sequence), *after] for sequence in sequences]
        tokens = [torch.tensor(row, dtype=torch.long) for row in rows]
        ids = pad_sequence(tokens, batch_first=True, padding_value=self.tokens.padding).to(self.device)
        lengths = torch.tensor([len(row) for row in rows], device=self.device)
        mask = torch.arange(ids.shape[1], device=self.device) < lengths[:, None]
        padded = len({len(row) for row in rows}) > 1
        with self._autocast():
            states = self.model(ids, mask if padded else None)
        first, behind = len(before), len(after)
        return [found[first : len(row) - behind].float() for found, row in zip(states, rows, strict=True)]

    def per_character(self, sequence: str, states: Tensor) -> Tensor:
        """See `Encoder.per_character`: each of several unknown residues in a row has the state of their one token."""
        rows = self.tokens.token_of_character(sequence)
        return states if rows is None or len(rows) == len(states) else states[rows]

    def count_unknown(self, sequences: Sequence[str]) -> list[tuple[int, int]]:
        """See `Encoder.count_unknown`; of a protein, residues are counted."""
        return [self.tokens.count_unknown(sequence) for sequence in sequences]

    def untrained(self, seed: int) -> Encoder:
        """See `Encoder.untrained`."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = MegatronModel(self.model.options)
            model.draw()
        options = EncoderOptions(
            device=str(self.device), precision=self.precision, layer=self.layer, pooling=self.pooling
        )
        return MegatronEncoder(model.requires_grad_(False), self.tokens, options, self.most_tokens)

    def why_unknown(self, sequence: str) -> str:
        """See `Encoder.why_unknown`."""
        unknown, tokens = self.tokens.count_unknown(sequence.upper())
        return "; the tokenizer knows capital letters: write sequences in them" if unknown < tokens else ""

    def _ids(self, sequence: str) -> list[int]:
        ids = self.tokens.ids(sequence)
        if not ids:
            raise DataError(f"expected a sequence with at least one token, found {sequence[:60]!r}")
        most = math.inf if self.most_tokens is None else self.most_tokens
        special = len(self.tokens.before) + len(self.tokens.after)
        if len(ids) + special > most:
            found = f"found {len(ids)} for {sequence[:30]!r}, and {special} special ones"
            raise DataError(f"expected at most {most} tokens, as the model takes, {found}; set max_seq_length")
        return ids

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, DTYPES[self.precision])
