"""Digests of models: the same for the same hidden states."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from types import FunctionType

import torch
from torch import Tensor, nn

from pipeline.encoders.code_digest import LIBRARIES, code_digest
from pipeline.encoders.internals import hooks_of
from pipeline.encoders.tokens import Tokens

# The keys of a configuration that do not change a hidden state.
NEUTRAL_OPTIONS = {"_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "use_cache"}

NO_SETTINGS = {"training", *vars(nn.Module())}  # attributes that every module has


def weights_digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """A digest of named tensors: the same for the same values, however they were stored."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        each = pool.map(_tensor_digest, sorted(tensors, key=lambda pair: pair[0]))
        return hashlib.sha256("\n".join(each).encode()).hexdigest()


def _tensor_digest(named: tuple[str, Tensor]) -> str:
    name, tensor = named
    value = tensor.detach().cpu().contiguous()
    content = hashlib.sha256(value.flatten().view(torch.uint8).numpy().data).hexdigest()
    return f"{name} {tuple(value.shape)} {value.dtype} {content}"


def code_of(model: nn.Module) -> str | None:
    """A digest of the code and the settings of a model that runs as it is; None where its code cannot be known.

    The code of libraries does not count. Settings are plain attributes of the modules, such as a factor that a
    constructor was given and that no weight or configuration holds.
    """
    own = [kind for kind in map(type, model.modules()) if kind.__module__.partition(".")[0] not in LIBRARIES]
    changed = hooks_of(model) > 0 or any("forward" in vars(module) for module in model.modules())
    code = code_digest(own[0], *own[1:]) if own else ""
    return None if changed or code is None else f"{code} {settings_digest(model)}"


def settings_digest(module: nn.Module) -> str:
    """A digest of the plain attributes of a module and of its submodules.

    Private attributes of the module itself are left out: a trainer keeps its notes there.
    """
    found = []
    for path, part in module.named_modules():
        for name, value in sorted(vars(part).items()):
            if name not in NO_SETTINGS and (path or not name.startswith("_")) and _is_plain(value):
                shown = f"{value.__module__}.{value.__qualname__}" if callable(value) else repr(value)
                found.append(f"{path} {name} {shown}")
    return hashlib.sha256("\n".join(found).encode()).hexdigest()


def _is_plain(value: object) -> bool:
    if isinstance(value, (tuple, list)):
        return all(_is_plain(item) for item in value) and not any(callable(item) for item in value)
    return value is None or isinstance(value, (bool, int, float, str, FunctionType, type))


def model_digest(model: nn.Module, state: Mapping[str, Tensor], tokens: Tokens, precision: str) -> str:
    """The digest of an encoder: its weights, the options of its configuration, its tokens and its precision."""
    options = {key: value for key, value in model.config.to_diff_dict().items() if key not in NEUTRAL_OPTIONS}  # type: ignore[union-attr, operator]
    weights = weights_digest(state.items())
    # Rounded arithmetic differs between kinds of device; float32 agrees to 1e-5.
    where = "" if precision == "fp32" else next(model.parameters()).device.type
    what = [weights, tokens.digest(), json.dumps(options, sort_keys=True, default=str), precision, where]
    return hashlib.sha256("\n".join(what).encode()).hexdigest()
