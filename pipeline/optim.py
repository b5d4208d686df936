"""Optimisers by name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from pipeline.errors import ConfigError, nearest

OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {"adam": torch.optim.Adam}


def build(parameters: Iterable[nn.Parameter], optim_config: Mapping[str, Any]) -> torch.optim.Optimizer:
    """The optimiser that the mapping `optim` of a task describes: `name`, and the options of that optimiser.

    Raises:
        ConfigError: the name or an option is not known, or an option has a wrong value.
    """
    options = dict(optim_config)
    name = str(options.pop("name", "adam")).lower()
    options.pop("sched", None)
    if name not in OPTIMIZERS:
        raise ConfigError(f"optim.name: unknown optimiser '{name}'{nearest(name, OPTIMIZERS)}")
    try:
        return OPTIMIZERS[name](parameters, **options)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"optim: {name} cannot be built from {options}: {error}") from error
