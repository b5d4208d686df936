"""Stage 3: `Embeddings` to a `FittedHead`.

Every fit starts from a fresh head with its own seeds, so a score is a function of checkpoint, data and configuration.
The probe is fitted beside it. It is not stored: it takes a fraction of the head's time.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from pipeline.config.class_paths import import_class
from pipeline.config.task import LEVELS, Task
from pipeline.data.parts import Target
from pipeline.embed import Embeddings
from pipeline.encoders.code_digest import code_digest, no_reuse
from pipeline.errors import CacheError
from pipeline.heads.architectures import Head, standard_head
from pipeline.heads.fit import Losses, SeedHead, fit, steps_of
from pipeline.heads.probe import Probe, fit_probe
from pipeline.heads.threads import threads_of
from pipeline.load import Examples
from pipeline.statistics.metrics import PROBE, metric_name
from pipeline.store.embedding_table import FORMAT, Store
from pipeline.store.temporary import temporary_folder

# The settings of a task that a fit depends on, beside the data.
FIT_SETTINGS = (
    "level",
    "batch_size",
    "num_epochs",
    "shuffle",
    "standardize",
    "optim",
    "patience",
    "val_fraction",
    "gradient_clip_val",
)


@dataclass(frozen=True)
class FittedHead:
    """The trained heads of a task.

    Attributes:
        heads: one for each seed; pictures and serving use the first.
        probe: the head in closed form beside them; None where the task wants none.
        notes: warnings for whoever reads the result.
    """

    heads: tuple[SeedHead, ...]
    probe: Probe | None = None
    notes: tuple[str, ...] = ()

    @property
    def head(self) -> Head:
        """The module of the first seed."""
        return self.heads[0].head

    @property
    def losses(self) -> list[float]:
        """Mean training loss of each epoch, of the first seed."""
        return self.heads[0].losses

    @property
    def val_losses(self) -> list[float]:
        """With `patience`, the loss on the validation examples after each epoch, of the first seed."""
        return self.heads[0].val_losses

    @property
    def reused(self) -> bool:
        """Whether all heads were read from the store."""
        return all(one.reused for one in self.heads)

    @property
    def metrics(self) -> dict[str, float]:
        """By name: the share of heads from the store, the mean steps of the optimizer, the probe's penalties."""
        penalties = self.probe.penalties if self.probe else {}
        chosen = {f"{metric_name(name)}{PROBE}_penalty": value for name, value in penalties.items() if value}
        reused, steps = ([getattr(one, name) for one in self.heads] for name in ("reused", "steps"))
        return {"reused": fmean(reused), "optimizer_steps": fmean(steps), **chosen}

    @property
    def curves(self) -> dict[str, list[float]]:
        """Losses of the first seed by name, one for each epoch."""
        curves = {"train_loss": self.losses, "val_loss": self.val_losses}
        return {name: losses for name, losses in curves.items() if losses}


def train_head(embeddings: Embeddings, store: Store, device: torch.device) -> FittedHead:
    """Trains a fresh head for each seed on the train part, or takes it from the store where that was done before.

    The probe is fitted to the same embeddings.

    Raises:
        ConfigError: the optimizer's name or options are not valid.
        DataError: the loss is no longer a finite number.
        CacheError: the head cannot be stored.
    """
    task = embeddings.examples.task
    heads = fit_seeds(embeddings, task.seeds, store, device)
    return fitted_head(task, heads, fit_probe(embeddings) if task.probe != "none" else None)


def fitted_head(task: Task, heads: Sequence[SeedHead], probe: Probe | None) -> FittedHead:
    """The heads of all seeds of a task and its probe, with what there is to say of them."""
    notes = (no_reuse(type(heads[0].head), "heads are trained"),) if code_of_head(task) is None else ()
    return FittedHead(tuple(heads), probe, notes + (probe.notes if probe else ()))


def fit_seeds(embeddings: Embeddings, seeds: Sequence[int], store: Store, device: torch.device) -> list[SeedHead]:
    """The heads of some seeds of a task. Raises what `train_head` does."""
    task, targets = embeddings.examples.task, embeddings.examples.targets
    with _as_trained_alone(device):
        heads = [_fresh(task, seed, embeddings.table.hidden_size, targets, device) for seed in seeds]
        paths = head_paths(embeddings.examples, embeddings.key if embeddings.reusable else None, heads[0], seeds, store)
        found = [_restore(head, path) for head, path in zip(heads, paths, strict=True)]
        missing = [index for index, losses in enumerate(found) if losses is None]
        trained = dict[int, Losses]()
        if missing:
            fitted = fit([heads[i] for i in missing], [seeds[i] for i in missing], embeddings, device)
            trained = dict(zip(missing, fitted, strict=True))
        for index, losses in trained.items():
            _keep(heads[index], losses, paths[index])
    result = []
    for index, (seed, head, stored) in enumerate(zip(seeds, heads, found, strict=True)):
        curves = stored or trained[index]
        steps = steps_of(embeddings.examples, len(curves[0]))
        result.append(SeedHead(seed, head.eval(), *curves, steps, stored is not None))
    return result


