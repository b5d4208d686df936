"""`.nemo` archives of the reference: ESM-1nv, ProtT5nv and MegaMolBART, as NeMo computes them."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.support import nemo
from tests.support.nemo_states import PROTEINS, TOLERANCE, assert_states, distance

GOLDEN = {
    "golden.json": ["esm1nv_tiny", "prott5nv_tiny", "megamolbart_tiny"],
    "golden_variants.json": [
        "esm1nv_tiny_legacyqkv",
        "esm1nv_tiny_tp2",
        "megamolbart_tiny_normformer",
        "megamolbart_tiny_postln",
        "prott5nv_tiny_relative_geglu",
    ],
}
ENDS = ("weight", "bias")


@pytest.mark.parametrize(("file", "name"), [(file, name) for file, names in GOLDEN.items() for name in names])
def test_an_archive_gives_what_nemo_gave(file: str, name: str, shared_data: Path) -> None:
    """Alone and in a batch; of some sequences several unknown residues in a row are one token."""
    folder = shared_data.parent / "golden" / "nemo"
    if not folder.is_dir():
        pytest.skip("needs the small archives with what NeMo's code gave, in the folder golden beside the data sets")
    golden = json.loads((folder / file).read_text())["models"][name]
    encoder = nemo.opened(folder / f"{name}.nemo")
    together = encoder.hidden_states([one["sequence"] for one in golden["sequences"]])
    for one, batched, embedding in zip(golden["sequences"], together, golden["batch"]["embedding"], strict=True):
        (alone,) = encoder.hidden_states([one["sequence"]])
        ids = encoder.tokens.ids(one["sequence"])
        assert [*encoder.tokens.before, *ids, *encoder.tokens.after] == one["ids"]
        expected = np.array(one["hidden"])[np.array(one["embed_mask"], bool)]
        assert distance(alone, expected) < TOLERANCE
        assert distance(batched, expected) < TOLERANCE
        assert distance(alone.mean(0), one["embedding"]) < TOLERANCE
        assert distance(batched.mean(0), embedding) < TOLERANCE


FUSED = ("gelu", "geglu", "fast-geglu")
BOTH = st.booleans()
SETTINGS = st.fixed_dictionaries(
    {
        "activation": st.sampled_from(
            [*FUSED, "reglu", "swiglu", "fast-reglu", "fast-swiglu", "squared-relu", "approx-gelu"]
        ),
        "transformer_block_type": st.sampled_from(["pre_ln", "post_ln", "normformer"]),
        "normalization": st.sampled_from(["layernorm", "layernorm1p", "rmsnorm", "low_precision_layernorm"]),
        "position_embedding_type": st.sampled_from(["learned_absolute", "relative"]),
        "relative_attention_num_buckets": st.sampled_from([8, 32]),
        "relative_attention_max_distance": st.sampled_from([12, 128]),
        "bias": BOTH,
        "headscale": BOTH,
        "openai_gelu": BOTH,
        "apply_query_key_layer_scaling": BOTH,
        "normalize_attention_scores": BOTH,
        "megatron_legacy": BOTH,
        "kv_channels": st.sampled_from([None, 3, 4]),
        "layernorm_epsilon": st.sampled_from([1e-5, "1e-3"]),
    }
)


@settings(max_examples=60)
@given(
    made=SETTINGS,
    kind=st.sampled_from([*nemo.TARGETS]),
    style=st.sampled_from(["flat", "both", "encoder"]),
    ranks=st.sampled_from([1, 2, 4]),
    fused=BOTH,
    seed=st.integers(0, 9),
)
def test_whatever_the_options(made: dict[str, Any], kind: str, style: str, ranks: int, fused: bool, seed: int) -> None:
    """Drawn at random, the settings that have no effect on ESM-1nv among them."""
    if kind == "esm1nv":
        style, made = "flat", {**made, "position_embedding_type": "learned_absolute"}
    elif made["activation"] not in FUSED:
        fused = False
    if made["transformer_block_type"] == "normformer" and made["normalization"] != "rmsnorm":
        made = {**made, "normalization": "layernorm"}
    key = "bias_gelu_fusion" if style == "flat" else "bias_activation_fusion"
    made = {**made, key: fused}
    with tempfile.TemporaryDirectory() as folder:
        state = nemo.write(Path(folder) / "x.nemo", kind, made, style, ranks, seed)
        assert_states(nemo.opened(Path(folder) / "x.nemo"), state, kind, made, fused=fused, ranks=ranks)


@pytest.mark.parametrize("block", ["pre_ln", "post_ln"])
def test_layers_are_those_of_torch(block: str, tmp_path: Path) -> None:
    """Of torch's own `TransformerEncoderLayer`, whose projection has queries, keys and values one after another."""
    made = {"transformer_block_type": block, "bias_gelu_fusion": False, "megatron_legacy": True}
    state = nemo.write(tmp_path / "x.nemo", "prott5nv", made)
    encoder = nemo.opened(tmp_path / "x.nemo")
    layer = nn.TransformerEncoderLayer(
        nemo.HIDDEN, nemo.HEADS, nemo.INNER, 0.0, "gelu", batch_first=True, norm_first=block == "pre_ln"
    ).eval()
    stack = "enc_dec_model.enc_dec_model.encoder.model."
    names = {
        "self_attn.in_proj_": "self_attention.query_key_value.",
        "self_attn.out_proj.": "self_attention.dense.",
        "linear1.": "mlp.dense_h_to_4h.",
        "linear2.": "mlp.dense_4h_to_h.",
        "norm1.": "input_layernorm.",
        "norm2.": "post_attention_layernorm.",
    }
    embedding = "enc_dec_model.encoder_embedding."
    ids = encoder.tokens.ids(PROTEINS[0])
    states = state[f"{embedding}word_embeddings.weight"][ids][None]
    states = states + state[f"{embedding}position_embeddings.weight"][: len(ids)]
    with torch.no_grad():
        for number in range(nemo.LAYERS):
            own = {f"{a}{end}": state[f"{stack}layers.{number}.{b}{end}"] for a, b in names.items() for end in ENDS}
            layer.load_state_dict(own)
            states = layer(states)
        if block == "pre_ln":
            weight, bias = (state[f"{stack}final_layernorm.{end}"] for end in ENDS)
            states = nn.functional.layer_norm(states, (nemo.HIDDEN,), weight, bias)
    assert distance(encoder.hidden_states([PROTEINS[0]])[0], states[0]) < TOLERANCE


