"""The weights of a model by name: which it needs, where a larger set holds them, and which are left over."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.errors import CheckpointError

# Buffers that a model computes from its configuration; releases differ in which of them they store.
DERIVED = re.compile(r"(^|\.)(position_ids|token_type_ids|inv_freq)$")
# Masks of causal attention, which earlier releases stored beside the weights of these models.
MASK = re.compile(r"\b(attn|attention)\.(masked_)?bias$")
MASKED = ("gpt2", "gpt_neo", "gpt_neox", "gptj", "codegen")
UNUSED = (
    "embeddings.position_embeddings.weight"  # of an ESM with rotary positions: transformers 4 makes them all the same
)
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # of which a value is what it stands for
SHOWN = 3  # names in a message


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """The weights and buffers that a model's hidden states depend on and its configuration does not give, by name."""
    state = {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    return {name: value for name, value in state.items() if not is_derived(name, model)}


def matching_prefix(encoder: nn.Module, name: str, state: Mapping[str, Any], prefix: str | None, source: str) -> str:
    """What the names of the encoder's weights begin with in a `state_dict`.

    Args:
        encoder: the model that the weights are for.
        name: its own within a larger model of its library, such as `encoder.`.
        state: the stored weights.
        prefix: what the names of the larger model begin with, where it is known.
        source: names the checkpoint in messages.

    Raises:
        CheckpointError: the weights are not there, or are there more than once.
    """
    wanted = list(weights_of(encoder))
    first = name + wanted[0]
    prefixes = [key.removesuffix(first) for key in state if key.endswith(first)]
    heads = ("", f"{getattr(encoder, 'base_model_prefix', '')}.")
    if prefix is not None:
        prefixes = [known for known in prefixes if known in {prefix + head for head in heads}]
    fitting = [known for known in prefixes if all(known + name + key in state for key in wanted)]
    if len(fitting) == 1:
        return fitting[0] + name
    found = f"several: {', '.join(map(repr, fitting))}" if fitting else "none"
    if len(prefixes) == 1 and not fitting:
        found = f"one that lacks {_some(key for key in wanted if prefixes[0] + name + key not in state)}"
    raise CheckpointError(f"ckpt: '{source}': expected one set of weights of a {type(encoder).__name__}, found {found}")


def unexpected(encoder: nn.Module, state: Mapping[str, Any], prefix: str) -> list[str]:
    """Names of stored weights that stand within the encoder, and that its class does not have."""
    known = set(encoder.state_dict())
    inside = [key.removeprefix(prefix) for key in state if key.startswith(prefix)]
    if getattr(getattr(encoder, "config", None), "model_type", "") in MASKED:
        inside = [key for key in inside if not MASK.search(key)]
    return [key for key in inside if key not in known and is_part(key, encoder) and not is_derived(key, encoder)]


def is_encoder_alone(model: nn.Module) -> bool:
    """Whether a model is of a class for the encoder of an encoder-decoder alone, such as `T5EncoderModel`."""
    return type(model).__name__.endswith("EncoderModel")


def is_part(name: str, encoder: nn.Module) -> bool:
    """Whether a weight or module is part of the encoder, by its name within the model that the encoder is in.

    Beside the parts of a T5's encoder stand its decoder and head. A pooling layer is behind the hidden states.
    """
    part = name.partition(".")[0]
    beside = is_encoder_alone(encoder) and part not in dict(encoder.named_children())
    return part != "pooler" and not beside


def check_unexpected(encoder: nn.Module, state: Mapping[str, Any], prefix: str, source: str, remedy: str) -> None:
    """Raises CheckpointError where a checkpoint holds weights of an encoder that its class does not have."""
    left = unexpected(encoder, state, prefix)
    if left:
        kind = type(encoder).__name__
        raise CheckpointError(f"ckpt: '{source}' holds weights that a {kind} does not have: {_some(left)}; {remedy}")


def check_dtypes(found: Mapping[str, torch.dtype], source: str) -> None:
    """Raises CheckpointError where weights are stored as integers or in 8 bits: quantised, with scales elsewhere."""
    for name, dtype in found.items():
        if dtype not in FLOATS:
            expected = "expected float16, bfloat16, float32 or float64"
            why = "quantised weights have scales, which are not read; take the checkpoint that they were made from"
            raise CheckpointError(
                f"ckpt: '{source}': '{name}': {expected}, found {str(dtype).removeprefix('torch.')}: {why}"
            )


def check_finite(model: nn.Module, source: str) -> None:
    """Raises CheckpointError where a weight is not a number, or infinite: so would every hidden state be."""
    for name, weight in model.named_parameters():
        if not torch.isfinite(weight).all():
            found = f"found {int((~torch.isfinite(weight)).sum())} of {weight.numel()} that are NaN or infinite"
            remedy = "the training diverged, or the file is damaged; take another checkpoint"
            raise CheckpointError(f"ckpt: '{source}': '{name}': expected finite numbers, {found}; {remedy}")


def is_derived(name: str, model: nn.Module) -> bool:
    """Whether a weight or buffer follows from the configuration, or is not used."""
    config: Any = getattr(model, "config", None)
    rotary = getattr(config, "model_type", "") == "esm" and config.position_embedding_type == "rotary"
    return bool(DERIVED.search(name)) or (rotary and name.endswith(UNUSED))


def _some(names: Any) -> str:
    listed = sorted(names)
    more = f" and {len(listed) - SHOWN} more" if len(listed) > SHOWN else ""
    return ", ".join(listed[:SHOWN]) + more
