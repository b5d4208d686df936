"""What a stored checkpoint holds: the model with its weights, and the tokenizer. One function for each format."""

from __future__ import annotations

import json
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

FACTORY = "name the class that has them, or a function that makes it, with model_factory=my_package.OwnModel"


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
        opened = _made_by(factory, source, content, description)
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
    left = unexpected(encoder, _stored_under(info["unexpected_keys"], model), name)
    if left:
        raise CheckpointError(left_over(source, encoder, left, FACTORY))
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
    if architecture is not None:
        check_config(Path(architecture), len(weights))
        encoder, name = fresh(AutoConfig.from_pretrained(architecture, trust_remote_code=False), held, source)
        tokenizer, prefix = load_tokenizer(architecture), None
    elif "class" in description:
        own = str(description["class"])
        theirs = own.startswith("transformers.")
        why = "that was changed from what its configuration says" if theirs else "which is no class of transformers"
        name = "the function that makes it" if theirs else "it, or a function that makes it,"
        example = "my_package.make_model" if theirs else own
        raise CheckpointError(f"ckpt: '{source}' holds a {own}, {why}; name {name} with model_factory={example}")
    elif description:
        check_counts(json.loads(description["config"]), f"ckpt: '{source}'", len(weights))
        encoder, name, tokenizer = rebuild(description, held, source)
        prefix = description["prefix"].replace("_orig_mod.", "")
    else:
        remedy = "give the Hugging Face folder of its architecture and tokenizer with architecture=..."
        raise CheckpointError(f"ckpt: '{source}' does not say what model it holds; {remedy}")
    fill(encoder, state, matching_prefix(encoder, name, state, prefix, source), source, FACTORY)
    return encoder, tokenizer


def _made_by(factory: Any, source: str, stored: Any, description: Mapping[str, Any]) -> tuple[nn.Module, Any]:
    """The module that the user's code makes, with the stored weights, and the stored tokenizer, if there is one.

    The code is called with the stored configuration, where there is one: an object of the class's `config_class`, if it
    has that, else a dictionary.
    """
    arguments: list[Any] = []
    if description.get("config"):
        config = json.loads(description["config"])
        check_counts(config, f"ckpt: '{source}'", None)
        check_implementation(description.get("attention"), f"ckpt: '{source}': attention")
        kind = getattr(factory, "config_class", None)
        arguments = [kind.from_dict(config, attn_implementation=description.get("attention")) if kind else config]
    try:
        with torch.random.fork_rng(devices=[]):
            module = factory(*arguments)
    except Exception as error:  # the user's code may raise anything
        given = "the stored configuration" if arguments else "no configuration: the checkpoint holds none"
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
    return module, described_tokenizer(description) if description.get("tokenizer") else None


def _state_in(stored: Any) -> dict[str, Any]:
    """The weights in a `.ckpt`, without what `torch.compile` adds to their names."""
    return {key.replace("_orig_mod.", ""): value for key, value in stored.get("state_dict", {}).items()}
