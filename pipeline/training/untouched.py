"""What keeps a training as it is while its module is measured."""

from __future__ import annotations

import copy
import io
import random
import sys
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer

from pipeline.encoders.parts import is_dtensor

OF_MODULES = frozenset(vars(nn.Module())) - {"_buffers", "_non_persistent_buffers_set"}  # parameters, hooks and so on
CONTAINERS = (list, dict, set, deque, tuple, OrderedDict, defaultdict)


@contextmanager
def untouched(module: nn.Module, runs_module: bool = True) -> Iterator[None]:
    """Afterwards module and process are bit for bit what they were, also when an exception passes through.

    Put back are the random states (Python, NumPy, torch, every GPU), each parameter's `requires_grad`, each
    submodule's mode, every buffer, hook and attribute, extra state (`get_extra_state`), the default dtype, the grad
    mode and autocast. Within, the module is in evaluation mode, gradients and autocast are off, and nothing is
    compiled.

    Args:
        module: the module in training.
        runs_module: whether the module itself will run, so that its buffers and attributes are kept; else they cannot
            change.
    """
    with ExitStack() as stack:
        stack.callback(random.setstate, random.getstate())
        stack.callback(np.random.set_state, np.random.get_state())
        gpus = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
        stack.enter_context(torch.random.fork_rng(gpus, device_type="cuda"))
        stack.callback(_set_gradients, [(parameter, parameter.requires_grad) for parameter in module.parameters()])
        stack.callback(torch.set_default_dtype, torch.get_default_dtype())
        if runs_module:
            stack.callback(_extra_states(module))  # after the attributes are put back
            stack.callback(_attributes(module))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        for device in ("cpu", "cuda"):
            stack.enter_context(torch.autocast(device, enabled=False))
        if "torch._dynamo" in sys.modules and hasattr(torch.compiler, "set_stance"):
            stack.enter_context(torch.compiler.set_stance("force_eager"))  # new lengths would compile anew
        for submodule in module.modules():
            stack.callback(setattr, submodule, "training", submodule.training)
            submodule.training = False
        yield


def _set_gradients(wanted: Sequence[tuple[nn.Parameter, bool]]) -> None:
    for parameter, requires_grad in wanted:
        if parameter.requires_grad != requires_grad:  # setting it fails where a parameter is not initialized
            parameter.requires_grad_(requires_grad)


def _extra_states(module: nn.Module) -> Callable[[], None]:
    """What modules keep of a forward pass in objects of their own, such as the scales of a TransformerEngine layer."""
    own = [part for part in module.modules() if _has_extra_state(type(part))]
    states = [(part, copy.deepcopy(part.get_extra_state())) for part in own]

    def restore() -> None:
        for part, state in states:
            if not _is_same(part.get_extra_state(), state):
                part.set_extra_state(state)

    return restore


def _has_extra_state(kind: type[nn.Module]) -> bool:
    """Whether modules of a class give extra state, and take it back: without both it cannot be put back."""
    gives = kind.get_extra_state is not nn.Module.get_extra_state
    return gives and kind.set_extra_state is not nn.Module.set_extra_state


def _is_same(now: Any, before: Any) -> bool:
    """Whether two extra states are equal, bit for bit; False where that cannot be said."""
    if isinstance(now, Tensor) and isinstance(before, Tensor):
        return bool(now.dtype == before.dtype and now.shape == before.shape and _bits(now) == _bits(before))
    if type(now) is not type(before):
        return False
    if isinstance(now, io.BytesIO):
        return bool(now.getvalue() == before.getvalue())
    if isinstance(now, dict):
        return [*now] == [*before] and all(_is_same(now[key], before[key]) for key in now)
    if isinstance(now, (list, tuple)):
        return len(now) == len(before) and all(map(_is_same, now, before))
    return isinstance(now, (bytes, str, int, float, bool, type(None))) and bool(now == before)


def _bits(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def _attributes(module: nn.Module) -> Callable[[], None]:
    """Buffers and other attributes, such as a table of positions or a count that a forward pass keeps."""
    attributes = [(submodule, dict(vars(submodule))) for submodule in module.modules()]
    own = [value for _, values in attributes for name, value in values.items() if name not in OF_MODULES]
    containers, tensors = _contents(own)
    every = [item for _, values in attributes for item in values.items()]
    hooks = [value for name, value in every if name in OF_MODULES and "hook" in name and isinstance(value, dict)]
    containers += [(value, copy.copy(value)) for value in hooks]  # transformers adds some in a forward pass
    copies = [(tensor, _local(tensor).clone()) for tensor in tensors]

    def restore() -> None:
        for submodule, values in attributes:
            vars(submodule).clear()
            vars(submodule).update(values)
        for container, content in containers:
            if _is_changed(container, content):
                container.clear()
                container.update(content) if isinstance(container, (dict, set)) else container.extend(content)
        with torch.no_grad():
            for tensor, value in copies:
                if not torch.equal(_local(tensor), value):
                    _local(tensor).copy_(value)

    return restore


def _local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this rank has: what is asked of the whole waits for ranks that may not come here."""
    local: Callable[[], Tensor] = getattr(tensor, "to_local", lambda: tensor)
    return local().detach()


def _contents(values: Sequence[object]) -> tuple[list[tuple[Any, Any]], list[Tensor]]:
    """The lists, dictionaries and the like among some objects and within them, each with a copy, and the tensors."""
    containers, tensors, seen, waiting = [], [], set[int](), list(values)
    while waiting:
        value = waiting.pop()
        if isinstance(value, Tensor) and not isinstance(value, UninitializedBuffer):
            tensors += [value] if _has_memory(value) else []
        elif type(value) in CONTAINERS and id(value) not in seen:  # subclasses may forbid what is done here
            container: Any = value
            seen.add(id(container))
            waiting += container.values() if isinstance(container, dict) else container
            if not isinstance(container, tuple):
                containers.append((container, copy.copy(container)))
    return containers, tensors


def _has_memory(tensor: Tensor) -> bool:
    """Whether a tensor's values are there: FSDP1 frees the memory of weights that it gathered alone."""
    return is_dtensor(tensor) or tensor.layout != torch.strided or tensor.untyped_storage().nbytes() > 0


def _is_changed(container: Any, content: Any) -> bool:
    """Whether a container holds other objects, or in another order, than its copy."""
    if isinstance(container, dict):
        return [*map(id, container), *map(id, container.values())] != [*map(id, content), *map(id, content.values())]
    return [*map(id, container)] != [*map(id, content)]
