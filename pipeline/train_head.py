"""Stage 3: `Embeddings` to a `FittedHead`.

Every fit starts from a fresh head with its own seeds, so a score is a function of checkpoint, data and configuration.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from pipeline import optim
from pipeline.embed import Embeddings
from pipeline.errors import CacheError, DataError
from pipeline.heads import MLP, ConvNet, Head
from pipeline.load import Part, Target, unit_index
from pipeline.progress import progress
from pipeline.rows import Rows
from pipeline.store import Store


@dataclass(frozen=True)
class FittedHead:
    """A trained head, in evaluation mode.

    Attributes:
        head: the module.
        losses: mean training loss of each epoch.
        reused: whether it was read from the store: same embeddings, labels, settings, device, threads and torch.
    """

    head: Head
    losses: list[float]
    reused: bool


@dataclass(frozen=True)
class Batch:
    """Some sequences with u units: rows (u, hidden_size), counts (sequences,), values and masks (u,) per target."""

    rows: Tensor
    counts: Tensor
    values: list[Tensor]
    masks: list[Tensor]


def train_head(embeddings: Embeddings, store: Store, device: torch.device) -> FittedHead:
    """Trains a fresh head on the train part, or takes it from the store where the same one was trained before.

    Raises:
        ConfigError: the optimiser's name or options are not valid.
        DataError: the loss is no longer a finite number.
        CacheError: the head cannot be stored.
    """
    with _own_modes(device):
        return _train_head(embeddings, store, device)


def _train_head(embeddings: Embeddings, store: Store, device: torch.device) -> FittedHead:
    task = embeddings.examples.task
    targets = embeddings.examples.targets
    head = make_head(task.level, embeddings.shelf.hidden_size, targets, task.random_seed).to(device)
    optimizer = optim.build(head.parameters(), task.optim)
    path = store.root.expanduser() / "heads" / f"{_key(embeddings, device)}.safetensors"
    losses = _restore(head, path)
    if losses is None:
        rows = embeddings.rows("train")
        try:
            losses = _fit(head, optimizer, rows, embeddings, device)
        finally:
            rows.close()
        _keep(head, losses, path)
        return FittedHead(head.eval(), losses, reused=False)
    return FittedHead(head.eval(), losses, reused=True)


def make_head(level: str, hidden_size: int, targets: tuple[Target, ...], seed: int) -> Head:
    """The head for a task, with fresh weights from `seed`."""
    outputs = [target.outputs for target in targets]
    head: Head = ConvNet(hidden_size, outputs) if level == "token" else MLP(hidden_size, outputs[0])
    head.reset(seed)
    return head


def batch_of(rows: Rows, part: Part, sequences: npt.NDArray[np.int64], device: torch.device) -> Batch:
    """The embeddings and labels of some sequences of a part."""
    units = unit_index(part.counts, sequences)
    values = [torch.from_numpy(value[units]).to(device) for value in part.values]
    masks = [torch.from_numpy(mask[units]).to(device) for mask in part.masks]
    counts = torch.from_numpy(part.counts[sequences]).to(device)
    return Batch(rows.gather(sequences).to(device), counts, values, masks)


def loss_of(outputs: list[Tensor], batch: Batch, targets: tuple[Target, ...]) -> Tensor:
    """The sum over targets of the mean over unmasked units of cross-entropy or squared error; a scalar.

    A target without an unmasked unit in the batch adds nothing.
    """
    losses = [outputs[0].sum() * 0]
    for output, value, mask, target in zip(outputs, batch.values, batch.masks, targets, strict=True):
        if not mask.any():
            continue
        if target.classes is None:
            losses.append(functional.mse_loss(output[mask, 0], value[mask].to(output.dtype)))
        else:
            losses.append(functional.cross_entropy(output[mask], value[mask]))
    return torch.stack(losses).sum()


def _fit(
    head: Head, optimizer: torch.optim.Optimizer, rows: Rows, embeddings: Embeddings, device: torch.device
) -> list[float]:
    """Trains `head` in place; gives the mean loss of each epoch."""
    examples = embeddings.examples
    task, part = examples.task, examples.train
    order = torch.Generator().manual_seed(task.random_seed)
    losses = []
    head.train()
    with progress(f"train_head {task.task_name}", task.num_epochs, "epochs") as advance:
        for epoch in range(task.num_epochs):
            sequences = torch.randperm(len(part), generator=order) if task.shuffle else torch.arange(len(part))
            total = torch.zeros((), device=device)
            for some in sequences.split(task.batch_size):
                batch = batch_of(rows, part, some.numpy(), device)
                loss = loss_of(head(batch.rows, batch.counts), batch, examples.targets)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                total += loss.detach() * len(some)
            losses.append(float(total) / len(part))
            if not np.isfinite(losses[-1]):
                found = f"the training loss is {losses[-1]} after epoch {epoch + 1}"
                raise DataError(f"task '{task.task_name}': {found}; lower optim.lr or check the range of the labels")
            advance(1)
    return losses


@contextmanager
def _own_modes(device: torch.device) -> Iterator[None]:
    """Gradients on and autocast off, whatever the caller's modes; they are back afterwards."""
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
        yield


def _key(embeddings: Embeddings, device: torch.device) -> str:
    """Changes with anything that a fit depends on."""
    task, examples = embeddings.examples.task, embeddings.examples
    what: dict[str, Any] = {
        "embeddings": embeddings.key,
        "train": examples.train.digest,
        "outputs": [(target.outputs, target.classes is None) for target in examples.targets],
        "fit": [task.level, task.batch_size, task.num_epochs, task.shuffle, task.random_seed, task.optim],
        "machine": [device.type, torch.get_num_threads(), torch.__version__],
    }
    return hashlib.sha256(json.dumps(what, sort_keys=True, default=str).encode()).hexdigest()[:32]


def _restore(head: Head, path: Path) -> list[float] | None:
    """Loads a stored head; None if there is none, or one that cannot be read."""
    try:
        with safe_open(path, framework="pt") as file:
            head.load_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
            losses = json.loads(file.metadata()["losses"])
    except (OSError, SafetensorError, KeyError, ValueError, RuntimeError):
        return None
    return [float(loss) for loss in losses]


def _keep(head: Head, losses: list[float], path: Path) -> None:
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        state = {name: value.cpu().contiguous() for name, value in head.state_dict().items()}
        save_file(state, temporary, metadata={"losses": json.dumps(losses)})
        temporary.replace(path)
    except OSError as error:
        raise CacheError(f"store: '{path.parent}' cannot be written ({error}); set store to another folder") from error
