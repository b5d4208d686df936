"""A live module, in training, to an `Encoder` of its current weights; no disk in between."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any
from uuid import uuid4

import torch
from torch import Tensor, nn

from pipeline.config.class_paths import encoder_class
from pipeline.encoders.code_digest import class_name
from pipeline.encoders.custom import Context, CustomEncoder, made_from_module, module_digest, no_layer, own_digest
from pipeline.encoders.description import check_architecture, describe, encoder_of, is_of_transformers, quiet, rebuild
from pipeline.encoders.devices import find_device
from pipeline.encoders.digests import settings_digest
from pipeline.encoders.huggingface import REMEDY, HuggingFaceEncoder, limit_of
from pipeline.encoders.in_step import InStep, SameNumber
from pipeline.encoders.internals import hooks_of, is_compiled, uncompiled, uncompiled_state
from pipeline.encoders.options import EncoderOptions
from pipeline.encoders.parts import is_sharded, own_class, whole, within_wrappers
from pipeline.encoders.tokens import Tokens
from pipeline.encoders.weights import is_part, matching_prefix, unexpected
from pipeline.errors import CheckpointError

logger = logging.getLogger(__name__)

PLAIN = "32-true"  # as Lightning calls float32 without autocast


class LiveModel:
    """Finds how a module gives hidden states, once; `encoder` then takes the weights of the moment.

    In this order: the class that `infer_target` names, by its `from_module`; the module's own method
    `hidden_states(sequences) -> list[Tensor (length, hidden_size)]`; the one Hugging Face model and tokenizer in it.
    The last is measured with a second model that shares the weights, so the module itself never runs. It is built as
    when a `.ckpt` is opened, so both give the same numbers. A model that its configuration does not rebuild exactly,
    such as a model of the user's own class, runs as it is.

    Attributes:
        runs_module: whether measuring runs the module itself; see `training.untouched`. A `.ckpt` then takes its code.
        in_parts: whether the weights are in parts on several ranks: then all ranks must measure, and the module runs.
        own_precision: the arithmetic of a module's own method, as the trainer calls it; None for any other way.
        max_seq_length: as an `Encoder`'s.
        description: what a `.ckpt` holds to describe the module, so that it can be opened without the module's code, or
            so that the user knows what code it takes; None where `infer_target` names a class.
    """

    context: Context
    mode: str
    maker: str | None

    def __init__(
        self,
        module: nn.Module,
        infer_target: str = "auto",
        tokenizer: Any = None,
        context: Context = nullcontext,
        mode: str = "",
        others: Sequence[object] = (),
        maker: str | None = "",
    ) -> None:
        """Finds the way to the hidden states; `encoder` takes the weights later.

        Args:
            module: the module in training.
            infer_target: `auto`, a short name that the architecture must agree with, or the path of an encoder class.
            tokenizer: the Hugging Face tokenizer; by default that in the module.
            context: wraps the module's own code, such as a trainer's autocast.
            mode: names the arithmetic of `context`.
            others: objects to look for the tokenizer in, beside the module.
            maker: a digest of the user's code that made the module; None where it cannot be known.

        Raises:
            CheckpointError: there is no such way to the hidden states, or more than one.
            ConfigError: `infer_target` names no class.
        """
        self.context, self.mode, self.maker = context, mode, maker
        self.description: dict[str, Any] | None = None
        self.in_parts: bool = is_sharded(module)
        self._class = encoder_class(infer_target)
        bare = within_wrappers(module)
        self._own_method = self._class is None and callable(getattr(bare, "hidden_states", None))
        self.own_precision: str | None = (mode or PLAIN) if self._own_method else None
        self._skeleton: nn.Module | None = None
        if self._class is not None:
            if self.in_parts:
                found: Any = made_from_module(self._class, bare)
            else:
                found = CustomEncoder.from_module(self._class, module, _device_of(module), context, mode)
            self.max_seq_length = _own_limit(found)
        elif self._own_method:
            self.description = {"prefix": "", "class": class_name(own_class(module))}
            self.max_seq_length = _own_limit(bare)
        else:
            prefix, model = _only_model(module)
            check_architecture(infer_target, model.config.model_type, f"the model in {own_class(module).__name__}")
            self._tokenizer = tokenizer or _only_tokenizer(list(module.modules()), others)
            self.description = describe(model, self._tokenizer, prefix)
            self._rebuild(module, model, prefix)
            self.max_seq_length = limit_of(model.config, Tokens(self._tokenizer))
        self.runs_module: bool = self._skeleton is None

    def encoder(
        self,
        module: nn.Module,
        options: EncoderOptions = EncoderOptions(),
        probe: str = "C",
    ) -> HuggingFaceEncoder | CustomEncoder:
        """An encoder of the weights that `module` has now; use it before they change.

        Args:
            module: the same as at first.
            options: device, precision, layer and pooling are used. The device `auto` is the module's own; a module that
                is run as it is stays where it is. A user's own code decides for itself on precision and layer.
            probe: a sequence to find out the hidden size with, where the module does not have it.

        Raises:
            CheckpointError: the module's own model gives no hidden states.
            ConfigError: there is no such layer, or the module's own code gives the hidden states.
        """
        if self._class is not None or self._own_method:
            no_layer(options.layer, own_class(module).__name__)
        where = _device_of(module) if options.device == "auto" else find_device(options.device)
        if self.in_parts and (self._class is not None or self._own_method):
            return self._custom_in_step(module, probe).with_pooling(options.pooling)
        if self._class is not None:
            custom = CustomEncoder.from_module(self._class, module, where, self.context, self.mode)
            return custom.with_pooling(options.pooling)
        if self._own_method:
            own, parts = type(module), map(type, module.modules())
            digest = None
            if self.maker is not None:
                how = f"{self.mode} {self.maker}"
                digest = own_digest(own, [*parts], lambda: f"{how} {settings_digest(module)} {module_digest(module)}")
            encoder = CustomEncoder(_Method(module), digest, _device_of(module), self.context, probe, own)
            encoder.precision = self.own_precision or PLAIN
            return encoder.with_pooling(options.pooling)
        if self._skeleton is None:
            model = encoder_of(_only_model(module)[1])[0]
            in_step = InStep(module, model) if self.in_parts else None
            return HuggingFaceEncoder(model, self._tokenizer, options, True, self.maker, in_step)
        self._take_weights(module)
        return HuggingFaceEncoder(self._skeleton, self._tokenizer, replace(options, device=str(where)))

    def _custom_in_step(self, module: nn.Module, probe: str) -> CustomEncoder:
        """An encoder of the user's own code on weights that are in parts on several ranks."""
        in_step, bare, reached = InStep(module), within_wrappers(module), []
        inner: Any = None
        owner = own_class(module) if self._own_method else self._class

        @torch.no_grad()
        def fill(_: int) -> None:
            with self.context():
                in_step(lambda: inner.hidden_states([probe]))

        same = SameNumber(in_step, fill)
        with same:
            inner = _Method(bare) if self._own_method else made_from_module(self._class, bare)
            encoder = CustomEncoder(_InStep(inner, in_step), "in parts", in_step.device, self.context, probe, owner)
            for number in (1, 2):
                encoder.hidden_states([probe] * number)
                reached.append(in_step.reached)
        same.fill_up(3)  # the first to find out the hidden size
        same.raise_late()
        encoder.digest, encoder.reusable, encoder.in_step = f"in parts {uuid4().hex}", False, in_step
        encoder.precision = self.own_precision or encoder.precision
        if len(reached[0]) != len(reached[1]):  # ranks with unlike batches would wait for one another in vain
            found = f"{len(reached[0])} calls of sharded layers for one sequence, and {len(reached[1])} for two"
            raise CheckpointError(f"{class_name(owner)}: {found}; give all sequences to the layers in one padded batch")
        return encoder

    def release(self) -> None:
        """Lets go of the weights that `encoder` took: where they are not float32 they are a copy."""
        if self._skeleton is not None:
            empty = {key: value.to("meta") for key, value in self._skeleton.state_dict().items()}
            self._skeleton.load_state_dict(empty, assign=True)

    def _rebuild(self, module: nn.Module, model: Any, prefix: str) -> None:
        """Makes the second model, where the configuration gives exactly the module's model; else logs why not."""
        assert self.description is not None
        if self.in_parts:
            if not is_of_transformers(own_class(model)):
                self.description["class"] = class_name(own_class(model))
            return
        own = class_name(type(model))
        try:
            if not is_of_transformers(type(model)):
                raise CheckpointError(f"{own} is not a class of transformers")
            with quiet():
                skeleton, name, self._tokenizer = rebuild(self.description)
            self._prefix = _exact_prefix(module, skeleton, name, uncompiled(prefix))
        except Exception as error:  # whatever a library has against a configuration
            self.description["class"] = own
            logger.info("%s runs as it is: %s", type(model).__name__, error)
            return
        if hooks_of(model):
            logger.info("%d forward hooks in %s do not run when it is measured", hooks_of(model), type(model).__name__)
        self._skeleton = skeleton
        self._take_weights(module)
        self.release()

    def _take_weights(self, module: nn.Module) -> None:
        """Gives the second model the module's weights: the same memory where they are float32."""
        assert self._skeleton is not None
        state = uncompiled_state(module.state_dict())
        weights = {key: state[self._prefix + key].detach() for key in self._skeleton.state_dict()}
        taken = {key: value.float() if value.is_floating_point() else value for key, value in weights.items()}
        self._skeleton.load_state_dict(taken, assign=True)


