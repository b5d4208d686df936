"""Hugging Face models: which class is the encoder, and what a `.ckpt` says of itself to be opened without its code."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.config import ARCHITECTURES
from pipeline.errors import CheckpointError
from pipeline.scratch import temporary_folder

DESCRIPTION = "downstream_validation"  # the key of a `.ckpt` under which it describes itself


def describe(model: nn.Module, tokenizer: Any, prefix: str) -> dict[str, Any]:
    """What a `.ckpt` must hold under `DESCRIPTION` to be opened without the code that trained it.

    Args:
        model: the Hugging Face model, with or without a head.
        tokenizer: its tokenizer.
        prefix: what its parameters' names begin with in the checkpoint's `state_dict`, such as `model.`.
    """
    with temporary_folder() as folder:
        tokenizer.save_pretrained(folder)
        files = {path.name: path.read_bytes().hex() for path in sorted(folder.iterdir()) if path.is_file()}
    return {"config": json.dumps(model.config.to_dict()), "tokenizer": files, "prefix": prefix}  # type: ignore[union-attr, operator]


def rebuild(description: Mapping[str, Any]) -> tuple[nn.Module, str, Any]:
    """The encoder that `describe` described, with random weights, its name within the model, and the tokenizer."""
    from transformers import AutoConfig

    with temporary_folder() as folder:
        for name, content in description["tokenizer"].items():
            (folder / Path(name).name).write_bytes(bytes.fromhex(content))
        (folder / "config.json").write_text(description["config"], encoding="utf-8")
        return *fresh(AutoConfig.from_pretrained(folder)), load_tokenizer(str(folder))


def fresh(config: Any) -> tuple[nn.Module, str]:
    """An encoder of a configuration with random weights, float32, and its name within the model."""
    skeleton, options = class_for(config)
    with torch.random.fork_rng(devices=[]):
        encoder, name = encoder_of(skeleton(config, **options))
    return encoder.float(), name


def check_architecture(infer_target: str, found: str, where: str) -> None:
    """Raises CheckpointError where `infer_target` is a short name that does not fit the model type `found`."""
    if infer_target != "auto" and found not in ARCHITECTURES[infer_target]:
        expected = " or ".join(ARCHITECTURES[infer_target])
        raise CheckpointError(f"infer_target '{infer_target}' is for {expected}, but {where} is {found}; use auto")


def class_for(config: Any) -> tuple[Any, dict[str, Any]]:
    """The class to load, and its options: no decoder where there is such a class, no pooling layer."""
    import transformers

    encoders = {"t5": "T5EncoderModel", "mt5": "MT5EncoderModel", "umt5": "UMT5EncoderModel"}
    if config.model_type in encoders:
        return getattr(transformers, encoders[config.model_type]), {}
    skeleton: Any = transformers.AutoModel._model_mapping[type(config)]
    skeleton = skeleton[0] if isinstance(skeleton, (tuple, list)) else skeleton
    pooling = "add_pooling_layer" in inspect.signature(skeleton).parameters
    return skeleton, {"add_pooling_layer": False} if pooling else {}


def encoder_of(model: Any) -> tuple[nn.Module, str]:
    """The encoder half of an encoder-decoder and its name within; any other model is its own encoder."""
    if not model.config.is_encoder_decoder or type(model).__name__.endswith("EncoderModel"):
        return model, ""
    encoder = model.get_encoder()
    return encoder, next(f"{name}." for name, module in model.named_modules() if module is encoder)


def load_tokenizer(source: str) -> Any:
    """The tokenizer in a folder or of a hub id. Raises CheckpointError if there is none."""
    from transformers import AutoTokenizer

    beside = Path(source).parent / "components" / "tokenizer"  # where MLflow's transformers flavour keeps it
    folder = str(beside) if beside.is_dir() else source
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:
        raise CheckpointError(f"ckpt: the tokenizer in '{folder}' cannot be loaded: {error}") from error


def matching_prefix(encoder: nn.Module, name: str, state: Mapping[str, Tensor], prefix: str | None, source: str) -> str:
    """What the names of the encoder's weights begin with in a `state_dict`.

    Raises:
        CheckpointError: it does not hold the weights, or holds several sets of them.
    """
    wanted = list(encoder.state_dict())
    first = name + wanted[0]
    prefixes = [key.removesuffix(first) for key in state if key.endswith(first)]
    heads = ("", f"{getattr(encoder, 'base_model_prefix', '')}.")
    if prefix is not None:
        prefixes = [known for known in prefixes if known in {prefix + head for head in heads}]
    fitting = [known for known in prefixes if all(known + name + key in state for key in wanted)]
    if len(fitting) != 1:
        found = f"several: {', '.join(map(repr, fitting))}" if fitting else "none"
        raise CheckpointError(
            f"ckpt: '{source}': expected one set of weights of a {type(encoder).__name__}, found {found}"
        )
    return fitting[0] + name


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps transformers from drawing bars and load reports: what they would say is an error here, or harmless."""
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
