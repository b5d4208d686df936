"""A writer of small `.nemo` archives, as NeMo names and cuts their weights; how they are opened, or refused."""

from __future__ import annotations

import functools
import io
import tarfile
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
import yaml

from pipeline import EncoderOptions, open_encoder
from pipeline.encoders.megatron_encoder import MegatronEncoder
from pipeline.errors import CheckpointError

State = dict[str, Any]

LETTERS = "LASGVERTDIPKNFQYHMCWXBUZO"
EXPRESSION = r"\[[^\]]+]|Br?|Cl?|N|O|S|P|F|I|b|c|n|o|s|p|\(|\)|\.|=|#|-|\+|\\\\|\/|:|~|@|\?|>|\*|\$|\%[0-9]{2}|[0-9]"
SMILES_TOKENS = ["<PAD>", "?", "^", "&", "<MASK>", "<SEP>", *"CNOcno()=#123", "Br", "[nH]", "Cl"]
HIDDEN, LAYERS, HEADS, INNER, POSITIONS, BUCKETS = 16, 2, 4, 24, 40, 8
BASE = {
    "seq_length": POSITIONS,
    "max_position_embeddings": POSITIONS,
    "num_layers": LAYERS,
    "hidden_size": HIDDEN,
    "ffn_hidden_size": INNER,
    "num_attention_heads": HEADS,
    "kv_channels": None,
    "layernorm_epsilon": 1e-5,
    "make_vocab_size_divisible_by": 8,
    "tensor_model_parallel_size": 1,
    "pipeline_model_parallel_size": 1,
}
TOP = ("seq_length", "max_position_embeddings", "tensor_model_parallel_size", "pipeline_model_parallel_size")
TARGETS = {
    "esm1nv": "bionemo.model.protein.esm1nv.esm1nv_model.ESM1nvModel",
    "prott5nv": "bionemo.model.protein.prott5nv.prott5_model.ProtT5nvModel",
    "megamolbart": "bionemo.model.molecule.megamolbart.megamolbart_model.MegaMolBARTModel",
}
GATES = {"geglu": "gelu", "reglu": "relu", "swiglu": "silu"}


@functools.cache
def protein_model(letters: str = LETTERS) -> bytes:
    """A sentencepiece model of single characters, as the reference's."""
    stream = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([letters] * 20),
        model_writer=stream,
        model_type="char",
        vocab_size=30,
        pad_id=3,
        user_defined_symbols=["<mask>"],
        add_dummy_prefix=False,
        minloglevel=2,
    )
    return stream.getvalue()


def vocabulary(kind: str) -> int:
    """Rows of the token embedding: a multiple of 8."""
    return 32 if kind != "megamolbart" else 24


