"""The configuration in a `.nemo` archive, to what its encoder is like; what is not read is refused in words.

Names and defaults are NeMo's. A setting that is null counts as missing.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from pipeline.encoders.megatron import MegatronOptions
from pipeline.errors import CheckpointError

# The models that the end of `target` may name, by a word in it; those without weights like the three are refused.
MODELS = {
    "esm1nv": "ESM-1nv",
    "prott5": "ProtT5nv",
    "megamolbart": "MegaMolBART",
    "esm2nv": "ESM-2nv",
    "molmim": "MolMIM",
}
SIZES = ("num_layers", "hidden_size", "ffn_hidden_size")
# Of the reference's ESM-2nv, each of which changes what the layers compute.
ESM2_SWITCHES = (
    "embedding_token_dropout",
    "embedding_use_attention_mask",
    "use_esm_attention",
    "esm_gelu",
    "use_pt_layernorm",
    "use_pt_mlp_out",
)
OTHER_CODE = ("transformer_engine", "mcore_bert", "mcore_t5")  # layers of other libraries, with other names
BLOCKS = ("pre_ln", "post_ln", "normformer")
NORMS = ("layernorm", "layernorm1p", "rmsnorm", "low_precision_layernorm")
# By name: the function, and how the factors of a gated one come about.
ACTIVATIONS = {
    "gelu": ("gelu", "none"),
    "geglu": ("gelu", "layer"),
    "reglu": ("relu", "layer"),
    "swiglu": ("silu", "layer"),
    "fast-geglu": ("gelu", "halves"),
    "fast-reglu": ("relu", "halves"),
    "fast-swiglu": ("silu", "halves"),
    "squared-relu": ("squared-relu", "none"),
    "approx-gelu": ("approx-gelu", "none"),
}
WORDS, POSITIONS = "word_embeddings.weight", "position_embeddings.weight"
OUTWARD = "layers.0.mlp.dense_4h_to_h.weight"
FUSED = ("gelu", "geglu", "fast-geglu")  # the activations that NeMo computes together with the bias


def shown(value: object) -> str:
    """The beginning of a value, for a message; a file of a few lines may hold one that is endless when written out."""
    return reprlib.repr(value)[:80]


class Settings:
    """Some settings, read with their types; `where` begins a message about one."""

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self.values, self.where = values, where

    @classmethod
    def of_encoder(cls, config: Settings, bert: bool) -> Settings:
        """Those of the encoder: of an encoder-decoder in a section of their own, but for old archives."""
        return config.section("encoder") if not bert and config.get("encoder") is not None else config

    def get(self, key: str) -> Any:
        """A setting as it is; None where it is missing."""
        return self.values.get(key)

    def section(self, key: str) -> Settings:
        """The settings below a key. Raises CheckpointError where there are none."""
        value = self.get(key)
        if not isinstance(value, Mapping):
            raise CheckpointError(f"{self.where}: expected the settings of {key}, found {shown(value)}")
        return Settings(value, f"{self.where}: {key}")

    def number(self, key: str, default: int | None) -> int:
        """A whole number from 1 on; without a default it must be there."""
        value = self._number(key, default)
        if value != int(value) or value < 1:
            raise self.error(key, "expected a whole number from 1 on", self.get(key))
        return int(value)

    def fraction(self, key: str, default: float) -> float:
        """A number above 0; PyYAML reads `1e-5` as text."""
        value = self._number(key, default)
        if not 0 < value < 1:
            raise self.error(key, "expected a number between 0 and 1", self.get(key))
        return value

    def flag(self, key: str, default: bool) -> bool:
        """True or false."""
        value = self.get(key)
        if value is not None and not isinstance(value, bool):
            raise self.error(key, "expected true or false", value)
        return default if value is None else value

    def choice(self, key: str, default: str | None, known: Sequence[str]) -> str:
        """One of some names."""
        value = self.get(key) if self.get(key) is not None else default
        if value not in known:
            raise self.error(key, f"expected {' or '.join(known)}", value)
        return str(value)

    def error(self, key: str, expected: str, found: object) -> CheckpointError:
        """The error for a setting that is not as expected."""
        return CheckpointError(f"{self.where}: {key}: {expected}, found {shown(found)}, which is not read")

    def _number(self, key: str, default: float | None) -> float:
        value = self.get(key) if self.get(key) is not None else default
        try:
            if isinstance(value, bool) or value is None or not abs(float(value)) < 2**40:
                raise ValueError
            return float(value)
        except (TypeError, ValueError) as error:
            raise self.error(key, "expected a number", value) from error


def read_options(
    config: Settings, settings: Settings, bert: bool, weights: Mapping[str, Tensor], ranks: int
) -> MegatronOptions:
    """What the encoder is like.

    Args:
        config: the whole configuration.
        settings: those of the encoder; see `Settings.of_encoder`.
        bert: it is ESM-1nv, whose blocks, norms, activation and biases are fixed, whatever the settings say.
        weights: the encoder's, by name: sizes are theirs.
        ranks: how many ranks the training cut the weights up for.

    Raises:
        CheckpointError: a setting is not read, or contradicts the weights.
    """
    _refuse(config, settings, bert)
    sizes = _sizes(settings, weights)
    heads = settings.number("num_attention_heads", None)
    if settings.get("kv_channels") is None and sizes["hidden_size"] % heads:
        raise settings.error("num_attention_heads", f"expected a divisor of {sizes['hidden_size']}", heads)
    return MegatronOptions(
        vocabulary=len(weights[WORDS]),
        num_layers=sizes["num_layers"],
        hidden_size=sizes["hidden_size"],
        inner_size=sizes["ffn_hidden_size"],
        heads=heads,
        head_size=settings.number("kv_channels", max(sizes["hidden_size"] // heads, 1)),
        epsilon=settings.fraction("layernorm_epsilon", 1e-5),
        parts_first=settings.flag("megatron_legacy", False),
        layer_scaling=settings.flag("apply_query_key_layer_scaling", True),
        normalised=settings.flag("normalize_attention_scores", True),
        inner_slices=ranks,
        initial_std=_initial_std(settings),
        **_positions(config, settings, bert, weights),
        **({"activation": _gelu(config.flag("bias_gelu_fusion", True))} if bert else _kinds(config, settings)),
    )


def most_tokens(config: Settings, options: MegatronOptions) -> int | None:
    """The most tokens of a sequence, special ones counted; None for no limit."""
    given = config.number("seq_length", 1) if config.get("seq_length") is not None else None
    return min((limit for limit in (given, options.positions) if limit is not None), default=None)


def is_gated_by_halves(settings: Settings) -> bool:
    """Whether one layer gives both the values and the factors of a gated activation."""
    return ACTIVATIONS[settings.choice("activation", "gelu", tuple(ACTIVATIONS))][1] == "halves"


def _refuse(config: Settings, settings: Settings, bert: bool) -> None:
    """Raises CheckpointError for what changes hidden states and is not read."""
    switches = [*OTHER_CODE, "apply_residual_connection_post_layernorm"]
    if bert:
        switches += ["bert_binary_head", *ESM2_SWITCHES]
    for place in (config, settings):
        for key in switches:
            if place.get(key):
                raise place.error(key, "expected false", place.get(key))
        if place.get("hiddens") is not None:
            raise place.error("hiddens", "expected none, for MolMIM alone has them", place.get("hiddens"))
    if not bert:
        arch = "arch" if settings.get("arch") is not None else "encoder_arch"
        settings.choice(arch, "transformer", ("transformer",))
    if settings.number("num_moe_experts", 1) > 1:
        raise settings.error("num_moe_experts", "expected 1, no mixture of experts", settings.get("num_moe_experts"))


def _sizes(settings: Settings, weights: Mapping[str, Tensor]) -> dict[str, int]:
    """The sizes that the weights have. Raises CheckpointError where the settings have others."""
    layers = {name.split(".")[1] for name in weights if name.startswith("layers.")}
    shapes = {name: tuple(weights[name].shape) if name in weights else () for name in (WORDS, OUTWARD)}
    for name, shape in shapes.items():
        if len(shape) != 2 or not all(shape):
            expected = f"expected the weight {name} with two axes"
            raise CheckpointError(
                f"{settings.where}: {expected}, found the shape {shape}" if shape else _lacks(name, settings)
            )
    found = dict(zip(SIZES, (len(layers), shapes[WORDS][1], shapes[OUTWARD][1]), strict=True))
    for key, size in found.items():
        if settings.number(key, size) != size:
            raise settings.error(key, f"expected {size}, as the weights have", settings.get(key))
    return found


def _lacks(name: str, settings: Settings) -> str:
    return f"{settings.where.partition(': model_config')[0]}: lacks weights of the encoder: {name}"


def _positions(config: Settings, settings: Settings, bert: bool, weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """How positions are told."""
    known = ("learned_absolute",) if bert else ("learned_absolute", "relative")
    if settings.choice("position_embedding_type", known[0], known) == "relative":
        buckets = settings.number("relative_attention_num_buckets", 32)
        farthest = settings.number("relative_attention_max_distance", 128)
        if buckets < 4 or farthest <= buckets // 4:
            raise settings.error("relative_attention_num_buckets", f"expected 4 to {4 * farthest - 1}", buckets)
        return {"positions": None, "buckets": buckets, "farthest": farthest}
    if POSITIONS not in weights:
        raise CheckpointError(_lacks(POSITIONS, settings))
    rows = len(weights[POSITIONS])
    if config.number("max_position_embeddings", rows) != rows:
        raise config.error(
            "max_position_embeddings", f"expected {rows}, as the weights have", config.get("max_position_embeddings")
        )
    return {"positions": rows}


def _kinds(config: Settings, settings: Settings) -> dict[str, Any]:
    """What kind of blocks, norms and activation an encoder-decoder has."""
    block, norm = (
        settings.choice("transformer_block_type", "pre_ln", BLOCKS),
        settings.choice("normalization", "layernorm", NORMS),
    )
    if block == "normformer" and norm not in ("layernorm", "rmsnorm"):
        raise settings.error("normalization", "expected layernorm or rmsnorm in a normformer", norm)
    name = settings.choice("activation", "gelu", tuple(ACTIVATIONS))
    function, gate = ACTIVATIONS[name]
    fused = _is_fused(config, settings)
    if name not in FUSED and settings.flag("onnx_safe", False):
        raise settings.error("onnx_safe", f"expected false with the activation {name}", True)
    if name not in FUSED and fused:
        raise settings.error("activation", f"expected {' or '.join(FUSED)} where bias and activation are fused", name)
    if fused or settings.flag("openai_gelu", False):
        function = _gelu(True)  # in the place of any function
    return {
        "block": block,
        "norm": norm,
        "activation": function,
        "gate": gate,
        "bias": settings.flag("bias", True),
        "head_scale": settings.flag("headscale", False),
    }


def _is_fused(config: Settings, settings: Settings) -> bool:
    """Whether NeMo computes bias and activation together, which takes the other GELU."""
    if settings is not config:
        return settings.flag("bias_activation_fusion", True)
    keys = [key for key in ("bias_gelu_fusion", "bias_activation_fusion") if config.get(key) is not None]
    return config.flag(keys[0] if keys else "bias", True)


def _initial_std(settings: Settings) -> float:
    """That of a training's first weights; one that is no such number is no reason to refuse those of its end."""
    try:
        return settings.fraction("init_method_std", 0.02)
    except CheckpointError:
        return 0.02


def _gelu(fused: bool) -> str:
    return "gelu-tanh" if fused else "gelu"
