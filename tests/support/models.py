"""Small models with random weights, saved as real hub folders are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import sentencepiece.sentencepiece_model_pb2 as sentencepiece_model
import torch
from tokenizers import Regex, Tokenizer, pre_tokenizers, processors
from tokenizers import models as tokenizer_models
from transformers import (
    AutoTokenizer,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertModel,
    EsmConfig,
    EsmForMaskedLM,
    EsmTokenizer,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from pipeline.encoders.esm import VOCABULARY

RESIDUES = "LAGVSERTIDPKQNFYMHWC"
SMILES_PATTERN = r"\[[^\]]+\]|Br?|Cl?|N|O|S|P|F|I|b|c|n|o|s|p|\(|\)|\.|=|#|-|\+|\\|/|:|~|@|\?|>|\*|\$|%\d{2}|\d"
SMILES_WORDS = [*"CNOSPFIbcnops()=#-+\\/123456789.", "Cl", "Br", "[nH]", "[N+]", "[O-]", "[C@@H]", "[C@H]", "[Na+]"]


def esm(folder: Path, width: int = 32, layers: int = 2, seed: int = 0, **save: Any) -> Path:
    """An `EsmForMaskedLM` with a slow tokenizer; `save` may ask for shards or another dtype."""
    torch.manual_seed(seed)
    config = EsmConfig(
        vocab_size=33,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=2 * width,
        pad_token_id=1,
        mask_token_id=32,
        max_position_embeddings=1026,
        position_embedding_type="rotary",
        token_dropout=True,
    )
    model = EsmForMaskedLM(config)
    for parameter in model.parameters():  # away from the initial near-zero weights, so that context matters
        parameter.data.normal_(0, 0.2) if parameter.dim() > 1 else None
    model.to(save.pop("dtype", torch.float32)).save_pretrained(folder, **save)
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY))
    EsmTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    return folder


def prott5(folder: Path, slow: bool = True, **save: Any) -> Path:
    """A full T5 with ProtT5's vocabulary: residues with a word boundary in front."""
    torch.manual_seed(1)
    model = T5ForConditionalGeneration(T5Config(vocab_size=128, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4))
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 and "relative" not in name:
            parameter.data.normal_(0, 0.1)
    model.to(save.pop("dtype", torch.float32)).save_pretrained(folder, **save)
    pieces = ["<pad>", "</s>", "<unk>", *(f"▁{residue}" for residue in RESIDUES + "X")]
    if slow:
        _sentencepiece(folder / "spiece.model", pieces)
        settings = {"tokenizer_class": "T5Tokenizer", "extra_ids": 100, "legacy": True}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    else:
        vocabulary = [(piece, 0.0 if index < 3 else -float(index)) for index, piece in enumerate(pieces)]
        tokenizer = Tokenizer(tokenizer_models.Unigram(vocabulary, unk_id=2))
        split: list[Any] = [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(split)
        tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
        names = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    return folder


def smiles_bart(folder: Path, split: bool = True, **save: Any) -> Path:
    """A full BART over SMILES with a fast tokenizer; without `split` it expects tokens between blanks."""
    torch.manual_seed(2)
    vocabulary = {word: index for index, word in enumerate(["<s>", "<pad>", "</s>", "<unk>", "<mask>", *SMILES_WORDS])}
    model = BartForConditionalGeneration(
        BartConfig(
            vocab_size=len(vocabulary),
            d_model=32,
            encoder_layers=2,
            decoder_layers=1,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=64,
            decoder_ffn_dim=64,
            max_position_embeddings=256,
            pad_token_id=1,
        )
    )
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.1) if parameter.dim() > 1 else None
    model.to(save.pop("dtype", torch.float32)).save_pretrained(folder, **save)
    tokenizer = Tokenizer(tokenizer_models.WordLevel(vocabulary, unk_token="<unk>"))
    pattern = Regex(SMILES_PATTERN)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(pattern, "isolated") if split else pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    names = {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": "<pad>",
        "mask_token": "<mask>",
    }
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    return folder


def protbert(folder: Path, positions: int = 64) -> Path:
    """A BERT whose tokenizer, like ProtBert's, wants blanks between residues."""
    torch.manual_seed(3)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *RESIDUES, "X"]
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=positions,
    )
    BertModel(config).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(words))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer", "do_lower_case": false}')
    AutoTokenizer.from_pretrained(folder).save_pretrained(folder)  # tokenizer.json too
    return folder


def _sentencepiece(path: Path, pieces: list[str]) -> None:
    kinds = {"<unk>": 2, "<pad>": 3, "</s>": 3}
    model: Any = sentencepiece_model.ModelProto()  # type: ignore[attr-defined]
    for index, piece in enumerate(pieces):
        score = 0.0 if piece in kinds else -float(index)
        model.pieces.add(piece=piece, score=score, type=kinds.get(piece, 1))
    model.trainer_spec.model_type = 1
    model.trainer_spec.unk_id, model.trainer_spec.pad_id = 2, 0
    model.trainer_spec.eos_id, model.trainer_spec.bos_id = 1, -1
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.add_dummy_prefix = True
    model.normalizer_spec.remove_extra_whitespaces = True
    model.normalizer_spec.escape_whitespaces = True
    path.write_bytes(model.SerializeToString())
