"""Which checkpoints a pattern names, what they are called, and the training steps that they are of."""

from __future__ import annotations

import glob
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.encoders.checks import json_object
from pipeline.encoders.protocol import Encoder
from pipeline.errors import CheckpointError

STEP = re.compile(r"(?:^|[^a-z])(?:step|checkpoint|ckpt|iter|iteration)[=_-]?(\d{1,18})(?!\.?\d)", re.IGNORECASE)
RANDOM_STATES = "random_states_*.pkl"  # in each folder of accelerate
COUNTED = re.compile(r"checkpoint_\d+")  # how accelerate names its folders, by a count of saves
MOST_STEPS = 2**63 - 1  # that trackers take
# Of files that hold a checkpoint; they are no part of its name.
SUFFIXES = (".ckpt", ".nemo", ".pt", ".pth", ".bin", ".safetensors")


def expand(ckpt: str) -> list[str]:
    """The checkpoints that a list or a pattern names: `a,b`, `run/step=*.ckpt`, `run/step={300,600}.ckpt`.

    The matches of a pattern are in the order of the numbers in their names. Other names stay as they are.

    Raises:
        CheckpointError: a pattern finds nothing.
    """
    if Path(ckpt).expanduser().exists():
        return [ckpt]
    found: list[str] = []
    for pattern in _alternatives(ckpt):
        path = Path(pattern).expanduser()
        matches = [pattern]
        if glob.has_magic(pattern) and not path.exists():
            every = glob.glob(str(path), recursive=True)  # noqa: PTH207
            kinds = {".ckpt", ".nemo", path.suffix if path.suffix in SUFFIXES else ".ckpt"}
            matches = [match for match in every if Path(match).suffix in kinds or Path(match).is_dir()]
        if not matches:
            raise CheckpointError(f"ckpt: no checkpoint matches '{pattern}'")
        found += sorted(matches, key=lambda name: [(len(part), part) for part in re.split(r"(\d+)", name)])
    return list(dict.fromkeys(found))


def _alternatives(ckpt: str) -> list[str]:
    """The entries of a list, with braces written out."""
    parts = [part.strip() for part in re.split(r",(?![^{]*\})", ckpt) if part.strip()]
    if not re.search(r"\{[^{}]*\}", ckpt):
        return parts or [ckpt]
    from braceexpand import braceexpand

    return [name for part in parts for name in (braceexpand(part) if re.search(r"\{[^{}]*\}", part) else [part])]


def step_of(ckpt: str, encoder: Encoder) -> int | None:
    """The training step in a checkpoint, in the file that Hugging Face's trainer wrote beside it, or in its name.

    `checkpoint_3` of accelerate is the fourth save, of whatever step: it has none.
    """
    if encoder.step is not None:
        return _checked(encoder.step, ckpt)
    written = _trainer_step(Path(ckpt).expanduser())
    if written is not None:
        return written
    return named_step(ckpt)


def named_step(ckpt: str) -> int | None:
    """The training step in a checkpoint's name, which is all that is known of one that cannot be opened."""
    named = None if _counts_saves(ckpt) else STEP.search(Path(ckpt).name)
    return int(named[1]) if named else None


def _counts_saves(ckpt: str) -> bool:
    """Whether the number in a name is accelerate's count of its saves, which is no training step.

    What is on a server cannot be looked into, and may be accelerate's.
    """
    remote = ckpt.startswith(("runs:/", "models:/"))
    return bool(COUNTED.fullmatch(Path(ckpt).name)) and (remote or any(Path(ckpt).expanduser().glob(RANDOM_STATES)))


def name_of(ckpt: str) -> str:
    """What a checkpoint is called: the last part of a path, or an MLflow URI without its scheme."""
    place = re.sub(r"^\w+:/+", "", ckpt).rstrip("/")
    name = place if place != ckpt.rstrip("/") else Path(place).name
    return without_suffix(name) or "checkpoint"


def with_step(name: str, step: int | None) -> str:
    """The name with its step in front, where it does not contain it: long names are cut in the UI."""
    named = STEP.search(name)
    return name if step is None or (named and int(named[1]) == step) else f"step={step} {name}"


def names_of(ckpts: Sequence[str]) -> list[str]:
    """What several checkpoints are called, told apart by their folders where names repeat."""
    names = [name_of(ckpt) for ckpt in ckpts]
    if len(set(names)) == len(names):
        return names
    parts = [Path(without_suffix(ckpt)).parts for ckpt in ckpts]
    shared = next(place for place in range(max(map(len, parts))) if len({part[: place + 1] for part in parts}) > 1)
    return ["/".join(part[shared:]) for part in parts]


def without_suffix(name: str) -> str:
    """The name of a checkpoint without that of a file's kind."""
    return name.removesuffix(next((suffix for suffix in SUFFIXES if name.endswith(suffix)), ""))


def _trainer_step(folder: Path) -> int | None:
    """The step in `trainer_state.json`, which Hugging Face's trainer writes last; None where there is no such file.

    Raises:
        CheckpointError: it holds no step: whoever wrote it was interrupted, and the weights may be of any step.
    """
    path = folder / "trainer_state.json"
    if not path.is_file():
        return None
    remedy = "; take another checkpoint, or delete the file: then the step is that in the folder's name"
    try:
        step = json_object(path).get("global_step")
    except ValueError as error:
        raise CheckpointError(f"ckpt: {error}{remedy}") from error
    return _checked(step, path, remedy)


def _checked(step: Any, where: object, remedy: str = "") -> int:
    """The step that a checkpoint holds. Raises CheckpointError if it is none."""
    if isinstance(step, bool) or not isinstance(step, int) or not 0 <= step <= MOST_STEPS:
        expected = "expected a whole number from 0 on"
        raise CheckpointError(f"ckpt: '{where}': global_step: {expected}, found {step!r:.60}{remedy}")
    return step
