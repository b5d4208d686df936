"""`.nemo` archives of the reference: ESM-1nv, ProtT5nv and MegaMolBART, as NeMo computes them."""

from __future__ import annotations

import io
import json
import pickle
import tarfile
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pipeline import EncoderOptions, Store, open_encoder, validate
from pipeline.__main__ import main
from pipeline.checkpoints.names import expand, name_of, step_of
from pipeline.encoders.megatron_encoder import MegatronEncoder
from pipeline.errors import CheckpointError, ConfigError, DataError
from tests.support import nemo
from tests.support.data import proteins, token_task, write_csv
from tests.support.lab import ALONE, newest_run

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
PROTEINS = ["MKTAYIAKQR", "G", "MXBZUOGLLAGGSVVKDDRREEPPTTI", "WW"]
SMILES = ["c1ccc[nH]1", "C", "CC(=O)NCCBr", "C#N"]
SEQUENCES = {"esm1nv": PROTEINS, "prott5nv": PROTEINS, "megamolbart": SMILES}
TOLERANCE = 1e-5
ENDS = ("weight", "bias")


def opened(path: Path | str, **options: Any) -> MegatronEncoder:
    encoder = open_encoder(str(path), EncoderOptions(device="cpu", **options))
    assert isinstance(encoder, MegatronEncoder)
    return encoder


def distance(found: Any, expected: Any) -> float:
    a, b = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert a.shape == b.shape
    return float(np.abs(a - b).max())


@pytest.mark.parametrize(("file", "name"), [(file, name) for file, names in GOLDEN.items() for name in names])
def test_an_archive_gives_what_nemo_gave(file: str, name: str, shared_data: Path) -> None:
    """Alone and in a batch; of some sequences several unknown residues in a row are one token."""
    folder = shared_data.parent / "golden" / "nemo"
    if not folder.is_dir():
        pytest.skip("needs the small archives with what NeMo's code gave, in the folder golden beside the data sets")
    golden = json.loads((folder / file).read_text())["models"][name]
    encoder = opened(folder / f"{name}.nemo")
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


def assert_states(encoder: MegatronEncoder, state: nemo.State, kind: str, made: Mapping[str, Any], **how: Any) -> None:
    """The hidden states of some sequences, alone and in a batch, are those of the specification."""
    before, after = len(encoder.tokens.before), len(encoder.tokens.after)
    together = encoder.hidden_states(SEQUENCES[kind])
    for sequence, batched in zip(SEQUENCES[kind], together, strict=True):
        ids = [*encoder.tokens.before, *encoder.tokens.ids(sequence), *encoder.tokens.after]
        expected = nemo.expected_states(state, kind, made, ids, **how)[before : len(ids) - after]
        assert distance(encoder.hidden_states([sequence])[0], expected) < TOLERANCE
        assert distance(batched, expected) < TOLERANCE


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
        assert_states(opened(Path(folder) / "x.nemo"), state, kind, made, fused=fused, ranks=ranks)


@pytest.mark.parametrize("block", ["pre_ln", "post_ln"])
def test_layers_are_those_of_torch(block: str, tmp_path: Path) -> None:
    """Of torch's own `TransformerEncoderLayer`, whose projection has queries, keys and values one after another."""
    made = {"transformer_block_type": block, "bias_gelu_fusion": False, "megatron_legacy": True}
    state = nemo.write(tmp_path / "x.nemo", "prott5nv", made)
    encoder = opened(tmp_path / "x.nemo")
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
    encoder = opened(tmp_path / "x.nemo")
    assert_states(encoder, state, kind, made, fused=fused)
    with pytest.raises(AssertionError):
        assert_states(encoder, state, kind, made, fused=not fused)


def spoilt(folder: Path, kind: str, change: Callable[[dict[str, Any], nemo.State], object], **how: Any) -> Path:
    """An archive whose configuration and weights were changed."""
    ranks = how.pop("ranks", 1)
    made = how.pop("made", {})
    config = nemo.make_config(kind, {**made, "tensor_model_parallel_size": ranks}, how.pop("style", "flat"))
    state = nemo.make_state(kind, made)
    change(config, state)
    return nemo.pack(folder / "x.nemo", nemo.members(kind, config, nemo.cut(state, ranks, made, kind)), **how)


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
    path = spoilt(tmp_path, "esm1nv", READ[what], compressed=compressed)
    assert_states(opened(path), nemo.make_state("esm1nv"), "esm1nv", {})
    assert [one.name for one in tmp_path.iterdir()] == ["x.nemo"]


