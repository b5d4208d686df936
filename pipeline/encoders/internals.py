"""Private parts of other libraries that have no public counterpart in every version; each is used here alone.

`tests/test_internals.py` fails, naming the part, in the version that takes one away.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

ATTENTION = "_attn_implementation"  # of a configuration; what transformers writes out begins with it
COMPILED = "_orig_mod"  # the module within that of `torch.compile`
WRAPPED = (COMPILED, "_fsdp_wrapped_module", "_checkpoint_wrapped_module")  # within those that torch puts around others


def attention_of(config: Any) -> str | None:
    """The implementation of attention that a model of this configuration runs with, such as `sdpa`."""
    return getattr(config, ATTENTION, None)


@contextmanager
def attention_set(config: Any, name: str) -> Iterator[None]:
    """Has the model of a configuration run with another implementation of attention."""
    before = attention_of(config)
    setattr(config, ATTENTION, name)
    try:
        yield
    finally:
        setattr(config, ATTENTION, before)


def hooks_of(module: nn.Module) -> int:
    """How many hooks run before or after the forward passes of a module and of its submodules.

    Those with which transformers 5 collects hidden states, from the first forward pass on, change nothing.
    """
    parts = [part for part in module.modules() if part._forward_hooks or part._forward_pre_hooks]
    hooks = [hook for part in parts for hook in (*part._forward_hooks.values(), *part._forward_pre_hooks.values())]
    return sum(not str(getattr(hook, "__module__", "")).startswith("transformers.") for hook in hooks)


def is_compiled(module: nn.Module) -> bool:
    """Whether a module is what `torch.compile` puts around another."""
    return hasattr(module, COMPILED)


def has_compiled_parts(model: nn.Module) -> bool:
    """Whether a module in it was compiled in place, by `Module.compile`."""
    return any(getattr(part, "_compiled_call_impl", None) is not None for part in model.modules())


def uncompiled(name: str) -> str:
    """The name that a weight or module had before `torch.compile`, FSDP and the like; a trailing dot is kept."""
    for wrapped in WRAPPED:
        name = name.replace(f"{wrapped}.", "")
    return name


def uncompiled_state(state: Mapping[str, Any]) -> dict[str, Any]:
    """Weights by the names that they had before `torch.compile`, FSDP and so on; where two become one, as they are."""
    found = {uncompiled(name): value for name, value in state.items()}
    return found if len(found) == len(state) else dict(state)


def fsdp1_has(parameter: Any) -> bool:
    """Whether a weight is in parts by FSDP1."""
    return bool(getattr(parameter, "_fsdp_flattened", False))


def fsdp1_reshard(part: Any) -> None:
    """Leaves a rank with its part of the weights of a module of FSDP1, also of the outermost one."""
    from torch.distributed.fsdp._runtime_utils import _reshard

    handle = part._handle  # None where it has no weights that are not in the parts within
    if handle is not None and handle.uses_sharded_strategy and not handle.needs_unshard():
        _reshard(part, handle, True)


@contextmanager
def fsdp1_order(parts: Sequence[Any]) -> Iterator[None]:
    """Within, FSDP1 does not note in which order parts run: it gathers ahead in that order, on all ranks alike."""
    orders = list({id(one): one for one in (part._exec_order_data for part in parts)}.values())
    handles = [part._handle for part in parts if part._handle is not None]
    lists = ("handles_pre_forward_order", "handles_post_forward_order")
    places = ("_pre_forward_order_index", "_post_forward_index")
    before = [(one, {name: list(getattr(one, name)) for name in lists}) for one in orders]
    before += [(one, {name: getattr(one, name) for name in places}) for one in handles]
    try:
        yield
    finally:
        for one, values in before:
            vars(one).update(values)


@contextmanager
def fsdp2_order(parts: Sequence[Any]) -> Iterator[None]:
    """As `fsdp1_order`, for modules of FSDP2."""
    groups = [group for part in parts for group in _groups(part)]
    before = {id(one): list(one) for group in groups for one in _orders(group)}
    try:
        yield
    finally:
        for one in (one for group in groups for one in _orders(group)):
            one[:] = before.get(id(one), [])  # a list may be new, since the first forward pass


def fsdp2_ranks(part: Any) -> list[int]:
    """The ranks that a module of FSDP2 has parts or copies of its weights on; none where it has no weights."""
    ranks: list[int] = [rank for group in _groups(part)[:1] for rank in group.mesh_info.mesh.mesh.flatten().tolist()]
    return ranks


def _groups(part: Any) -> list[Any]:
    """The groups of weights of a module of FSDP2; earlier releases of torch than 2.13 have one."""
    state = part._get_fsdp_state()
    return list(getattr(state, "_fsdp_param_groups", None) or filter(None, [state._fsdp_param_group]))


def _orders(group: Any) -> list[list[Any]]:
    of_all = getattr(group.comm_ctx, "post_forward_order", None)  # from the first forward pass on
    return [group._post_forward_indices, *([] if of_all is None else [of_all])]


@contextmanager
def panics_as_errors() -> Iterator[None]:
    """Turns a panic of a library written in Rust, which is no `Exception` and cannot be imported, into an error."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise RuntimeError(str(error)) from error
