"""Models whose class is in files beside their weights (`auto_map` in `config.json`): run where the user says so."""

from __future__ import annotations

import logging
from typing import Any

from pipeline.encoders.checks import read_configuration
from pipeline.errors import CheckpointError

KINDS = ("AutoModel", "AutoModelForMaskedLM", "AutoModelForCausalLM")  # the first that is there is run

logger = logging.getLogger(__name__)


def own_class(source: str, trusted: bool, tensors: int | None = None) -> Any:
    """The model's class in the code of a folder or hub id; None where it is one of transformers.

    Where transformers has a class for the type of the model, code is passed over unless it is trusted, with a warning.

    Args:
        source: the folder or hub id.
        trusted: import the code.
        tensors: how many tensors the weights are; see `check_configuration`.

    Raises:
        CheckpointError: the class is in code of its own, which is not trusted, or is no class of a model.
    """
    from transformers import CONFIG_MAPPING
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    config = read_configuration(source, tensors)
    named = config.get("auto_map") or {}
    if not named:
        return None
    if not isinstance(named, dict):
        raise CheckpointError(f"ckpt: '{source}': auto_map: expected the names of classes, found {named!r:.60}")
    known = config.get("model_type") in CONFIG_MAPPING
    kind = next((kind for kind in (*KINDS, *named) if kind in named and kind.startswith("AutoModel")), None)
    if known and not (trusted and kind):
        if kind:
            what = "is not run: the class of transformers is measured, which may be another model"
            logger.warning(
                "checkpoint  the code of '%s', %s, %s; trust_remote_code=true runs it", source, named[kind], what
            )
        return None
    if not trusted:
        what = ", ".join(sorted({str(path).partition(".")[0] + ".py" for path in named.values()}))
        remedy = "set trust_remote_code=true if you trust whoever wrote it"
        raise CheckpointError(f"ckpt: '{source}' is of a class of its own, in {what}, which is not run; {remedy}")
    if kind is None:
        raise CheckpointError(f"ckpt: '{source}': auto_map: expected an AutoModel, found {', '.join(named)}")
    logger.warning("checkpoint  the code of '%s' runs, as trust_remote_code says: %s", source, named[kind])
    return get_class_from_dynamic_module(str(named[kind]), source)
