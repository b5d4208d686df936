"""Stage 3: `Embeddings` to a `FittedHead`.

Every fit starts from a fresh head with its own seeds, so a score is a function of checkpoint, data and configuration.
The probe is fitted beside it. It is not stored: it takes a fraction of the head's time.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from pipeline.config.class_paths import import_class
from pipeline.config.schema import LEVELS, Task
from pipeline.data.parts import Target
from pipeline.embed import Embeddings
from pipeline.encoders.code_digest import code_digest, no_reuse
from pipeline.errors import CacheError
from pipeline.heads.architectures import MLP, ConvNet, Head
from pipeline.heads.fit import Losses, fit
from pipeline.heads.probe import Probe, fit_probe
from pipeline.statistics.metrics import PROBE, metric_name
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
        val_losses: with `patience`, the loss on the validation examples after each epoch.
        reused: whether it was read from the store: same embeddings, labels, settings, device, threads and torch.
        probe: the head in closed form beside it; None where the task wants none.
        notes: warnings for whoever reads the result.
    """

    head: Head
    losses: list[float]
    val_losses: list[float]
    reused: bool
    probe: Probe | None = None
    notes: tuple[str, ...] = ()

    @property
    def metrics(self) -> dict[str, float]:
        """Numbers by name."""
        penalties = self.probe.penalties if self.probe else {}
        chosen = {f"{metric_name(name)}{PROBE}_penalty": value for name, value in penalties.items() if value}
        return {"reused": float(self.reused), **chosen}

    @property
    def curves(self) -> dict[str, list[float]]:
        """Losses by name, one for each epoch."""
        curves = {"train_loss": self.losses, "val_loss": self.val_losses}
        return {name: losses for name, losses in curves.items() if losses}


def train_head(embeddings: Embeddings, store: Store, device: torch.device) -> FittedHead:
    """Trains a fresh head on the train part, or takes it from the store where the same fit was made before.

    The probe is fitted to the same embeddings.

    Raises:
        ConfigError: the optimizer's name or options are not valid.
        DataError: the loss is no longer a finite number.
        CacheError: the head cannot be stored.
    """
    task, targets = embeddings.examples.task, embeddings.examples.targets
    code = code_digest(import_class(task.head, "class", LEVELS)) if task.head else ""
    reusable = code is not None and embeddings.reusable
    path = store.root.expanduser() / "heads" / f"{_key(embeddings, code, device)}.safetensors"
    with (  # the caller's modes and random states come back afterwards
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast(device.type, enabled=False),
        torch.random.fork_rng([device] if device.type == "cuda" else []),
    ):
        torch.manual_seed(task.random_seed)  # for layers of a user's own head
        head = make_head(task, embeddings.table.hidden_size, targets, device)
        losses = _restore(head, path) if reusable else None
        reused = losses is not None
        if losses is None:
            (losses,) = fit([head], [task.random_seed], embeddings, device)
            if reusable:
                _keep(head, losses, path)
    notes = (no_reuse(type(head), "heads are trained"),) if code is None else ()
    probe = fit_probe(embeddings) if task.probe != "none" else None
    return FittedHead(head.eval(), *losses, reused, probe, notes + (probe.notes if probe else ()))


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


def _key(embeddings: Embeddings, code: str | None, device: torch.device) -> str:
    """A digest of everything that a fit depends on; `code` is the digest of a user's own head."""
    task, examples = embeddings.examples.task, embeddings.examples
    parts: dict[str, Any] = {
        "format": FORMAT,
        "embeddings": embeddings.key,
        "train": examples.train.digest,
        "val": examples.val.digest if examples.val else None,
        "targets": [(target.outputs, target.classes is None, target.weights) for target in examples.targets],
        "fit": [getattr(task, name) for name in FIT_SETTINGS],
        "head": task.head and [task.head, code],
        "machine": [device.type, torch.get_num_threads(), torch.get_float32_matmul_precision(), torch.__version__],
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:32]


def _restore(head: Head, path: Path) -> Losses | None:
    """Loads a stored head; None if there is none that can be read."""
    try:
        with safe_open(path, framework="pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            losses, val_losses = json.loads(file.metadata()["losses"])
        shapes = {name: value.shape for name, value in head.state_dict().items()}
        if {name: value.shape for name, value in state.items()} != shapes:
            return None
        head.load_state_dict(state)
    except (OSError, SafetensorError, KeyError, ValueError, RuntimeError):
        return None
    return losses, val_losses


def _keep(head: Head, losses: Losses, path: Path) -> None:
    state = {name: value.cpu().contiguous() for name, value in head.state_dict().items()}
    try:
        with temporary_folder(path.parent) as folder:
            save_file(state, folder / path.name, metadata={"losses": json.dumps(losses)})
            (folder / path.name).replace(path)
    except (OSError, SafetensorError) as error:
        raise CacheError(f"store: '{path.parent}' cannot be written ({error}); set store to another folder") from error
