"""Packed sequences: no padding, the same hidden states, and only for models that it is right for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    EsmConfig,
    EsmModel,
    ModernBertConfig,
    ModernBertModel,
    RobertaConfig,
    RobertaModel,
    T5Config,
    T5EncoderModel,
)

from pipeline.checkpoints.opening import open_encoder
from pipeline.encoders.devices import DTYPES
from pipeline.encoders.huggingface import HuggingFaceEncoder
from pipeline.encoders.options import EncoderOptions
from pipeline.encoders.packing import Packing
from tests.support.decoders import decoder_folder

# transformers 4.48 has no interface for attention of others: models are padded, and that is said
pytestmark = pytest.mark.skipif(not hasattr(transformers, "AttentionInterface"), reason="needs transformers 4.51")
Make = Callable[..., Path]
SIZE: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}


def moved(model: Any) -> Any:
    """Weights away from their near-zero beginnings, so that positions and context matter."""
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.2) if parameter.dim() > 1 else None
    return model.eval()


@settings(max_examples=30, deadline=None)
@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=12))
@pytest.mark.parametrize("kind", ["esm", "protbert", "prott5", "smiles_bart"])
@torch.inference_mode()
def test_packed_is_as_alone(model_folder: Make, kind: str, lengths: list[int]) -> None:
    encoder: Any = open_encoder(str(model_folder(kind)))
    assert encoder.packs
    letters = "CNOCCONNCOCNCCOCNOCC" if kind == "smiles_bart" else "ACDEFGHIKLMNPQRSTVWY"
    texts = [letters[length % 7 :] * 3 for length in lengths]
    texts = [text[:length] for text, length in zip(texts, lengths, strict=True)]
    for text, state in zip(texts, encoder.hidden_states(texts), strict=True):
        ids = torch.tensor([[*encoder.tokens.before, *encoder.tokens.ids(text), *encoder.tokens.after]])
        first, behind = len(encoder.tokens.before), len(encoder.tokens.after)
        expected = encoder.model(input_ids=ids).last_hidden_state[0, first : ids.shape[1] - behind]
        torch.testing.assert_close(state, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["protbert", "smiles_bart"])
def test_more_tokens_in_a_row_than_the_model_has_positions(model_folder: Make, kind: str) -> None:
    encoder: Any = open_encoder(str(model_folder(kind)))
    texts = ["CNOCCNOOCN" * 6] * 40
    states = encoder.hidden_states(texts)
    assert all(torch.equal(state, states[0]) for state in states)
    assert encoder.model.config.max_position_embeddings < sum(map(len, texts))


@torch.inference_mode()
def test_positions_numbered_from_behind_the_padding() -> None:
    ids = list(range(5, 25))
    roberta = moved(RobertaModel(RobertaConfig(vocab_size=30, max_position_embeddings=50, **SIZE)))
    packing = Packing.fit(roberta, ids, padding=1)
    assert packing is not None
    assert packing.first == 2
    absolute = EsmConfig(vocab_size=33, pad_token_id=1, mask_token_id=32, max_position_embeddings=60, **SIZE)
    packing = Packing.fit(moved(EsmModel(absolute)), ids, padding=1)
    assert packing is not None
    assert packing.first == 2


@torch.inference_mode()
def test_models_with_another_attention_are_padded() -> None:
    """Windows (ModernBERT), another kernel."""
    config = ModernBertConfig(vocab_size=40, pad_token_id=0, local_attention=8, **SIZE)
    windows = moved(ModernBertModel(config))
    before = windows.config._attn_implementation
    assert Packing.fit(windows, list(range(5, 29)), padding=0) is None
    assert windows.config._attn_implementation == before
    rotary = EsmConfig(vocab_size=33, pad_token_id=1, mask_token_id=32, position_embedding_type="rotary", **SIZE)
    eager = moved(EsmModel(rotary, add_pooling_layer=False))
    eager.set_attn_implementation("eager")
    assert Packing.fit(eager, list(range(5, 25)), padding=1) is None


@torch.inference_mode()
def test_activations_written_out_are_fused_while_it_runs() -> None:
    """ESM's GELU and that of a T5 with gates: the same hidden states, from other operations, and a model as it was."""
    ids = list(range(5, 29))
    rotary = EsmConfig(vocab_size=33, pad_token_id=1, mask_token_id=32, position_embedding_type="rotary", **SIZE)
    gates = T5Config(
        vocab_size=40, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu"
    )
    written_out = {"aten::erf", "aten::tanh"}
    for model in (moved(EsmModel(rotary, add_pooling_layer=False)), moved(T5EncoderModel(gates))):
        packing = Packing.fit(model, ids, padding=1)
        assert packing is not None
        assert len(packing.fused) == 2
        with torch.profiler.profile() as seen:
            (found,) = packing([ids], lambda model=model, **inputs: model(**inputs).last_hidden_state)
        assert not written_out & {one.key for one in seen.key_averages()}
        with torch.profiler.profile() as seen:
            expected = model(input_ids=torch.tensor([ids])).last_hidden_state[0]
        assert written_out & {one.key for one in seen.key_averages()}
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@torch.inference_mode()
def test_what_is_not_the_same_is_not_fused() -> None:
    """A module that somebody hooked, and one that has the name and computes something else."""
    config = EsmConfig(vocab_size=33, pad_token_id=1, mask_token_id=32, position_embedding_type="rotary", **SIZE)
    model = moved(EsmModel(config, add_pooling_layer=False))
    one, other = (layer.intermediate for layer in model.encoder.layer)
    own = one.forward = lambda states: torch.relu(one.dense(states))
    packing = Packing.fit(model, list(range(5, 29)), padding=1)
    assert packing is not None
    assert set(packing.fused) == {other}
    assert one.forward is own
    other.__class__ = type(
        "EsmIntermediate", (type(other),), {"forward": lambda self, states: self.dense(states).sin()}
    )
    packing = Packing.fit(model, list(range(5, 29)), padding=1)
    assert packing is not None
    assert packing.fused == {}