def head_paths(
    examples: Examples, embeddings: str | None, head: Head, seeds: Sequence[int], store: Store
) -> list[Path | None]:
    """Where the heads of some seeds are stored once they are trained.

    Args:
        examples: what they are trained on.
        embeddings: the key of their embeddings; None where these are not stored.
        head: one of them, on its device.
        seeds: of the heads.
        store: where they would be.

    Returns:
        A path for each; None for heads that are not stored, as their embeddings or their code will not be known again.
    """
    code = code_of_head(examples.task)
    if embeddings is None or code is None:
        return [None] * len(seeds)
    folder, threads = store.root.expanduser() / "heads", threads_of(head, examples)
    device = next(head.parameters()).device
    keys = [head_key(examples, embeddings, seed, code, device, threads) for seed in seeds]
    return [folder / f"{key}.safetensors" for key in keys]


@contextmanager
def _as_trained_alone(device: torch.device) -> Iterator[None]:
    """Modes and random states of the caller come back afterwards."""
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast(device.type, enabled=False),
        torch.random.fork_rng([device] if device.type == "cuda" else []),
    ):
        yield


@dataclass(frozen=True)
class PackedHead:
    """A `SeedHead` that can go to another process: in place of the module its state, on the CPU."""

    head: SeedHead
    state: dict[str, torch.Tensor]
    scale: Any

    @classmethod
    def of(cls, one: SeedHead) -> PackedHead:
        """Packs it."""
        state = {name: value.cpu() for name, value in one.head.state_dict().items()}
        return cls(replace(one, head=None), state, one.head.label_scale)  # type: ignore[arg-type]

    def unpacked(self, embeddings: Embeddings, device: torch.device) -> SeedHead:
        """The head of a task again, on a device."""
        examples = embeddings.examples
        with _as_trained_alone(device):
            head = _fresh(examples.task, self.head.seed, embeddings.table.hidden_size, examples.targets, device)
        head.load_state_dict(self.state)
        head.label_scale = self.scale
        return replace(self.head, head=head.eval())


def _fresh(task: Task, seed: int, hidden_size: int, targets: tuple[Target, ...], device: torch.device) -> Head:
    torch.manual_seed(seed)  # for layers of a user's own head
    return make_head(replace(task, random_seed=seed), hidden_size, targets, device)


def make_head(task: Task, hidden_size: int, targets: tuple[Target, ...], device: torch.device) -> Head:
    """The head for a task on a device, with fresh weights from its seed."""
    outputs = [target.outputs for target in targets]
    own = import_class(task.head, "class", LEVELS) if task.head else None
    head: Head = own(hidden_size, outputs) if own else standard_head(task.level, hidden_size, outputs)
    head = head.to(device)
    head.reset(task.random_seed)
    return head


def code_of_head(task: Task) -> str | None:
    """A digest of the code of a user's own head; None where it cannot be known, empty for a head of this project."""
    return code_digest(import_class(task.head, "class", LEVELS)) if task.head else ""


def head_key(
    examples: Examples, embeddings: str, seed: int, code: str | None, device: torch.device, threads: int
) -> str:
    """A digest of everything that the fit of a head depends on.

    Other seeds of the task count only where they draw what is held out: a task of more heads reuses those that are
    there.

    Args:
        examples: what it is trained on.
        embeddings: the key of their embeddings.
        seed: of the head.
        code: see `code_of_head`.
        device: where it is trained.
        threads: that train it.
    """
    task = examples.task
    parts: dict[str, Any] = {
        "format": FORMAT,
        "embeddings": embeddings,
        "train": examples.train.digest,
        "val": examples.val.digest if examples.val else None,
        "targets": [(target.outputs, target.classes is None, target.weights) for target in examples.targets],
        "fit": [getattr(task, name) for name in FIT_SETTINGS],
        "seed": seed,
        "held out by": task.random_seed if task.patience is not None and examples.val is None else None,
        "head": task.head and [task.head, code],
        "machine": [device.type, threads, torch.get_float32_matmul_precision(), torch.__version__],
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:32]


def _restore(head: Head, path: Path | None) -> Losses | None:
    """Loads a stored head; None if there is none that can be read."""
    if path is None:
        return None
    try:
        with safe_open(path, framework="pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            losses, val_losses = json.loads(file.metadata()["losses"])
            scale = json.loads(file.metadata()["scale"])
        shapes = {name: value.shape for name, value in head.state_dict().items()}
        if {name: value.shape for name, value in state.items()} != shapes:
            return None
        head.load_state_dict(state)
        head.label_scale = scale and [(mean, deviation) for mean, deviation in scale]
    except (OSError, SafetensorError, KeyError, ValueError, RuntimeError):
        return None
    return losses, val_losses


def _keep(head: Head, losses: Losses, path: Path | None) -> None:
    if path is None:
        return
    state = {name: value.cpu().contiguous() for name, value in head.state_dict().items()}
    try:
        with temporary_folder(path.parent) as folder:
            metadata = {"losses": json.dumps(losses), "scale": json.dumps(head.label_scale)}
            save_file(state, folder / path.name, metadata=metadata)
            (folder / path.name).replace(path)
    except (OSError, SafetensorError) as error:
        raise CacheError(f"store: '{path.parent}' cannot be written ({error}); set store to another folder") from error