def test_legacy_names(tmp_path: Path) -> None:
    def change(config: dict[str, Any], state: nemo.State) -> None:
        renamed(".encoder.", ".transformer.")(config, state)
        renamed(".self_attention.", ".attention.")(config, state)

    made = {"megatron_legacy": True}
    assert_states(opened(spoilt(tmp_path, "esm1nv", change, made=made)), nemo.make_state("esm1nv"), "esm1nv", made)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_of_half_precision_are_made_float32(dtype: torch.dtype, tmp_path: Path) -> None:
    def change(_: dict[str, Any], state: nemo.State) -> None:
        state.update({name: value.to(dtype) for name, value in state.items()})

    rounded = {name: value.to(dtype).float() for name, value in nemo.make_state("prott5nv").items()}
    assert_states(opened(spoilt(tmp_path, "prott5nv", change)), rounded, "prott5nv", {})


# A setting, or a weight's name, that is refused, and what the message says.
REFUSED = [
    ("esm1nv", {"bert_binary_head": True}, "bert_binary_head: expected false, found 'True', which is not read"),
    ("esm1nv", {"use_esm_attention": True}, "use_esm_attention: expected false"),
    ("esm1nv", {"esm_gelu": True}, "esm_gelu: expected false"),
    ("esm1nv", {"embedding_token_dropout": True}, "embedding_token_dropout: expected false"),
    ("esm1nv", {"embedding_use_attention_mask": True}, "embedding_use_attention_mask: expected false"),
    ("esm1nv", {"use_pt_layernorm": True}, "use_pt_layernorm: expected false"),
    ("esm1nv", {"use_pt_mlp_out": True}, "use_pt_mlp_out: expected false"),
    ("esm1nv", {"mcore_bert": True}, "mcore_bert: expected false"),
    ("esm1nv", {"position_embedding_type": "rope"}, "expected learned_absolute, found 'rope'"),
    ("esm1nv", {"tokenizer": {"library": "regex"}}, "expected sentencepiece for ESM-1nv, found regex"),
    ("esm1nv", {"target": "bionemo.model.protein.esm1nv.esm1nv_model.ESM2nvModel"}, "found ESM2nvModel"),
    (
        "esm1nv",
        {"target": "bionemo.model.protein.prott5nv.ProtT5nvModel"},
        "expected a class of ESM-1nv, as the weights are",
    ),
    ("prott5nv", {"transformer_engine": True}, "transformer_engine: expected false"),
    ("prott5nv", {"position_embedding_type": "alibi"}, "expected learned_absolute or relative, found 'alibi'"),
    ("prott5nv", {"position_embedding_type": "none"}, "expected learned_absolute or relative, found 'none'"),
    ("prott5nv", {"relative_attention_num_buckets": 2, "position_embedding_type": "relative"}, "expected 4 to 511"),
    ("prott5nv", {"activation": "mish"}, "activation: expected gelu or geglu or "),
    ("prott5nv", {"activation": "swiglu"}, "expected gelu or geglu or fast-geglu where bias and activation are fused"),
    ("prott5nv", {"activation": "squared-relu"}, "where bias and activation are fused, found 'squared-relu'"),
    ("prott5nv", {"activation": "reglu", "onnx_safe": True}, "onnx_safe: expected false with the activation reglu"),
    ("prott5nv", {"transformer_block_type": "gpt"}, "expected pre_ln or post_ln or normformer, found 'gpt'"),
    ("prott5nv", {"normalization": "batchnorm"}, "normalization: expected layernorm or"),
    (
        "prott5nv",
        {"transformer_block_type": "normformer", "normalization": "layernorm1p"},
        "expected layernorm or rmsnorm in a normformer, found 'layernorm1p'",
    ),
    ("prott5nv", {"apply_residual_connection_post_layernorm": True}, "expected false"),
    ("prott5nv", {"hiddens": {"enc_output_name": "z"}}, "hiddens: expected none"),
    ("prott5nv", {"encoder_arch": "perceiver"}, "encoder_arch: expected transformer, found 'perceiver'"),
    ("prott5nv", {"num_moe_experts": 4}, "num_moe_experts: expected 1, no mixture of experts"),
    ("prott5nv", {"tokenizer": {"library": "huggingface"}}, "expected sentencepiece or regex, found 'huggingface'"),
    ("prott5nv", {"tokenizer": "x"}, "expected the settings of tokenizer, found 'x'"),
    ("prott5nv", {"hidden_size": 32}, "hidden_size: expected 16, as the weights have, found '32'"),
    ("prott5nv", {"num_layers": 10**9}, "num_layers: expected 2, as the weights have"),
    ("prott5nv", {"ffn_hidden_size": 16}, "ffn_hidden_size: expected 24"),
    ("prott5nv", {"max_position_embeddings": 512}, "max_position_embeddings: expected 40"),
    ("prott5nv", {"num_attention_heads": 3}, "num_attention_heads: expected a divisor of 16, found '3'"),
    ("prott5nv", {"num_attention_heads": None}, "num_attention_heads: expected a number, found 'None'"),
    ("prott5nv", {"kv_channels": 8}, "expected the shape (96, 16), found (48, 16)"),
    ("prott5nv", {"layernorm_epsilon": "${trainer.eps}"}, "layernorm_epsilon: expected a number, found '${trainer"),
    ("prott5nv", {"bias": "yes"}, "bias: expected true or false, found 'yes'"),
    ("prott5nv", {"bias": False, "bias_gelu_fusion": False}, "beside them"),
    ("prott5nv", {"headscale": True}, "lacks layers.0.self_attention.head_scale_tensor"),
    ("prott5nv", {"pipeline_model_parallel_size": 2}, "expected weights that are not cut into stages of a pipeline"),
    ("prott5nv", {"seq_length": 0}, "seq_length: expected a whole number from 1 on, found '0'"),
    ("esm1nv", {"seq_length": 2}, "expected room for more than 2 special tokens, found 2"),
    ("esm1nv", "model.encoder.layers.0.self_attention.linear_qkv.weight", "layers of Megatron Core"),
    ("esm1nv", "model.output_layer.weight", "is no weight of the models that are read"),
    ("esm1nv", "model.language_model.embedding.tokentype_embeddings.weight", "token types"),
    ("esm1nv", "model.language_model.encoder.layers.0.adapter_layer.weight", "is of a model with adapters"),
    ("esm1nv", "model.language_model.encoder.layers.2.input_layernorm.weight", "num_layers: expected 3"),
    ("esm1nv", "model.language_model.encoder.layers.1.extra.weight", "has layers.1.extra.weight beside them"),
    (
        "esm1nv",
        "enc_dec_model.tokens_head.bias",
        "expected weights of ESM-1nv (model.language_model.*), or of ProtT5nv",
    ),
    ("prott5nv", "enc_dec_model.hiddens_module.z.weight", "hidden transforms, as MolMIM has"),
    ("prott5nv", "enc_dec_model.enc_dec_model.encoder.init_hidden", "a perceiver"),
    ("prott5nv", "enc_dec_model.enc_dec_model.encoder.model.layers.0.mlp.router.weight", "a mixture of experts"),
    ("prott5nv", "enc_dec_model.something.weight", "is no weight of the models that are read"),
]