@torch.inference_mode()
def test_padded_and_packed_agree(model_folder: Make) -> None:
    """Attention that is not torch's own is not replaced, so such a model is padded."""
    packed, padded = (cast(HuggingFaceEncoder, open_encoder(str(model_folder("esm")))) for _ in range(2))
    cast(Any, padded.model).set_attn_implementation("eager")
    assert packed.packs
    assert not padded.packs
    texts = ["MKV", "ACDEFGHIKL" * 9, "W", "MKV"]
    for one, other in zip(packed.hidden_states(texts), padded.hidden_states(texts), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=0)


@pytest.mark.slow  # a minute of a C++ compiler
@pytest.mark.parametrize("kind", ["esm", "prott5"])
def test_compiled_layers_give_the_same(model_folder: Make, kind: str) -> None:
    """The key `compile`: once for all layers and lengths, and stored apart, since the last bits are others."""
    folder = str(model_folder(kind))
    plain, compiled = (cast(Any, open_encoder(folder, EncoderOptions(compile=value))) for value in (False, True))
    texts = ["MKV", "ACDEFGHIKL" * 4, "W", "MKV"]
    torch.compiler.reset()
    for some in (texts, texts[:1], texts[1:]):
        for one, other in zip(compiled.hidden_states(some), plain.hidden_states(some), strict=True):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=0)
    assert compiled.packs
    assert compiled.digest != plain.digest


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("kind", ["esm", "protbert", "smiles_bart", "gpt2", "llama"])
def test_a_gpu_packs_in_half_precision(model_folder: Make, tmp_path: Path, kind: str, precision: str) -> None:
    """The same hidden states as of each sequence alone, to the rounding of the half precision."""
    folder = decoder_folder(tmp_path, kind) if kind in ("gpt2", "llama") else model_folder(kind)
    encoder: Any = open_encoder(str(folder), EncoderOptions(device="cuda", precision=precision))
    assert encoder.packs
    letters = "CNOCCONNCOCNCCOCNOCC" if kind == "smiles_bart" else "ACDEFGHIKLMNPQRSTVWY"
    texts = [letters[length % 7 :] * 3 for length in (3, 40, 17, 17, 30, 1)]
    for text, state in zip(texts, encoder.hidden_states(texts), strict=True):
        row = [*encoder.tokens.before, *encoder.tokens.ids(text), *encoder.tokens.after]
        first, behind = len(encoder.tokens.before), len(encoder.tokens.after)
        with torch.no_grad(), torch.autocast("cuda", DTYPES[precision]):
            alone = encoder.model(input_ids=torch.tensor([row], device="cuda")).last_hidden_state[0]
        alone = alone[first : len(row) - behind].float()
        assert (state - alone).norm() < 0.02 * alone.norm()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(("kind", "precision"), [("prott5", "bf16"), ("esm", "fp32")])
def test_a_gpu_pads_what_its_kernel_does_not_take(model_folder: Make, kind: str, precision: str) -> None:
    """A bias of relative positions, and float32."""
    encoder: Any = open_encoder(str(model_folder(kind)), EncoderOptions(device="cuda", precision=precision))
    assert not encoder.packs
