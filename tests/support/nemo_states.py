"""What the encoders of `.nemo` archives must give, written apart from the project's own model.

NumPy in double precision, head by head and rank by rank, from the specification of the format.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy.special import erf

from pipeline.encoders.megatron_encoder import MegatronEncoder
from tests.support.nemo import GATES, HEADS, INNER, LAYERS, State, full

Array = npt.NDArray[np.float64]

PROTEINS = ["MKTAYIAKQR", "G", "MXBZUOGLLAGGSVVKDDRREEPPTTI", "WW"]
SMILES = ["c1ccc[nH]1", "C", "CC(=O)NCCBr", "C#N"]
SEQUENCES = {"esm1nv": PROTEINS, "prott5nv": PROTEINS, "megamolbart": SMILES}
TOLERANCE = 1e-5


def distance(found: Any, expected: Any) -> float:
    a, b = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert a.shape == b.shape
    return float(np.abs(a - b).max())


def assert_states(encoder: MegatronEncoder, state: State, kind: str, made: Mapping[str, Any], **how: Any) -> None:
    """The hidden states of some sequences, alone and in a batch, are those of the specification."""
    before, after = len(encoder.tokens.before), len(encoder.tokens.after)
    together = encoder.hidden_states(SEQUENCES[kind])
    for sequence, batched in zip(SEQUENCES[kind], together, strict=True):
        ids = [*encoder.tokens.before, *encoder.tokens.ids(sequence), *encoder.tokens.after]
        expected = expected_states(state, kind, made, ids, **how)[before : len(ids) - after]
        assert distance(encoder.hidden_states([sequence])[0], expected) < TOLERANCE
        assert distance(batched, expected) < TOLERANCE


def expected_states(
    state: State,
    kind: str,
    settings: Mapping[str, Any],
    ids: Sequence[int],
    fused: bool = True,
    ranks: int = 1,
    layer: int = LAYERS,
) -> Array:
    """The hidden states of one sequence, special tokens in, shape (tokens, HIDDEN).

    Args:
        state: weights, see `make_state`.
        kind: of model.
        settings: as they were given.
        ids: of its tokens.
        fused: bias and activation are computed together: then the GELU is the approximate one.
        ranks: of the training.
        layer: behind which layer; the norm behind the last is behind it alone.
    """
    made, value = full(settings, kind), _Values(state)
    epsilon = float(made["layernorm_epsilon"])

    def norm(x: Array, name: str) -> Array:
        return _norm(x, value[f"{name}.weight"], value.get(f"{name}.bias"), made["normalization"], epsilon)

    x = value["word_embeddings.weight"][list(ids)]
    if made["position_embedding_type"] != "relative":
        x = x + value["position_embeddings.weight"][: len(ids)]
    for number in range(layer):
        own = f"layers.{number}."
        block = made["transformer_block_type"]
        entered = x if block == "post_ln" else norm(x, f"{own}input_layernorm")
        attended = _attention(entered, value, own, made, number + 1)
        if block == "normformer":
            attended = norm(attended, f"{own}post_attention_normformer_norm")
        x = x + attended
        x = norm(x, f"{own}input_layernorm") if block == "post_ln" else x
        entered = x if block == "post_ln" else norm(x, f"{own}post_attention_layernorm")
        inner = _activated(entered, value, f"{own}mlp.", made, fused)
        if block == "normformer":
            width = INNER // ranks
            inner = np.concatenate(
                [_sliced_norm(inner, value, own, made, slice(r * width, (r + 1) * width)) for r in range(ranks)], 1
            )
        x = x + _linear(inner, value, f"{own}mlp.dense_4h_to_h")
        x = norm(x, f"{own}post_attention_layernorm") if block == "post_ln" else x
    normed = made["transformer_block_type"] == "post_ln" or layer < LAYERS
    return x if normed else norm(x, "final_layernorm")


class _Values:
    """Weights by the ends of their names, double precision; the decoder's are left out."""

    def __init__(self, state: State) -> None:
        self._found = {name: value for name, value in state.items() if "decoder." not in name.partition("decoder_")[0]}

    def get(self, end: str) -> Array | None:
        for name, value in self._found.items():
            if f".{name}".endswith(f".{end}") and "decoder_embedding" not in name:
                return np.asarray(value.double().numpy())
        return None

    def __getitem__(self, end: str) -> Array:
        found = self.get(end)
        assert found is not None, end
        return found


