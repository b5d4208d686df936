"""A `ckpt` string to an `Encoder`: a Hugging Face folder or hub id, a Lightning `.ckpt`, an MLflow URI.

Weights are read with safetensors or `weights_only=True`. Weights that a checkpoint lacks are an error: a library that
fills them in at random would have us measure noise.
"""

from __future__ import annotations

import glob
import inspect
import json
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.config import import_class
from pipeline.custom import CustomEncoder
from pipeline.encoders import Encoder, HuggingFaceEncoder, find_device
from pipeline.errors import CheckpointError, PipelineError

DESCRIPTION = "downstream_validation"  # the key of a `.ckpt` under which it describes itself
ARCHITECTURES = {"esm": ("esm",), "prott5": ("t5", "mt5"), "megamolbart": ("bart", "mbart")}
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def open_encoder(
    ckpt: str,
    infer_target: str = "auto",
    device: str = "auto",
    precision: str = "auto",
    architecture: str | None = None,
    trust_pickle: bool = False,
) -> Encoder:
    """The encoder in a stored checkpoint.

    Args:
        ckpt: a Hugging Face folder or hub id, a Lightning `.ckpt`, or an MLflow URI (`runs:/`, `models:/`).
        infer_target: `auto`, a short name that the architecture must agree with, or the path of an encoder class.
        device: `auto`, `cpu`, `cuda`, `cuda:1` or `mps`.
        precision: `auto`, `fp32`, `bf16` or `fp16`.
        architecture: for a `.ckpt` that does not describe itself, the Hugging Face folder or id that does.
        trust_pickle: unpickle a `.ckpt` that holds more than tensors and plain values.

    Raises:
        CheckpointError: there is no such checkpoint, it cannot be read, or `infer_target` does not fit it.
        ConfigError: `infer_target`, `device` or `precision` is not known here.
    """
    if infer_target not in ("auto", *ARCHITECTURES):
        own = import_class(infer_target, "infer_target", ("auto", *ARCHITECTURES))
        return CustomEncoder.from_checkpoint(own, _locate(ckpt), find_device(device))
    source = _locate(ckpt)
    try:
        with _quiet():
            if source.endswith(".ckpt"):
                model, tokenizer = _from_lightning(source, architecture, trust_pickle)
            else:
                model, tokenizer = _from_folder(source)
    except PipelineError:
        raise
    except Exception as error:
        if not Path(source).exists():
            remedy = "give a model folder, a .ckpt, a hub id or an MLflow URI"
            raise CheckpointError(f"ckpt: '{ckpt}' does not exist here or on the hub ({error}); {remedy}") from error
        # whatever a library raises on a broken checkpoint, the checkpoint is at fault
        raise CheckpointError(f"ckpt: '{ckpt}' cannot be loaded: {type(error).__name__}: {error}") from error
    found: str = model.config.model_type  # type: ignore[union-attr, assignment]
    if infer_target != "auto" and found not in ARCHITECTURES[infer_target]:
        expected = " or ".join(ARCHITECTURES[infer_target])
        raise CheckpointError(f"infer_target '{infer_target}' is for {expected}, but '{ckpt}' is {found}; use auto")
    return HuggingFaceEncoder(model, tokenizer, device, precision)


def describe(model: nn.Module, tokenizer: Any, prefix: str) -> dict[str, Any]:
    """What a `.ckpt` must hold under `DESCRIPTION` to be opened without the code that trained it.

    Args:
        model: the Hugging Face model, with or without a head.
        tokenizer: its tokenizer.
        prefix: what its parameters' names begin with in the checkpoint's `state_dict`, such as `model.`.
    """
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        files = {path.name: path.read_bytes().hex() for path in sorted(Path(folder).iterdir()) if path.is_file()}
    return {"config": json.dumps(model.config.to_dict()), "tokenizer": files, "prefix": prefix}  # type: ignore[union-attr, operator]


def _locate(ckpt: str) -> str:
    """The path or hub id behind `ckpt`."""
    if ckpt.startswith(("runs:/", "models:/")):
        from pipeline.tracking.mlflow import download

        return _model_in(download(ckpt), ckpt)
    if not ckpt:
        raise CheckpointError("ckpt: expected a model folder, a .ckpt, a hub id or an MLflow URI, found nothing")
    path = Path(ckpt).expanduser()
    if ckpt.endswith(".nemo"):
        raise CheckpointError(
            f"ckpt: '{ckpt}': .nemo archives are not read yet; export the model as a Hugging Face folder"
        )
    if path.is_dir():
        return _model_in(path, ckpt)
    if path.is_file():
        if path.suffix != ".ckpt":
            raise CheckpointError(f"ckpt: expected a model folder or a Lightning .ckpt, found the file '{ckpt}'")
        return str(path)
    matches = sorted(glob.glob(str(path)))  # noqa: PTH207  (an absolute pattern)
    if len(matches) == 1:
        return _locate(matches[0])
    if matches:
        raise CheckpointError(f"ckpt: expected one checkpoint, '{ckpt}' matches {len(matches)}; name one of them")
    if ckpt and HUB_ID.fullmatch(ckpt) and not ckpt.startswith(".") and not ckpt.endswith(".ckpt"):
        return ckpt
    raise CheckpointError(f"ckpt: '{ckpt}' does not exist; give a model folder, a .ckpt, a hub id or an MLflow URI")


def _model_in(folder: Path, ckpt: str) -> str:
    """The model folder or `.ckpt` at or below `folder`: MLflow keeps models a level or two down."""
    if folder.is_file() and folder.suffix == ".ckpt":
        return str(folder)
    if (folder / "config.json").is_file():
        return str(folder)
    candidates = [path.parent for path in folder.rglob("config.json")] + list(folder.rglob("*.ckpt"))
    if len(candidates) == 1:
        return str(candidates[0])
    found = "none" if not candidates else ", ".join(str(path.relative_to(folder)) for path in sorted(candidates))
    raise CheckpointError(f"ckpt: expected one config.json or .ckpt in '{ckpt}', found {found}")


