"""The loss, and the training of a head, or of several at once."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeGuard

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.config.schema import Task
from pipeline.embed import Embeddings
from pipeline.errors import DataError
from pipeline.heads import optimizers as optim
from pipeline.heads.architectures import MLP, Head
from pipeline.heads.batches import Batch, Data, Indices
from pipeline.heads.optimizers import Descent
from pipeline.heads.stack import Stack
from pipeline.load import Examples, Target
from pipeline.progress import progress

IGNORED = -100  # the class of a unit that does not count
Losses = tuple[list[float], list[float]]


def loss_of(
    outputs: list[Tensor],
    values: list[Tensor],
    masks: Sequence[Tensor | None],
    targets: tuple[Target, ...],
    weighted: bool = False,
) -> Tensor:
    """The sum over targets of the mean over unmasked units of cross-entropy or squared error; a scalar.

    A target without an unmasked unit adds nothing.

    Args:
        outputs: per target, shape (units, outputs).
        values: per target, class indices or numbers, shape (units,).
        masks: per target, shape (units,), or None where none is masked.
        targets: what the outputs are.
        weighted: whether class weights count, as in `torch.nn.CrossEntropyLoss`: in training they do.
    """
    losses = []
    for output, value, mask, target in zip(outputs, values, masks, targets, strict=True):
        if target.classes is None:
            wanted = value.to(output.dtype) if mask is None else value.to(output.dtype).where(mask, 0)
            each = (output[:, 0] - wanted) ** 2
            losses.append(each.mean() if mask is None else (each * mask).sum() / mask.sum().clamp(min=1))
            continue
        wanted = value.long() if mask is None else value.long().where(mask, IGNORED)
        weight = output.new_tensor(target.weights) if weighted and target.weights else None
        total = functional.cross_entropy(output, wanted, weight, ignore_index=IGNORED, reduction="sum")
        losses.append(total / _mass(wanted, weight))
    return torch.stack(losses).sum()


def _mass(wanted: Tensor, weight: Tensor | None) -> Tensor | int:
    """What a sum of cross-entropies is divided by: the weights of all that counts, or their number; 1 for nothing."""
    counted = wanted != IGNORED
    if weight is None:
        return counted.sum().clamp(min=1)
    mass = (weight[wanted.where(counted, 0)] * counted).sum()
    return mass.where(mass > 0, 1)


@torch.no_grad()
def predict(head: Head, data: Data, sequences: Indices, batch_size: int) -> list[Tensor]:
    """For each target, the outputs of a head in evaluation mode, float64 on the CPU, shape (units, outputs)."""
    training = head.training
    head.eval()
    outputs = [
        [output.cpu().double() for output in head(batch.rows, batch.counts)]
        for batch in data.batches(sequences, batch_size)
    ]
    head.train(training)
    return [torch.cat(target) for target in zip(*outputs, strict=True)]


class _Held:
    """The examples kept back for early stopping, and the best head so far on them."""

    def __init__(self, data: Data, sequences: Indices, patience: int) -> None:
        self.data, self.sequences, self.patience = data, sequences, patience
        self.best = np.inf
        self.state: dict[str, Tensor] | None = None
        self.bad_epochs = 0

    def loss(self, head: Head, task: Task, targets: tuple[Target, ...]) -> float:
        """The loss over all of them."""
        outputs = predict(head, self.data, self.sequences, task.batch_size)
        return float(loss_of(outputs, *self.data.labels(self.sequences), targets))

    def enough(self, head: Head, loss: float) -> bool:
        """Remembers the best head; True once `patience` epochs in a row were no better."""
        if loss < self.best:
            self.best, self.state, self.bad_epochs = loss, copy.deepcopy(head.state_dict()), 0
        else:
            self.bad_epochs += 1
        return self.bad_epochs >= self.patience


class _Course:
    """A head's way through its epochs: its batches and losses.

    Attributes:
        losses: mean training loss of each epoch.
        held_losses: with `patience`, the loss on the held-out part after each.
        enough: no further epoch is needed.
    """

    def __init__(self, head: Head, examples: Examples, data: Data, held: tuple[Indices, _Held | None]) -> None:
        self.head, self.data, self.task, self.targets = head, data, examples.task, examples.targets
        self.sequences, self.held = held
        self.order = torch.Generator().manual_seed(self.task.random_seed)
        self.losses: list[float] = []
        self.held_losses: list[float] = []
        self.enough = False

    def descend(self, parameters: Iterable[nn.Parameter]) -> Descent:
        """An optimiser as the task says."""
        steps = self.task.num_epochs * -(-len(self.sequences) // self.task.batch_size)
        return Descent(parameters, self.task.optim, steps)

    def batches(self) -> Iterator[Batch]:
        """Those of an epoch."""
        count = len(self.sequences)
        shuffled = torch.randperm(count, generator=self.order) if self.task.shuffle else torch.arange(count)
        return self.data.batches(self.sequences[shuffled.numpy()], self.task.batch_size)

    def step(self, batch: Batch, descent: Descent) -> Tensor:
        """One optimiser step; the batch's loss. A closure, for optimisers that evaluate the loss more than once.

        Those see the same dropout each time: what they descend on is one function.
        """
        values: list[Tensor] = []
        dropout = None if optim.is_plain(self.task.optim) else self.head.dropout_state()

        def closure() -> Tensor:
            if values and dropout is not None:
                self.head.set_dropout_state(dropout)
            descent.optimizer.zero_grad()
            outputs = self.head(batch.rows, batch.counts)
            loss = loss_of(outputs, batch.values, batch.masks, self.targets, weighted=True)
            loss.backward()
            self.clip()
            values.append(loss.detach())
            return loss

        descent.step(closure)
        return values[0]

    def clip(self) -> None:
        """Clips the gradients, where the task says so."""
        if self.task.gradient_clip_val is not None:
            nn.utils.clip_grad_norm_(self.head.parameters(), self.task.gradient_clip_val)

    def end_epoch(self, total: float) -> None:
        """Takes down the losses of an epoch, summed over its sequences. Raises DataError where they are not finite."""
        self.losses.append(_finite(total / len(self.sequences), len(self.losses), self.task))
        if self.held is not None:
            self.held_losses.append(self.held.loss(self.head, self.task, self.targets))
            self.enough = self.held.enough(self.head, self.held_losses[-1])

    @property
    def loss(self) -> float:
        """The last, which a schedule may go by."""
        return (self.held_losses or self.losses)[-1]


def fit(heads: Sequence[Head], embeddings: Sequence[Embeddings], device: torch.device) -> list[Losses]:
    """Trains heads in place, as the task of each says; several at once are a group of `groups`.

    Returns:
        For each, the mean training loss of each epoch, and, with `patience`, the loss on the held-out part after each;
        the head is then the best of them.

    Raises:
        ConfigError: the optimiser's or the schedule's name or options are not valid.
        DataError: the loss is no longer a finite number.
    """
    courses = list[_Course]()
    for head, one in zip(heads, embeddings, strict=True):
        data = Data(one.rows("train"), one.examples.train, device)
        courses.append(_Course(head.train(), one.examples, data, _hold_out(one, data)))
    names = ", ".join(course.task.task_name for course in courses)
    together = _stack(courses)
    descents = _descend(courses, together)
    with progress(f"train_head {names}", courses[0].task.num_epochs, "epochs") as advance:
        for _ in range(courses[0].task.num_epochs):
            for course, total in zip(courses, _epoch(courses, descents, together).tolist(), strict=True):
                course.end_epoch(total)
            for course, descent in zip(courses, descents, strict=False):  # one may be that of all
                descent.end_epoch(course.loss)
            advance(1)
            if all(course.enough for course in courses):
                break
    if together is not None:
        together.release()
    for course in courses:
        if course.held is not None and course.held.state is not None:
            course.head.load_state_dict(course.held.state)
    return [(course.losses, course.held_losses) for course in courses]


def _epoch(courses: Sequence[_Course], descents: Sequence[Descent], together: Stack | None) -> Tensor:
    """An epoch of each head; their losses, summed over the sequences, shape (heads,)."""
    totals = torch.zeros(len(courses), device=courses[0].data.device)
    for batches in zip(*(course.batches() for course in courses), strict=True):
        if together is None:
            steps = zip(courses, batches, descents, strict=True)
            losses = torch.stack([course.step(batch, descent) for course, batch, descent in steps])
        else:
            losses = together.backward(batches)
            for course in courses:
                course.clip()
            for descent in descents:
                descent.step()
        totals += losses * len(batches[0].counts)
    return totals


def _descend(courses: Sequence[_Course], together: Stack | None) -> list[Descent]:
    """An optimiser for each head; one for all, over all weights at once, where each would do the same.

    Those that heads at once are trained with change each weight by itself.
    """
    first = courses[0].task.optim
    same = all(course.task.optim == first for course in courses) and not optim.minds_loss(first)
    if together is not None and (same or len(courses) == 1):
        return [courses[0].descend([together.weights])]
    return [course.descend(course.head.parameters()) for course in courses]


def _stack(courses: Sequence[_Course]) -> Stack | None:
    """None for a head, always alone, that has another architecture, weighted classes or an optimiser like L-BFGS."""
    heads = [course.head for course in courses if _stackable(course.head, course.task, course.targets)]
    return Stack(heads, courses[0].targets[0].classes is not None) if heads else None


def _stackable(head: Head, task: Task, targets: Sequence[Target]) -> TypeGuard[MLP]:
    return type(head) is MLP and targets[0].weights is None and optim.is_plain(task.optim)


def groups(heads: Sequence[Head], embeddings: Sequence[Embeddings]) -> list[list[int]]:
    """Which heads are trained at once: MLPs of one shape that take the same steps. By their places, in order."""
    found: dict[tuple[Any, ...], list[int]] = {}
    for place, (head, one) in enumerate(zip(heads, embeddings, strict=True)):
        task, target = one.examples.task, one.examples.targets[0]
        together = task.patience is None and _stackable(head, task, one.examples.targets)
        alone = () if together else (place,)
        steps = len(one.examples.train), task.batch_size, task.num_epochs
        shape = one.table.hidden_size, target.outputs, target.classes is None
        found.setdefault((*alone, *steps, *shape), []).append(place)
    return list(found.values())


def _hold_out(embeddings: Embeddings, data: Data) -> tuple[Indices, _Held | None]:
    """The train sequences to fit on, and what early stopping looks at: the val part, else a seeded part of train."""
    examples = embeddings.examples
    task, everything = examples.task, np.arange(len(examples.train))
    if task.patience is None:
        return everything, None
    if examples.val is not None:
        own = Data(embeddings.rows("val"), examples.val, data.device)
        return everything, _Held(own, np.arange(len(examples.val)), task.patience)
    generator = torch.Generator().manual_seed(task.random_seed)
    order = torch.randperm(len(everything), generator=generator).numpy()
    count = max(1, round(task.val_fraction * len(order)))
    if count >= len(order):
        raise DataError(f"task '{task.task_name}': {len(order)} train sequences are too few to hold some out")
    held = np.sort(order[:count])
    if not any(mask.any() for mask in data.labels(held)[1]):
        raise DataError(f"task '{task.task_name}': no label is left in the held-out part; raise val_fraction")
    return np.sort(order[count:]), _Held(data, held, task.patience)


def _finite(loss: float, epoch: int, task: Task) -> float:
    if not np.isfinite(loss):
        found = f"the training loss is {loss} after epoch {epoch + 1}"
        raise DataError(f"task '{task.task_name}': {found}; lower optim.lr or check the range of the labels")
    return loss
