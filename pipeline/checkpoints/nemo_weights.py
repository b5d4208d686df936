"""The weights in a `.nemo` archive, to those of its encoder: names, the parts that ranks have, what is missing."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from pipeline.checkpoints.nemo_options import Settings, is_gated_by_halves
from pipeline.encoders.internals import uncompiled
from pipeline.encoders.megatron import MegatronModel, MegatronOptions
from pipeline.errors import CheckpointError

BERT, ENCODER_DECODER = "model.language_model.", "enc_dec_model."
# What the names of the encoder's weights begin with; then what stands beside the encoder.
WITHIN = (
    "model.language_model.embedding.",
    "model.language_model.encoder.",
    "enc_dec_model.encoder_embedding.",
    "enc_dec_model.encoder_relative_position_embedding.",
    "enc_dec_model.enc_dec_model.encoder.model.",
)
BESIDE = (
    "model.lm_head.",
    "model.binary_head.",
    "model.language_model.pooler.",
    "enc_dec_model.decoder_embedding.",
    "enc_dec_model.decoder_relative_position_embedding.",
    "enc_dec_model.decoder_cross_attention_relative_position_embedding.",
    "enc_dec_model.enc_dec_model.decoder.",
    "enc_dec_model.tokens_head.",
)
# Parts of names that are of models that are not read.
OTHERS = {
    "tokentype_embeddings": "token types (bert_binary_head)",
    "hiddens_module": "hidden transforms, as MolMIM has",
    "init_hidden": "a perceiver",
    "cross_attn_layers": "a perceiver",
    "mlp.router": "a mixture of experts",
    "mlp.experts": "a mixture of experts",
    "adapter": "adapters",
    "lora": "adapters",
    "linear_qkv": "layers of Megatron Core",
}
JOINED_ROWS = ("word_embeddings", "query_key_value", "dense_h_to_4h", "dense_h_to_4h_2", "normalization")
JOINED_COLUMNS = ("self_attention.dense.weight", "mlp.dense_4h_to_h.weight", "head_scale_tensor")
SHOWN = 3  # names in a message

logger = logging.getLogger(__name__)


def is_bert(state: Mapping[str, Any], where: str) -> bool:
    """Whether the weights are of a Megatron BERT, or else of an encoder-decoder.

    Raises:
        CheckpointError: of neither.
    """
    names = [_bare(name) for name in state]
    found = [first for first in (BERT, ENCODER_DECODER) if any(name.startswith(first) for name in names)]
    if len(found) != 1:
        expected = f"expected weights of ESM-1nv ({BERT}*), or of ProtT5nv or MegaMolBART ({ENCODER_DECODER}*)"
        raise CheckpointError(f"{where}: {expected}, found {_some(names)}")
    return found == [BERT]


def encoder_weights(shards: list[dict[str, Any]], bert: bool, settings: Settings, where: str) -> dict[str, Tensor]:
    """The weights of the encoder by their names in a `MegatronModel`. Takes them out of `shards`, one after another.

    Raises:
        CheckpointError: the ranks do not have the same weights, or some are of a model that is not read.
    """
    legacy = settings.flag("megatron_legacy", False)
    fused = 2 if not bert and is_gated_by_halves(settings) else 1
    named = [_named(shard, bert, legacy, where) for shard in shards]
    shards.clear()
    joined = {}
    for name in list(named[0]):
        if any(name not in shard for shard in named):
            raise CheckpointError(f"{where}: expected '{name}' of every rank, found it in some alone")
        parts = {"query_key_value": 3 if legacy else 1, "dense_h_to_4h": fused}.get(_module(name), 1)
        joined[name] = _join(name, [shard.pop(name) for shard in named], parts, where)
    left = [name for shard in named for name in shard]
    if left:
        raise CheckpointError(f"{where}: expected the same weights of every rank, found in some alone {_some(left)}")
    return joined


def fill(options: MegatronOptions, weights: dict[str, Tensor], where: str) -> MegatronModel:
    """The model with these weights, float32; they are its own afterwards.

    Raises:
        CheckpointError: one is missing, left over, of another shape, or no finite number.
    """
    with torch.device("meta"):
        model = MegatronModel(options)
    expected = model.state_dict()
    missing, left = expected.keys() - weights.keys(), weights.keys() - expected.keys()
    if missing or left:
        found = [f"lacks {_some(missing)}"] if missing else []
        found += [f"has {_some(left)} beside them"] if left else []
        raise CheckpointError(f"{where}: expected the weights that {_described(options)} has; it {' and '.join(found)}")
    for name, value in weights.items():
        if value.shape != expected[name].shape:
            shapes = f"expected the shape {tuple(expected[name].shape)}, found {tuple(value.shape)}"
            raise CheckpointError(f"{where}: '{name}': {shapes}")
        if not torch.isfinite(value).all():
            raise CheckpointError(f"{where}: '{name}': expected finite numbers, found others; take another checkpoint")
        weights[name] = value.float()
    model.load_state_dict(weights, assign=True)
    return model.requires_grad_(False)


def _named(state: Mapping[str, Any], bert: bool, legacy: bool, where: str) -> dict[str, Tensor]:
    """The encoder's weights of a rank by their names within it."""
    found: dict[str, Tensor] = {}
    beside = []
    for key, value in state.items():
        name = _bare(key)
        if legacy:  # NeMo renames them, too
            name = name.replace(".transformer.", ".encoder.").replace(".attention.", ".self_attention.")
        if name.endswith("_extra_state"):
            continue
        other = next((what for part, what in OTHERS.items() if part in name), None)
        if other is not None:
            raise CheckpointError(f"{where}: '{key}' is of a model with {other}, which is not read")
        first = next((first for first in WITHIN if name.startswith(first)), None)
        if first is not None:
            if not isinstance(value, Tensor) or not value.is_floating_point():
                kind = f"one of {value.dtype}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
                raise CheckpointError(f"{where}: '{key}': expected a tensor of floating-point numbers, found {kind}")
            found[name.removeprefix(first)] = value
        elif name.startswith("model." if bert else ENCODER_DECODER) and not name.startswith(BESIDE):
            raise CheckpointError(f"{where}: '{key}' is no weight of the models that are read")
        else:
            beside.append(name)
    if beside:
        parts = sorted({".".join(name.split(".")[:2]) for name in beside})
        logger.info("checkpoint  weights beside the encoder are not used: %s", ", ".join(parts[:8]))
    return found


