"""Hugging Face models: which class is the encoder, and the description with which a `.ckpt` opens without its code."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipeline.config.class_paths import ARCHITECTURES
from pipeline.encoders.checks import check_size, malformed
from pipeline.encoders.internals import ATTENTION, attention_of
from pipeline.encoders.tokens import SMILES_TOKEN, Tokens
from pipeline.encoders.weights import is_encoder_alone
from pipeline.errors import CheckpointError
from pipeline.store.temporary import temporary_folder

DESCRIPTION = "downstream_validation"  # the key of a `.ckpt` under which it describes itself


def describe(model: nn.Module, tokenizer: Any, prefix: str) -> dict[str, Any]:
    """What a `.ckpt` must hold under `DESCRIPTION` to be opened without the code that trained it.

    Args:
        model: the Hugging Face model, with or without a head.
        tokenizer: its tokenizer.
        prefix: begins its parameters' names in the checkpoint's `state_dict`, such as `model.`.
    """
    config: Any = model.config
    # transformers 4 writes that it has chosen an implementation of attention, and not which
    options = {key: value for key, value in config.to_dict().items() if not key.startswith(ATTENTION)}
    return {
        "config": json.dumps(options),
        "attention": attention_of(config),  # a configuration written out does not hold it
        "tokenizer": _tokenizer_files(tokenizer),
        "prefix": prefix,
    }


def _tokenizer_files(tokenizer: Any) -> dict[str, str]:
    """Name and content, as hexadecimal digits, of each file of a tokenizer; none where it takes the user's code."""
    written = portable(tokenizer)
    if written is None:
        return {}
    with temporary_folder() as folder:
        written.save_pretrained(folder)
        return {path.name: path.read_bytes().hex() for path in sorted(folder.iterdir()) if path.is_file()}


def rebuild(description: Mapping[str, Any], held: int | None = None, where: str = "") -> tuple[nn.Module, str, Any]:
    """The described encoder with random weights, its name within the model, and the tokenizer; see `check_size`."""
    from transformers import AutoConfig

    with temporary_folder() as folder:
        (folder / "config.json").write_text(description["config"], encoding="utf-8")
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    return *fresh(config, held, where), described_tokenizer(description)


def described_tokenizer(description: Mapping[str, Any]) -> Any:
    """The tokenizer that a description holds. Raises CheckpointError where it holds none."""
    if not description.get("tokenizer"):
        raise CheckpointError(
            "ckpt: the tokenizer is of a class of its own; name its Hugging Face folder in architecture"
        )
    with temporary_folder() as folder:
        for name, content in description["tokenizer"].items():
            (folder / Path(name).name).write_bytes(bytes.fromhex(content))
        return load_tokenizer(str(folder))


def fresh(config: Any, held: int | None = None, where: str = "") -> tuple[nn.Module, str]:
    """An encoder of a configuration with random weights, float32, and its name within the model."""
    skeleton, options = class_for(config, held, where)
    with torch.random.fork_rng(devices=[]):
        encoder, name = encoder_of(skeleton(config, **options))
    return encoder.float(), name


def check_architecture(infer_target: str, found: str, where: str) -> None:
    """Raises CheckpointError where `infer_target` is a short name that does not fit the model type `found`."""
    if infer_target != "auto" and found not in ARCHITECTURES[infer_target]:
        expected = " or ".join(ARCHITECTURES[infer_target])
        raise CheckpointError(f"infer_target '{infer_target}' is for {expected}, but {where} is {found}; use auto")


def class_for(config: Any, held: int | None, where: str) -> tuple[Any, dict[str, Any]]:
    """The class to load, and its options: no decoder where there is such a class, no pooling layer.

    Raises CheckpointError where its weights are more than `held` bytes can be; see `check_size`.
    """
    import transformers

    encoders = {"t5": "T5EncoderModel", "mt5": "MT5EncoderModel", "umt5": "UMT5EncoderModel"}
    if config.model_type in encoders:
        skeleton: Any = getattr(transformers, encoders[config.model_type])
    else:
        skeleton = transformers.MODEL_MAPPING[type(config)]
        skeleton = skeleton[0] if isinstance(skeleton, (tuple, list)) else skeleton
    pooling = "add_pooling_layer" in inspect.signature(skeleton).parameters
    options = {"add_pooling_layer": False} if pooling else {}
    check_size(lambda: skeleton(deepcopy(config), **options), held, where)
    return skeleton, options


def encoder_of(model: Any) -> tuple[nn.Module, str]:
    """The encoder half of an encoder-decoder and its name within; any other model is its own encoder."""
    if not model.config.is_encoder_decoder or is_encoder_alone(model):
        return model, ""
    encoder = model.get_encoder()
    return encoder, next(f"{name}." for name, module in model.named_modules() if module is encoder)


def load_tokenizer(source: str, trusted: bool = False) -> Any:
    """The tokenizer in a folder or of a hub id; where it is `trusted`, by code of its own. Raises CheckpointError."""
    from transformers import AutoTokenizer

    beside = Path(source).parent / "components" / "tokenizer"  # where MLflow's transformers flavour keeps it
    folder = str(beside) if beside.is_dir() else source
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trusted)
    except Exception as error:
        found = malformed(Path(folder)) or str(error)
        remedy = "copy the files of the tokenizer there"
        raise CheckpointError(f"ckpt: the tokenizer in '{folder}' cannot be loaded: {found}; {remedy}") from error


def portable(tokenizer: Any) -> Any:
    """A tokenizer of a class of transformers that does the same; None where there is none.

    The copy of a user's own tokenizer has its rules, where they are of the `tokenizers` library, else its vocabulary,
    where that gives each residue or SMILES token an id of its own.
    """
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    if is_of_transformers(type(tokenizer)):
        return tokenizer
    tokens = Tokens(tokenizer)
    inner = getattr(tokenizer, "backend_tokenizer", None)
    if inner is None:
        vocabulary = {str(word): int(number) for word, number in tokenizer.get_vocab().items()}
        inner = Tokenizer(models.WordLevel(vocabulary, unk_token=tokenizer.unk_token))
        inner.pre_tokenizer = {
            "residues": pre_tokenizers.Split("", "isolated"),
            "smiles": pre_tokenizers.Split(Regex(SMILES_TOKEN.pattern), "isolated"),
        }.get(tokens.splitting, pre_tokenizers.WhitespaceSplit())
        special = {number: word for word, number in vocabulary.items()}
        around = [*(special[number] for number in tokens.before), "$A", *(special[number] for number in tokens.after)]
        inner.post_processor = processors.TemplateProcessing(
            single=" ".join(around), special_tokens=[(word, vocabulary[word]) for word in around if word != "$A"]
        )
    made = PreTrainedTokenizerFast(
        tokenizer_object=inner, model_max_length=tokenizer.model_max_length, **tokenizer.special_tokens_map
    )
    return made if Tokens(made).digest() == tokens.digest() else None


def is_of_transformers(kind: type) -> bool:
    """Whether a class is in the transformers library, so that its name is enough to make it again."""
    return kind.__module__.startswith("transformers.")


@contextmanager
def quiet() -> Iterator[None]:
    """Turns off the progress bars and load reports of transformers: their content is an error here, or harmless."""
    from transformers.utils import logging as hf_logging

    verbosity, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(verbosity)
        if bars:
            hf_logging.enable_progress_bar()
