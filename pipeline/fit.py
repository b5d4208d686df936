"""Batches, the loss, and the training loop of a head."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.lr_scheduler import ReduceLROnPlateau

from pipeline import optim
from pipeline.config import Task
from pipeline.embed import Embeddings
from pipeline.errors import DataError
from pipeline.heads import Head
from pipeline.load import Part, Target, unit_index
from pipeline.progress import progress
from pipeline.rows import Rows

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Batch:
    """Some sequences with u units: rows (u, hidden_size), counts (sequences,), values and masks (u,) per target."""

    rows: Tensor
    counts: Tensor
    values: list[Tensor]
    masks: list[Tensor]


def batch_of(rows: Rows, part: Part, sequences: Indices, device: torch.device) -> Batch:
    """The embeddings and labels of some sequences of a part."""
    values, masks = labels_of(part, sequences)
    counts = torch.from_numpy(part.counts[sequences]).to(device)
    return Batch(
        rows.gather(sequences).to(device), counts, [v.to(device) for v in values], [m.to(device) for m in masks]
    )


def labels_of(part: Part, sequences: Indices) -> tuple[list[Tensor], list[Tensor]]:
    """Values (int64 or float32) and masks of some sequences, per target, shape (units,)."""
    units = unit_index(part.counts, sequences)
    values = [torch.from_numpy(value[units]) for value in part.values]
    masks = [torch.from_numpy(mask[units]) for mask in part.masks]
    return [value.float() if value.is_floating_point() else value for value in values], masks


def loss_of(
    outputs: list[Tensor],
    values: list[Tensor],
    masks: list[Tensor],
    targets: tuple[Target, ...],
    weighted: bool = False,
) -> Tensor:
    """The sum over targets of the mean over unmasked units of cross-entropy or squared error; a scalar.

    A target without an unmasked unit adds nothing.

    Args:
        outputs: per target, shape (units, outputs).
        values: per target, class indices or numbers, shape (units,).
        masks: per target, shape (units,).
        targets: what the outputs are.
        weighted: whether class weights count, as in `torch.nn.CrossEntropyLoss`: in training they do.
    """
    losses = [outputs[0].sum() * 0]
    for output, value, mask, target in zip(outputs, values, masks, targets, strict=True):
        if not mask.any():
            continue
        if target.classes is None:
            losses.append(functional.mse_loss(output[mask, 0], value[mask].to(output.dtype)))
        else:
            weight = output.new_tensor(target.weights) if weighted and target.weights else None
            if weight is None or weight[value[mask]].sum() > 0:
                losses.append(functional.cross_entropy(output[mask], value[mask], weight))
    return torch.stack(losses).sum()


@torch.no_grad()
def predict(
    head: Head, rows: Rows, part: Part, sequences: Indices, batch_size: int, device: torch.device
) -> list[Tensor]:
    """For each target, the outputs of a head in evaluation mode, float64 on the CPU, shape (units, outputs)."""
    training = head.training
    head.eval()
    outputs = []
    for begin in range(0, len(sequences), batch_size):
        batch = batch_of(rows, part, sequences[begin : begin + batch_size], device)
        outputs.append([output.cpu().double() for output in head(batch.rows, batch.counts)])
    head.train(training)
    return [torch.cat(target) for target in zip(*outputs, strict=True)]


@dataclass
class _Held:
    """The examples kept back for early stopping, and the best head so far on them."""

    rows: Rows
    part: Part
    sequences: Indices
    patience: int
    best: float = np.inf
    state: dict[str, Tensor] | None = None
    bad_epochs: int = 0

    def loss(self, head: Head, task: Task, targets: tuple[Target, ...], device: torch.device) -> float:
        """The loss over all of them."""
        outputs = predict(head, self.rows, self.part, self.sequences, task.batch_size, device)
        return float(loss_of(outputs, *labels_of(self.part, self.sequences), targets))

    def enough(self, head: Head, loss: float) -> bool:
        """Remembers the best head; True once `patience` epochs in a row were no better."""
        if loss < self.best:
            self.best, self.state, self.bad_epochs = loss, copy.deepcopy(head.state_dict()), 0
        else:
            self.bad_epochs += 1
        return self.bad_epochs >= self.patience


def fit(head: Head, embeddings: Embeddings, device: torch.device) -> tuple[list[float], list[float]]:
    """Trains `head` in place, as the task says.

    Returns:
        The mean training loss of each epoch, and, with `patience`, the loss on the held-out part after each; the head
        is then the best of them.

    Raises:
        ConfigError: the optimiser's or the schedule's name or options are not valid.
        DataError: the loss is no longer a finite number.
    """
    rows = embeddings.rows("train")
    return _epochs(head, embeddings, (rows, *_hold_out(embeddings, rows)), device)


def _hold_out(embeddings: Embeddings, rows: Rows) -> tuple[Indices, _Held | None]:
    """The train sequences to fit on, and what early stopping looks at: the val part, else a seeded part of train."""
    examples = embeddings.examples
    task, everything = examples.task, np.arange(len(examples.train))
    if task.patience is None:
        return everything, None
    if examples.val is not None:
        own = embeddings.rows("val")
        return everything, _Held(own, examples.val, np.arange(len(examples.val)), task.patience)
    generator = torch.Generator().manual_seed(task.random_seed)
    order = torch.randperm(len(everything), generator=generator).numpy()
    count = max(1, round(task.val_fraction * len(order)))
    if count >= len(order):
        raise DataError(f"task '{task.task_name}': {len(order)} train sequences are too few to hold some out")
    held = np.sort(order[:count])
    if not any(mask.any() for mask in labels_of(examples.train, held)[1]):
        raise DataError(f"task '{task.task_name}': no label is left in the held-out part; raise val_fraction")
    return np.sort(order[count:]), _Held(rows, examples.train, held, task.patience)


def _epochs(
    head: Head, embeddings: Embeddings, data: tuple[Rows, Indices, _Held | None], device: torch.device
) -> tuple[list[float], list[float]]:
    rows, sequences, held = data
    task, targets = embeddings.examples.task, embeddings.examples.targets
    steps = task.num_epochs * -(-len(sequences) // task.batch_size)
    optimizer, scheduler = optim.build(head.parameters(), optim.with_max_steps(task.optim, steps))
    after_epoch = scheduler is not None and optim.per_epoch(scheduler)
    order = torch.Generator().manual_seed(task.random_seed)
    losses: list[float] = []
    held_losses: list[float] = []
    head.train()
    with progress(f"train_head {task.task_name}", task.num_epochs, "epochs") as advance:
        for epoch in range(task.num_epochs):
            shuffled = torch.randperm(len(sequences), generator=order) if task.shuffle else torch.arange(len(sequences))
            total = torch.zeros((), device=device)
            for some in shuffled.split(task.batch_size):
                batch = batch_of(rows, embeddings.examples.train, sequences[some.numpy()], device)
                total += _step(head, optimizer, batch, targets, task.gradient_clip_val) * len(some)
                if scheduler is not None and not after_epoch:
                    scheduler.step()
            losses.append(_finite(float(total) / len(sequences), epoch, task))
            if held is not None:
                held_losses.append(held.loss(head, task, targets, device))
            if after_epoch:
                _step_epoch(scheduler, (held_losses or losses)[-1])
            advance(1)
            if held is not None and held.enough(head, held_losses[-1]):
                break
    if held is not None and held.state is not None:
        head.load_state_dict(held.state)
    return losses, held_losses


def _step(
    head: Head, optimizer: torch.optim.Optimizer, batch: Batch, targets: tuple[Target, ...], clip: float | None
) -> Tensor:
    """One optimiser step; the batch's loss. A closure, for optimisers that evaluate the loss more than once."""
    values: list[Tensor] = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(head(batch.rows, batch.counts), batch.values, batch.masks, targets, weighted=True)
        loss.backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(head.parameters(), clip)
        values.append(loss.detach())
        return loss

    evaluate: Callable[[], Any] = closure
    optimizer.step(evaluate)
    return values[0]


def _step_epoch(scheduler: Any, loss: float) -> None:
    if isinstance(scheduler, ReduceLROnPlateau):
        scheduler.step(loss)
    else:
        scheduler.step()


def _finite(loss: float, epoch: int, task: Task) -> float:
    if not np.isfinite(loss):
        found = f"the training loss is {loss} after epoch {epoch + 1}"
        raise DataError(f"task '{task.task_name}': {found}; lower optim.lr or check the range of the labels")
    return loss
