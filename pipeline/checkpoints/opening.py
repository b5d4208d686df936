"""A `ckpt` string to an `Encoder`: a Hugging Face folder or hub id, a Lightning `.ckpt`, an MLflow URI.

Weights are read with safetensors or `weights_only=True`. Weights that a checkpoint lacks are an error: a library that
fills them in at random would have us measure noise.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.checkpoints.formats import Stored, open_stored
from pipeline.config.classes import encoder_class, import_class
from pipeline.encoders.companions import at_fault, checked_step, malformed, panics_as_errors, trainer_step
from pipeline.encoders.custom import CustomEncoder, class_name, no_layer
from pipeline.encoders.description import check_architecture, quiet
from pipeline.encoders.devices import find_device
from pipeline.encoders.huggingface import HuggingFaceEncoder
from pipeline.encoders.live import PLAIN, LiveModel
from pipeline.encoders.protocol import Encoder
from pipeline.encoders.source import code_digest
from pipeline.errors import CheckpointError, ConfigError, PipelineError

STEP = re.compile(r"(?:^|[^a-z])(?:step|checkpoint|ckpt|iter|iteration)[=_-]?(\d{1,18})(?!\.?\d)", re.IGNORECASE)
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def expand(ckpt: str) -> list[str]:
    """The checkpoints that a list or a pattern names: `a,b`, `run/step=*.ckpt`, `run/step={300,600}.ckpt`.

    What a pattern finds is in the order of the numbers in the names. What is not a pattern is left as it is.

    Raises:
        CheckpointError: a pattern finds nothing.
    """
    if Path(ckpt).expanduser().exists():
        return [ckpt]
    found: list[str] = []
    for one in _alternatives(ckpt):
        pattern = glob.has_magic(one) and not Path(one).expanduser().exists()
        matches = [one]
        if pattern:
            every = glob.glob(str(Path(one).expanduser()), recursive=True)  # noqa: PTH207
            matches = [path for path in every if path.endswith(".ckpt") or Path(path).is_dir()]
        if not matches:
            raise CheckpointError(f"ckpt: no checkpoint matches '{one}'")
        found += sorted(matches, key=lambda name: [(len(part), part) for part in re.split(r"(\d+)", name)])
    return list(dict.fromkeys(found))


def _alternatives(ckpt: str) -> list[str]:
    """The entries of a list, with braces written out."""
    parts = [part.strip() for part in re.split(r",(?![^{]*\})", ckpt) if part.strip()]
    if not re.search(r"\{[^{}]*\}", ckpt):
        return parts or [ckpt]
    from braceexpand import braceexpand

    return [one for part in parts for one in (braceexpand(part) if re.search(r"\{[^{}]*\}", part) else [part])]


def step_of(ckpt: str, encoder: Encoder) -> int | None:
    """The training step of a checkpoint: as it says itself, as Hugging Face's trainer wrote it, or as its name says."""
    said = getattr(encoder, "step", None)
    if said is not None:
        try:
            return checked_step(said, f"ckpt: '{ckpt}': global_step")
        except ValueError as error:
            raise CheckpointError(str(error)) from error
    written = trainer_step(Path(ckpt).expanduser())
    if written is not None:
        return written
    named = STEP.search(Path(ckpt).name)
    return int(named[1]) if named else None


def name_of(ckpt: str) -> str:
    """What a checkpoint is called: the last part of a path, or an MLflow URI without its scheme."""
    place = re.sub(r"^\w+:/+", "", ckpt).rstrip("/")
    return (place if place != ckpt.rstrip("/") else Path(place).name).removesuffix(".ckpt") or "checkpoint"


def with_step(name: str, step: int | None) -> str:
    """The name with its step in front, where it does not say it: long names are cut in the UI."""
    said = STEP.search(name)
    return name if step is None or (said and int(said[1]) == step) else f"step={step} {name}"


def names_of(ckpts: Sequence[str]) -> list[str]:
    """What several are called, told apart by their folders where names repeat."""
    names = [name_of(ckpt) for ckpt in ckpts]
    if len(set(names)) == len(names):
        return names
    parts = [Path(ckpt.removesuffix(".ckpt")).parts for ckpt in ckpts]
    shared = next(place for place in range(max(map(len, parts))) if len({part[: place + 1] for part in parts}) > 1)
    return ["/".join(part[shared:]) for part in parts]


