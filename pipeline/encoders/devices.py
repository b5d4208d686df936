"""Where a model runs, and in which arithmetic."""

from __future__ import annotations

import torch

from pipeline.config.fields import check_choice
from pipeline.errors import ConfigError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def find_device(name: str) -> torch.device:
    """The device called `name`; `auto` is a GPU if there is any. Raises ConfigError if it is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"device: '{name}' is not on this machine ({str(error).splitlines()[0]}); use auto"
        ) from error
    return torch.device(name)


def find_precision(name: str, device: torch.device) -> str:
    """`auto` is bf16 on a GPU that has it, else fp32 (on most CPUs bf16 is emulated, and slow).

    Raises:
        ConfigError: the name is not known.
    """
    check_choice("precision", name, ("auto", *DTYPES))
    if name != "auto":
        return name
    return "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"


def send(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Values of the CPU on a device; to a GPU without waiting for it."""
    on_gpu = device.type == "cuda"
    return (values.pin_memory() if on_gpu else values).to(device, non_blocking=on_gpu)
