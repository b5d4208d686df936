"""An adapter of the `peft` library: a folder with `adapter_config.json`, merged into the model that it was trained on.

The arithmetic is the library's own (`merge_and_unload`), in float32. It is given the encoder alone, under the name that
this had within the larger model of the training, so that patterns of names mean what they meant there.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from pipeline.checkpoints.folder import FOLDER
from pipeline.checkpoints.stored import Format, Stored, say_left_out
from pipeline.checkpoints.unpickle import read_tensors
from pipeline.encoders.checks import json_object
from pipeline.encoders.description import load_tokenizer
from pipeline.encoders.options import EncoderOptions
from pipeline.encoders.weights import check_dtypes
from pipeline.errors import CheckpointError

CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
PREFIX = "base_model.model."  # begins every name in an adapter's file
# Kinds of adapters that become part of the weights; others, such as learnt prompts, do not.
MERGED = {"LORA", "ADALORA", "LOHA", "LOKR", "IA3", "OFT", "HRA", "LN_TUNING", "FOURIERFT"}
# Ways to start a LoRA: those of the first kind leave the base as it is, those of the second are computed from it.
PLAIN_STARTS, COMPUTED_STARTS = (True, False, "gaussian", "eva", "orthogonal"), ("pissa", "olora")
MERGE = "merge it where it was trained (merge_and_unload), save_pretrained that, and open the new folder"
REMEDY = "copy the folder again, or take another checkpoint"


def _holds(path: Path) -> bool:
    return (path / CONFIG).is_file()


def _read(source: str, options: EncoderOptions, factory: Any) -> Stored:
    folder = Path(source)
    settings, state = _settings(folder), _state(folder, options)
    base: Stored = _base(folder, settings, options, factory)
    try:
        _merge(base.model, settings, state, source)
    except (ValueError, KeyError, TypeError, RuntimeError) as error:  # whatever the library has against the adapter
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(f"ckpt: '{source}': the adapter does not fit its base model: {reason}") from error
    own = (folder / "tokenizer_config.json").is_file() and options.architecture is None
    return replace(base, tokenizer=load_tokenizer(source)) if own else base


def _settings(folder: Path) -> dict[str, Any]:
    """The adapter's configuration. Raises CheckpointError where it cannot be merged, or names code."""
    path = folder / CONFIG
    try:
        settings = json_object(path)
    except ValueError as error:
        raise CheckpointError(f"ckpt: {error}; {REMEDY}") from error
    kind, start = settings.get("peft_type"), settings.get("init_lora_weights", True)
    if kind not in MERGED:
        expected = f"expected an adapter that can be merged ({', '.join(sorted(MERGED))})"
        raise CheckpointError(f"ckpt: '{path}': peft_type: {expected}, found {kind!r:.60}; measure it in training")
    if start not in PLAIN_STARTS and not str(start).startswith(COMPUTED_STARTS):
        why = "which changes the base model with what is not in the folder"
        raise CheckpointError(f"ckpt: '{path}': init_lora_weights is {start!r:.60}, {why}; {MERGE}")
    if settings.get("megatron_config"):
        raise CheckpointError(f"ckpt: '{path}': megatron_config names code, which is never loaded; {MERGE}")
    return {**settings, "init_lora_weights": True} if start in PLAIN_STARTS and kind == "LORA" else settings


def _state(folder: Path, options: EncoderOptions) -> dict[str, Tensor]:
    """The adapter's weights, as float32, by their names within the model that it was trained on."""
    path = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if path is None:
        raise CheckpointError(f"ckpt: '{folder}': expected {' or '.join(WEIGHTS)}, found neither; {REMEDY}")
    try:
        found = load_file(path) if path.suffix == ".safetensors" else read_tensors(path, options.trust_pickle)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"ckpt: '{path}' is damaged, or no file of weights ({error}); {REMEDY}") from error
    tensors = isinstance(found, Mapping) and all(isinstance(value, Tensor) for value in found.values())
    if not tensors or not all(str(name).startswith(PREFIX) for name in found):
        raise CheckpointError(f"ckpt: '{path}': expected tensors called {PREFIX}..., found others; {REMEDY}")
    check_dtypes({name: value.dtype for name, value in found.items()}, str(path))
    return {name.removeprefix(PREFIX): value.float() for name, value in found.items()}


