"""Stored weights to the model that they are of, and its tokenizer."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.checkpoints.remote_code import own_class
from pipeline.checkpoints.unpickle import StandIn
from pipeline.encoders.checks import check_configuration, read_configuration
from pipeline.encoders.code_digest import class_name
from pipeline.encoders.description import described_tokenizer, fresh, load_tokenizer, rebuild
from pipeline.encoders.internals import uncompiled
from pipeline.encoders.options import EncoderOptions
from pipeline.encoders.protocol import Encoder
from pipeline.encoders.weights import check_dtypes, check_unexpected, matching_prefix
from pipeline.errors import CheckpointError

FACTORY = (
    "set model_factory to the class that has them, or to a function that makes it: model_factory=my_package.OwnModel"
)

logger = logging.getLogger(__name__)

# Names of BERT in TensorFlow, which transformers reads, and version 5 writes again
OLD_NAMES = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}


@dataclass(frozen=True)
class Stored:
    """What a checkpoint holds.

    Attributes:
        model: a Hugging Face encoder, or the module that the user's code made, with the stored weights, float32.
        tokenizer: its tokenizer; None where the module has one.
        made_with: how it was measured in training; see `embed.made_with`.
        step: of the training.
        factory: the code, not of transformers, that made the module.
    """

    model: nn.Module
    tokenizer: Any
    made_with: Mapping[str, Any] = field(default_factory=dict)
    step: int | None = None
    factory: Any = None


@dataclass(frozen=True)
class Format:
    """A way in which checkpoints are stored.

    Attributes:
        holds: whether a path is a checkpoint in this format, by its content.
        read: reads the checkpoint at a path, or of a hub id. Its last argument is the user's code that makes the
            module; None for a class of transformers. Raises CheckpointError where weights are missing or left over.
            A format that is of one kind of model gives its `Encoder` itself.
    """

    holds: Callable[[Path], bool]
    read: Callable[[str, EncoderOptions, Any], Stored | Encoder]


@dataclass(frozen=True)
class Weights:
    """Stored weights, of which the model is made elsewhere.

    Attributes:
        source: names the checkpoint in messages.
        state: the weights by name, without what `torch.compile` adds to the names.
        description: what `describe` gave when the checkpoint was written; empty where it has none.
        step: of the training.
        fill_tensors: reads stored weights into the float32 tensors that it is given by name. None where `state` has
            them; else they are on the meta device there, so that no more is read than the model has.
    """

    source: str
    state: Mapping[str, Any]
    description: Mapping[str, Any] = field(default_factory=dict)
    step: int | None = None
    fill_tensors: Callable[[Mapping[str, Tensor]], None] | None = None

    def fill(self, options: EncoderOptions, factory: Any) -> Stored:
        """The model that these weights are of, filled with them, and its tokenizer; see `Format.read`."""
        own = own_class(options.architecture, options.trust_remote_code) if options.architecture else None
        factory = factory or own
        if factory is None:
            model, tokenizer = _of_transformers(self, options.architecture)
        else:
            model, tokenizer = _made_by(self, options.architecture, factory, own is not None)
        return Stored(model, tokenizer, self.description.get("made_with") or {}, self.step, factory)


def say_left_out(names: Iterable[str], encoder: nn.Module) -> None:
    """Names the stored weights that stand beside the encoder: heads, or layers that somebody added there."""
    parts = sorted({".".join(name.split(".")[:2]) for name in names})
    if parts:
        logger.info("checkpoint  weights beside the %s are not used: %s", type(encoder).__name__, ", ".join(parts[:8]))


def _of_transformers(weights: Weights, architecture: str | None) -> tuple[nn.Module, Any]:
    """The encoder, of a class of transformers, and its tokenizer."""
    from transformers import AutoConfig

    weights = _with_new_names(weights)
    source, state, description = weights.source, weights.state, weights.description
    tensors = [value for value in state.values() if isinstance(value, Tensor)]
    held = sum(value.nbytes for value in tensors)
    if "class" in description:
        raise CheckpointError(_takes_code(source, str(description["class"])))
    if architecture is not None:
        read_configuration(architecture, len(tensors))
        encoder, name = fresh(AutoConfig.from_pretrained(architecture, trust_remote_code=False), held, source)
        tokenizer, prefix = load_tokenizer(architecture), None
    elif description:
        check_configuration(json.loads(description["config"]), f"ckpt: '{source}'", len(tensors))
        encoder, name, tokenizer = rebuild(description, held, source)
        prefix = uncompiled(description["prefix"])
    else:
        remedy = f"set architecture to the Hugging Face folder of its configuration and tokenizer, or {FACTORY}"
        raise CheckpointError(f"ckpt: '{source}' does not say what model it holds; {remedy}")
    found = matching_prefix(encoder, name, state, prefix, source)
    _load(encoder, weights, found, FACTORY)
    say_left_out([key for key in state if not key.startswith(found)], encoder)
    return encoder, tokenizer


def _with_new_names(weights: Weights) -> Weights:
    """The same, where weights have the names in `OLD_NAMES`, with those that the classes of transformers have."""
    fill, stored = weights.fill_tensors, {}
    for name in weights.state:
        old = next((old for old in OLD_NAMES if name.endswith(old)), "")
        stored[name.removesuffix(old) + OLD_NAMES.get(old, "")] = name
    if len(stored) < len(weights.state) or all(new == name for new, name in stored.items()):
        return weights
    state = {new: weights.state[name] for new, name in stored.items()}
    again = fill and (lambda tensors: fill({stored[new]: tensor for new, tensor in tensors.items()}))
    return replace(weights, state=state, fill_tensors=again)


def _takes_code(source: str, own: str) -> str:
    """The message for a checkpoint of a model that transformers cannot make."""
    theirs = own.startswith("transformers.")
    why = "that was changed from what its configuration says" if theirs else "which is no class of transformers"
    what = "the function that makes it" if theirs else "it, or to a function that makes it"
    example = "my_package.make_model" if theirs else own
    return f"ckpt: '{source}' holds a {own}, {why}; set model_factory to {what}, such as model_factory={example}"


def _made_by(weights: Weights, architecture: str | None, factory: Any, trusted: bool) -> tuple[nn.Module, Any]:
    """The module that the user's code makes, and the stored tokenizer, if there is one."""
    module = _call(factory, _arguments(weights, architecture, factory))
    prefix = matching_prefix(module, "", weights.state, None, weights.source)
    _load(module.float(), weights, prefix, "model_factory must make the model that was trained")
    if architecture is not None:
        return module, load_tokenizer(architecture, trusted)
    return module, described_tokenizer(weights.description) if weights.description.get("tokenizer") else None


