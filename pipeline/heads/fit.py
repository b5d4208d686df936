"""The training of the heads of one task."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeGuard

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.config.task import Task
from pipeline.data.parts import Target, unit_index
from pipeline.embed import Embeddings
from pipeline.errors import DataError
from pipeline.heads.architectures import MLP, Head
from pipeline.heads.batches import Batch, Data, Indices
from pipeline.heads.loss import losses_of
from pipeline.heads.optimizers import ScheduledOptimizer, is_plain, needs_metric
from pipeline.heads.stack import Stack
from pipeline.heads.threads import on_threads, threads_of
from pipeline.load import Examples
from pipeline.progress import progress

Losses = tuple[list[float], list[float]]
Scale = list[tuple[float, float]]  # per target, what is subtracted from its labels, and what they are divided by
Backward = Callable[[Batch], Tensor]  # sets the gradients of the heads; returns their losses, shape (heads, targets)


@torch.no_grad()
def predict(head: Head, data: Data, sequences: Indices, batch_size: int) -> list[Tensor]:
    """For each target, the outputs of a head in evaluation mode, float64 on the CPU, shape (units, outputs).

    Numbers are in the units of the labels.
    """
    training = head.training
    head.eval()
    outputs = [head.in_own_units(head(batch.rows, batch.counts)) for batch in data.batches(sequences, batch_size)]
    head.train(training)
    return [torch.cat(target) for target in zip(*outputs, strict=True)]


class _FitState:
    """How far the training of a head has come.

    Attributes:
        losses: mean training loss of each epoch.
        val_losses: with `patience`, the loss on the validation examples after each epoch.
        done: early stopping has ended the training.
    """

    def __init__(self, head: Head, seed: int, task: Task) -> None:
        self.head, self.task = head.train(), task
        self.order = torch.Generator().manual_seed(seed)
        self.losses: list[float] = []
        self.val_losses: list[float] = []
        self.done = False
        self._least, self._epochs_since = np.inf, 0
        self._best: dict[str, Tensor] | None = None

    def shuffled(self, sequences: Indices) -> Indices:
        """The sequences in the order of the next epoch."""
        if not self.task.shuffle:
            return sequences
        order: Indices = torch.randperm(len(sequences), generator=self.order).numpy()
        return sequences[order]

    def end_epoch(self, loss: float, split: _Split) -> None:
        """Records the mean training loss and the validation loss. Raises DataError where the former is not finite."""
        if self.done:  # other heads of a stack go on
            return
        if not np.isfinite(loss):
            found = f"the training loss is {loss} after epoch {len(self.losses) + 1}"
            remedy = "lower optim.lr or check the range of the labels"
            raise DataError(f"task '{self.task.task_name}': {found}; {remedy}")
        self.losses.append(loss)
        if self.task.patience is not None:
            of_targets = split.val_losses(self.head)
            self.val_losses.append(float(of_targets.sum()))
            self._epochs_since += 1
            compared = float((of_targets / split.squares).sum())  # each target counts as in training
            if compared < self._least:
                self._least, self._epochs_since = compared, 0
                self._best = copy.deepcopy(self.head.state_dict())
            self.done = self._epochs_since >= self.task.patience

    def finish(self) -> Losses:
        """Restores the weights with the least validation loss, with early stopping; returns the losses."""
        if self._best is not None:
            self.head.load_state_dict(self._best)
        return self.losses, self.val_losses


class _Split:
    """The sequences to train on; for early stopping the val part, else a part of train that the task's seed draws.

    Attributes:
        data: the train part.
        train: the sequences of it to train on.
        scale: per target, mean and deviation by which the labels are standardised; None where they are not.
        squares: per target, the factor from the squared error of those to the labels' own units, shape (targets,).
    """

    def __init__(self, embeddings: Embeddings, device: torch.device) -> None:
        self.examples = examples = embeddings.examples
        self.data = Data(embeddings.rows("train"), examples.train, device)
        self.train = np.arange(len(examples.train))
        self._val_data, self._val = self.data, self.train[:0]
        if examples.task.patience is not None:
            if examples.val is not None:
                self._val_data = Data(embeddings.rows("val"), examples.val, device)
                self._val = np.arange(len(examples.val))
            else:
                self.train, self._val = self._hold_out()
        self.scale = _scale(examples, self.train)
        if self.scale is not None:
            self.data.standardise(self.scale)
        self.squares = torch.tensor([deviation**2 for _, deviation in self.scale or [(0, 1.0)] * len(examples.targets)])
        self.squares = self.squares.double()

    def val_losses(self, head: Head) -> Tensor:
        """The loss of each target over all validation examples, in the labels' own units, shape (targets,)."""
        outputs = predict(head, self._val_data, self._val, self.examples.task.batch_size)
        labels = self._val_data.labels(self._val, exact=self.scale is not None)  # float32 is too coarse far from 0
        return losses_of(outputs, *labels, self.examples.targets)

    def _hold_out(self) -> tuple[Indices, Indices]:
        task, count, held_out = self.examples.task, len(self.train), _held_out(self.examples)
        order = torch.randperm(count, generator=torch.Generator().manual_seed(task.random_seed)).numpy()
        if held_out >= count:
            raise DataError(f"task '{task.task_name}': {count} train sequences are too few to hold some out")
        val = np.sort(order[:held_out])
        if not any(mask.any() for mask in self.data.labels(val)[1]):
            raise DataError(f"task '{task.task_name}': no label is left in the held-out part; raise val_fraction")
        return np.sort(order[held_out:]), val


