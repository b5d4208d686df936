"""The module within what loops wrap around it: DDP, `torch.compile`, DeepSpeed, and what accelerate prepares."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from pipeline.encoders.live import PLAIN
from pipeline.errors import ConfigError

WRAPPERS = {"DistributedDataParallel": "module", "DataParallel": "module", "OptimizedModule": "_orig_mod"}
WRAPPERS |= {"DeepSpeedEngine": "module"}  # of ZeRO 0 to 2; it has all weights, as it computes with them
SHARDED = {
    "FullyShardedDataParallel": "FSDP (fully_shard, which replaces it, can be measured)",
    "PipelineEngine": "a DeepSpeed engine of pipeline stages",
}
REMEDY = "downstream validation needs all weights on a rank; use DDP for now, or measure the checkpoints"


def unwrapped(module: nn.Module) -> nn.Module:
    """The module itself, which has all its weights, or is one of FSDP2 (`fully_shard`), which runs as it is.

    Raises:
        ConfigError: no rank has all weights (FSDP, DeepSpeed ZeRO-3, tensor parallelism).
    """
    while True:
        refuse_sharded(module)
        inner = next((inner for name, inner in WRAPPERS.items() if name in _names(module)), None)
        if inner is None:
            return module
        module = getattr(module, inner)


def refuse_sharded(module: nn.Module) -> None:
    """Raises ConfigError where a module's weights are in parts in a way that cannot be measured, see `unwrapped`."""
    found = next(filter(None, map(_sharded_class, module.modules())), None)
    inside = {id(one) for part in module.modules() if "FSDPModule" in _names(part) for one in part.parameters()}
    named = module.named_parameters()
    found = found or next(filter(None, (_sharded_parameter(name, one, id(one) in inside) for name, one in named)), None)
    if found:
        raise ConfigError(f"{type(module).__name__}: the model is sharded: {found}; {REMEDY}")


def _sharded_class(module: nn.Module) -> str:
    return next((what for name, what in SHARDED.items() if name in _names(module)), "")


def _sharded_parameter(name: str, parameter: Any, by_fsdp: bool) -> str:
    if hasattr(parameter, "ds_id"):
        return f"DeepSpeed ZeRO-3, which has '{name}' in parts"
    if "DTensor" not in _names(parameter) | _names(parameter.data):
        return ""
    if not by_fsdp:
        return f"'{name}' is a DTensor, as tensor parallelism makes it"
    mesh = parameter.device_mesh
    if mesh.ndim > 1 or mesh.size() != torch.distributed.get_world_size():
        kind = f"{mesh.ndim} dimensions {mesh.mesh_dim_names or ''}, {mesh.size()} ranks"
        return f"'{name}' is on a device mesh of {kind}, where one of all ranks in one dimension can be measured"
    return ""


def _names(instance: object) -> set[str]:
    return {kind.__name__ for kind in type(instance).__mro__}


@contextmanager
def without_autocast_wrapper(module: nn.Module) -> Iterator[None]:
    """Takes off the `forward` that accelerate sets for mixed precision, so that the model is what its class says."""
    own = vars(module)
    wrapper = own.get("forward")
    if wrapper is None or "_original_forward" not in own:
        yield
        return
    del own["forward"]
    try:
        yield
    finally:
        own["forward"] = wrapper


def arithmetic(device: torch.device) -> tuple[Callable[[], AbstractContextManager[Any]], str]:
    """The autocast of the loop, and its name as Lightning has it: that of accelerate, else the one in force now."""
    dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
    state = sys.modules.get("accelerate.state")
    if dtype is None and state is not None and state.is_initialized():
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(state.AcceleratorState().mixed_precision)
    name = {torch.bfloat16: "bf16-mixed", torch.float16: "16-mixed"}.get(dtype) if dtype else PLAIN
    if dtype is None:
        dtype = torch.float32
    context = partial(torch.autocast, device.type, dtype=dtype, enabled=name != PLAIN)
    return context, name or f"{dtype}-mixed"