class _InStep:
    """An object of the user's own whose passes run on all ranks at once."""

    def __init__(self, inner: Any, in_step: InStep) -> None:
        self._inner, self._in_step = inner, in_step
        for name in ("hidden_states", "states_from_first"):
            if callable(getattr(inner, name, None)):
                setattr(self, name, partial(self._run, getattr(inner, name)))

    def _run(self, method: Any, sequences: Sequence[str]) -> Any:
        states = self._in_step(method, sequences)
        return [whole(one) for one in states] if isinstance(states, list) else whole(states)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


class _Method:
    """A module's own `hidden_states`, without the module's other attributes, which may mean something else."""

    def __init__(self, module: Any) -> None:
        self.hidden_states = module.hidden_states
        self.max_seq_length = _own_limit(module)
        for name in ("count_unknown", "states_from_first"):
            if callable(getattr(module, name, None)):
                setattr(self, name, getattr(module, name))


def _exact_prefix(module: nn.Module, skeleton: nn.Module, name: str, prefix: str) -> str:
    """What the encoder's names begin with in the module; a CheckpointError where the two are not the same model."""
    state = uncompiled_state(module.state_dict())
    found = matching_prefix(skeleton, name, state, prefix, type(module).__name__)
    left = unexpected(skeleton, state, found)
    if left:
        raise CheckpointError(f"its configuration does not give the weights {', '.join(left[:3])}")
    expected = {name: type(part) for name, part in skeleton.named_modules()}
    for path, part in module.named_modules():
        full = uncompiled(f"{path}.")
        within = full.removeprefix(found).rstrip(".")
        if not full.startswith(found) or not is_part(within, skeleton) or is_compiled(part):
            continue
        if expected.get(within) is not type(part) or "forward" in vars(part):
            raise CheckpointError(f"{path} is not what its configuration says")
    return found