def _from_folder(source: str) -> tuple[nn.Module, Any]:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    skeleton, options = _class_for(config)
    model, info = skeleton.from_pretrained(
        source,
        config=config,
        dtype=torch.float32,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
        **options,
    )
    encoder, name = _encoder_of(model)
    lacking = sorted(key for key in info["missing_keys"] if key.startswith(name))
    wrong = sorted(str(key) for key in info["mismatched_keys"])
    if lacking or wrong:
        raise CheckpointError(
            f"ckpt: '{source}' lacks weights of the encoder or has them in another shape: {(lacking + wrong)[:3]}"
        )
    return encoder, _tokenizer(source)


def _tokenizer(source: str) -> Any:
    from transformers import AutoTokenizer

    beside = Path(source).parent / "components" / "tokenizer"  # where MLflow's transformers flavour keeps it
    folder = str(beside) if beside.is_dir() else source
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:
        raise CheckpointError(f"ckpt: the tokenizer in '{folder}' cannot be loaded: {error}") from error


def _class_for(config: Any) -> tuple[Any, dict[str, Any]]:
    """The class to load, and its options: no decoder where there is such a class, no pooling layer."""
    import transformers

    encoders = {"t5": "T5EncoderModel", "mt5": "MT5EncoderModel", "umt5": "UMT5EncoderModel"}
    if config.model_type in encoders:
        return getattr(transformers, encoders[config.model_type]), {}
    skeleton: Any = transformers.AutoModel._model_mapping[type(config)]
    skeleton = skeleton[0] if isinstance(skeleton, (tuple, list)) else skeleton
    pooling = "add_pooling_layer" in inspect.signature(skeleton).parameters
    return skeleton, {"add_pooling_layer": False} if pooling else {}


def _encoder_of(model: Any) -> tuple[nn.Module, str]:
    """The encoder half of an encoder-decoder and its name within; any other model is its own encoder."""
    if not model.config.is_encoder_decoder or type(model).__name__.endswith("EncoderModel"):
        return model, ""
    encoder = model.get_encoder()
    return encoder, next(f"{name}." for name, module in model.named_modules() if module is encoder)


def _from_lightning(source: str, architecture: str | None, trust_pickle: bool) -> tuple[nn.Module, Any]:
    from transformers import AutoConfig

    stored = _read_ckpt(source, trust_pickle)
    state = {key.replace("_orig_mod.", ""): value for key, value in stored.get("state_dict", {}).items()}
    description = stored.get(DESCRIPTION)
    if description is None and architecture is None:
        remedy = "give the Hugging Face folder of its architecture and tokenizer with architecture=..."
        raise CheckpointError(f"ckpt: '{source}' does not say what model it holds; {remedy}")
    if architecture is not None:
        config, tokenizer, prefix = (
            AutoConfig.from_pretrained(architecture, trust_remote_code=False),
            _tokenizer(architecture),
            None,
        )
    else:
        assert description is not None
        config, tokenizer = _rebuild(description)
        prefix = description["prefix"].replace("_orig_mod.", "")
    skeleton, options = _class_for(config)
    with torch.random.fork_rng(devices=[]):
        encoder, name = _encoder_of(skeleton(config, **options))
    encoder.load_state_dict(_weights(encoder.float(), name, state, prefix, source))
    return encoder, tokenizer


def _rebuild(description: Mapping[str, Any]) -> tuple[Any, Any]:
    """The model configuration and the tokenizer in what `describe` wrote."""
    from transformers import AutoConfig

    with tempfile.TemporaryDirectory() as folder:
        for name, content in description["tokenizer"].items():
            (Path(folder) / Path(name).name).write_bytes(bytes.fromhex(content))
        (Path(folder) / "config.json").write_text(description["config"], encoding="utf-8")
        return AutoConfig.from_pretrained(folder), _tokenizer(folder)


def _read_ckpt(source: str, trust_pickle: bool) -> Any:
    import pickle

    try:
        return torch.load(source, map_location="cpu", weights_only=not trust_pickle)
    except pickle.UnpicklingError as error:
        remedy = "set trust_pickle=true if you trust whoever wrote it"
        raise CheckpointError(
            f"ckpt: '{source}' is damaged or holds more than tensors and plain values; {remedy}"
        ) from error


def _weights(
    encoder: nn.Module, name: str, state: Mapping[str, Tensor], prefix: str | None, source: str
) -> dict[str, Tensor]:
    """The encoder's weights in a checkpoint's `state_dict`, found by their names."""
    wanted = list(encoder.state_dict())
    first = name + wanted[0]
    prefixes = [key.removesuffix(first) for key in state if key.endswith(first)]
    heads = ("", f"{getattr(encoder, 'base_model_prefix', '')}.")
    if prefix is not None:
        prefixes = [known for known in prefixes if known in {prefix + head for head in heads}]
    fitting = [known for known in prefixes if all(known + name + key in state for key in wanted)]
    if len(fitting) != 1:
        found = f"several: {', '.join(map(repr, fitting))}" if fitting else "none"
        raise CheckpointError(
            f"ckpt: '{source}': expected one set of weights of a {type(encoder).__name__}, found {found}"
        )
    return {key: state[fitting[0] + name + key] for key in wanted}


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps transformers from drawing bars and load reports: what they would say is an error here, or harmless."""
    from transformers.utils import logging as hf_logging

    verbosity, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(verbosity)
        if bars:
            hf_logging.enable_progress_bar()
