"""Sequences one after another in a single row, so that a batch holds no padding.

Linear layers then see real tokens alone, and attention runs within each sequence, without a mask. A model takes part if
its hidden states on a probe stay the same: positions must be an argument, absolute (ESM, BERT, BART) or relative (T5),
and attention plain, or causal (GPT-2, Llama). An activation that the model computes in several operations, each over
all values of a layer, is replaced by a single operation where that gives the same, too.

On a CPU attention is computed for neighbours of equal length at a time; on a GPU, in bf16 or fp16, for all sequences of
the row by one kernel, `torch.nn.attention.varlen`, which takes no bias of relative positions: T5 is padded there.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, groupby, product
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.encoders.devices import send
from pipeline.encoders.internals import attention_of, attention_set, has_compiled_parts

NAME = "within_sequences"  # of the attention, among those that transformers knows
# The arguments that transformers gives to an attention function and that do not change the result here.
HARMLESS = {"position_ids", "use_cache", "output_attentions", "output_hidden_states", "return_dict"}
TOLERANCE, GPU_TOLERANCE = 1e-5, 1e-4  # of the probe in float32; a GPU adds up in another order for each shape
HALF_TOLERANCE = (
    0.05  # of the hidden states' norm, in bf16 and fp16; what another context makes of them is far above it
)

logger = logging.getLogger(__name__)

_given_up: set[type[nn.Module]] = set()  # classes of models that the user was told of


@dataclass(frozen=True)
class _Row:
    """The lengths of the sequences in the row; on a GPU where each begins, and the last ends, (sequences + 1,)."""

    lengths: Sequence[int]
    starts: Tensor | None


_row: ContextVar[_Row] = ContextVar("the sequences in the row")


class Packing:
    """Runs a model on packed sequences."""

    def __init__(self, model: nn.Module, first: int, fused: Mapping[Any, Callable[[Tensor], Tensor]]) -> None:
        """See `fit`; `first` numbers a sequence's first position, `fused` are forward passes to replace others."""
        self.model = model
        self.first = first
        self.fused = fused
        inner = [module for module in model.modules() if module is not model]
        # BART's own embedding of positions takes them, but the encoder has no argument for them
        self._embeddings = [part for part in inner if isinstance(part, nn.Embedding) and _takes(part, "position_ids")]
        self._biases: list[Any] = [part for part in inner if hasattr(part, "compute_bias")]  # T5's relative positions

    @classmethod
    def fit(
        cls,
        model: nn.Module,
        ids: Sequence[int],
        padding: int,
        autocast: Callable[[], AbstractContextManager[Any]] | None = None,
    ) -> Packing | None:
        """The packing of a model in evaluation mode; None, and a log line, where it does not give the same.

        Args:
            model: a Hugging Face encoder, in float32.
            ids: some tokens to try it on, no special ones among them.
            padding: the padding token; positions may be numbered from behind it.
            autocast: within what it will run, where that is bf16 or fp16; tried too, when float32 gives the same.
        """
        if attention_of(model.config) != "sdpa" or len(ids) < 2:
            _give_up(model, "its attention is not torch's, sdpa" if len(ids) >= 2 else "it has no tokens to try")
            return None
        rows = [[*ids], [*ids[: len(ids) // 2]], [*reversed(ids)]]  # the last has the length of the first
        contexts = [(nullcontext, _close)] if autocast is None else [(nullcontext, _close), (autocast, _close_in_half)]
        fused, reason = fused_forwards(model), ""
        for fusing, first in product([fused, {}] if fused else [{}], (0, padding + 1)):
            packing = cls(model, first, fusing)
            try:
                if all(packing._agrees(rows, context, close) for context, close in contexts):
                    return packing
            except Exception as error:  # whatever a model has against it: in the end it is padded
                if _is_out_of_memory(error):
                    raise
                logger.debug("packing of %s", type(model).__name__, exc_info=True)
                reason = f"{type(error).__name__}: {error}"
        _give_up(model, reason or "its hidden states become others")
        return None

    def _agrees(
        self,
        rows: Sequence[Sequence[int]],
        context: Callable[[], AbstractContextManager[Any]],
        close: Callable[[Tensor, Tensor], bool],
    ) -> bool:
        """Whether each row has the same hidden states alone and packed."""
        device = next(self.model.parameters()).device

        def forward(**inputs: Tensor) -> Tensor:
            states: Tensor = self.model(**inputs).last_hidden_state
            return states

        with context():
            alone = [forward(input_ids=torch.tensor([row], device=device))[0] for row in rows]
            return all(map(close, self(rows, forward), alone))

    def __call__(self, rows: Sequence[Sequence[int]], forward: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        """The hidden states of each row of token ids, each of shape (tokens, hidden_size).

        Args:
            rows: token ids.
            forward: calls the model with keywords, and gives hidden states of shape (1, tokens of all, hidden_size).
        """
        lengths = [len(row) for row in rows]
        device = next(self.model.parameters()).device
        ids = send(torch.tensor([[token for row in rows for token in row]]), device)
        positions = send(torch.cat([torch.arange(self.first, self.first + length) for length in lengths]), device)
        inputs = {"input_ids": ids, "position_ids": positions[None]}
        if _takes(self.model, "token_type_ids") and bool(getattr(self.model.config, "type_vocab_size", 0)):
            inputs["token_type_ids"] = torch.zeros_like(ids)  # a model's own are as many as it has positions
        starts = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32) if device.type == "cuda" else None
        row = _Row(lengths, None if starts is None else send(starts, device))
        with self._given(positions, max(lengths)), _within(self.model, row):
            states: Tensor = forward(**inputs)
        found: tuple[Tensor, ...] = states[0].split(lengths)
        return found

    @contextmanager
    def _given(self, positions: Tensor, longest: int) -> Iterator[None]:
        """Gives positions to modules that would count on from the first to the last token of the row, and fuses others.

        A bias of relative positions is computed for the longest sequence: a shorter sequence takes its corner.
        """

        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            return args, {**kwargs, "position_ids": positions}

        with ExitStack() as stack:
            for embedding in self._embeddings:
                stack.callback(embedding.register_forward_pre_hook(hook, with_kwargs=True).remove)
            for bias in self._biases:
                compute = bias.compute_bias
                bias.compute_bias = lambda *_, compute=compute, **options: compute(longest, longest, **options)
                stack.callback(delattr, bias, "compute_bias")
            for module, forward in self.fused.items():
                module.forward = forward
                stack.callback(delattr, module, "forward")
            yield


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    position_bias: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention within each sequence of the row, as transformers calls it; neighbours of equal length go together.

    `query`, `key` and `value` have the shape (1, heads, tokens of all, head size); several heads of `query` may share
    one of the others. `position_bias` is added to the scores of the longest sequence, shape (1, heads, longest,
    longest).

    Returns:
        Shape (1, tokens of all, heads, head size).

    Raises:
        ValueError: a mask, dropout or another argument would change the result.
    """
    given = {name for name, value in others.items() if value is not None and value is not False}
    strange = sorted(given - HARMLESS)
    if strange or attention_mask is not None or dropout:
        raise ValueError(f"attention with {', '.join(strange) or 'a mask or dropout'}")
    causal, sharing = bool(getattr(module, "is_causal", False)), query.shape[1] // key.shape[1]
    if sharing > 1:
        key, value = (states.repeat_interleave(sharing, dim=1) for states in (key, value))
    query, key, value = (states[0].transpose(0, 1) for states in (query, key, value))  # (tokens, heads, head size)
    row = _row.get()
    if torch.is_autocast_enabled(query.device.type):
        if position_bias is not None:
            raise ValueError("attention with a bias of relative positions, which varlen attention does not take")
        return _varlen(query, key, value, row, causal, scaling)[None], None
    parts, begin = [], 0
    for length, same in groupby(row.lengths):
        count = len(list(same))
        end = begin + count * length
        q, k, v = (rows[begin:end].unflatten(0, (count, length)).transpose(1, 2) for rows in (query, key, value))
        bias = None if position_bias is None else position_bias[..., :length, :length]
        part = functional.scaled_dot_product_attention(q, k, v, bias, is_causal=causal, scale=scaling)
        parts.append(part.transpose(1, 2).flatten(0, 1))
        begin = end
    return torch.cat(parts)[None], None


def _varlen(query: Tensor, key: Tensor, value: Tensor, row: _Row, causal: bool, scaling: float | None) -> Tensor:
    """Attention of all sequences by one kernel, in the dtype of autocast; shapes (tokens, heads, head size)."""
    from torch.nn.attention.varlen import varlen_attn  # with these arguments from torch 2.11 on

    assert row.starts is not None  # as it is on a GPU
    dtype, longest = torch.get_autocast_dtype(query.device.type), max(row.lengths)
    query, key, value = (states.to(dtype) for states in (query, key, value))
    window = (-1, 0 if causal else -1)
    found = varlen_attn(query, key, value, row.starts, row.starts, longest, longest, scale=scaling, window_size=window)
    assert isinstance(found, Tensor)  # it gives more only where that is asked for
    return found


def fused_forwards(model: nn.Module) -> dict[nn.Module, Callable[[Tensor], Tensor]]:
    """By module, its forward pass with torch's own GELU: as ESM writes that out, it is a sixth of all of its time.

    None where the model was compiled: that puts operations together by itself, and once more for each other forward.
    """
    if has_compiled_parts(model):
        return {}
    return {
        module: partial(FUSED[type(module).__name__], module)
        for module in model.modules()
        if type(module).__name__ in FUSED and "forward" not in vars(module)  # that would be somebody's own
    }


# The forward pass of a class of transformers, by the class's name; T5 with gates has the second.
FUSED: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "EsmIntermediate": lambda module, states: functional.gelu(module.dense(states)),
    "NewGELUActivation": lambda _module, states: functional.gelu(states, approximate="tanh"),
}


def _close(found: Tensor, expected: Tensor) -> bool:
    tolerance = TOLERANCE if found.device.type == "cpu" else GPU_TOLERANCE
    return torch.allclose(expected, found, rtol=tolerance, atol=tolerance)


def _close_in_half(found: Tensor, expected: Tensor) -> bool:
    return bool((found - expected).norm() <= HALF_TOLERANCE * expected.norm())


def _give_up(model: nn.Module, reason: str) -> None:
    """Logs that batches are padded, once for each class of models."""
    if type(model) not in _given_up:
        text = "embed       %s: sequences are padded, not packed, which takes longer: %s"
        logger.info(text, type(model).__name__, " ".join(reason.split())[:300])
    _given_up.add(type(model))


def _is_out_of_memory(error: Exception) -> bool:
    """Whether a GPU or the CPU has no memory left; torch has no type for the latter."""
    return isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)) or "DefaultCPUAllocator" in str(error)


def _takes(module: nn.Module, name: str) -> bool:
    return name in inspect.signature(module.forward).parameters


@contextmanager
def _within(model: nn.Module, row: _Row) -> Iterator[None]:
    """Has the model's attention stay within the sequences of a row."""
    from transformers import AttentionInterface

    compiled = has_compiled_parts(model)  # then attention is left out: new lengths would have it compiled again
    AttentionInterface.register(NAME, torch.compiler.disable(attention) if compiled else attention)
    token = _row.set(row)
    try:
        with attention_set(model.config, NAME):
            yield
    finally:
        _row.reset(token)