def _held_out(examples: Examples) -> int:
    """How many sequences of the train part are not trained on: those that decide when to stop."""
    task = examples.task
    if task.patience is None or examples.val is not None:
        return 0
    return max(1, round(task.val_fraction * len(examples.train)))


def steps_of(examples: Examples, epochs: int) -> int:
    """The optimizer steps that so many epochs of a task take."""
    return epochs * -(-(len(examples.train) - _held_out(examples)) // examples.task.batch_size)


def _scale(examples: Examples, sequences: Indices) -> Scale | None:
    """Mean and deviation of the unmasked labels of these train sequences; 0 and 1 for classes, and 1 for equal labels.

    None where the labels are trained on as they are.
    """
    if not examples.task.standardize or all(target.classes is not None for target in examples.targets):
        return None
    part, units = examples.train, unit_index(examples.train.counts, sequences)
    scale = Scale()
    for target, values, mask in zip(examples.targets, part.values, part.masks, strict=True):
        labels = values[units][mask[units]].astype(np.float64)
        if target.classes is not None or not len(labels):
            scale.append((0.0, 1.0))
            continue
        deviation = float(labels.std()) if np.ptp(labels) else 0.0
        scale.append((float(labels.mean()), deviation or 1.0))
    return scale


@dataclass(frozen=True)
class SeedHead:
    """A trained head of one seed, in evaluation mode.

    Attributes:
        seed: of its weights, batches and dropout.
        head: the module.
        losses: mean training loss of each epoch, in the labels' own units.
        val_losses: with `patience`, the loss on the validation examples after each epoch.
        steps: of the optimizer.
        reused: whether it was read from the store: same embeddings, labels, settings, device, threads and torch.
    """

    seed: int
    head: Head
    losses: list[float]
    val_losses: list[float]
    steps: int
    reused: bool


def fit(heads: Sequence[Head], seeds: Sequence[int], embeddings: Embeddings, device: torch.device) -> list[Losses]:
    """Trains fresh heads of one task in place, each as it would be trained alone; may seed torch's random state.

    On a CPU it takes as many threads as `threads_of` says.

    Args:
        heads: of one architecture.
        seeds: of each head's batches.
        embeddings: of the task.
        device: where the heads are.

    Returns:
        For each head the mean training loss of each epoch, and, with `patience`, the loss on the validation examples
        after each; the head then has the weights of the epoch with the least loss. All are in the labels' own units,
        also where the heads are trained on standardised labels; their `label_scale` then says how.

    Raises:
        ConfigError: the optimizer's or the schedule's name or options are not valid.
        DataError: the loss is no longer a finite number.
    """
    with on_threads(threads_of(heads[0], embeddings.examples)):
        return _fit(heads, seeds, embeddings, device)


def _fit(heads: Sequence[Head], seeds: Sequence[int], embeddings: Embeddings, device: torch.device) -> list[Losses]:
    examples, split = embeddings.examples, _Split(embeddings, device)
    task, targets = examples.task, examples.targets
    for head in heads:
        head.label_scale = split.scale
    states = [_FitState(head, seed, task) for head, seed in zip(heads, seeds, strict=True)]
    if _stackable(heads, task, targets):
        stack = Stack(heads, targets[0].classes is not None)
        _train([stack.weights], lambda batch: stack.backward(batch)[:, None], states, split)
        stack.release()
    else:
        for state, seed in zip(states, seeds, strict=True):
            torch.manual_seed(seed)  # for what a user's own head draws
            _train(state.head.parameters(), partial(_backward, state.head, targets), [state], split)
    return [state.finish() for state in states]


def _stackable(heads: Sequence[Head], task: Task, targets: Sequence[Target]) -> TypeGuard[Sequence[MLP]]:
    return all(type(head) is MLP for head in heads) and trained_at_once(task, targets, len(heads))


def trained_at_once(task: Task, targets: Sequence[Target], count: int) -> bool:
    """Whether one optimizer trains so many heads at once: then a part of them would not have the same last bits."""
    plain = is_plain(task.optim) and (count == 1 or not needs_metric(task.optim))
    return plain and targets[0].weights is None and task.level == "sequence" and task.head is None


def _backward(head: Head, targets: tuple[Target, ...], batch: Batch) -> Tensor:
    """Sets the gradients of a head of any architecture; its losses, shape (1, targets)."""
    head.zero_grad()
    outputs = head(batch.rows, batch.counts)
    losses = losses_of(outputs, batch.values, batch.masks, targets, weighted=True)
    losses.sum().backward()
    return losses.detach()[None]


def _train(parameters: Iterable[nn.Parameter], backward: Backward, states: Sequence[_FitState], split: _Split) -> None:
    """Runs the epochs of all heads at once; `parameters` are what the optimizer changes."""
    task = states[0].task
    optimizer = ScheduledOptimizer(parameters, task.optim, steps_of(split.examples, task.num_epochs))
    squares = split.squares.float().to(split.data.device)
    with progress(f"train_head {task.task_name}", task.num_epochs, "epochs") as advance:
        for _ in range(task.num_epochs):
            totals = torch.zeros(len(states), device=split.data.device)
            for batch in _batches(states, split):
                losses = (_step(backward, states, batch, optimizer) * squares).sum(1)
                totals += losses * (len(batch.counts) // len(states))
            for state, total in zip(states, totals.tolist(), strict=True):
                state.end_epoch(total / len(split.train), split)
            optimizer.end_epoch((states[0].val_losses or states[0].losses)[-1])
            advance(1)
            if all(state.done for state in states):
                break


def _batches(states: Sequence[_FitState], split: _Split) -> Iterator[Batch]:
    """The batches of an epoch: for each head in turn, as many sequences in an order of its own."""
    orders, size = np.stack([state.shuffled(split.train) for state in states]), states[0].task.batch_size
    chunks = [orders[:, begin : begin + size].ravel() for begin in range(0, orders.shape[1], size)]
    return split.data.batches(np.concatenate(chunks), size * len(states))


def _step(backward: Backward, states: Sequence[_FitState], batch: Batch, optimizer: ScheduledOptimizer) -> Tensor:
    """One optimizer step; the losses of each head before it, shape (heads, targets).

    An optimizer that evaluates the loss several times sees the same dropout each time.
    """
    task, losses = states[0].task, list[Tensor]()
    dropout = None if is_plain(task.optim) else states[0].head.dropout_generator
    before = None if dropout is None else dropout.get_state()

    def closure() -> Tensor:
        if losses and dropout is not None and before is not None:
            dropout.set_state(before)
        losses.append(backward(batch))
        if task.gradient_clip_val is not None:
            for state in states:
                nn.utils.clip_grad_norm_(state.head.parameters(), task.gradient_clip_val)
        return losses[-1].sum()

    optimizer.step(closure)
    return losses[0]