def _arguments(weights: Weights, architecture: str | None, factory: Any) -> list[Any]:
    """The arguments for the user's code: the configuration of `architecture`, else the stored one, if there is any.

    It is an object of the class's `config_class`, if it has that, else a dictionary.
    """
    attention = None
    if architecture is not None:
        config = read_configuration(architecture)
    elif weights.description.get("config"):
        config, attention = json.loads(weights.description["config"]), weights.description.get("attention")
        check_configuration({**config, "attn_implementation": attention}, f"ckpt: '{weights.source}'", None)
    else:
        return []
    kind = getattr(factory, "config_class", None)
    return [kind.from_dict(config, attn_implementation=attention) if kind else config]


def _call(factory: Any, arguments: list[Any]) -> nn.Module:
    """The module that the user's code makes."""
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
    return module


def _load(model: nn.Module, weights: Weights, prefix: str, remedy: str) -> None:
    """Loads the stored weights whose names begin with `prefix`, which are all that the model has.

    Raises:
        CheckpointError: a weight has another shape, is no tensor, is quantised, or is not one of the model's; `remedy`
            says what to do about the last.
    """
    state, source = weights.state, weights.source
    own = model.state_dict()
    stored = {key: state[prefix + key] for key in own if prefix + key in state}
    trained = [prefix + key for key in stored if own[key].is_floating_point()]
    check_dtypes({key: state[key].dtype for key in trained if isinstance(state[key], Tensor)}, source)
    check_unexpected(model, state, prefix, source, remedy)
    for key, value in stored.items():
        where = f"ckpt: '{source}': '{prefix}{key}'"
        if isinstance(value, StandIn):
            found = f"found a {type(value).__module__}.{type(value).__qualname__}, which is not read"
            remedy = "set trust_pickle=true if you trust whoever wrote it"
            raise CheckpointError(f"{where}: expected a tensor, {found}; {remedy}")
        if isinstance(value, Tensor) and value.shape != own[key].shape:
            expected, shape = tuple(own[key].shape), tuple(value.shape)
            another = "the weights are of another model: set architecture, or model_factory, to their own"
            raise CheckpointError(f"{where}: expected the shape {expected}, found {shape}; {another}")
    if weights.fill_tensors is None:
        model.load_state_dict(stored, strict=False)
    else:
        weights.fill_tensors({prefix + key: own[key] for key in stored})
