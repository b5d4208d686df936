"""Says what is installed, which device there is, whether store and tracker work, and what a measurement will cost."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

import torch
from packaging.requirements import Requirement

from pipeline.checkpoints.names import expand
from pipeline.checkpoints.opening import open_encoder
from pipeline.command.cost import Cost, estimate
from pipeline.command.head_cost import HeadCost
from pipeline.config.schema import Config
from pipeline.config.shipped import ROOT
from pipeline.config.yaml_file import read_config
from pipeline.encoders.devices import find_device, find_precision
from pipeline.encoders.options import EncoderOptions
from pipeline.encoders.protocol import Encoder
from pipeline.errors import ConfigError, PipelineError
from pipeline.load import Examples, load_all
from pipeline.store.embedding_table import Store
from pipeline.store.temporary import nearest
from pipeline.validation import check

NAME = "downstream-validation"
SHOWN = ("torch", "transformers", "mlflow", "pyarrow", "pandas", "scikit-learn")


@dataclass
class Findings:
    """What was found.

    Attributes:
        lines: in words, to print.
        content: the same for scripts.
        problems: what does not work, with the remedy; also among the lines.
    """

    lines: list[str] = field(default_factory=list)
    content: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def say(self, what: str, text: str) -> None:
        """Adds a line."""
        self.lines.append(f"{what:<14}{text}")

    def attempt(self, what: str, look: Callable[[], None]) -> None:
        """Calls `look`; what it raises is a problem: also a folder that is closed, or a GPU that is full."""
        try:
            look()
        except (PipelineError, OSError, RuntimeError) as error:
            lines = str(error).strip().splitlines() or ["no message"]
            own = isinstance(error, PipelineError)
            for problem in error.args if own else [f"{what}: {type(error).__name__}: {lines[0]}"]:
                self.problems.append(problem)
                self.say(what, f"PROBLEM: {problem}")


def examine(ckpt: str, config: str, overrides: str = "", tracking_uri: str = "", quick: bool = False) -> Findings:
    """Looks at everything that a measurement needs, without making one; nothing is written.

    Args:
        ckpt: see `open_encoder`; of several, the first is looked at.
        config: a YAML file.
        overrides: see `read_config`.
        tracking_uri: by default MLflow's current one.
        quick: leaves out checkpoint, data and cost, for which some batches are timed.
    """
    found, read = Findings(), list[Config]()
    found.attempt("packages", lambda: _packages(found))
    found.say("sample", f"{ROOT}/sample, configurations in {ROOT}/configs")
    found.attempt("configuration", lambda: read.append(_configuration(found, config, overrides)))
    if read:
        found.attempt("device", lambda: _device(found, read[0]))
        found.attempt("store", lambda: _store(found, read[0]))
    found.attempt("tracker", lambda: _tracker(found, tracking_uri))
    if read and not quick:
        here = read[0] if read[0].engine == "local" else replace(read[0], device="auto")  # workers have their own
        _measurement(found, ckpt, here)
    found.content["problems"] = found.problems
    return found


def _packages(found: Findings) -> None:
    """The versions of what is installed, extras too. Raises ConfigError for what is not as the package wants it."""
    found.content["versions"] = {"python": platform.python_version()}
    try:
        wanted = [Requirement(line) for line in requires(NAME) or []]
        found.content["versions"][NAME] = version(NAME)
    except PackageNotFoundError:
        raise ConfigError(f"expected the installed package {NAME}, found its files alone; pip install it") from None
    always = [one for one in wanted if one.marker is None or one.marker.evaluate({"extra": ""})]
    versions = {one.name: _version(one.name) for one in always}
    found.content["versions"] |= versions
    shown = ", ".join(f"{name} {versions.get(name)}" for name in SHOWN)
    found.say("installed", f"{NAME} {version(NAME)}, python {platform.python_version()}, {shown}")
    names = {part for one in wanted if one.marker for part in str(one.marker).split('"') if part.isidentifier()}
    found.content["extras"] = {}
    for extra in sorted(names - {"docs", "extra", "test"}):
        members = [one for one in wanted if one not in always and one.marker and one.marker.evaluate({"extra": extra})]
        there = {one.name: _version(one.name) for one in members}
        found.content["extras"][extra] = there
        unfit = [f"{one.name}{one.specifier}" for one in members if not _fits(one, there)]
        remedy = f"; expected {', '.join(unfit)}: pip install -U '{NAME}[{extra}]'" if unfit else ""
        words = ", ".join(f"{name} {number}" if number else f"no {name}" for name, number in there.items())
        found.say(f"extra {extra}", f"{words}{remedy}")
    wrong = [one for one in always if not _fits(one, versions)]
    if wrong:
        what = ", ".join(f"{one.name} {versions[one.name] or 'missing'}" for one in wrong)
        raise ConfigError(f"expected {', '.join(map(str, wrong))}; found {what}; pip install -U {NAME}")


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _fits(wanted: Requirement, versions: Mapping[str, str | None]) -> bool:
    there = versions[wanted.name]
    return there is not None and wanted.specifier.contains(there, prereleases=True)


def _configuration(found: Findings, file: str, overrides: str) -> Config:
    config = read_config(file, overrides)
    check(config.dataset)
    found.say("configuration", f"{file}: {config.title}")
    found.content["config"] = file
    return config


def _device(found: Findings, config: Config) -> None:
    if config.engine != "local":
        if importlib.util.find_spec(config.engine) is None:
            raise ConfigError(f"engine: {config.engine} is not installed; pip install '{NAME}[{config.engine}]'")
        found.say("device", f"{config.device}, on the workers of engine {config.engine}, which are not asked here")
        found.content["device"] = {"device": config.device, "engine": config.engine}
        return
    device = find_device(config.device)
    precision = find_precision(config.precision, device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    threads = f", {torch.get_num_threads()} threads of {os.cpu_count()} processors" if device.type == "cpu" else ""
    found.say("device", f"{device} ({name}), {precision}{threads}")
    found.content["device"] = {"device": str(device), "name": name, "precision": precision}


def _store(found: Findings, config: Config) -> None:
    folder = Path(config.store).expanduser()
    there, can_be_written = nearest(folder)
    free = shutil.disk_usage(there).free
    found.content["store"] = {"folder": str(folder), "free_bytes": free}
    if not can_be_written:
        raise ConfigError(f"store: expected a folder that can be written, found '{there}'; set store to another folder")
    found.say("store", f"{folder}, {_size(free)} free")


def _tracker(found: Findings, uri: str) -> None:
    from pipeline.tracking.client import answer

    address, problem = answer(uri)
    found.content["tracker"] = {"tracking_uri": address, "answers": not problem}
    if problem:
        raise ConfigError(f"MLflow at '{address}' does not answer: {problem}; give --tracking-uri, or start the server")
    found.say("tracker", f"MLflow at {address} answers")


def _measurement(found: Findings, ckpt: str, config: Config) -> None:
    """The checkpoint, the data, and what measuring the one on the other will cost."""
    opened, examples = list[tuple[str, Encoder]](), list[Examples]()
    found.attempt("checkpoint", lambda: opened.append(_checkpoint(found, ckpt, config)))
    limit = opened[0][1].max_seq_length if opened else None
    found.attempt("data", lambda: examples.extend(load_all(config.dataset, limit)))
    if opened and examples:
        found.attempt("cost", lambda: _cost(found, *opened[0], examples, config))


def _checkpoint(found: Findings, ckpt: str, config: Config) -> tuple[str, Encoder]:
    first, *others = expand(ckpt)
    encoder = open_encoder(first, EncoderOptions.from_config(config))
    more = f", the first of {1 + len(others)}" if others else ""
    found.say("checkpoint", f"{first}{more}: {encoder.hidden_size} wide, {encoder.device} {encoder.precision}")
    return first, encoder


def _cost(found: Findings, ckpt: str, encoder: Encoder, examples: Sequence[Examples], config: Config) -> None:
    cost = estimate(examples, encoder, Store.from_config(config))
    found.content["cost"] = {"checkpoint": ckpt, **asdict(cost)}
    for line in _words(cost):
        found.say("cost", line)
    if config.baseline:
        found.say("cost", f"baseline   {config.baseline}: embedded too, the first time; that is not counted above")
    needed = cost.disk_bytes * (2 if config.baseline else 1)
    free = found.content.get("store", {}).get("free_bytes", needed)
    if needed > free:
        need = f"{_size(needed)} for the embeddings"
        raise ConfigError(f"store: expected {need}, found {_size(free)} free; set store to another disk")


def _words(cost: Cost) -> list[str]:
    parts = (f"{name}: {', '.join(f'{n} {part}' for part, n in parts.items())}" for name, parts in cost.rows.items())
    lines = [f"rows       {'; '.join(parts)}", f"sequences  {cost.sequences} distinct, {cost.stored} already stored"]
    if cost.tokens:
        lines.append(f"tokens     {cost.tokens:,} to embed")
    for what, costs in (("heads", cost.heads), ("baseline's", cost.baselines)):
        some = "; ".join(f"{name}: {_training(one)}" for name, one in costs.items())
        lines += [f"{what:<11}{some}"] if some else []
    timed = f" (from {cost.timed} of {cost.batches} batches)" if cost.seconds else ""
    time = f"about {cost.seconds or 0:.1f} s to embed{timed}, {cost.head_seconds:.1f} s to train heads"
    disk = [f"disk       {_size(cost.disk_bytes)}"] if cost.tokens else []
    return [*lines, f"time       {time}; probes and scores come on top", *disk]


def _training(cost: HeadCost) -> str:
    """`600 steps, 1.2 s, 1 already stored`."""
    there = f"{cost.stored} already stored" if cost.stored else ""
    steps = f"{cost.steps:,} steps, {cost.seconds:.1f} s" if cost.steps else ""
    return ", ".join(filter(None, (steps, there))) or "nothing to train"


def _size(number: float) -> str:
    """Bytes in words: `1.5 GB`."""
    units = ["bytes", "kB", "MB", "GB", "TB"]
    while number >= 1000 and len(units) > 1:
        number, units = number / 1000, units[1:]
    return f"{number:.0f} bytes" if units[0] == "bytes" else f"{number:.1f} {units[0]}"
