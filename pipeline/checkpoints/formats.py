"""What a stored checkpoint holds: the model with its weights, and the tokenizer. One function for each format."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipeline.checkpoints.filling import fill
from pipeline.checkpoints.unpickle import read_tensors
from pipeline.encoders.companions import check_config, check_counts, check_folder, check_implementation, check_size
from pipeline.encoders.custom import class_name
from pipeline.encoders.description import (
    DESCRIPTION,
    class_for,
    described_tokenizer,
    encoder_of,
    fresh,
    is_version_5,
    load_tokenizer,
    rebuild,
)
from pipeline.encoders.weights import is_derived, left_over, matching_prefix, unexpected
from pipeline.errors import CheckpointError

FACTORY = (
    "set model_factory to the class that has them, or to a function that makes it: model_factory=my_package.OwnModel"
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Stored:
    """What a checkpoint holds.

    Attributes:
        model: a Hugging Face encoder, or the module that the user's code made, with the stored weights, float32.
        tokenizer: its tokenizer; None where the module has one.
        made_with: how it was measured in training; see `embed.made_with`.
        step: of the training.
    """

    model: nn.Module
    tokenizer: Any
    made_with: Mapping[str, Any] = field(default_factory=dict)
    step: int | None = None


def open_stored(source: str, architecture: str | None, trust_pickle: bool, factory: Any) -> Stored:
    """Opens a folder, a hub id or a `.ckpt`; for the arguments see `open_encoder`.

    Args:
        source: a path or hub id.
        architecture: of a `.ckpt` that does not describe itself.
        trust_pickle: unpickle a `.ckpt` as it is.
        factory: the user's code that makes the module; None for a class of transformers.

    Raises:
        CheckpointError: the checkpoint lacks weights, or holds others.
    """
    if not source.endswith(".ckpt"):
        return Stored(*_from_folder(source, factory))
    content = read_tensors(source, trust_pickle)
    if not isinstance(content, Mapping):
        raise CheckpointError(f"ckpt: '{source}': expected a Lightning .ckpt, found a {type(content).__name__}")
    description = content.get(DESCRIPTION) or {}
    if factory is not None:
        opened = _made_by(factory, source, content, description, architecture)
    else:
        opened = _from_lightning(content, source, architecture, description)
    return Stored(*opened, description.get("made_with") or {}, content.get("global_step"))


def _from_folder(source: str, factory: Any) -> tuple[nn.Module, Any]:
    from transformers import AutoConfig

    held = check_folder(Path(source))
    if factory is None:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        skeleton, options = class_for(config)
        check_size(lambda: skeleton(deepcopy(config), **options), held, f"'{source}'")
        options = {**options, "config": config}
    else:
        skeleton, options = factory, {}
        if not hasattr(factory, "from_pretrained"):
            raise CheckpointError(
                f"model_factory: {class_name(factory)} has no from_pretrained(folder), for '{source}'"
            )
    precision = {"dtype" if is_version_5() else "torch_dtype": torch.float32}
    model, info = skeleton.from_pretrained(
        source, output_loading_info=True, ignore_mismatched_sizes=True, **precision, **options
    )
    encoder, name = encoder_of(model)
    lacking = sorted(key for key in info["missing_keys"] if key.startswith(name) and not is_derived(key, model))
    wrong = sorted(str(key) for key in info["mismatched_keys"])
    if lacking or wrong:
        raise CheckpointError(
            f"ckpt: '{source}' lacks weights of the encoder or has them in another shape: {(lacking + wrong)[:3]}"
        )
    inside = _stored_under(info["unexpected_keys"], model)
    left = unexpected(encoder, inside, name)
    if left:
        raise CheckpointError(left_over(source, encoder, left, FACTORY))
    _say_left_out([key for key in info["unexpected_keys"] if key not in inside], encoder)
    return (model if factory else encoder), load_tokenizer(source)


def _stored_under(names: Iterable[str], model: Any) -> dict[str, None]:
    """Stored weights by their names within the base model; those of heads beside it are left out."""
    prefix = f"{model.base_model_prefix}."
    parts = {key.partition(".")[0] for key in model.state_dict()}
    inside = (name.removeprefix(prefix) for name in names)
    return {
        key: None
        for key, name in zip(inside, names, strict=True)
        if name.startswith(prefix) or key.partition(".")[0] in parts
    }


def _from_lightning(
    stored: Any, source: str, architecture: str | None, description: Mapping[str, Any]
) -> tuple[nn.Module, Any]:
    """The encoder and the tokenizer in a `.ckpt` whose model is of a class of transformers."""
    from transformers import AutoConfig

    state = _state_in(stored)
    weights = [value for value in state.values() if isinstance(value, torch.Tensor)]
    held = sum(value.nbytes for value in weights)
    if "class" in description:
        raise CheckpointError(_takes_code(source, str(description["class"])))
    if architecture is not None:
        check_config(Path(architecture), len(weights))
        encoder, name = fresh(AutoConfig.from_pretrained(architecture, trust_remote_code=False), held, source)
        tokenizer, prefix = load_tokenizer(architecture), None
    elif description:
        check_counts(json.loads(description["config"]), f"ckpt: '{source}'", len(weights))
        encoder, name, tokenizer = rebuild(description, held, source)
        prefix = description["prefix"].replace("_orig_mod.", "")
    else:
        remedy = f"set architecture to the Hugging Face folder of its configuration and tokenizer, or {FACTORY}"
        raise CheckpointError(f"ckpt: '{source}' does not say what model it holds; {remedy}")
    found = matching_prefix(encoder, name, state, prefix, source)
    fill(encoder, state, found, source, FACTORY)
    _say_left_out([key for key in state if not key.startswith(found)], encoder)
    return encoder, tokenizer


def _takes_code(source: str, own: str) -> str:
    """What to say of a checkpoint whose model transformers cannot make."""
    theirs = own.startswith("transformers.")
    why = "that was changed from what its configuration says" if theirs else "which is no class of transformers"
    what = "the function that makes it" if theirs else "it, or to a function that makes it"
    example = "my_package.make_model" if theirs else own
    return f"ckpt: '{source}' holds a {own}, {why}; set model_factory to {what}, such as model_factory={example}"


def _say_left_out(names: Iterable[str], encoder: nn.Module) -> None:
    """Names the stored weights that stand beside the encoder: heads, or layers that somebody added there."""
    parts = sorted({".".join(name.split(".")[:2]) for name in names})
    if parts:
        logger.info("checkpoint  weights beside the %s are not used: %s", type(encoder).__name__, ", ".join(parts[:8]))


def _made_by(
    factory: Any, source: str, stored: Any, description: Mapping[str, Any], architecture: str | None
) -> tuple[nn.Module, Any]:
    """The module that the user's code makes, with the stored weights, and the stored tokenizer, if there is one.

    The code is called with the stored configuration, or with that of `architecture`, where there is one: an object of
    the class's `config_class`, if it has that, else a dictionary.
    """
    arguments: list[Any] = []
    if architecture is not None:
        kind = getattr(factory, "config_class", None)
        path = Path(architecture) / "config.json"
        check_config(Path(architecture), None)
        arguments = [kind.from_pretrained(architecture) if kind else json.loads(path.read_text(encoding="utf-8"))]
    elif description.get("config"):
        config = json.loads(description["config"])
        check_counts(config, f"ckpt: '{source}'", None)
        check_implementation(description.get("attention"), f"ckpt: '{source}': attention")
        kind = getattr(factory, "config_class", None)
        arguments = [kind.from_dict(config, attn_implementation=description.get("attention")) if kind else config]
    try:
        with torch.random.fork_rng(devices=[]):
            module = factory(*arguments)
    except Exception as error:  # the user's code may raise anything
        none = "no configuration: the checkpoint holds none; name a function that needs none, or set architecture"
        given = "the stored configuration" if arguments else none
        raise CheckpointError(
            f"model_factory: {class_name(factory)} called with {given}: {type(error).__name__}: {error}"
        ) from error
    if not isinstance(module, nn.Module):
        raise CheckpointError(
            f"model_factory: {class_name(factory)}: expected an nn.Module, found {type(module).__name__}"
        )
    state = _state_in(stored)
    remedy = "model_factory must make the model that was trained"
    fill(module.float(), state, matching_prefix(module, "", state, None, source), source, remedy)
    if architecture is not None:
        return module, load_tokenizer(architecture)
    return module, described_tokenizer(description) if description.get("tokenizer") else None


def _state_in(stored: Any) -> dict[str, Any]:
    """The weights in a `.ckpt`, without what `torch.compile` adds to their names."""
    return {key.replace("_orig_mod.", ""): value for key, value in stored.get("state_dict", {}).items()}
