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
from pipeline.encoders.parts import outside_of_wrapper, within_wrappers
from pipeline.errors import ConfigError

WRAPPERS = {"DistributedDataParallel": "module", "DataParallel": "module", "OptimizedModule": "_orig_mod"}
WRAPPERS |= {"DeepSpeedEngine": "module"}  # of ZeRO 0 to 2; it has all weights, as it computes with them
SHARDED = {"PipelineEngine": "a DeepSpeed engine of pipeline stages"}
REMEDY = "downstream validation needs all weights on a rank; use DDP for now, or measure the checkpoints"


def unwrapped(module: nn.Module) -> nn.Module:
    """The module itself, which has all its weights, or is one of FSDP or tensor parallelism, which runs as it is.

    Raises:
        ConfigError: no rank has all weights in another way (DeepSpeed ZeRO-3, pipeline stages).
    """
    while True:
        refuse_sharded(module)
        inner = next((inner for name, inner in WRAPPERS.items() if name in _names(module)), None)
        if inner is None:
            return module
        module = getattr(module, inner)


def refuse_sharded(module: nn.Module) -> None:
    """Raises ConfigError where a module's weights are in parts in a way that cannot be measured, see `unwrapped`."""
    kind = type(module).__name__
    found = next(filter(None, map(_sharded_class, module.modules())), "")
    name = next((name for name, one in module.named_parameters() if hasattr(one, "ds_id")), "")
    found = found or (name and f"DeepSpeed ZeRO-3, which has '{name}' in parts")
    if found:
        raise ConfigError(f"{kind}: the model is sharded: {found}; {REMEDY}")
    if name := outside_of_wrapper(module):
        remedy = "hand over what FullyShardedDataParallel returned, not the module within"
        raise ConfigError(f"{kind}: FSDP around it has '{name}' in parts; {remedy}")


def _sharded_class(module: nn.Module) -> str:
    return next((what for name, what in SHARDED.items() if name in _names(module)), "")


def _names(instance: object) -> set[str]:
    return {kind.__name__ for kind in type(instance).__mro__}


@contextmanager
def without_autocast_wrapper(module: nn.Module) -> Iterator[None]:
    """Takes off the `forward` that accelerate sets for mixed precision, so that the model is what its class says."""
    own = vars(within_wrappers(module))
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