def _base(folder: Path, settings: Mapping[str, Any], options: EncoderOptions, factory: Any) -> Any:
    """The model that the adapter was trained on: in `architecture`, or where its configuration says."""
    name, where = options.architecture or settings.get("base_model_name_or_path"), f"ckpt: '{folder}'"
    remedy = "set architecture to the folder of the base model"
    if not name or not isinstance(name, str):
        raise CheckpointError(f"{where} does not name the model that the adapter is of; {remedy}")
    if settings.get("revision") not in (None, "main") and options.architecture is None:
        revision = f"revision {settings['revision']!r:.60} of '{name}'"
        raise CheckpointError(f"{where} is an adapter of {revision}, and revisions are not fetched; {remedy}")
    try:
        return FOLDER.read(name, replace(options, architecture=None), factory)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0][:200]
        raise CheckpointError(f"{where}: its base model '{name}' cannot be read ({reason}); {remedy}") from error


def _merge(encoder: nn.Module, settings: Mapping[str, Any], state: Mapping[str, Tensor], source: str) -> None:
    """Merges the adapter into the encoder's weights. Raises CheckpointError unless it has all that it must have."""
    try:
        import peft
    except ImportError as error:
        install = "pip install 'downstream-validation[peft]'"
        raise CheckpointError(f"ckpt: '{source}' is an adapter, which takes the peft library: {install}") from error
    prefix = _prefix(encoder, state, source)
    inside = {name: value for name, value in state.items() if _is_within(name.removeprefix(prefix), encoder)}
    inside = {name: value for name, value in inside.items() if name.startswith(prefix)}
    say_left_out(sorted(state.keys() - inside.keys()), encoder)
    left_out = ("task_type", "auto_mapping", "base_model_name_or_path", "revision", "runtime_config")
    known = {name: value for name, value in settings.items() if name not in left_out}
    modules = known.get("modules_to_save") or []
    known["modules_to_save"] = [name for name in modules if any(_names(name, key) for key in inside)] or None
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")  # about how the adapter starts; it is filled below
        wrapped: Any = peft.get_peft_model(_within(encoder, prefix), peft.PeftConfig.from_peft_type(**known))
        _check(peft.get_peft_model_state_dict(wrapped, save_embedding_layers=False), inside, wrapped, source)
        peft.set_peft_model_state_dict(wrapped, {PREFIX + name: value for name, value in inside.items()})
        wrapped.merge_and_unload()


def _names(module: str, key: str) -> bool:
    """Whether a weight is of a module that `modules_to_save` names."""
    return f".{module}." in f".{key}"


def _prefix(encoder: nn.Module, state: Iterable[str], source: str) -> str:
    """What the encoder's names began with in the training: such as `esm.`, or nothing."""
    own = getattr(encoder, "base_model_prefix", "")
    candidates = ["", *(f"{name}." for name in (own, "model", "encoder", f"{own}.encoder", "model.encoder") if name)]
    hits = {
        prefix: sum(name.startswith(prefix) and _is_within(name.removeprefix(prefix), encoder) for name in state)
        for prefix in candidates
    }
    best = max(hits, key=lambda prefix: hits[prefix])
    if not hits[best]:
        some = next(iter(state), "nothing")
        kind = type(encoder).__name__
        raise CheckpointError(f"ckpt: '{source}': expected an adapter of a {kind}, found one with '{some}' in it")
    return best


def _is_within(name: str, encoder: nn.Module) -> bool:
    """Whether a weight of an adapter is at a module of the encoder."""
    parts = name.split(".")
    modules = dict(encoder.named_modules())
    paths = (".".join(parts[:count]) for count in range(1, len(parts)))
    return any(path in modules and not any(modules[path].children()) for path in paths)


def _within(encoder: nn.Module, prefix: str) -> nn.Module:
    """A module in which the encoder has the name that it had in the training."""
    module = encoder
    for part in reversed(prefix.split(".")[:-1]):
        holder = nn.Module()
        holder.add_module(part, module)
        module = holder
    return module


def _check(expected: Mapping[str, Tensor], found: Mapping[str, Tensor], wrapped: nn.Module, source: str) -> None:
    """Raises CheckpointError where a weight is missing, is left over, or has another shape.

    Weights of the base model may be among those found, such as embeddings that the training changed.
    """
    wanted = {name.removeprefix(PREFIX): value.shape for name, value in expected.items()}
    base = {name.removeprefix(PREFIX): value.shape for name, value in wrapped.state_dict().items()}
    lacking, left = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys() - base.keys())
    if lacking or left:
        what = f"lacks '{lacking[0]}'" if lacking else f"has '{left[0]}', for which the model has no place"
        raise CheckpointError(f"ckpt: '{source}': the adapter {what}; take the configuration that belongs to it")
    for name, value in found.items():
        shape = wanted.get(name, base.get(name))
        if shape is not None and value.shape != shape:
            remedy = "take the base model that it was trained on: set architecture to its folder"
            shapes = f"expected the shape {tuple(shape)}, found {tuple(value.shape)}"
            raise CheckpointError(f"ckpt: '{source}': '{name}': {shapes}; {remedy}")


PEFT = Format(_holds, _read)
