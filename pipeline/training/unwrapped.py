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
    "FullyShardedDataParallel": "FSDP",
    "FSDPModule": "FSDP2 (fully_shard)",
    "PipelineEngine": "a DeepSpeed engine of pipeline stages",
}
REMEDY = "downstream validation needs all weights on a rank; use DDP for now, or measure the checkpoints"


def unwrapped(module: nn.Module) -> nn.Module:
    """The module itself, which has all its weights. Sharded modules will be gathered here; for now they are refused.

    Raises:
        ConfigError: no rank has all weights (FSDP, FSDP2, DeepSpeed ZeRO-3).
    """
    while True:
        _refuse_sharded(module)
        inner = next((inner for name, inner in WRAPPERS.items() if name in _names(module)), None)
        if inner is None:
            return module
        module = getattr(module, inner)


def _refuse_sharded(module: nn.Module) -> None:
    found = next(filter(None, map(_sharded_class, module.modules())), None)
    found = found or next(filter(None, map(_sharded_parameter, module.named_parameters())), None)
    if found:
        raise ConfigError(f"{type(module).__name__}: the model is sharded: {found}; {REMEDY}")


def _sharded_class(module: nn.Module) -> str:
    return next((what for name, what in SHARDED.items() if name in _names(module)), "")


def _sharded_parameter(named: tuple[str, nn.Parameter]) -> str:
    name, parameter = named
    if hasattr(parameter, "ds_id"):
        return f"DeepSpeed ZeRO-3, which has '{name}' in parts"
    distributed = "DTensor" in _names(parameter) | _names(parameter.data)
    return f"'{name}' is a DTensor, as FSDP2 and tensor parallelism make it" if distributed else ""


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