def _join(name: str, values: list[Tensor], parts: int, where: str) -> Tensor:
    """A weight of which each rank has a share, or all.

    Args:
        name: its name.
        values: of each rank.
        parts: how many weights one after another each rank's rows are of; the shares of each are joined.
        where: begins a message.
    """
    shapes = [tuple(value.shape) for value in values]
    if len(set(shapes)) > 1:
        raise CheckpointError(f"{where}: '{name}': expected the same shape of every rank, found {shapes[:8]}")
    if len(values) == 1 or not shapes[0]:
        return values[0]
    if name.endswith(JOINED_COLUMNS) and len(shapes[0]) > 1:
        return torch.cat(values, 1)
    if _module(name) not in JOINED_ROWS:
        return values[0]
    if shapes[0][0] % parts:
        return torch.cat(values)  # whose shape is refused
    return torch.cat([value.unflatten(0, (parts, -1)) for value in values], 1).flatten(0, 1)


def _bare(name: str) -> str:
    """A name without what torch.compile and mixed precision add."""
    plain = uncompiled(name)
    first = plain.partition(".")[0]
    return plain.replace(f"{first}.module.", f"{first}.", 1) if plain.startswith(f"{first}.module.") else plain


def _module(name: str) -> str:
    """The module that a weight is of: the last part of the name but one."""
    return name.split(".")[-2] if "." in name else name


def _described(options: MegatronOptions) -> str:
    positions = "relative" if options.positions is None else "learnt"
    return f"an encoder of {options.num_layers} layers ({options.block}, {options.norm}, {positions} positions)"


def _some(names: Iterable[str]) -> str:
    listed = sorted(names)
    more = f" and {len(listed) - SHOWN} more" if len(listed) > SHOWN else ""
    return (", ".join(listed[:SHOWN]) or "none") + more
