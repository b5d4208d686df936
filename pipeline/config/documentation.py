"""The page that `python -m pipeline config --schema` prints: every key, made from the typed classes."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from typing import Any

from pipeline.config.background import Background
from pipeline.config.engine import Ray
from pipeline.config.line_numbers import SECTION
from pipeline.config.schema import Config
from pipeline.config.task import Files, MaxRows, Task
from pipeline.config.trackers import Logging
from pipeline.config.yaml_file import CLASSES, ENCODERS, RENAMED, UNUSED

# The policies of `heads.schedules`, which is not imported here because it imports torch.
POLICIES = """
WarmupPolicy WarmupHoldPolicy SquareAnnealing CosineAnnealing NoamAnnealing NoamHoldAnnealing WarmupAnnealing
InverseSquareRootAnnealing T5InverseSquareRootAnnealing SquareRootAnnealing PolynomialDecayAnnealing
PolynomialHoldDecayAnnealing
""".split()


def markdown() -> str:
    """Every key with its type, default and a line of explanation, as Markdown tables."""
    return "\n".join(_lines())


def _lines() -> Iterator[str]:
    yield from ("# Configuration", "", f"Keys of the section `{SECTION}` of a YAML file.", "")
    yield from ("This page is what `python -m pipeline config --schema` prints.", "")
    yield from _table("The section", Config)
    yield from _table("In the background: `background`", Background)
    yield from _table("On Ray: `ray`", Ray)
    yield from _table("Logging: `logging`", Logging)
    yield from _table("A task: `dataset`, or an entry of the list", Task)
    yield from _table("Files: `dataset.dataset`", Files)
    yield from _table("Most rows: `dataset.max_rows`", MaxRows)
    yield from ("## Other spellings", "", "| written | read as |", "| --- | --- |")
    for old, new in RENAMED.items():
        if old != "class":
            yield f"| `{old}` | `{new}` |"
    for name, short in {**CLASSES, **ENCODERS}.items():
        yield f"| `bionemo.….{name}` | `{short}` |"
    yield from ("", f"Accepted and not used: {', '.join(f'`{key}`' for key in sorted(UNUSED))}.", "")
    yield from ("## `optim`", "")
    yield "`name` is an optimiser of torch or pytorch_optimizer, in any case, with its own options. `fused_adam`,"
    yield "`megatron_fused_adam`, `distributed_fused_adam` and `mcore_distributed_optim` are torch's AdamW."
    yield ""
    yield "`sched.name` is a schedule of torch's, or a policy of NeMo's:"
    yield ""
    yield ", ".join(f"`{name}`" for name in POLICIES) + "."
    yield ""
    yield "Each takes the options that NeMo's takes, of these: `max_steps` (left out: the steps of the fit),"
    yield "`warmup_steps` or `warmup_ratio`, `hold_steps` or `hold_ratio`, `constant_steps` or `constant_ratio`,"
    yield "`min_lr`, `last_epoch` (-1), `d_model`, `decay_rate`, `power` and `cycle`. They step at each batch;"
    yield "`ExponentialLR` and `ReduceLROnPlateau` step at each epoch."


def _table(title: str, schema: type) -> Iterator[str]:
    yield from (f"## {title}", "", "| key | type | default | meaning |", "| --- | --- | --- | --- |")
    for field in dataclasses.fields(schema):
        if not field.metadata.get("hidden"):
            key = field.metadata.get("key", field.name)
            kind = str(field.type).replace("|", "or")
            yield f"| `{key}` | {kind} | {_default(field)} | {field.metadata['help']} |"
    yield ""


def _default(field: dataclasses.Field[Any]) -> str:
    assert field.default_factory is not dataclasses.MISSING
    value = field.default_factory()
    if value is None:
        return ""
    return "see below" if dataclasses.is_dataclass(value) else f"`{json.dumps(value)}`"