# What GELU an archive has, by its style and the settings that it does not have as they are by default.
FUSIONS = [
    ("esm1nv", "flat", {}, True),
    ("esm1nv", "flat", {"bias_activation_fusion": False}, True),
    ("esm1nv", "flat", {"bias_gelu_fusion": False, "openai_gelu": True}, False),
    ("prott5nv", "encoder", {}, True),
    ("prott5nv", "encoder", {"bias_gelu_fusion": False}, True),
    ("prott5nv", "encoder", {"bias_activation_fusion": False}, False),
    ("megamolbart", "flat", {}, True),
    ("megamolbart", "flat", {"bias": False}, False),
    ("megamolbart", "flat", {"bias_activation_fusion": False}, False),
    ("megamolbart", "flat", {"bias_gelu_fusion": True, "bias_activation_fusion": False}, True),
    ("megamolbart", "flat", {"bias_gelu_fusion": False, "bias_activation_fusion": True}, False),
]


@pytest.mark.parametrize(("kind", "style", "made", "fused"), FUSIONS)
def test_which_gelu(kind: str, style: str, made: dict[str, Any], fused: bool, tmp_path: Path) -> None:
    """They differ by more than the tolerance."""
    state = nemo.write(tmp_path / "x.nemo", kind, made, style)
    encoder = nemo.opened(tmp_path / "x.nemo")
    assert_states(encoder, state, kind, made, fused=fused)
    with pytest.raises(AssertionError):
        assert_states(encoder, state, kind, made, fused=not fused)


def renamed(old: str, new: str) -> Callable[[dict[str, Any], nemo.State], object]:
    def change(_: dict[str, Any], state: nemo.State) -> None:
        for name in list(state):
            state[name.replace(old, new)] = state.pop(name)

    return change


# What is read as if it was not there.
READ: dict[str, Callable[[dict[str, Any], nemo.State], object]] = {
    "a level of mixed precision": renamed("model.language_model.", "model.module.language_model."),
    "torch.compile": renamed("model.language_model.", "model._orig_mod.language_model."),
    "an extra state": lambda _, state: state.update({"model.language_model.encoder.layers.0._extra_state": None}),
    "a head": lambda _, state: state.update({"model.binary_head.weight": torch.ones(2, 2)}),
    "a pooler": lambda _, state: state.update({"model.language_model.pooler.dense.weight": torch.ones(2, 2)}),
    "no target": lambda config, _: config.pop("target"),
    "a path for the tokenizer": lambda config, _: config["tokenizer"].update(model="/home/somebody/x.model"),
    "no vocabulary file": lambda config, _: config["tokenizer"].update(vocab_file=None),
    "no sizes": lambda config, _: [config.pop(key) for key in ("num_layers", "hidden_size", "ffn_hidden_size")],
    "a number as text": lambda config, _: config.update(layernorm_epsilon="1e-5"),
    "a level of the configuration": lambda config, _: config.update(model=dict(config), num_layers=7),
}


@pytest.mark.parametrize("what", READ)
@pytest.mark.parametrize("compressed", [False, True], ids=["tar", "tar.gz"])
def test_what_is_read(what: str, compressed: bool, tmp_path: Path) -> None:
    path = nemo.spoilt(tmp_path, "esm1nv", READ[what], compressed=compressed)
    assert_states(nemo.opened(path), nemo.make_state("esm1nv"), "esm1nv", {})
    assert [one.name for one in tmp_path.iterdir()] == ["x.nemo"]


def test_legacy_names(tmp_path: Path) -> None:
    def change(config: dict[str, Any], state: nemo.State) -> None:
        renamed(".encoder.", ".transformer.")(config, state)
        renamed(".self_attention.", ".attention.")(config, state)

    made = {"megatron_legacy": True}
    assert_states(
        nemo.opened(nemo.spoilt(tmp_path, "esm1nv", change, made=made)), nemo.make_state("esm1nv"), "esm1nv", made
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_of_half_precision_are_made_float32(dtype: torch.dtype, tmp_path: Path) -> None:
    def change(_: dict[str, Any], state: nemo.State) -> None:
        state.update({name: value.to(dtype) for name, value in state.items()})

    rounded = {name: value.to(dtype).float() for name, value in nemo.make_state("prott5nv").items()}
    assert_states(nemo.opened(nemo.spoilt(tmp_path, "prott5nv", change)), rounded, "prott5nv", {})
