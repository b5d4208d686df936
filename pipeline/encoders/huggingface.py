"""A Hugging Face model and its tokenizer as an `Encoder`."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from functools import cached_property
from typing import Any
from uuid import uuid4

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils.rnn import pad_sequence

from pipeline.encoders.code_digest import no_reuse
from pipeline.encoders.description import fresh, quiet
from pipeline.encoders.devices import DTYPES, find_device, find_precision, send
from pipeline.encoders.digests import code_of, model_digest
from pipeline.encoders.in_step import InStep, SameNumber
from pipeline.encoders.layers import compile_layers, find_layer, shorten
from pipeline.encoders.options import EncoderOptions
from pipeline.encoders.packing import Packing
from pipeline.encoders.parts import whole
from pipeline.encoders.protocol import Encoder, no_first
from pipeline.encoders.tokens import Tokens
from pipeline.encoders.weights import weights_of
from pipeline.errors import CheckpointError

REMEDY = "give the module a method hidden_states(sequences), or name an encoder class in infer_target"


class HuggingFaceEncoder(Encoder):
    """A Hugging Face encoder and its tokenizer. See `Encoder` for the attributes.

    On a CPU in float32, and on a GPU in bf16 or fp16, sequences are packed into one row where the model gives the same
    hidden states so; else, and where the model runs as it is, they are padded to the longest of a batch. Padding is
    masked and not returned.
    """

    as_is: bool
    maker: str | None
    in_step: InStep | None

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        options: EncoderOptions = EncoderOptions(),
        as_is: bool = False,
        maker: str | None = "",
        in_step: InStep | None = None,
    ) -> None:
        """Puts the model on its device and in evaluation mode.

        Args:
            model: the encoder, without heads; layers above the chosen layer are removed.
            tokenizer: its tokenizer.
            options: device, precision, layer, pooling and `compile` are used, the last where not `as_is`.
            as_is: the model is of a class of the user's own, or in training: it stays where it is, keeps all layers and
                heads, and runs as its class has it. Float32 copies stand in for weights of another dtype.
            maker: a digest of the user's code that made the model; None where it cannot be known.
            in_step: runs a model in training whose weights are in parts on several ranks, in their own dtype.

        Raises:
            CheckpointError: the tokenizer's special tokens are not around the sequence, the model gives no hidden
                states, or none for the pooling.
            ConfigError: the device or the layer is not there, or the device has no such precision.
        """
        config: Any = model.config
        self.as_is, self.maker, self.in_step = as_is, maker, in_step
        own = in_step.device if in_step else next(model.parameters()).device if as_is else None
        self.layer: int | None = find_layer(options.layer, config)
        self.device: torch.device = own or find_device(options.device)
        self.precision: str = find_precision(options.precision, self.device)
        self.tokens: Tokens = Tokens(tokenizer)
        self._vocabulary: int | None = getattr(config, "vocab_size", None)
        self._check_ids(self.tokens.before + self.tokens.after)
        if not as_is:
            if self.layer is not None:
                shorten(model, self.layer, config)
            if hasattr(config, "use_cache"):
                config.use_cache = False  # the keys and values of a causal model, for a token to come
            model.to(self.device)
            if options.compile:
                compile_layers(model, config)
        self.compiled: bool = options.compile and not as_is
        self.model: nn.Module = model.eval()
        self._copies = _float_copies(model) if as_is and in_step is None else {}
        self.max_seq_length: int | None = limit_of(config, self.tokens)
        self.pooling: str = options.pooling
        same = SameNumber(in_step, lambda _: self._found_size())
        with same:
            size = None if as_is else getattr(config, "hidden_size", None) or config.d_model
            self.hidden_size: int = size or self._found_size()
            if self.pooling == "cls":
                self._check_first()
        same.fill_up(3 if self.pooling == "cls" else 1)
        same.raise_late()

    @cached_property
    def digest(self) -> str:  # type: ignore[override]  # mypy: read-only, though a cached property can be set
        """See `Encoder`. Computed when it is first used: all weights are read."""
        if self.in_step is not None:
            return f"in parts {uuid4().hex}"  # no rank has all weights
        how = self.precision if self.layer is None else f"{self.precision} layer {self.layer}"
        how += " compiled" if self.compiled else ""
        if self.as_is:
            how += f" {self._code or uuid4().hex}"
        return model_digest(self.model, {**weights_of(self.model), **self._copies}, self.tokens, how)

    @cached_property
    def _code(self) -> str | None:
        """What a model that runs as it is depends on beside its weights; None where it cannot be known."""
        code = code_of(self.model)
        return None if code is None or self.maker is None else f"{code} {self.maker}"

    @cached_property
    def reusable(self) -> bool:  # type: ignore[override]
        """See `Encoder`: the code of a model that runs as it is must be known."""
        return self.in_step is None and (not self.as_is or self._code is not None)

    @cached_property
    def notes(self) -> Sequence[str]:  # type: ignore[override]
        """See `Encoder`."""
        return () if self.reusable or self.in_step else (no_reuse(type(self.model), "embeddings are made"),)

    def hidden_states(self, sequences: Sequence[str]) -> list[Tensor]:
        """See `Encoder.hidden_states`."""
        first = len(self.tokens.before)
        return [states[first:] for states in self._states(sequences)]

    def states_from_first(self, sequences: Sequence[str]) -> list[Tensor]:
        """See `Encoder.states_from_first`."""
        return [torch.cat([states[:1], states[len(self.tokens.before) :]]) for states in self._states(sequences)]

    @torch.no_grad()  # no inference mode: a module in training may keep tensors of a forward pass and train with them
    def _states(self, sequences: Sequence[str]) -> list[Tensor]:
        """The hidden states of the special tokens before each sequence, and of its own tokens."""
        before, after = self.tokens.before, self.tokens.after
        rows = [[*before, *self.tokens.ids(sequence).tolist(), *after] for sequence in sequences]
        with self._autocast():
            states = self._padded(rows) if self._packing is None else self._packing(rows, self._forward)
        return [state[: len(row) - len(after)].float() for state, row in zip(states, rows, strict=True)]

    @cached_property
    def packs(self) -> bool:  # type: ignore[override]
        """See `Encoder`."""
        return self._packing is not None

    @cached_property
    @torch.no_grad()
    def _packing(self) -> Packing | None:
        """None for float32 on a GPU: the kernel for sequences of many lengths takes bf16 and fp16 alone."""
        full = self.precision == "fp32"
        if self.as_is or (self.device.type, full) not in (("cpu", True), ("cuda", False)):
            return None
        autocast = None if full else self._autocast
        return Packing.fit(self.model, self.tokens.ordinary(24), self.tokens.padding, autocast)

    def _padded(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """Hidden states of the rows padded to the longest, shape (rows, longest, hidden_size)."""
        tokens = [torch.tensor(row, dtype=torch.long) for row in rows]
        ids = pad_sequence(tokens, batch_first=True, padding_value=self.tokens.padding)
        mask = pad_sequence([torch.ones_like(row) for row in tokens], batch_first=True)
        return self._forward(input_ids=send(ids, self.device), attention_mask=send(mask, self.device))

    def _forward(self, **inputs: Tensor) -> Tensor:
        """The hidden states of the chosen layer."""
        if self.layer is None and not self.as_is:
            last: Tensor = self.model(**inputs).last_hidden_state
            return last
        options = {**inputs, "output_hidden_states": True}
        if self.in_step is not None:
            output = self.in_step(self.model, **options)
        elif self._copies:
            output = functional_call(self.model, self._copies, kwargs=options)
        else:
            output = self.model(**options)
        states = output.get("hidden_states") if hasattr(output, "get") else None
        if states is None:
            name = type(self.model).__name__
            raise CheckpointError(
                f"{name}: expected hidden_states in its output, found {type(output).__name__}; {REMEDY}"
            )
        chosen: Tensor = whole(states[-1 if self.layer is None else self.layer])
        if chosen.shape[1] != (length := inputs["input_ids"].shape[1]):
            found = (
                f"expected hidden states of {length} tokens, found {chosen.shape[1]}, as sequence parallelism has them"
            )
            raise CheckpointError(f"{type(self.model).__name__}: {found}; {REMEDY}")
        return chosen

    @torch.no_grad()
    def _check_first(self) -> None:
        """Raises CheckpointError where no special token is before a sequence, or its state knows nothing of that."""
        if not self.tokens.before:
            raise no_first(f"the tokenizer, a {type(self.tokens.tokenizer).__name__}, puts none there")
        with self._autocast():
            states = [self._padded([[*self.tokens.before, word]])[0, 0] for word in self.tokens.ordinary(2)]
        if len(states) == 2 and torch.equal(*states):
            raise no_first(f"in a {type(self.model).__name__} that is the same for every sequence: it sees none of it")

    @torch.no_grad()
    def _found_size(self) -> int:
        """The width of the hidden states of one token."""
        row = [*self.tokens.before, *self.tokens.ordinary(1), *self.tokens.after]
        with self._autocast():
            return int(self._padded([row]).shape[-1])

    def count_unknown(self, sequences: Sequence[str]) -> list[tuple[int, int]]:
        """See `Encoder.count_unknown`. Raises CheckpointError where the model has no such tokens."""
        ids = [self.tokens.ids(sequence) for sequence in sequences]
        self._check_ids([int(row.max()) for row in ids if len(row)])
        return [(int((row == self.tokens.unknown).sum()), len(row)) for row in ids]

    def untrained(self, seed: int) -> Encoder | None:
        """See `Encoder.untrained`. Raises CheckpointError where a class of the user's own makes no model again."""
        config: Any = deepcopy(self.model.config)
        with torch.random.fork_rng(devices=[]), quiet():
            torch.manual_seed(seed)
            try:
                model = type(self.model)(config).float() if self.as_is else fresh(config)[0]
            except Exception as error:  # the user's class may raise anything
                kind = type(self.model).__name__
                remedy = "leave baseline out"
                raise CheckpointError(f"baseline: {kind}(config) gives no model ({error}); {remedy}") from error
        same = {name: getattr(self, name) for name in ("precision", "layer", "pooling")}
        options = EncoderOptions(device=str(self.device), compile=self.compiled, **same)
        return HuggingFaceEncoder(model.to(self.device), self.tokens.tokenizer, options, self.as_is, self.maker)

    def why_unknown(self, sequence: str) -> str:
        """See `Encoder.why_unknown`."""
        return self.tokens.why_unknown(sequence)

    def _check_ids(self, ids: Sequence[int]) -> None:
        if self._vocabulary is not None and max(ids, default=0) >= self._vocabulary:
            expected = f"expected ids below {self._vocabulary}, as the model has"
            remedy = "take the tokenizer's files that were written with the model"
            raise CheckpointError(f"ckpt: the tokenizer: {expected}, found {max(ids)}; {remedy}")

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, DTYPES[self.precision])


