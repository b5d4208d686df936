"""Small decoder-only models with random weights, saved as real hub folders are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
from tokenizers import models as tokenizer_models
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
)

from tests.support.models import RESIDUES

PAIRS = ["AG", "LV", "KR", "ST", "MK"]  # that a byte-pair vocabulary has beside single residues
POSITIONS = 64


def tokenizer_of(pairs: bool = False, start: bool = False) -> PreTrainedTokenizerFast:
    """One token per residue, or byte pairs; no padding token; with `start`, a token before each sequence."""
    words = ["<|endoftext|>", "<|start|>", *RESIDUES, *(PAIRS if pairs else [])]
    vocabulary = {word: number for number, word in enumerate(words)}
    merges = [(pair[0], pair[1]) for pair in PAIRS] if pairs else []
    inner = Tokenizer(tokenizer_models.BPE(vocabulary, merges))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    if start:
        inner.post_processor = processors.TemplateProcessing(single="<|start|> $A", special_tokens=[("<|start|>", 1)])
    names = {"eos_token": "<|endoftext|>", "bos_token": "<|start|>"}
    return PreTrainedTokenizerFast(tokenizer_object=inner, **names)


def decoder(kind: str = "gpt2", seed: int = 0) -> Any:
    """A model with its language-model head, whose weights are large enough for context to matter."""
    torch.manual_seed(seed)
    ids: dict[str, Any] = {"vocab_size": 2 + len(RESIDUES) + len(PAIRS), "bos_token_id": 1, "eos_token_id": 0}
    gpt2: dict[str, Any] = {"n_positions": POSITIONS, "n_embd": 32, "n_layer": 2, "n_head": 4}
    neo: dict[str, Any] = {
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 1]],
    }
    llama: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": POSITIONS,
    }
    makers: dict[str, Callable[[], Any]] = {
        "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**ids, **gpt2)),
        "gpt_neo": lambda: GPTNeoForCausalLM(GPTNeoConfig(**ids, **neo, max_position_embeddings=POSITIONS)),
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**ids, **llama)),
        "mistral": lambda: MistralForCausalLM(MistralConfig(**ids, **llama, sliding_window=8)),
    }
    model = makers[kind]()
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.2) if parameter.dim() > 1 else None
    return model.eval()


def decoder_folder(folder: Path, kind: str = "gpt2", pairs: bool = False, start: bool = False) -> Path:
    """A folder with such a model and its tokenizer."""
    decoder(kind).save_pretrained(folder)
    tokenizer_of(pairs, start).save_pretrained(folder)
    return folder
