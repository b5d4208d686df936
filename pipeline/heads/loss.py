"""The loss of a head: cross-entropy or squared error, over the units that count."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from pipeline.data.parts import Target

IGNORED = -100  # the class of a unit that does not count


def loss_of(
    outputs: list[Tensor],
    values: list[Tensor],
    masks: Sequence[Tensor | None],
    targets: tuple[Target, ...],
    weighted: bool = False,
) -> Tensor:
    """The sum of `losses_of` over the targets; a scalar."""
    return losses_of(outputs, values, masks, targets, weighted).sum()


def losses_of(
    outputs: list[Tensor],
    values: list[Tensor],
    masks: Sequence[Tensor | None],
    targets: tuple[Target, ...],
    weighted: bool = False,
) -> Tensor:
    """For each target the mean over unmasked units of cross-entropy or squared error, shape (targets,).

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
    return torch.stack(losses)


def _mass(wanted: Tensor, weight: Tensor | None) -> Tensor | int:
    """The divisor of a sum of cross-entropies: the unmasked units' number, or sum of weights; 1 where that is 0."""
    counted = wanted != IGNORED
    if weight is None:
        return counted.sum().clamp(min=1)
    mass = (weight[wanted.where(counted, 0)] * counted).sum()
    return mass.where(mass > 0, 1)