def open_encoder(
    ckpt: str,
    infer_target: str = "auto",
    device: str = "auto",
    precision: str = "auto",
    architecture: str | None = None,
    trust_pickle: bool = False,
    layer: int | None = None,
    model_factory: str | None = None,
) -> Encoder:
    """The encoder in a stored checkpoint.

    Args:
        ckpt: a Hugging Face folder or hub id, a Lightning `.ckpt`, or an MLflow URI (`runs:/`, `models:/`).
        infer_target: `auto`, a short name that the architecture must agree with, or the path of an encoder class.
        device: `auto`, `cpu`, `cuda`, `cuda:1` or `mps`.
        precision: `auto`, `fp32`, `bf16` or `fp16`.
        architecture: for a `.ckpt` that does not describe itself, the Hugging Face folder or id that does.
        trust_pickle: unpickle a `.ckpt` as it is, with the code that it names.
        layer: the hidden states to take; None for the last. See `HuggingFaceEncoder`.
        model_factory: the path of a class or function of the user's that makes the `nn.Module` that the weights are of;
            called with the stored configuration. The module is then looked at as one in training is; see `LiveModel`.

    Raises:
        CheckpointError: there is no such checkpoint, it cannot be read, or `infer_target` does not fit it.
        ConfigError: `infer_target`, `device`, `precision`, `layer` or `model_factory` is not known here.
    """
    own = encoder_class(infer_target)
    factory = import_class(model_factory, "model_factory", ()) if model_factory else None
    if factory is not None and not callable(factory):
        raise ConfigError(f"model_factory: expected a class or a function, found a {type(factory).__name__}")
    if own is not None:
        if factory is not None:
            raise ConfigError("give a class of your own in infer_target, or model_factory, not both")
        no_layer(layer, infer_target)
        return CustomEncoder.from_checkpoint(own, _locate(ckpt), find_device(device))
    source = _locate(ckpt)
    encoder: HuggingFaceEncoder | CustomEncoder
    try:
        with quiet(), panics_as_errors():
            stored = open_stored(source, architecture, trust_pickle, factory)
            if factory is not None:
                encoder = _encoder_of_module(stored, infer_target, device, precision, layer, factory)
    except PipelineError:
        raise
    except Exception as error:
        if not Path(source).exists():
            remedy = "give a model folder, a .ckpt, a hub id or an MLflow URI"
            raise CheckpointError(f"ckpt: '{ckpt}' does not exist here or on the hub ({error}); {remedy}") from error
        # whatever a library raises on a broken checkpoint, the checkpoint is at fault
        found = malformed(Path(source)) or f"{type(error).__name__}: {error}"
        raise CheckpointError(f"ckpt: '{ckpt}' cannot be loaded: {found}") from error
    if factory is None:
        with at_fault(f"ckpt: '{ckpt}'", Path(source)):
            check_architecture(infer_target, str(stored.model.config.model_type), f"'{ckpt}'")  # type: ignore[union-attr]
            encoder = HuggingFaceEncoder(stored.model, stored.tokenizer, device, precision, layer=layer)
    encoder.made_with, encoder.step = stored.made_with, stored.step
    return encoder


def _encoder_of_module(
    stored: Stored, infer_target: str, device: str, precision: str, layer: int | None, factory: Any
) -> HuggingFaceEncoder | CustomEncoder:
    """The encoder of a module that the user's code made: found as it is in a training."""
    module = stored.model.to(find_device(device)).eval()
    code = code_digest(factory)
    maker = None if code is None else f"{class_name(factory)} {code}"
    live = LiveModel(module, infer_target, stored.tokenizer, mode=PLAIN, maker=maker)
    return live.encoder(module, "auto", precision, layer=layer)


def _locate(ckpt: str) -> str:
    """The path or hub id behind `ckpt`."""
    if ckpt.startswith(("runs:/", "models:/")):
        from pipeline.tracking.client import download

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
    several = expand(ckpt) if glob.has_magic(ckpt) or "," in ckpt else []
    if len(several) == 1 and several != [ckpt]:
        return _locate(several[0])
    if len(several) > 1:
        raise CheckpointError(f"ckpt: expected one checkpoint, '{ckpt}' names {len(several)}; open them one by one")
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
