"""What the benchmarks work on: models of random weights, and tasks from folders of CSV files."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BartConfig, EsmConfig, EsmModel, PreTrainedTokenizerFast
from transformers.models.bart.modeling_bart import BartEncoder

from pipeline import EncoderOptions, Files, HuggingFaceEncoder, Task
from pipeline.encoders.esm import VOCABULARY, make_tokenizer
from pipeline.load import Examples, load

OPTIONS = EncoderOptions(device="cpu", precision="fp32")
ATOMS = [*"CNOSPFIbcnops()[]=#-+\\/123456789.@H", "Cl", "Br"]


def make_esm(
    layers: int = 6, width: int = 320, heads: int = 20, device: str = "cpu", compiled: bool = False
) -> HuggingFaceEncoder:
    """An ESM, for proteins; on a GPU in bf16."""
    torch.manual_seed(0)
    config = EsmConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * width,
        pad_token_id=1,
        mask_token_id=32,
        max_position_embeddings=1026,
        position_embedding_type="rotary",
    )
    options = OPTIONS if device == "cpu" else EncoderOptions(device=device, precision="bf16", compile=compiled)
    with torch.device(device):
        model = EsmModel(config, add_pooling_layer=False)
    return HuggingFaceEncoder(model, make_tokenizer(), options)


def make_bart(layers: int = 6, width: int = 320, heads: int = 20) -> HuggingFaceEncoder:
    """The encoder of a BART of the same size, for molecules; a token per character but for Cl and Br."""
    torch.manual_seed(0)
    vocabulary = {word: index for index, word in enumerate(["<s>", "<pad>", "</s>", "<unk>", *ATOMS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    ends = [("<s>", 0), ("</s>", 2)]
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ends)
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    config = BartConfig(
        vocab_size=len(vocabulary),
        d_model=width,
        encoder_layers=layers,
        decoder_layers=1,
        encoder_attention_heads=heads,
        encoder_ffn_dim=4 * width,
        max_position_embeddings=512,
    )
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    return HuggingFaceEncoder(BartEncoder(config), wrapped, OPTIONS)


def proteins(folder: Path, limit: int = 0, epochs: int = 10) -> Task:
    """Secondary structure, at the level of tokens; at most `limit` train sequences."""
    with (folder / "train" / "x000.csv").open() as stream:
        masked = "resolved" in stream.readline()
    task = Task(
        level="token",
        task_type="classification",
        task_name="secondary structure",
        dataset_path=str(folder),
        target_column=["3state"],
        mask_column=["resolved"] if masked else None,
        num_epochs=epochs,
        optim={"name": "adam", "lr": 1e-3},
        baselines=False,
    )
    task.max_rows.train = limit or None
    return task


def molecules(folder: Path, target: str, limit: int = 0, epochs: int = 10) -> Task:
    """A number for each molecule."""
    task = Task(
        dataset_path=str(folder),
        task_name="molecules",
        dataset=Files(),
        sequence_column="smiles",
        target_column=[target],
        num_epochs=epochs,
        optim={"name": "adam", "lr": 1e-3},
        baselines=False,
    )
    task.max_rows.train = limit or None
    return task


def sequences_of(examples: Examples) -> list[str]:
    """The distinct sequences of train and test."""
    return list(dict.fromkeys([*examples.train.sequences, *examples.test.sequences]))


def parser(description: str | None) -> argparse.ArgumentParser:
    """Arguments that the benchmarks have in common."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--proteins", type=Path, default=Path("sample/data/proteins"), help="folder with a column 3state")
    made.add_argument("--molecules", type=Path, default=Path("sample/data/molecules"), help="folder with smiles")
    made.add_argument("--target", default="tpsa", help="label column of the molecules")
    made.add_argument("--limit", type=int, default=0, help="most train sequences; 0 for all")
    made.add_argument("--rounds", type=int, default=3)
    made.add_argument("--json", type=Path)
    return made


def chosen(options: argparse.Namespace, kind: str, epochs: int = 10) -> tuple[HuggingFaceEncoder, Task, Examples]:
    """Model, task and data of a kind, `proteins` or `molecules`."""
    if kind == "proteins":
        encoder, task = make_esm(), proteins(options.proteins, options.limit, epochs)
    else:
        encoder, task = make_bart(), molecules(options.molecules, options.target, options.limit, epochs)
    return encoder, task, load(task, encoder.max_seq_length)