def full(settings: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """The settings that count, defaults filled in: an ESM-1nv heeds only some of them."""
    known: dict[str, Any] = {
        "transformer_block_type": "pre_ln",
        "normalization": "layernorm",
        "activation": "gelu",
        "bias": True,
        "headscale": False,
        "openai_gelu": False,
    }
    other: dict[str, Any] = {
        "position_embedding_type": "learned_absolute",
        "relative_attention_num_buckets": 32,
        "relative_attention_max_distance": 128,
        "apply_query_key_layer_scaling": True,
        "normalize_attention_scores": True,
        "megatron_legacy": False,
    }
    given = {key: value for key, value in settings.items() if kind != "esm1nv" or key not in known}
    return {**BASE, **known, **other, **given}


class _Writer:
    """Puts random weights into a state."""

    def __init__(self, made: Mapping[str, Any], seed: int) -> None:
        self.made = made
        self.state: State = {}
        self._random = torch.Generator().manual_seed(seed)

    def put(self, name: str, *shape: int) -> None:
        scale = 1.0 if len(shape) == 1 else 0.2  # norms and biases far from their defaults
        self.state[name] = scale * torch.randn(shape, generator=self._random)

    def linear(self, name: str, *shape: int) -> None:
        self.put(f"{name}.weight", *shape)
        if self.made["bias"]:
            self.put(f"{name}.bias", shape[0])

    def norm(self, name: str, width: int = HIDDEN) -> None:
        self.put(f"{name}.weight", width)
        kind = self.made["normalization"]
        if kind in ("layernorm", "layernorm1p") or (kind == "low_precision_layernorm" and self.made["bias"]):
            self.put(f"{name}.bias", width)

    def layer(self, name: str) -> None:
        made, inner = self.made, self.made["num_attention_heads"] * (self.made["kv_channels"] or HIDDEN // HEADS)
        self.norm(f"{name}input_layernorm")
        self.linear(f"{name}self_attention.query_key_value", 3 * inner, HIDDEN)
        self.linear(f"{name}self_attention.dense", HIDDEN, inner)
        if made["headscale"]:
            self.put(f"{name}self_attention.head_scale_tensor", 1, HEADS, 1, 1)
        self.norm(f"{name}post_attention_layernorm")
        self.linear(f"{name}mlp.dense_h_to_4h", INNER * (1 + made["activation"].startswith("fast-")), HIDDEN)
        if made["activation"] in GATES:
            self.linear(f"{name}mlp.dense_h_to_4h_2", INNER, HIDDEN)
        if made["transformer_block_type"] == "normformer":
            self.norm(f"{name}post_attention_normformer_norm")
            self.norm(f"{name}mlp.normalization", INNER)
        self.linear(f"{name}mlp.dense_4h_to_h", HIDDEN, INNER)


def make_state(kind: str, settings: Mapping[str, Any] = {}, seed: int = 0) -> State:
    """Random weights by NeMo's names, of one rank; a decoder and heads stand beside the encoder."""
    writer, bert = _Writer(full(settings, kind), seed), kind == "esm1nv"
    words = "model.language_model.embedding." if bert else "enc_dec_model.encoder_embedding."
    stack = "model.language_model.encoder." if bert else "enc_dec_model.enc_dec_model.encoder.model."
    writer.put(f"{words}word_embeddings.weight", vocabulary(kind), HIDDEN)
    if writer.made["position_embedding_type"] == "relative":
        table = "enc_dec_model.encoder_relative_position_embedding.relative_position_embedding.weight"
        writer.put(table, writer.made["relative_attention_num_buckets"], HEADS)
    else:
        writer.put(f"{words}position_embeddings.weight", POSITIONS, HIDDEN)
    for number in range(LAYERS):
        writer.layer(f"{stack}layers.{number}.")
    if writer.made["transformer_block_type"] != "post_ln":
        writer.norm(f"{stack}final_layernorm")
    beside = "model.lm_head.dense" if bert else "enc_dec_model.enc_dec_model.decoder.model.layers.0.mlp.dense_h_to_4h"
    writer.put(f"{beside}.weight", HIDDEN, HIDDEN)
    if not bert:
        shared = writer.state[f"{words}word_embeddings.weight"]
        writer.state["enc_dec_model.decoder_embedding.word_embeddings.weight"] = shared
        writer.put("enc_dec_model.tokens_head.bias", vocabulary(kind))
    return writer.state


def cut(state: State, ranks: int, settings: Mapping[str, Any], kind: str) -> list[State]:
    """The weights of each rank, as Megatron's parallel layers keep them."""
    made = full(settings, kind)
    shards: list[State] = [{} for _ in range(ranks)]
    for name, value in state.items():
        module = name.split(".")[-2] if "." in name else ""
        rows = module in ("word_embeddings", "query_key_value", "dense_h_to_4h", "dense_h_to_4h_2", "normalization")
        columns = name.endswith(("self_attention.dense.weight", "mlp.dense_4h_to_h.weight", "head_scale_tensor"))
        parts = 1
        if module == "query_key_value" and made["megatron_legacy"]:
            parts = 3
        elif module == "dense_h_to_4h" and made["activation"].startswith("fast-"):
            parts = 2
        for rank, shard in enumerate(shards):
            if "decoder" in name or not (rows or columns):
                shard[name] = value
            elif columns:
                shard[name] = value.chunk(ranks, 1)[rank].clone()
            else:
                shard[name] = torch.cat([part.chunk(ranks)[rank] for part in value.chunk(parts)])
    return shards


def make_config(kind: str, settings: Mapping[str, Any] = {}, style: str = "flat") -> dict[str, Any]:
    """The configuration: `flat`, `both` (with the settings in `encoder` again) or `encoder` (there alone)."""
    smiles = kind == "megamolbart"
    tokenizer = {"library": "regex" if smiles else "sentencepiece", "model": f"nemo:{uuid.UUID(int=1).hex}_x.model"}
    tokenizer["vocab_file"] = f"nemo:{uuid.UUID(int=2).hex}_x.vocab"
    config: dict[str, Any] = {**BASE, **settings, "target": TARGETS[kind], "tokenizer": tokenizer}
    if style == "flat":
        return config
    inner = {key: value for key, value in {**BASE, **settings}.items() if key not in TOP}
    if style == "encoder":
        config = {key: value for key, value in config.items() if key not in inner}
    return {**config, "encoder": {**inner, "arch": "transformer", "tokenizer": {"model": "/old/x.model"}}}


def members(kind: str, config: Mapping[str, Any], shards: Sequence[State]) -> dict[str, bytes]:
    """The files in an archive by name."""
    smiles = kind == "megamolbart"
    found = {"model_config.yaml": yaml.safe_dump(dict(config)).encode()}
    for rank, state in enumerate(shards):
        stream = io.BytesIO()
        torch.save(state, stream)
        name = "model_weights.ckpt" if len(shards) == 1 else f"mp_rank_{rank:02d}/model_weights.ckpt"
        found[name] = stream.getvalue()
    found[f"{uuid.UUID(int=1).hex}_x.model"] = EXPRESSION.encode() if smiles else protein_model()
    found[f"{uuid.UUID(int=2).hex}_x.vocab"] = "\n".join(SMILES_TOKENS).encode() if smiles else b"unused"
    return found


def pack(path: Path, files: Mapping[str, bytes], compressed: bool = False) -> Path:
    """Writes the archive."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz" if compressed else "w") as tar:
        for name, content in {".": b"", **{f"./{name}": content for name, content in files.items()}}.items():
            info = tarfile.TarInfo(name)
            info.size, info.type = len(content), tarfile.DIRTYPE if name == "." else tarfile.REGTYPE
            tar.addfile(info, io.BytesIO(content))
    return path


def write(
    path: Path,
    kind: str,
    settings: Mapping[str, Any] = {},
    style: str = "flat",
    ranks: int = 1,
    seed: int = 0,
    compressed: bool = False,
) -> State:
    """Writes an archive, and gives its weights, those of all ranks together."""
    state = make_state(kind, settings, seed)
    config = make_config(kind, {**settings, "tensor_model_parallel_size": ranks}, style)
    pack(path, members(kind, config, cut(state, ranks, settings, kind)), compressed)
    return state


def spoilt(folder: Path, kind: str, change: Callable[[dict[str, Any], State], object], **how: Any) -> Path:
    """An archive whose configuration and weights were changed."""
    ranks = how.pop("ranks", 1)
    made = how.pop("made", {})
    config = make_config(kind, {**made, "tensor_model_parallel_size": ranks}, how.pop("style", "flat"))
    state = make_state(kind, made)
    change(config, state)
    return pack(folder / "x.nemo", members(kind, config, cut(state, ranks, made, kind)), **how)


def opened(path: Path | str, **options: Any) -> MegatronEncoder:
    encoder = open_encoder(str(path), EncoderOptions(device="cpu", **options))
    assert isinstance(encoder, MegatronEncoder)
    return encoder


def refused(path: Path | str, message: str, **options: Any) -> None:
    """It is refused in one line that names the file."""
    with pytest.raises(CheckpointError) as caught:
        opened(path, **options)
    text = str(caught.value)
    assert message in text
    assert "\n" not in text
    assert str(path) in text