@pytest.mark.parametrize(("kind", "what", "message"), REFUSED)
def test_what_is_not_read_is_refused(kind: str, what: Any, message: str, tmp_path: Path) -> None:
    def change(config: dict[str, Any], state: nemo.State) -> None:
        if isinstance(what, str):
            state[what] = torch.ones(2, 2)
        else:
            config.update(what)

    refused(spoilt(tmp_path, kind, change), message)


def refused(path: Path | str, message: str, **options: Any) -> None:
    """It is refused in one line that names the file."""
    with pytest.raises(CheckpointError) as caught:
        opened(path, **options)
    text = str(caught.value)
    assert message in text
    assert "\n" not in text
    assert str(path) in text


class Code:
    """What would write a file if it were unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


Files = dict[str, bytes]
CONFIG, WEIGHTS = "model_config.yaml", "model_weights.ckpt"


def changed(files: Files, **values: Any) -> None:
    """Changes settings in the configuration."""
    files[CONFIG] = yaml.safe_dump({**yaml.safe_load(files[CONFIG]), **values}).encode()


def weights(files: Files, change: Callable[[nemo.State], object]) -> None:
    """Changes weights in the first of the files of weights."""
    name = next(name for name in files if name.endswith(WEIGHTS))
    state = torch.load(io.BytesIO(files[name]), weights_only=True)
    change(state)
    stream = io.BytesIO()
    torch.save(state, stream)
    files[name] = stream.getvalue()


def moved(files: Files, old: str, new: str) -> None:
    for name in list(files):
        if old in name:
            files[name.replace(old, new)] = files.pop(name)


WORDS, FIRST = "encoder_embedding.word_embeddings.weight", "enc_dec_model.enc_dec_model.encoder.model.layers.0."
# What is done to the files of an archive, of two ranks or of one, and what the message says.
BROKEN: dict[str, tuple[Callable[[Files], object], str]] = {
    "empty": (lambda files: files.clear(), "expected 'model_config.yaml' in the archive, found no file"),
    "no configuration": (lambda files: files.pop(CONFIG), "expected 'model_config.yaml' in the archive, found "),
    "no YAML": (lambda files: files.update({CONFIG: b"a: [1"}), "model_config.yaml: expected YAML, found none"),
    "bytes for YAML": (lambda files: files.update({CONFIG: b"\xff\xfe\x00"}), "expected YAML, found none"),
    "a list for settings": (lambda files: files.update({CONFIG: b"- 1"}), "expected the settings of a model, found"),
    "code in YAML": (
        lambda files: files.update({CONFIG: b"a: !!python/object/apply:os.system ['touch ran']"}),
        "expected YAML, found none (could not determine a constructor",
    ),
    "no tokenizer settings": (lambda files: changed(files, tokenizer=None), "expected the settings of tokenizer"),
    "no weights": (lambda files: files.pop(WEIGHTS), "expected model_weights.ckpt, found model_config.yaml"),
    "weights of a pipeline": (
        lambda files: moved(files, WEIGHTS, f"tp_rank_00_pp_rank_000/{WEIGHTS}"),
        f"not cut into stages of a pipeline, found 'tp_rank_00_pp_rank_000/{WEIGHTS}'",
    ),
    "a distributed checkpoint": (
        lambda files: moved(files, WEIGHTS, "model_weights/.metadata"),
        "found the folder model_weights/ of a distributed checkpoint",
    ),
    "truncated weights": (lambda files: files.update({WEIGHTS: files[WEIGHTS][:5000]}), "is damaged (RuntimeError"),
    "text for weights": (lambda files: files.update({WEIGHTS: b"weights\n"}), "expected 'model_weights.ckpt' to hold"),
    "empty weights": (lambda files: files.update({WEIGHTS: b""}), "'model_weights.ckpt' is damaged (EOFError"),
    "a list for weights": (
        lambda files: files.update({WEIGHTS: saved([torch.ones(1)])}),
        "expected weights by name, found a list",
    ),
    "no weight": (lambda files: weights(files, lambda state: state.clear()), "expected weights of ESM-1nv"),
    "a weight missing": (
        lambda files: weights(files, lambda state: state.pop(f"{FIRST}mlp.dense_h_to_4h.bias")),
        "it lacks layers.0.mlp.dense_h_to_4h.bias",
    ),
    "no token embedding": (
        lambda files: weights(files, lambda state: state.pop(f"enc_dec_model.{WORDS}")),
        "lacks weights of the encoder: word_embeddings.weight",
    ),
    "no positions": (
        lambda files: weights(files, lambda state: state.pop("enc_dec_model." + WORDS.replace("word", "position"))),
        "lacks weights of the encoder: position_embeddings.weight",
    ),
    "a weight in another shape": (
        lambda files: weights(files, lambda s: s.update({f"{FIRST}input_layernorm.weight": torch.ones(3)})),
        "'layers.0.input_layernorm.weight': expected the shape (16,), found (3,)",
    ),
    "a token embedding of one axis": (
        lambda files: weights(files, lambda s: s.update({f"enc_dec_model.{WORDS}": torch.ones(3)})),
        "expected the weight word_embeddings.weight with two axes",
    ),
    "whole numbers for a weight": (
        lambda files: weights(files, lambda s: s.update({f"{FIRST}input_layernorm.weight": torch.ones(16).long()})),
        "expected a tensor of floating-point numbers, found one of torch.int64",
    ),
    "text for a weight": (
        lambda files: weights(files, lambda s: s.update({f"{FIRST}input_layernorm.weight": "ones"})),
        "expected a tensor of floating-point numbers, found a str",
    ),
    "NaN": (
        lambda files: weights(files, lambda s: s[f"{FIRST}input_layernorm.weight"].fill_(torch.nan)),
        "'layers.0.input_layernorm.weight': expected finite numbers, found others",
    ),
    "no tokenizer": (lambda files: moved(files, "_x.model", "_y.model"), "expected 'nemo:00000000000000000000000000"),
    "an empty tokenizer": (
        lambda files: files.update({name: b"" for name in files if name.endswith(".model")}),
        "expected a regular expression, found an empty file",
    ),
    "a regular expression with groups": (
        lambda files: files.update({name: b"(Br)|C" for name in files if name.endswith(".model")}),
        "expected a regular expression without groups, found '(Br)|C'",
    ),
    "no regular expression": (
        lambda files: files.update({name: b"[a" for name in files if name.endswith(".model")}),
        "expected a regular expression, found '[a' (",
    ),
    "bytes for a vocabulary": (
        lambda files: files.update({name: b"\xff" for name in files if name.endswith(".vocab")}),
        "tokenizer: expected UTF-8, found other bytes",
    ),
    "no unknown token": (
        lambda files: files.update({name: b"<PAD>\nC" for name in files if name.endswith(".vocab")}),
        "expected a vocabulary with '?' for unknown tokens",
    ),
    "a larger vocabulary": (
        lambda files: files.update(
            {n: b"\n".join(b"?%d" % i for i in range(99)) + b"\n?" for n in files if "vocab" in n}
        ),
        "expected a tokenizer of at most 24 tokens, as the model has, found one of 100",
    ),
}
RANKS: dict[str, tuple[Callable[[Files], object], str]] = {
    "the last missing": (lambda files: files.pop(f"mp_rank_01/{WEIGHTS}"), "expected the weights of 2 ranks (tensor_m"),
    "the first missing": (
        lambda files: files.pop(f"mp_rank_00/{WEIGHTS}"),
        f"expected the weights of every rank from mp_rank_00 on, found mp_rank_01/{WEIGHTS}",
    ),
    "fewer in the settings": (lambda files: changed(files, tensor_model_parallel_size=1), "of 1 ranks"),
    "other weights": (
        lambda files: weights(files, lambda state: state.pop(f"{FIRST}input_layernorm.weight")),
        "expected the same weights of every rank, found in some alone layers.0.input_layernorm.weight",
    ),
    "other shapes": (
        lambda files: weights(files, lambda s: s.update({f"{FIRST}mlp.dense_h_to_4h.bias": torch.ones(3)})),
        "'layers.0.mlp.dense_h_to_4h.bias': expected the same shape of every rank, found [(3,), (12,)]",
    ),
    "one of them truncated": (
        lambda files: files.update({f"mp_rank_01/{WEIGHTS}": files[f"mp_rank_01/{WEIGHTS}"][:999]}),
        f"'mp_rank_01/{WEIGHTS}' is damaged",
    ),
    "a whole one beside them": (
        lambda files: files.update({WEIGHTS: files[f"mp_rank_01/{WEIGHTS}"]}),
        f"of 2 ranks (tensor_model_parallel_size), found 3: {WEIGHTS}",
    ),
}


def saved(content: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(content, stream)
    return stream.getvalue()


@pytest.mark.parametrize(
    ("ranks", "what"), [(1, what) for what in BROKEN] + [(2, what) for what in RANKS], ids=lambda x: str(x)
)
def test_a_broken_archive(ranks: int, what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    change, message = (BROKEN if ranks == 1 else RANKS)[what]
    monkeypatch.chdir(tmp_path)
    config = nemo.make_config("megamolbart", {"tensor_model_parallel_size": ranks})
    state = nemo.make_state("megamolbart")
    files = nemo.members("megamolbart", config, nemo.cut(state, ranks, {}, "megamolbart"))
    change(files)
    refused(nemo.pack(tmp_path / "x.nemo", files), message)
    assert [one.name for one in tmp_path.iterdir()] == ["x.nemo"]


@pytest.mark.parametrize("protocol", ["zip", "pickle"])
def test_code_in_the_weights_is_not_run(protocol: str, tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    content = {**nemo.make_state("esm1nv"), "more": Code(ran)}
    files = nemo.members("esm1nv", nemo.make_config("esm1nv"), [{}])
    files[WEIGHTS] = saved(content) if protocol == "zip" else pickle.dumps(content)
    for trust in (False, True):
        refused(nemo.pack(tmp_path / "x.nemo", files), "'model_weights.ckpt'", trust_pickle=trust)
    assert not ran.exists()


@pytest.mark.parametrize("compressed", [False, True], ids=["tar", "tar.gz"])
def test_half_an_archive(compressed: bool, tmp_path: Path) -> None:
    """As an interrupted download leaves it, cut at any place."""
    nemo.write(tmp_path / "whole.nemo", "esm1nv", compressed=compressed)
    content = (tmp_path / "whole.nemo").read_bytes()
    for cut in range(0, len(content) - 12_000, len(content) // 12):  # a tar ends in up to 10 kB of zeros
        (tmp_path / "x.nemo").write_bytes(content[:cut])
        refused(tmp_path / "x.nemo", "")


def test_no_archive_at_all(tmp_path: Path) -> None:
    path = tmp_path / "x.nemo"
    path.write_text("a text\n")
    refused(path, "expected a .nemo archive (a tar file), found none, or part of one (ReadError")
    path.unlink()
    refused(path, f"ckpt: '{path}' does not exist")
    path.mkdir()
    refused(path, "found none")


def test_other_tokenizers_files_are_refused(tmp_path: Path) -> None:
    """Sentencepiece reads what it can of other bytes."""
    files = nemo.members("esm1nv", nemo.make_config("esm1nv"), [nemo.make_state("esm1nv")])
    name = next(name for name in files if name.endswith(".model"))
    for content, message in ((b"", "found an empty file"), (b"no model", "expected a sentencepiece model, found none")):
        refused(nemo.pack(tmp_path / "x.nemo", {**files, name: content}), message)


def test_links_and_paths_that_lead_out_are_not_followed(tmp_path: Path) -> None:
    (tmp_path / "secret.yaml").write_text("a: 1\n")
    files = nemo.members("esm1nv", nemo.make_config("esm1nv"), [nemo.make_state("esm1nv")])
    with tarfile.open(nemo.pack(tmp_path / "x.nemo", {**files, "../outside": b"x", "/tmp/../x": b"x"}), "a") as tar:
        link = tarfile.TarInfo("./model_config.yaml")
        link.type, link.linkname = tarfile.SYMTYPE, str(tmp_path / "secret.yaml")
        tar.addfile(link)
    assert_states(opened(tmp_path / "x.nemo"), nemo.make_state("esm1nv"), "esm1nv", {})
    assert sorted(one.name for one in tmp_path.iterdir()) == ["secret.yaml", "x.nemo"]


def test_unknown_residues(tmp_path: Path) -> None:
    """Several in a row are one token, as in the reference; each residue has a state of its own where that is asked."""
    nemo.write(tmp_path / "x.nemo", "prott5nv")
    encoder = opened(tmp_path / "x.nemo")
    text = "MAL*WE-jjK"
    assert encoder.count_unknown([text, "MK", "j"]) == [(4, 10), (0, 2), (1, 1)]
    (states,) = encoder.hidden_states([text])
    assert len(states) == 8
    places = [0, 1, 2, 3, 4, 5, 6, 6, 6, 7]
    assert torch.equal(encoder.per_character(text, states), states[places])
    assert torch.equal(encoder.per_character("MK", states[:2]), states[:2])
    assert "write sequences in them" in encoder.why_unknown("mkt")
    assert encoder.why_unknown("**") == ""


def test_blanks_at_an_end_are_no_token(tmp_path: Path) -> None:
    nemo.write(tmp_path / "x.nemo", "esm1nv")
    encoder = opened(tmp_path / "x.nemo")
    assert encoder.count_unknown([" MK ", "M K"]) == [(0, 2), (1, 3)]
    (states,) = encoder.hidden_states([" MK "])
    assert len(encoder.per_character(" MK ", states)) == 2
    with pytest.raises(DataError, match="at least one token"):
        encoder.hidden_states(["  "])


def test_a_token_level_task_has_a_row_for_each_unknown_residue(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    nemo.write(tmp_path / "x.nemo", "esm1nv")
    task = token_task(tmp_path, ["MKjjT", "GG--", "MKT", "AAA"])
    validate(opened(tmp_path / "x.nemo"), task, Store(tmp_path / "store"))
    assert "4 tokens in 2 of 4 sequences are unknown to the tokenizer" in caplog.text


def test_unknown_tokens_of_smiles_stay_single(tmp_path: Path) -> None:
    nemo.write(tmp_path / "x.nemo", "megamolbart")
    encoder = opened(tmp_path / "x.nemo")
    assert encoder.count_unknown(["C[Se]?xx", "C[nH]Br"]) == [(4, 5), (0, 3)]
    assert len(encoder.hidden_states(["C[Se]?xx"])[0]) == 5


@pytest.mark.parametrize(
    ("kind", "made", "limit"),
    [
        ("esm1nv", {}, 38),
        ("prott5nv", {}, 40),
        ("prott5nv", {"seq_length": 30}, 30),
        ("esm1nv", {"seq_length": 99}, 38),
        ("prott5nv", {"seq_length": 99, "position_embedding_type": "relative"}, 99),
        ("prott5nv", {"seq_length": None, "position_embedding_type": "relative"}, None),
    ],
)
def test_the_longest_sequence(kind: str, made: dict[str, Any], limit: int | None, tmp_path: Path) -> None:
    state = nemo.write(tmp_path / "x.nemo", kind, made)
    encoder = opened(tmp_path / "x.nemo")
    assert encoder.max_seq_length == limit
    longest = ("MK" * 100)[: limit or 200]
    (found,) = encoder.hidden_states([longest])
    ids = [*encoder.tokens.before, *encoder.tokens.ids(longest), *encoder.tokens.after]
    special = len(encoder.tokens.before)
    expected = nemo.expected_states(state, kind, made, ids)[special : len(ids) - special]
    assert distance(found, expected) < TOLERANCE
    if limit is not None:
        with pytest.raises(DataError, match="as the model takes, found"):
            encoder.hidden_states([longest + "A"])


@pytest.mark.parametrize("layer", [0, 1, -2, 2, -1])
def test_another_layer(layer: int, tmp_path: Path) -> None:
    state = nemo.write(tmp_path / "x.nemo", "esm1nv")
    encoder = opened(tmp_path / "x.nemo", layer=layer)
    assert len(encoder.model.layers) == layer % (nemo.LAYERS + 1)
    assert_states(encoder, state, "esm1nv", {}, layer=layer % (nemo.LAYERS + 1))
    with pytest.raises(ConfigError, match="layer: expected -3 to 2 for a model of 2 layers, found 3"):
        opened(tmp_path / "x.nemo", layer=3)


def test_precision(tmp_path: Path) -> None:
    """Also with a bias of positions, padding, and a norm that torch does not compute itself."""
    made = {"position_embedding_type": "relative", "normalization": "rmsnorm"}
    nemo.write(tmp_path / "x.nemo", "prott5nv", made)
    exact = opened(tmp_path / "x.nemo").hidden_states(PROTEINS)
    encoder = opened(tmp_path / "x.nemo", precision="bf16")
    for found, expected in zip(encoder.hidden_states(PROTEINS), exact, strict=True):
        assert found.dtype == torch.float32
        assert TOLERANCE < distance(found, expected) < 0.1
    assert encoder.precision == "bf16"


def test_the_digest_changes_with_all_that_states_depend_on(tmp_path: Path) -> None:
    path = tmp_path / "x.nemo"
    digests = []

    def add(kind: str = "prott5nv", made: Mapping[str, Any] = {}, seed: int = 0, **options: Any) -> str:
        nemo.write(path, kind, made, seed=seed)
        digests.append(opened(path, **options).digest)
        return digests[-1]

    first = add()
    add(seed=1)
    add(made={"num_attention_heads": 2, "kv_channels": 8})
    add(made={"bias_gelu_fusion": False})
    add(made={"apply_query_key_layer_scaling": False})
    add(precision="bf16")
    add(layer=1)
    files = nemo.members("prott5nv", nemo.make_config("prott5nv"), [nemo.make_state("prott5nv")])
    name = next(name for name in files if name.endswith(".model"))
    other = nemo.protein_model(nemo.LETTERS.replace("O", "J"))
    digests.append(opened(nemo.pack(path, {**files, name: other})).digest)
    assert len(set(digests)) == len(digests)
    nemo.write(tmp_path / "again.nemo", "prott5nv", compressed=True, style="both")
    assert opened(tmp_path / "again.nemo").digest == first


def test_an_archive_is_known_by_its_content(tmp_path: Path) -> None:
    for name in ("x.ckpt", "archive", "x.tar.gz"):
        nemo.write(tmp_path / name, "esm1nv", compressed=name.endswith("gz"))
        assert opened(tmp_path / name).max_seq_length == 38
    with tarfile.open(tmp_path / "other.tar", "w") as tar:
        tar.add(tmp_path / "archive", "archive")
    refused(tmp_path / "other.tar", "found the file")
    nemo.write(tmp_path / "folder" / "below" / "x.nemo", "esm1nv")
    assert opened(tmp_path / "folder").max_seq_length == 38


def test_several_archives_their_names_and_steps(tmp_path: Path) -> None:
    names = ["bert--val_loss=2.10-step=300-consumed_samples=9.0", "bert--val_loss=2.05-step=1200-consumed_samples=9.0"]
    for name in reversed(names):
        nemo.write(tmp_path / f"{name}.nemo", "esm1nv")
    found = expand(f"{tmp_path}/*step=*.nemo")
    assert [name_of(ckpt) for ckpt in found] == sorted(names)
    assert {step_of(ckpt, opened(ckpt)) for ckpt in found} == {300, 1200}


@pytest.mark.parametrize(
    ("kind", "target", "model"),
    [("esm1nv", "esm", "ESM-1nv"), ("prott5nv", "prott5", "ProtT5nv"), ("megamolbart", "megamolbart", "MegaMolBART")],
)
def test_infer_target(kind: str, target: str, model: str, tmp_path: Path) -> None:
    nemo.write(tmp_path / "x.nemo", kind)
    assert opened(tmp_path / "x.nemo", infer_target=target).hidden_size == nemo.HIDDEN
    for other, name in (("esm", "ESM-1nv"), ("prott5", "ProtT5nv"), ("megamolbart", "MegaMolBART")):
        if other != target:
            message = f"infer_target '{other}' is for {name}, but '{tmp_path / 'x.nemo'}' is {model}; use auto"
            refused(tmp_path / "x.nemo", message, infer_target=other)


def test_a_factory_is_refused(tmp_path: Path) -> None:
    nemo.write(tmp_path / "x.nemo", "esm1nv")
    refused(tmp_path / "x.nemo", "a .nemo archive needs no model_factory", model_factory="torch.nn.Identity")


def test_the_whole_job_from_the_command_line(tmp_path: Path, tracking: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A sequence-level and a token-level task, two epochs each; then from an archive that was cut."""
    texts = proteins(40, 1)
    rows = [
        {"sequence": t, "value": t.count("A") / len(t), "state": "HC" * (len(t) // 2) + "H" * (len(t) % 2)}
        for t in texts
    ]
    for part, some in (("train", rows[:30]), ("test", rows[30:])):
        write_csv(tmp_path / "data" / part / "x000.csv", some)
    given = {"dataset_path": str(tmp_path / "data"), "num_epochs": 2, "infer_target": TARGET, **ALONE}
    tasks = [
        {**given, "task_name": "value", "class": "sequence", "task_type": "regression", "target_column": "value"},
        {**given, "task_name": "state", "class": "token", "task_type": "classification", "target_column": ["state"]},
    ]
    section = {"dataset": tasks, "store": str(tmp_path / "store"), "device": "cpu", "logging": {"figures": False}}
    (tmp_path / "x.yaml").write_text(yaml.safe_dump({"model": {"dwnstr_task_validation": section}}))
    nemo.write(tmp_path / "esm-step=70.nemo", "esm1nv", ranks=2)
    command = ["main", f"--ckpt={tmp_path / 'esm-step=70.nemo'}", f"--config={tmp_path / 'x.yaml'}"]
    assert main(command) == 0
    run = newest_run()
    assert {"value/test_value_mse", "state/test_state_accuracy"} <= set(run.data.metrics)
    content = (tmp_path / "esm-step=70.nemo").read_bytes()
    (tmp_path / "esm-step=70.nemo").write_bytes(content[: len(content) // 2])
    capsys.readouterr()
    assert main(command) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: ckpt: ")


TARGET = "bionemo.model.protein.esm1nv.infer.ESM1nvInference"
