"""An encoder as files that need nothing else: weights as safetensors, configuration, tokenizer."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pipeline.encoders.code_digest import class_name
from pipeline.encoders.description import fresh, load_tokenizer, portable, quiet
from pipeline.encoders.devices import find_device
from pipeline.encoders.huggingface import HuggingFaceEncoder
from pipeline.encoders.internals import ATTENTION
from pipeline.encoders.layers import shorten
from pipeline.encoders.megatron import MegatronModel, MegatronOptions
from pipeline.encoders.megatron_encoder import MegatronEncoder
from pipeline.encoders.megatron_tokens import read_tokens
from pipeline.encoders.options import EncoderOptions
from pipeline.encoders.protocol import Encoder

WEIGHTS, CONFIGURATION, MEGATRON = "model.safetensors", "config.json", "megatron.json"


def why_not(encoder: Encoder) -> str:
    """Why an encoder cannot be written as files that need nothing else; empty where it can."""
    if isinstance(encoder, MegatronEncoder):
        return ""
    if not isinstance(encoder, HuggingFaceEncoder):
        own = getattr(encoder, "inner", encoder)
        return f"a {class_name(type(own))} is code of your own, which is not copied; serve it with your own script"
    if encoder.in_step is not None:
        return "the weights are in parts on several ranks; measure a checkpoint with the command line"
    kind = class_name(type(encoder.model))
    if encoder.as_is:
        return f"a {kind} runs by code of your own, which is not copied; serve it with your own script"
    others = {value.dtype for value in encoder.model.parameters()} - {torch.float32}
    if others:
        return f"the {kind} holds weights of {', '.join(map(str, others))}, expected float32; take one not quantised"
    if portable(encoder.tokens.tokenizer) is None:
        return f"the tokenizer, a {class_name(type(encoder.tokens.tokenizer))}, takes code of your own"
    return ""


def write_encoder(encoder: Encoder, folder: Path) -> dict[str, Any]:
    """Writes an encoder, for which `why_not` is empty, into a new folder.

    Returns:
        How it embeds, for `read_encoder`.
    """
    folder.mkdir(parents=True)
    assert isinstance(encoder, (HuggingFaceEncoder, MegatronEncoder))
    if isinstance(encoder, HuggingFaceEncoder):
        config: Any = encoder.model.config
        portable(encoder.tokens.tokenizer).save_pretrained(folder)
        plain = {key: value for key, value in config.to_dict().items() if not key.startswith(ATTENTION)}
        (folder / CONFIGURATION).write_text(json.dumps(plain, indent=2), encoding="utf-8")
    else:
        content = {"model": asdict(encoder.model.options), "most_tokens": encoder.most_tokens}
        (folder / MEGATRON).write_text(json.dumps({**content, "tokens": encoder.tokens.content}), encoding="utf-8")
    save_file(_apart(encoder.model), folder / WEIGHTS, metadata={"format": "pt"})
    own = next(path for path in folder.iterdir() if path.suffix == ".json")
    shutil.copymode(own, folder / WEIGHTS)  # the library makes a file that the user alone can read
    names = ("layer", "pooling", "precision")
    return {**{name: getattr(encoder, name) for name in names}, "device": encoder.device.type}


def read_encoder(folder: Path, how: Mapping[str, Any], device: str = "auto") -> Encoder:
    """The encoder in a folder.

    Args:
        folder: what `write_encoder` wrote.
        how: what it returned. The precision is that of the measurement on the same kind of device, else the device's.
        device: see `EncoderOptions`.
    """
    same = find_device(device).type == how["device"]
    precision = how["precision"] if same else "auto"
    options = EncoderOptions(device=device, precision=precision, layer=how["layer"], pooling=how["pooling"])
    state = load_file(folder / WEIGHTS)
    if (folder / MEGATRON).is_file():
        content = json.loads((folder / MEGATRON).read_text(encoding="utf-8"))
        described = MegatronModel(MegatronOptions(**content["model"]))
        if options.layer is not None:
            described.shorten(options.layer)
        described.load_state_dict(state)
        tokens = read_tokens(content["tokens"])
        return MegatronEncoder(described.requires_grad_(False), tokens, options, content["most_tokens"])
    from transformers import AutoConfig

    with quiet():
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        model = fresh(config)[0]
        if options.layer is not None:
            shorten(model, options.layer, model.config)
        model.load_state_dict(state)
        return HuggingFaceEncoder(model, load_tokenizer(str(folder)), options)


def _apart(model: nn.Module) -> dict[str, Tensor]:
    """The weights on the CPU, no two in the same memory: a file of safetensors takes none that share it."""
    found: dict[str, Tensor] = {}
    places = set[int]()
    for name, value in model.state_dict().items():
        tensor = value.detach().cpu().contiguous()
        place = tensor.untyped_storage().data_ptr()
        found[name] = tensor.clone() if place in places else tensor
        places.add(place)
    return found
