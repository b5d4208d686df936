"""Modules whose weights are in parts on several ranks, as each library makes them: FSDP2, FSDP1, tensor parallelism.

A part is a module that gathers its weights for its forward pass, on several ranks at once: what `fully_shard` (FSDP2)
was called on, or a `FullyShardedDataParallel` (FSDP1) around another module.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from pipeline.encoders.internals import fsdp1_has, fsdp1_order, fsdp1_reshard, fsdp2_order, fsdp2_ranks

T = TypeVar("T")

FSDP1, FSDP2 = "FullyShardedDataParallel", "FSDPModule"
AROUND_FORWARD = ("forward", "_forward_hooks", "_forward_pre_hooks")  # attributes of a module


def is_sharded(module: nn.Module) -> bool:
    """Whether a forward pass of a module takes several ranks, as none has all weights."""
    return bool(parts_of(module)) or any(map(is_dtensor, module.parameters()))


def parts_of(module: nn.Module) -> list[Any]:
    """The parts in a module, which may be one itself, from the outermost on."""
    return [part for part in module.modules() if is_part(part)]


def is_part(module: nn.Module) -> bool:
    """Whether a module is one of FSDP2 or of FSDP1."""
    return _is(module, FSDP2) or _is(module, FSDP1)


def is_dtensor(tensor: Tensor) -> bool:
    """Whether a tensor is a part of a whole, of which other ranks have the rest."""
    return any(kind.__name__ == "DTensor" for one in (tensor, tensor.data) for kind in type(one).__mro__)


def whole(states: Any) -> Any:
    """Hidden states of which the rank may have a part, as a tensor of their own."""
    full: Callable[[], Any] = getattr(states, "full_tensor", lambda: states)
    return full()


def within_wrappers(module: Any) -> Any:
    """The user's own module: what FSDP1 is around; FSDP2 is around nothing."""
    while _is(module, FSDP1):
        module = module.module
    return module


def own_class(module: nn.Module) -> type[nn.Module]:
    """The class that a module had before `fully_shard`, which gives it one of its own."""
    kinds = type(within_wrappers(module)).__mro__
    names = [kind.__name__ for kind in kinds]
    return next(kind for kind in kinds[1:] if kind.__name__ != FSDP2) if FSDP2 in names else kinds[0]


def compute_device(module: nn.Module) -> torch.device:
    """Where a module in parts runs: the parts may be kept on a CPU."""
    for part in module.modules():
        if _is(part, FSDP1):
            return torch.device(part.compute_device)  # type: ignore[call-overload,no-any-return]
    kind = str(_meshes(module)[0].device_type)
    return torch.device(kind) if kind == "cpu" else torch.device(kind, torch.get_device_module(kind).current_device())


def place_of(module: nn.Module) -> int:
    """Ranks with the same place must embed the same batches: those among which the layers themselves are divided.

    It is the place among the ranks that gather their weights from one another or have copies of them; where there are
    none, the first rank of those that the layers are divided among.
    """
    rank = torch.distributed.get_rank()
    for part in parts_of(module):
        if _is(part, FSDP1):
            hybrid = "HYBRID" in part.sharding_strategy.name
            return rank if hybrid else int(torch.distributed.get_rank(part.process_group))
        if ranks := fsdp2_ranks(part):
            return ranks.index(rank)
    return min((int(mesh.mesh.min()) for mesh in _meshes(module)), default=rank)


def within(parts: list[Any], code: Callable[[], T]) -> T:
    """Runs code as if it were the forward pass of each of some parts, from the outermost on."""
    if not parts:
        return code()
    run = _within_wrapper if _is(parts[0], FSDP1) else _within_module
    result: T = run(parts[0], lambda: within(parts[1:], code))
    return result


def reshard(part: Any) -> None:
    """Leaves this rank with its part of the weights; FSDP leaves the outermost ones whole after a forward pass."""
    if _is(part, FSDP1):
        fsdp1_reshard(part)
    else:
        part.reshard()


@contextmanager
def at_rest(module: nn.Module) -> Iterator[None]:
    """Within, FSDP1 is set up, as else in the first forward pass; and no FSDP goes by passes within in later ones."""
    parts = parts_of(module)
    wrappers = [part for part in parts if _is(part, FSDP1)]
    if wrappers:
        from torch.distributed.fsdp import FullyShardedDataParallel

        FullyShardedDataParallel.fsdp_modules(module, root_only=True)  # which sets up the outermost
        for part in wrappers:
            fsdp1_reshard(part)
    with fsdp1_order(wrappers), fsdp2_order([part for part in parts if _is(part, FSDP2)]):
        yield


def outside_of_wrapper(module: nn.Module) -> str:
    """The name of a weight that FSDP1 has in parts for a module around this one; empty without any."""
    inside = {id(one) for part in module.modules() if _is(part, FSDP1) for one in part.parameters()}
    named = module.named_parameters()
    return next((name for name, one in named if id(one) not in inside and fsdp1_has(one)), "")


def _within_module(part: Any, code: Callable[[], T]) -> T:
    from torch.distributed.fsdp import register_fsdp_forward_method

    name = "_run_for_downstream_validation"
    vars(part)[name] = code
    try:
        register_fsdp_forward_method(part, name)
        result: T = getattr(part, name)()
    finally:
        vars(part).pop(name, None)  # which is run within itself, where a pass of it failed
    return result


def _within_wrapper(part: Any, code: Callable[[], T]) -> T:
    """The wrapper calls the module in it, whose forward pass is the code until that runs; no hook of it does."""
    own = vars(part.module)
    before = {name: own[name] for name in AROUND_FORWARD if name in own}

    def put_back() -> None:
        own.pop("forward", None)
        own.update(before)

    def forward(*_: Any, **__: Any) -> T:
        put_back()
        return code()

    own.update({name: type(value)() for name, value in before.items() if name != "forward"}, forward=forward)
    try:
        result: T = part.forward()
    finally:
        put_back()
    return result


def _meshes(module: nn.Module) -> list[Any]:
    parameters: list[Any] = [*module.parameters()]
    return [one.device_mesh for one in parameters if is_dtensor(one)]


def _is(module: nn.Module, name: str) -> bool:
    return any(kind.__name__ == name and kind.__module__.startswith("torch.") for kind in type(module).__mro__)
