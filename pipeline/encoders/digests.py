"""Digests of models: the same for the same hidden states."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor, nn

from pipeline.encoders.source import LIBRARIES, code_digest
from pipeline.encoders.tokens import Tokens

# What a configuration holds that does not change a hidden state.
NEUTRAL_OPTIONS = {"_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "use_cache"}


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
    """A digest of the code of the classes in a model that are no library's; None where it cannot be known."""
    own = [kind for kind in map(type, model.modules()) if kind.__module__.partition(".")[0] not in LIBRARIES]
    patched = any("forward" in vars(one) for one in model.modules())
    return None if patched or not own else code_digest(own[0], *own[1:])


def model_digest(model: nn.Module, state: Mapping[str, Tensor], tokens: Tokens, precision: str) -> str:
    """The digest of an encoder: its weights, the options of its configuration, its tokens and its precision."""
    options = {key: value for key, value in model.config.to_diff_dict().items() if key not in NEUTRAL_OPTIONS}  # type: ignore[union-attr, operator]
    weights = weights_digest(state.items())
    # Rounded arithmetic differs between kinds of device; float32 agrees to 1e-5.
    where = "" if precision == "fp32" else next(model.parameters()).device.type
    what = [weights, tokens.digest(), json.dumps(options, sort_keys=True, default=str), precision, where]
    return hashlib.sha256("\n".join(what).encode()).hexdigest()
