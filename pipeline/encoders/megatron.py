"""The encoder of NeMo's Megatron BERT, T5 and BART in plain PyTorch.

Modules are called as NeMo calls them, so that weights keep their names, as `layers.0.self_attention.dense.weight`.
Shapes: B sequences, T tokens of the longest, H the hidden size, n heads of width d, F the width within the MLP.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": functional.gelu,
    "gelu-tanh": partial(functional.gelu, approximate="tanh"),
    "relu": functional.relu,
    "silu": functional.silu,
    "squared-relu": lambda values: functional.relu(values).square(),
    "approx-gelu": lambda values: values * torch.sigmoid(1.702 * values),
}
OUTWARD = ("self_attention.dense.weight", "mlp.dense_4h_to_h.weight")  # of layers whose output is added to a residual


@dataclass(frozen=True)
class MegatronOptions:
    """What the encoder is like.

    Attributes:
        vocabulary: rows of the token embedding.
        num_layers: how many layers there are.
        hidden_size: H.
        heads: n.
        head_size: d; n times d need not be H.
        inner_size: F.
        positions: rows of the embedding of learnt positions; None for relative positions.
        buckets: of relative positions.
        farthest: from this distance on, relative positions share the last bucket.
        block: `pre_ln`, `post_ln` or `normformer`.
        norm: `layernorm`, `layernorm1p` (weights less 1), `rmsnorm` or `low_precision_layernorm`.
        epsilon: added to the variance in norms.
        bias: whether linear layers have one.
        activation: a key of `ACTIVATIONS`.
        gate: `none`, `layer` (a second layer gives the factors) or `halves` (the second half of the one layer does).
        parts_first: the fused projection has the axes (3, n, d), not (n, 3, d).
        layer_scaling: a relative bias, and scores that are not normalised, are multiplied by the layer's number.
        normalised: whether scores are divided by the root of d.
        head_scale: whether each head's output has a factor.
        inner_slices: of the F values, each normalised for itself in `normformer`, as each rank did in the training.
        initial_std: of the weights that a training starts from; hidden states do not depend on it.
    """

    vocabulary: int
    num_layers: int
    hidden_size: int
    heads: int
    head_size: int
    inner_size: int
    positions: int | None
    buckets: int = 32
    farthest: int = 128
    block: str = "pre_ln"
    norm: str = "layernorm"
    epsilon: float = 1e-5
    bias: bool = True
    activation: str = "gelu-tanh"
    gate: str = "none"
    parts_first: bool = False
    layer_scaling: bool = True
    normalised: bool = True
    head_scale: bool = False
    inner_slices: int = 1
    initial_std: float = 0.02


class Norm(nn.Module):
    """A norm over the last axis, or over each of some slices of it."""

    def __init__(self, width: int, options: MegatronOptions, slices: int = 1) -> None:
        super().__init__()
        self.kind, self.epsilon, self.slices = options.norm, options.epsilon, slices
        self.weight = nn.Parameter(torch.empty(width))
        always = options.norm in ("layernorm", "layernorm1p")
        biased = options.norm != "rmsnorm" and (always or options.bias)
        self.bias = nn.Parameter(torch.empty(width)) if biased else None

    def forward(self, states: Tensor) -> Tensor:
        """Keeps the shape."""
        weight = self.weight + 1 if self.kind == "layernorm1p" else self.weight
        if self.kind != "rmsnorm" and self.slices == 1:
            return functional.layer_norm(states, weight.shape, weight, self.bias, self.epsilon)
        values = states.float().unflatten(-1, (self.slices, -1))
        if self.kind == "rmsnorm":
            normed = values * torch.rsqrt(values.square().mean(-1, keepdim=True) + self.epsilon)
        else:
            normed = functional.layer_norm(values, values.shape[-1:], eps=self.epsilon)
        scaled: Tensor = normed.flatten(-2) * weight
        return scaled if self.bias is None else scaled + self.bias


class Attention(nn.Module):
    """Self-attention in both directions, the projections of queries, keys and values fused."""

    def __init__(self, options: MegatronOptions, number: int) -> None:
        super().__init__()
        inner = options.heads * options.head_size
        self.parts_first = options.parts_first
        self.shape = (options.heads, options.head_size)
        self.factor = number if options.layer_scaling else 1
        self.scale = options.head_size**-0.5 if options.normalised else float(self.factor)
        self.query_key_value = nn.Linear(options.hidden_size, 3 * inner, options.bias)
        self.dense = nn.Linear(inner, options.hidden_size, options.bias)
        self.head_scale_tensor = nn.Parameter(torch.empty(1, options.heads, 1, 1)) if options.head_scale else None

    def forward(self, states: Tensor, mask: Tensor | None, bias: Tensor | None) -> Tensor:
        """Attends to real tokens: `mask` (B, 1, 1, T) is True there; `bias` (1, n, T, T) is that of positions."""
        heads, size = self.shape
        fused = self.query_key_value(states)
        if self.parts_first:
            parts = fused.unflatten(-1, (3, heads, size)).unbind(2)
        else:
            parts = fused.unflatten(-1, (heads, 3, size)).unbind(3)
        query, key, value = (part.transpose(1, 2) for part in parts)  # (B, n, T, d)
        added = mask
        if bias is not None:
            added = (bias * self.factor).to(query.dtype)
            if mask is not None:
                added = added.masked_fill(~mask, -torch.inf)
        mixed = functional.scaled_dot_product_attention(query, key, value, added, scale=self.scale)
        if self.head_scale_tensor is not None:
            mixed = mixed * self.head_scale_tensor
        result: Tensor = self.dense(mixed.transpose(1, 2).flatten(2))
        return result


class Mlp(nn.Module):
    """Two linear layers with an activation between them, which may have a gate and a norm."""

    def __init__(self, options: MegatronOptions) -> None:
        super().__init__()
        hidden, inner, self.gate = options.hidden_size, options.inner_size, options.gate
        self.activation = ACTIVATIONS[options.activation]
        self.dense_h_to_4h = nn.Linear(hidden, 2 * inner if self.gate == "halves" else inner, options.bias)
        if self.gate == "layer":
            self.dense_h_to_4h_2 = nn.Linear(hidden, inner, options.bias)
        normed = options.block == "normformer"
        self.normalization = Norm(inner, options, options.inner_slices) if normed else None
        self.dense_4h_to_h = nn.Linear(inner, hidden, options.bias)

    def forward(self, states: Tensor) -> Tensor:
        """Shape (B, T, H) in and out."""
        values = self.dense_h_to_4h(states)
        if self.gate == "halves":
            values, factors = values.chunk(2, -1)
            values = self.activation(values) * factors
        elif self.gate == "layer":
            values = self.activation(values) * self.dense_h_to_4h_2(states)
        else:
            values = self.activation(values)
        if self.normalization is not None:
            values = self.normalization(values)
        result: Tensor = self.dense_4h_to_h(values)
        return result


class Layer(nn.Module):
    """Attention and MLP, each with its residual; `block` says where the norms are."""

    def __init__(self, options: MegatronOptions, number: int) -> None:
        super().__init__()
        self.block = options.block
        self.input_layernorm = Norm(options.hidden_size, options)
        self.self_attention = Attention(options, number)
        if self.block == "normformer":
            self.post_attention_normformer_norm = Norm(options.hidden_size, options)
        self.post_attention_layernorm = Norm(options.hidden_size, options)
        self.mlp = Mlp(options)

    def forward(self, states: Tensor, mask: Tensor | None, bias: Tensor | None) -> Tensor:
        """Shape (B, T, H) in and out; see `Attention` for `mask` and `bias`."""
        if self.block == "post_ln":
            states = self.input_layernorm(states + self.self_attention(states, mask, bias))
            normed: Tensor = self.post_attention_layernorm(states + self.mlp(states))
            return normed
        attended = self.self_attention(self.input_layernorm(states), mask, bias)
        if self.block == "normformer":
            attended = self.post_attention_normformer_norm(attended)
        states = states + attended
        result: Tensor = states + self.mlp(self.post_attention_layernorm(states))
        return result


class MegatronModel(nn.Module):
    """Token ids to hidden states. Neither embeddings are scaled or normed, nor are there token types."""

    def __init__(self, options: MegatronOptions) -> None:
        super().__init__()
        self.options = options
        self.word_embeddings = nn.Embedding(options.vocabulary, options.hidden_size)
        if options.positions is None:
            self.relative_position_embedding = nn.Embedding(options.buckets, options.heads)
        else:
            self.position_embeddings = nn.Embedding(options.positions, options.hidden_size)
        self.layers = nn.ModuleList(Layer(options, number + 1) for number in range(options.num_layers))
        self.final_layernorm = Norm(options.hidden_size, options) if options.block != "post_ln" else None

    @torch.no_grad()
    def draw(self) -> None:
        """Gives all weights the random values that Megatron starts a training from.

        Layers whose output is added to a residual have smaller ones, the more layers there are. Norms and the factors
        of heads leave values as they are.
        """
        std, outward = self.options.initial_std, self.options.initial_std / math.sqrt(2 * self.options.num_layers)
        as_is = 0.0 if self.options.norm == "layernorm1p" else 1.0
        for name, weight in self.named_parameters():
            if name.endswith("bias"):
                weight.zero_()
            elif name.endswith("head_scale_tensor"):
                weight.fill_(1.0)
            elif weight.dim() == 1:
                weight.fill_(as_is)
            else:
                weight.normal_(0.0, outward if name.endswith(OUTWARD) else std)

    def shorten(self, layer: int) -> None:
        """Removes the layers above `layer`, and the norm behind the last."""
        del self.layers[layer:]
        self.final_layernorm = None

    def forward(self, ids: Tensor, mask: Tensor | None) -> Tensor:
        """Hidden states, shape (B, T, H).

        Args:
            ids: shape (B, T).
            mask: True at real tokens, shape (B, T); None where there is no padding.
        """
        states, bias = self.word_embeddings(ids), None
        if self.options.positions is None:
            bias = self._relative_bias(ids.shape[1])
        else:
            states = states + self.position_embeddings.weight[: ids.shape[1]]
        seen = None if mask is None else mask[:, None, None, :]
        for layer in self.layers:
            states = layer(states, seen, bias)
        result: Tensor = states if self.final_layernorm is None else self.final_layernorm(states)
        return result

    def _relative_bias(self, length: int) -> Tensor:
        """The bias of relative positions, shape (1, n, length, length): T5's buckets, in both directions."""
        place = torch.arange(length, device=self.word_embeddings.weight.device)
        distance = place[None, :] - place[:, None]  # of the key from the query
        half = self.options.buckets // 2
        near, far = half // 2, self.options.farthest
        away = distance.abs()
        steps = torch.log(away.clamp(min=1).float() / near) / math.log(far / near) * (half - near)
        bucket = torch.where(away < near, away, (near + steps.long()).clamp(max=half - 1))
        bias: Tensor = self.relative_position_embedding(bucket + half * (distance > 0))
        return bias.permute(2, 0, 1)[None]