def _float_copies(model: nn.Module) -> dict[str, Tensor]:
    """Float32 copies of the weights and buffers that are floating-point numbers of another dtype."""
    named = [*model.named_parameters(), *model.named_buffers()]
    others = [(name, value) for name, value in named if value.is_floating_point() and value.dtype != torch.float32]
    return {name: value.detach().float() for name, value in others}


def limit_of(config: Any, tokens: Tokens) -> int | None:
    """The longest sequence in characters that a model and its tokenizer take; None for no limit.

    Models with relative positions (T5) have no limit. Those that number positions from behind the padding index (ESM,
    RoBERTa) lose `pad_token_id + 1` of `max_position_embeddings`; ESM with rotary positions was trained with that
    limit too. Decoders have other names for it.
    """
    limits: list[int] = []
    special = len(tokens.before + tokens.after)
    names = ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx")
    positions = next((value for value in (getattr(config, name, None) for name in names) if value), None)
    if config.model_type in ("t5", "mt5", "umt5"):
        return None
    if positions and config.model_type in ("esm", "roberta", "xlm-roberta", "camembert", "longformer"):
        positions -= (config.pad_token_id or 0) + 1
    if positions:
        limits.append(positions)
    if tokens.tokenizer.model_max_length < 10**9:
        limits.append(tokens.tokenizer.model_max_length)
    if not limits:
        return None
    if min(limits) <= special:
        raise CheckpointError(f"the model takes {min(limits)} tokens, of which {special} are special: none is left")
    return int(min(limits)) - special
