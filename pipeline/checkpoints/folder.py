"""A Hugging Face model folder or hub id."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from pipeline.checkpoints.bare import by_name, dtype_of, opened_safetensors, read_index
from pipeline.checkpoints.remote_code import own_class
from pipeline.checkpoints.stored import FACTORY, Format, Stored, say_left_out
from pipeline.checkpoints.unpickle import StandIn, read_tensors
from pipeline.encoders.checks import TAKE_ITS_OWN, count_tensors
from pipeline.encoders.code_digest import class_name
from pipeline.encoders.description import class_for, encoder_of, load_tokenizer
from pipeline.encoders.options import EncoderOptions
from pipeline.encoders.weights import check_dtypes, check_unexpected, is_derived
from pipeline.errors import CheckpointError


def _holds(path: Path) -> bool:
    return (path / "config.json").is_file()


def _read(source: str, given: EncoderOptions, factory: Any) -> Stored:
    files = [path for kind in ("safetensors", "bin") for path in Path(source).glob(f"*.{kind}")]
    own = own_class(source, given.trust_remote_code, count_tensors(files))
    dtypes = _check_files(Path(source))
    factory = factory or own
    skeleton, options = _class_to_load(source, factory, sum(path.stat().st_size for path in files))
    options |= {"torch_dtype": torch.float32}  # as transformers 4 calls it; 5 takes it, too
    model, info = skeleton.from_pretrained(source, output_loading_info=True, ignore_mismatched_sizes=True, **options)
    if getattr(model, "hf_quantizer", None) is None:  # which reads scales
        check_dtypes(dtypes, source)
    encoder, name = encoder_of(model)
    lacking = sorted(key for key in info["missing_keys"] if key.startswith(name) and not is_derived(key, model))
    if lacking:
        raise CheckpointError(
            f"ckpt: '{source}' lacks weights of the encoder: {', '.join(lacking[:3])}; {TAKE_ITS_OWN}"
        )
    for key, found, expected in sorted(info["mismatched_keys"]):
        shapes = f"expected the shape {tuple(expected)}, found {tuple(found)}"
        raise CheckpointError(f"ckpt: '{source}': '{key}': {shapes}; {TAKE_ITS_OWN}")
    inside = _stored_under(info["unexpected_keys"], model)
    check_unexpected(encoder, inside, name, source, FACTORY)
    say_left_out([key for key in info["unexpected_keys"] if key not in inside], encoder)
    return Stored(model if factory else encoder, load_tokenizer(source, own is not None), factory=factory)


def _check_files(folder: Path) -> dict[str, torch.dtype]:
    """The dtypes of stored weights, by name.

    The library would say less of what is wrong with a file, and reads whatever file an index names.

    Raises:
        CheckpointError: a file of weights is damaged, not there, not in the folder, or holds other things.
    """
    found: dict[str, torch.dtype] = {}
    for path in _weight_files(folder):
        if path.suffix == ".safetensors":
            with opened_safetensors(path) as opened:
                found |= {name: dtype_of(opened.get_slice(name)) for name in opened.keys()}  # noqa: SIM118
            continue
        content = by_name(read_tensors(path, mapped=True), str(path))
        other = next((value for value in content.values() if isinstance(value, StandIn)), None)
        if other is not None:
            what = f"{type(other).__module__}.{type(other).__qualname__}"
            remedy = "save the weights alone, as safetensors"
            raise CheckpointError(f"ckpt: '{path}': expected tensors, found a {what}, whose code is not run; {remedy}")
        found |= {name: value.dtype for name, value in content.items() if isinstance(value, torch.Tensor)}
    return {name: dtype for name, dtype in found.items() if name.endswith("weight")}  # buffers may count


def _weight_files(folder: Path) -> list[Path]:
    """The files that transformers reads, which looks for them in this order."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).is_file():
            return [folder / name]
        if (folder / f"{name}.index.json").is_file():
            return sorted(set(read_index(folder / f"{name}.index.json").values()))
    return []


def _class_to_load(source: str, factory: Any, held: int) -> tuple[Any, dict[str, Any]]:
    """The class whose `from_pretrained` reads the folder, and its options."""
    from transformers import AutoConfig

    if factory is not None:
        if not hasattr(factory, "from_pretrained"):
            raise CheckpointError(
                f"model_factory: {class_name(factory)} has no from_pretrained(folder), for '{source}'"
            )
        return factory, {}
    config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    skeleton, options = class_for(config, held or None, source)
    return skeleton, {**options, "config": config}


def _stored_under(names: Iterable[str], model: Any) -> dict[str, None]:
    """Stored weights by their names within the base model; weights of heads are left out."""
    prefix = f"{model.base_model_prefix}."
    parts = {key.partition(".")[0] for key in model.state_dict()}
    inside = (name.removeprefix(prefix) for name in names)
    pairs = zip(inside, names, strict=True)
    return {key: None for key, name in pairs if name.startswith(prefix) or key.partition(".")[0] in parts}


FOLDER = Format(_holds, _read)
