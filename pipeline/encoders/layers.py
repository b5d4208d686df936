"""The layers of a Hugging Face model: how many there are, which hidden states to take, and compiling them."""

from __future__ import annotations

from typing import Any

from torch import nn

from pipeline.errors import ConfigError

COUNTS = ("encoder_layers", "num_hidden_layers", "num_layers", "n_layers")  # as configurations call it


def find_layer(layer: int | None, config: Any) -> int | None:
    """A layer's number from 0 on; None for the last. Raises ConfigError where there is no such layer."""
    if layer is None:
        return None
    last = _count(config)
    if last is None:
        raise ConfigError(f"layer: expected one of {', '.join(COUNTS)} in the model's configuration; set layer=null")
    if not -last - 1 <= layer <= last:
        raise ConfigError(f"layer: expected {-last - 1} to {last} for a model of {last} layers, found {layer}")
    found = layer % (last + 1)
    return None if found == last else found


def shorten(model: nn.Module, layer: int, config: Any) -> None:
    """Removes the layers above `layer` but for the next, whose input is the output of `layer`."""
    stack = _stack(model, config)
    if stack is not None:
        del stack[layer + 1 :]


def compile_layers(model: nn.Module, config: Any) -> None:
    """Has torch compile each layer, for any number of tokens, when it is first called.

    Layers share their code, so that one is compiled for all. A model whose layers are in no list is compiled whole.
    """
    stack = _stack(model, config)
    for part in (model,) if stack is None else stack:
        part.compile(dynamic=True)


def _stack(model: nn.Module, config: Any) -> nn.ModuleList | None:
    count = _count(config)
    stacks = (part for part in model.modules() if isinstance(part, nn.ModuleList) and len(part) == count)
    return next(stacks, None)


def _count(config: Any) -> int | None:
    """How many layers the encoder has, where its configuration says that."""
    return next((int(count) for name in COUNTS if (count := getattr(config, name, None)) is not None), None)
