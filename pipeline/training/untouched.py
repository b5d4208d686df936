"""What keeps a training as it is while its module is measured."""

from __future__ import annotations

import copy
import random
import sys
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer

OF_MODULES = frozenset(vars(nn.Module()))  # what every module has: parameters, hooks and so on
CONTAINERS = (list, dict, set, deque, tuple, OrderedDict, defaultdict)


@contextmanager
def untouched(module: nn.Module, runs_module: bool = True) -> Iterator[None]:
    """Afterwards module and process are bit for bit what they were, also when an exception passes through.

    Put back are the random states (Python, NumPy, torch, every GPU), each parameter's `requires_grad`, each
    submodule's mode, every buffer and attribute, the default dtype, the grad mode and autocast. Within, the module is
    in evaluation mode, gradients and autocast are off, and nothing is compiled.

    Args:
        module: what is in training.
        runs_module: whether the module itself will run, so that its buffers and attributes are kept; else they cannot
            change.
    """
    undo = [_random_states(), _modes(module), _defaults()]
    if runs_module:
        undo += [_buffers(module), _attributes(module)]  # the last first: buffers are put into what they belong to
    with ExitStack() as stack:
        for one in undo:
            stack.callback(one)
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        for device in ("cpu", "cuda"):
            stack.enter_context(torch.autocast(device, enabled=False))
        if "torch._dynamo" in sys.modules and hasattr(torch.compiler, "set_stance"):
            stack.enter_context(torch.compiler.set_stance("force_eager"))  # new lengths would compile anew
        for submodule in module.modules():
            submodule.training = False
        yield


def _random_states() -> Callable[[], None]:
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else []

    def restore() -> None:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        if gpus:
            torch.cuda.set_rng_state_all(gpus)

    return restore


def _modes(module: nn.Module) -> Callable[[], None]:
    training = [(submodule, submodule.training) for submodule in module.modules()]
    wanted = [(parameter, parameter.requires_grad) for parameter in module.parameters()]

    def restore() -> None:
        for submodule, mode in training:
            submodule.training = mode
        for parameter, requires_grad in wanted:
            if parameter.requires_grad != requires_grad:
                parameter.requires_grad_(requires_grad)

    return restore


def _defaults() -> Callable[[], None]:
    dtype, grad = torch.get_default_dtype(), torch.is_grad_enabled()

    def restore() -> None:
        torch.set_default_dtype(dtype)
        torch.set_grad_enabled(grad)

    return restore


def _buffers(module: nn.Module) -> Callable[[], None]:
    registered = [(one, dict(one._buffers), set(one._non_persistent_buffers_set)) for one in module.modules()]
    restore_values = _values(tensor for _, buffers, _ in registered for tensor in buffers.values())

    def restore() -> None:
        for submodule, buffers, temporary in registered:
            submodule._buffers.clear()
            submodule._buffers.update(buffers)
            submodule._non_persistent_buffers_set = temporary
        restore_values()

    return restore


def _attributes(module: nn.Module) -> Callable[[], None]:
    """What is no parameter, buffer or submodule, such as a table of positions or a count that a forward pass keeps."""
    attributes = [(one, dict(vars(one))) for one in module.modules()]
    own = [value for _, values in attributes for name, value in values.items() if name not in OF_MODULES]
    containers, tensors = _contents(own)
    restore_values = _values(tensors)

    def restore() -> None:
        for submodule, values in attributes:
            vars(submodule).clear()
            vars(submodule).update(values)
        for container, kept in containers:
            if _is_changed(container, kept):
                container.clear()
                container.update(kept) if isinstance(container, (dict, set)) else container.extend(kept)
        restore_values()

    return restore


def _contents(values: Sequence[object]) -> tuple[list[tuple[Any, Any]], list[Tensor]]:
    """The lists, dictionaries and the like among some objects and within them, each with a copy, and the tensors."""
    containers, tensors, seen, waiting = [], [], set[int](), list(values)
    while waiting:
        one = waiting.pop()
        if isinstance(one, Tensor):
            tensors.append(one)
        elif type(one) in CONTAINERS and id(one) not in seen:  # classes made from them may forbid what is done here
            content: Any = one
            seen.add(id(one))
            waiting += content.values() if isinstance(one, dict) else content
            if not isinstance(one, tuple):
                containers.append((one, copy.copy(one)))
    return containers, tensors


def _is_changed(container: Any, kept: Any) -> bool:
    """Whether a container holds other objects, or in another order, than its copy."""
    if isinstance(container, dict):
        return [*map(id, container), *map(id, container.values())] != [*map(id, kept), *map(id, kept.values())]
    return [*map(id, container)] != [*map(id, kept)]


def _values(candidates: Iterable[object]) -> Callable[[], None]:
    """What puts back the content of the tensors among some objects."""
    tensors = [one for one in candidates if isinstance(one, Tensor) and not isinstance(one, UninitializedBuffer)]
    saved = [(one, one.detach().clone()) for one in tensors]

    def restore() -> None:
        with torch.no_grad():
            for tensor, value in saved:
                if not torch.equal(tensor, value):
                    tensor.copy_(value)

    return restore
