"""`.nemo` archives of models that are not read: each gives one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support import nemo

# A setting, or a weight's name, that is refused, and what the message says.
REFUSED = [
    ("esm1nv", {"bert_binary_head": True}, "bert_binary_head: expected false, found True, which is not read"),
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
    ("prott5nv", {"hidden_size": 32}, "hidden_size: expected 16, as the weights have, found 32"),
    ("prott5nv", {"num_layers": 10**9}, "num_layers: expected 2, as the weights have"),
    ("prott5nv", {"ffn_hidden_size": 16}, "ffn_hidden_size: expected 24"),
    ("prott5nv", {"max_position_embeddings": 512}, "max_position_embeddings: expected 40"),
    ("prott5nv", {"num_attention_heads": 3}, "num_attention_heads: expected a divisor of 16, found 3"),
    ("prott5nv", {"num_attention_heads": None}, "num_attention_heads: expected a number, found None"),
    ("prott5nv", {"kv_channels": 8}, "expected the shape (96, 16), found (48, 16)"),
    ("prott5nv", {"layernorm_epsilon": "${trainer.eps}"}, "layernorm_epsilon: expected a number, found '${trainer"),
    ("prott5nv", {"bias": "yes"}, "bias: expected true or false, found 'yes'"),
    ("prott5nv", {"bias": False, "bias_gelu_fusion": False}, "beside them"),
    ("prott5nv", {"headscale": True}, "lacks layers.0.self_attention.head_scale_tensor"),
    ("prott5nv", {"pipeline_model_parallel_size": 2}, "expected weights that are not cut into stages of a pipeline"),
    ("prott5nv", {"seq_length": 0}, "seq_length: expected a whole number from 1 on, found 0"),
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

    nemo.refused(nemo.spoilt(tmp_path, kind, change), message)