def _own_limit(module: nn.Module) -> int | None:
    limit = getattr(module, "max_seq_length", None)
    return limit if isinstance(limit, int) else None


def _device_of(module: nn.Module) -> torch.device:
    tensor: Tensor | None = next(iter(module.parameters()), None)
    return torch.device("cpu") if tensor is None else tensor.device


def _only_model(module: nn.Module) -> tuple[str, Any]:
    """The only outermost Hugging Face model in a module, and what the names of its weights begin with."""
    from transformers import PreTrainedModel

    found: dict[str, Any] = {}
    for name, part in module.named_modules():
        if isinstance(part, PreTrainedModel) and not any(name.startswith(outer) for outer in found):
            found[f"{name}." if name else ""] = part
    if len(found) != 1:
        names = ", ".join(prefix.rstrip(".") or "the module itself" for prefix in found) or "none"
        raise CheckpointError(f"{type(module).__name__}: expected one Hugging Face model, found {names}; {REMEDY}")
    return found.popitem()


def _only_tokenizer(holders: Sequence[object], others: Sequence[object]) -> Any:
    """The only tokenizer among the attributes of `holders`, or else of `others`."""
    from transformers import PreTrainedTokenizerBase

    found: list[Any] = []
    for some in (holders, others):
        values = [value for holder in some if holder is not None for value in vars(holder).values()]
        unique = {id(value): value for value in values if isinstance(value, PreTrainedTokenizerBase)}
        found = found or list(unique.values())
    if len(found) != 1:
        count = "none" if not found else f"{len(found)}: {', '.join(type(tokenizer).__name__ for tokenizer in found)}"
        remedy = "give tokenizer=..., keep it as an attribute of the module, such as self.tokenizer, or " + REMEDY
        raise CheckpointError(f"expected one Hugging Face tokenizer in the module, found {count}; {remedy}")
    return found[0]
