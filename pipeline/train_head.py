"""Stage 3: `Embeddings` to a `FittedHead`.

Every fit starts from a fresh head with its own seeds, so a score is a function of checkpoint, data and configuration.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from pipeline.config.classes import import_class
from pipeline.config.schema import LEVELS, Task
from pipeline.embed import Embeddings
from pipeline.encoders.source import code_digest, no_reuse
from pipeline.errors import CacheError
from pipeline.heads.architectures import MLP, ConvNet, Head
from pipeline.heads.fit import Losses, fit, groups
from pipeline.load import Target
from pipeline.store.embedding_table import FORMAT, Store
from pipeline.store.temporary import temporary_folder

# The settings of a task that a fit depends on, beside the data.
FIT_SETTINGS = (
    "level",
    "batch_size",
    "num_epochs",
    "shuffle",
    "random_seed",
    "optim",
    "patience",
    "val_fraction",
    "gradient_clip_val",
)


@dataclass(frozen=True)
class FittedHead:
    """A trained head, in evaluation mode.

    Attributes:
        head: the module.
        losses: mean training loss of each epoch.
        held_losses: with `patience`, the loss on the held-out part after each epoch.
        reused: whether it was read from the store: same embeddings, labels, settings, device, threads and torch.
        notes: warnings for whoever reads the result.
    """

    head: Head
    losses: list[float]
    held_losses: list[float]
    reused: bool
    notes: tuple[str, ...] = ()


def train_head(embeddings: Embeddings, store: Store, device: torch.device) -> FittedHead:
    """Trains a fresh head on the train part, or takes it from the store where the same one was trained before.

    Raises:
        ConfigError: the optimiser's name or options are not valid.
        DataError: the loss is no longer a finite number.
        CacheError: the head cannot be stored.
    """
    return next(train_heads([embeddings], store, device))


def train_heads(embeddings: Sequence[Embeddings], store: Store, device: torch.device) -> Iterator[FittedHead]:
    """As `train_head` for each task, in order; MLPs that take the same steps are trained at once.

    Those are heads of one shape for as many rows: other seeds, learning rates or targets of the same data, say.
    """
    with _isolated(device):
        heads = [_fresh(one, device) for one in embeddings]
    waiting, fitted = iter(groups(heads, embeddings)), dict[int, FittedHead]()
    for place in range(len(embeddings)):
        if place not in fitted:  # then it is the first of the next group
            group = next(waiting)
            with _isolated(device):
                found = _train([heads[one] for one in group], [embeddings[one] for one in group], store, device)
            fitted.update(zip(group, found, strict=True))
        yield fitted.pop(place)


def _fresh(embeddings: Embeddings, device: torch.device) -> Head:
    examples = embeddings.examples
    torch.manual_seed(examples.task.random_seed)  # for layers of a user's own head
    return make_head(examples.task, embeddings.table.hidden_size, examples.targets, device)


def _train(
    heads: Sequence[Head], embeddings: Sequence[Embeddings], store: Store, device: torch.device
) -> list[FittedHead]:
    codes = [_code(one.examples.task) for one in embeddings]
    kept = None not in codes and all(one.reusable for one in embeddings)
    paths = _paths(embeddings, codes, store, device) if kept else []
    known = [_restore(head, path) for head, path in zip(heads, paths, strict=kept)]
    if kept and all(losses is not None for losses in known):
        return [FittedHead(h.eval(), *losses, reused=True) for h, losses in zip(heads, known, strict=True) if losses]
    seed = embeddings[0].examples.task.random_seed
    if len(heads) > 1:  # some may have been restored
        for head, one in zip(heads, embeddings, strict=True):
            head.reset(one.examples.task.random_seed)
    torch.manual_seed(seed)  # for what a user's own head draws
    found = fit(heads, embeddings, device)
    for head, losses, path in zip(heads, found, paths, strict=kept):
        _keep(head, losses, path)
    fitted = [FittedHead(head.eval(), *losses, reused=False) for head, losses in zip(heads, found, strict=True)]
    return [
        one if code is not None else replace(one, notes=(no_reuse(type(one.head), "heads are trained"),))
        for one, code in zip(fitted, codes, strict=True)
    ]


def _paths(
    embeddings: Sequence[Embeddings], codes: Sequence[str | None], store: Store, device: torch.device
) -> list[Path]:
    """Where heads that are trained at once are kept."""
    keys = [_key(one, code, device) for one, code in zip(embeddings, codes, strict=True)]
    if len(keys) > 1:  # what is trained at once agrees to rounding alone with what is trained by itself
        keys = [hashlib.sha256(f"{key} of {sorted(keys)}".encode()).hexdigest()[:32] for key in keys]
    return [store.root.expanduser() / "heads" / f"{key}.safetensors" for key in keys]


def make_head(task: Task, hidden_size: int, targets: tuple[Target, ...], device: torch.device) -> Head:
    """The head for a task on a device, with fresh weights from its seed."""
    outputs = [target.outputs for target in targets]
    head: Head
    if task.head:
        head = import_class(task.head, "class", LEVELS)(hidden_size, outputs)
    else:
        head = ConvNet(hidden_size, outputs) if task.level == "token" else MLP(hidden_size, outputs[0])
    head = head.to(device)
    head.reset(task.random_seed)
    return head


@contextmanager
def _isolated(device: torch.device) -> Iterator[None]:
    """Gradients on and autocast off, whatever the caller's modes; they and the random states are back afterwards."""
    gpus = [device] if device.type == "cuda" else []
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast(device.type, enabled=False),
        torch.random.fork_rng(gpus),
    ):
        yield


def _code(task: Task) -> str | None:
    """The digest of a user's own head's code; empty where the head is none, None where the code cannot be known."""
    return code_digest(import_class(task.head, "class", LEVELS)) if task.head else ""


def _key(embeddings: Embeddings, code: str | None, device: torch.device) -> str:
    """Changes with anything that a fit depends on."""
    task, examples = embeddings.examples.task, embeddings.examples
    what: dict[str, Any] = {
        "format": FORMAT,
        "embeddings": embeddings.key,
        "train": examples.train.digest,
        "val": examples.val.digest if examples.val else None,
        "targets": [(target.outputs, target.classes is None, target.weights) for target in examples.targets],
        "fit": [getattr(task, name) for name in FIT_SETTINGS],
        "head": task.head and [task.head, code],
        "machine": [device.type, torch.get_num_threads(), torch.get_float32_matmul_precision(), torch.__version__],
    }
    return hashlib.sha256(json.dumps(what, sort_keys=True, default=str).encode()).hexdigest()[:32]


def _restore(head: Head, path: Path) -> Losses | None:
    """Loads a stored head; None if there is none, or one that cannot be read."""
    try:
        with safe_open(path, framework="pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            losses, held_losses = json.loads(file.metadata()["losses"])
        shapes = {name: value.shape for name, value in head.state_dict().items()}
        if {name: value.shape for name, value in state.items()} != shapes:
            return None
        head.load_state_dict(state)
    except (OSError, SafetensorError, KeyError, ValueError, RuntimeError):
        return None
    return losses, held_losses


def _keep(head: Head, losses: Losses, path: Path) -> None:
    state = {name: value.cpu().contiguous() for name, value in head.state_dict().items()}
    try:
        with temporary_folder(path.parent) as folder:
            save_file(state, folder / path.name, metadata={"losses": json.dumps(losses)})
            (folder / path.name).replace(path)
    except (OSError, SafetensorError) as error:
        raise CacheError(f"store: '{path.parent}' cannot be written ({error}); set store to another folder") from error
