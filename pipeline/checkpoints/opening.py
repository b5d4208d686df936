"""A `ckpt` string to an `Encoder`: a folder or file in one of `FORMATS`, a hub id, an MLflow URI.

Weights are read with safetensors or `weights_only=True`. Weights that a checkpoint lacks are an error: a library that
fills them in at random would have us measure noise.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from pipeline.checkpoints.accelerate import ACCELERATE
from pipeline.checkpoints.bare import BARE
from pipeline.checkpoints.deepspeed import DEEPSPEED
from pipeline.checkpoints.distributed import DISTRIBUTED
from pipeline.checkpoints.folder import FOLDER
from pipeline.checkpoints.lightning import LIGHTNING
from pipeline.checkpoints.names import SUFFIXES, expand
from pipeline.checkpoints.nemo import NEMO
from pipeline.checkpoints.peft import PEFT
from pipeline.checkpoints.stored import Format, Stored
from pipeline.config.class_paths import encoder_class, import_class
from pipeline.encoders.checks import malformed
from pipeline.encoders.code_digest import class_name, code_digest
from pipeline.encoders.custom import CustomEncoder, no_layer
from pipeline.encoders.description import check_architecture, quiet
from pipeline.encoders.devices import find_device
from pipeline.encoders.huggingface import HuggingFaceEncoder
from pipeline.encoders.internals import panics_as_errors
from pipeline.encoders.live import PLAIN, LiveModel
from pipeline.encoders.options import EncoderOptions
from pipeline.encoders.protocol import Encoder
from pipeline.encoders.weights import check_finite
from pipeline.errors import CheckpointError, ConfigError, PipelineError

FORMATS = (PEFT, DEEPSPEED, FOLDER, NEMO, ACCELERATE, DISTRIBUTED, LIGHTNING)  # the first that holds a path reads it
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
SERVERS = ("runs:/", "models:/")
REMEDY = "give a model folder, a file of weights, a hub id or an MLflow URI"


def open_encoder(ckpt: str, options: EncoderOptions = EncoderOptions()) -> Encoder:
    """The encoder in a stored checkpoint.

    Args:
        ckpt: a folder or file in one of `FORMATS`, a hub id, or an MLflow URI (`runs:/`, `models:/`).
        options: how it is opened. The module that a `model_factory` makes is treated as a module in training; see
            `LiveModel`.

    Raises:
        CheckpointError: there is no such checkpoint, it cannot be read, or `infer_target` does not fit it.
        ConfigError: `infer_target`, `device`, `precision`, `layer` or `model_factory` is not known here.
    """
    own, factory = encoder_class(options.infer_target), _factory(options.model_factory)
    if own is not None:
        if factory is not None:
            raise ConfigError("give a class of your own in infer_target, or model_factory, not both")
        no_layer(options.layer, options.infer_target)
        custom = CustomEncoder.from_checkpoint(own, _locate(ckpt)[1], find_device(options.device))
        return custom.with_pooling(options.pooling)
    stored_as, source = _locate(ckpt)
    with _at_fault(ckpt, source):
        stored = stored_as.read(source, options, factory)
        if not isinstance(stored, Stored):
            return stored
        check_finite(stored.model, ckpt)
        if stored.factory is not None:
            encoder: Encoder = _of_module(stored, options)
        else:
            check_architecture(options.infer_target, str(stored.model.config.model_type), f"'{ckpt}'")  # type: ignore[union-attr]
            encoder = HuggingFaceEncoder(stored.model, stored.tokenizer, options)
    encoder.made_with, encoder.step = stored.made_with, stored.step
    return encoder


def refuse_missing(ckpt: str) -> None:
    """Raises CheckpointError for a name that is no file or folder here, and no hub id or URI by its form."""
    if not Path(ckpt).expanduser().exists() and not ckpt.startswith(SERVERS):
        _locate(ckpt)


def _factory(path: str | None) -> Any:
    """The user's class or function of that path; None where none is named."""
    if not path:
        return None
    factory = import_class(path, "model_factory", ())
    if not callable(factory):
        raise ConfigError(f"model_factory: expected a class or a function, found a {type(factory).__name__}")
    return factory


def _of_module(stored: Stored, options: EncoderOptions) -> Encoder:
    """The encoder of a module that code of its own made: found as it is in a training."""
    factory = stored.factory
    module = stored.model.to(find_device(options.device)).eval()
    code = code_digest(factory)
    maker = None if code is None else f"{class_name(factory)} {code}"
    live = LiveModel(module, options.infer_target, stored.tokenizer, mode=PLAIN, maker=maker)
    return live.encoder(module, replace(options, device="auto"))


@contextmanager
def _at_fault(ckpt: str, source: str) -> Iterator[None]:
    """Turns whatever a library raises into a CheckpointError: a broken checkpoint may have it raise anything."""
    try:
        with quiet(), panics_as_errors():
            yield
    except PipelineError:
        raise
    except Exception as error:
        if not Path(source).exists():
            raise CheckpointError(f"ckpt: '{ckpt}' does not exist here or on the hub ({error}); {REMEDY}") from error
        found = malformed(Path(source)) or f"{type(error).__name__}: {error}"
        if isinstance(error, UnpicklingError):  # the library's words end in advice to run what the file holds
            found = "a file of weights holds other things than tensors, whose code is not run"
        raise CheckpointError(f"ckpt: '{ckpt}' cannot be loaded: {found}") from error


def _locate(ckpt: str) -> tuple[Format, str]:
    """The format of a checkpoint, and its path or hub id."""
    if ckpt.startswith(SERVERS):
        from pipeline.tracking.client import download

        return _found_in(download(ckpt), ckpt)
    if not ckpt:
        raise CheckpointError(f"ckpt: expected a checkpoint, found nothing; {REMEDY}")
    path = Path(ckpt).expanduser()
    if path.exists():
        return _found_in(path, ckpt)
    several = expand(ckpt) if glob.has_magic(ckpt) or "," in ckpt else []
    if len(several) == 1 and several != [ckpt]:
        return _locate(several[0])
    if len(several) > 1:
        raise CheckpointError(f"ckpt: expected one checkpoint, '{ckpt}' names {len(several)}; open them one by one")
    if HUB_ID.fullmatch(ckpt) and not ckpt.startswith(".") and not ckpt.endswith(SUFFIXES):
        return FOLDER, ckpt
    raise CheckpointError(f"ckpt: '{ckpt}' does not exist; {REMEDY}")


def _found_in(path: Path, ckpt: str) -> tuple[Format, str]:
    """The format and place of the only checkpoint at `path` or below it: MLflow keeps models a level or two down."""
    if path.is_file():
        stored_as = next((one for one in (*FORMATS, BARE) if one.holds(path)), None)
        if stored_as is None:
            raise CheckpointError(f"ckpt: expected a model folder or a file of weights, found the file '{ckpt}'")
        return stored_as, str(path)
    found: dict[Path, Format] = {}
    for place in (path, *sorted(path.rglob("*"))):
        if found.keys().isdisjoint(place.parents):
            found.update((place, stored_as) for stored_as in reversed(FORMATS) if stored_as.holds(place))
    if len(found) != 1:
        names = ", ".join(str(place.relative_to(path)) for place in found) or "none"
        raise CheckpointError(f"ckpt: expected one checkpoint in '{ckpt}', found {names}")
    place, stored_as = found.popitem()
    return stored_as, str(place)