def _linear(x: Array, value: _Values, name: str) -> Array:
    bias = value.get(f"{name}.bias")
    product: Array = x @ value[f"{name}.weight"].T
    return product if bias is None else product + bias


def _norm(x: Array, weight: Array, bias: Array | None, kind: str, epsilon: float) -> Array:
    if kind == "rmsnorm":
        scaled: Array = x / np.sqrt((x**2).mean(1, keepdims=True) + epsilon) * weight
        return scaled
    centred = x - x.mean(1, keepdims=True)
    scaled = centred / np.sqrt(x.var(1, keepdims=True) + epsilon) * (weight + (kind == "layernorm1p"))
    if bias is not None:
        scaled = scaled + bias
    return scaled


def _sliced_norm(x: Array, value: _Values, own: str, made: Mapping[str, Any], part: slice) -> Array:
    bias = value.get(f"{own}mlp.normalization.bias")
    weight = value[f"{own}mlp.normalization.weight"][part]
    part_bias = None if bias is None else bias[part]
    return _norm(x[:, part], weight, part_bias, made["normalization"], float(made["layernorm_epsilon"]))


def _attention(x: Array, value: _Values, own: str, made: Mapping[str, Any], number: int) -> Array:
    fused = _linear(x, value, f"{own}self_attention.query_key_value")
    size = fused.shape[1] // 3 // HEADS
    times = number if made["apply_query_key_layer_scaling"] else 1
    heads = []
    for head in range(HEADS):
        if made["megatron_legacy"]:
            starts = [part * HEADS * size + head * size for part in range(3)]
        else:
            starts = [head * 3 * size + part * size for part in range(3)]
        query, key, values = (fused[:, start : start + size] for start in starts)
        scores = query @ key.T
        if made["normalize_attention_scores"]:
            scores = scores / (np.sqrt(size) * times)
        if made["position_embedding_type"] == "relative":
            scores = scores + _relative(len(x), value, made)[:, :, head]
        scores = scores * times
        shares = np.exp(scores - scores.max(1, keepdims=True))
        mixed = shares / shares.sum(1, keepdims=True) @ values
        scale = value.get(f"{own}self_attention.head_scale_tensor")
        heads.append(mixed if scale is None else mixed * scale[0, head, 0, 0])
    return _linear(np.concatenate(heads, 1), value, f"{own}self_attention.dense")


def _relative(length: int, value: _Values, made: Mapping[str, Any]) -> Array:
    """The bias of each pair of positions and head, by the buckets of transformers' T5."""
    from transformers.models.t5.modeling_t5 import T5Attention

    place = torch.arange(length)
    buckets = T5Attention._relative_position_bucket(
        place[None] - place[:, None],
        bidirectional=True,
        num_buckets=made["relative_attention_num_buckets"],
        max_distance=made["relative_attention_max_distance"],
    )
    bias: Array = value["relative_position_embedding.weight"][buckets.numpy()]
    return bias


def _activated(x: Array, value: _Values, own: str, made: Mapping[str, Any], fused: bool) -> Array:
    name, u = made["activation"], _linear(x, value, f"{own}dense_h_to_4h")
    factors: Array | float = 1.0
    if name.startswith("fast-"):
        u, factors = u[:, :INNER], u[:, INNER:]
    elif name in GATES:
        factors = _linear(x, value, f"{own}dense_h_to_4h_2")
    kind = GATES.get(name.removeprefix("fast-"), name)
    if fused or made["openai_gelu"]:
        shown = 0.5 * u * (1 + np.tanh(0.7978845608028654 * u * (1 + 0.044715 * u**2)))
    elif kind == "gelu":
        shown = 0.5 * u * (1 + erf(u / np.sqrt(2)))
    elif kind == "approx-gelu":
        shown = u / (1 + np.exp(-1.702 * u))
    elif kind == "silu":
        shown = u / (1 + np.exp(-u))
    else:
        shown = np.maximum(u, 0) ** (2 if kind == "squared-relu" else 1)
    return np.asarray(shown * factors)
