"""MLPs of one shape, trained at once: batched matrix products for all of them, an optimiser for each.

Each head has the batches, the dropout and the schedule that it would have alone. A single one is trained this way too:
layer, ReLU and dropout are one step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from pipeline.batches import Batch
from pipeline.heads import MLP, Dropout


class Stack:
    """Heads whose parameters are slices of stacked ones, until `release`."""

    def __init__(self, heads: Sequence[MLP], classes: bool) -> None:
        """`classes`: cross-entropy rather than squared error."""
        self.heads, self.classes = heads, classes
        linears = [[one for one in head.modules() if isinstance(one, nn.Linear)] for head in heads]
        self._linears = list(zip(*linears, strict=True))
        dropouts = [[one for one in head.modules() if isinstance(one, Dropout)] for head in heads]
        self._dropouts = list(zip(*dropouts, strict=True))
        self._parameters: list[Tensor] = []
        for layer in self._linears:
            for name in ("weight", "bias"):
                stacked = torch.stack([getattr(one, name).detach() for one in layer]).requires_grad_()
                for one, own in zip(layer, stacked.detach().unbind(), strict=True):
                    getattr(one, name).data = own
                self._parameters.append(stacked)

    def backward(self, batches: Sequence[Batch]) -> Tensor:
        """Sets the gradients of every head's parameters, each from a batch of its own; their losses, shape (heads,).

        All batches have one size.
        """
        outputs = self._forward(torch.stack([batch.rows for batch in batches]))
        values = torch.stack([batch.values[0] for batch in batches])
        if self.classes:
            each = functional.cross_entropy(outputs.flatten(0, 1), values.flatten().long(), reduction="none")
        else:
            each = (outputs[..., 0] - values.to(outputs.dtype)) ** 2
        losses = each.view(values.shape).mean(1)
        gradients = torch.autograd.grad(losses.sum(), self._parameters)
        for place, gradient in enumerate(gradients):
            name = ("weight", "bias")[place % 2]
            for one, own in zip(self._linears[place // 2], gradient.unbind(), strict=True):
                getattr(one, name).grad = own
        return losses.detach()

    def release(self) -> None:
        """Gives each head parameters of its own again."""
        for head in self.heads:
            for parameter in head.parameters():
                parameter.data = parameter.data.clone()

    def _forward(self, rows: Tensor) -> Tensor:
        """Rows (heads, n, hidden_size) to (heads, n, outputs)."""
        for layer in range(len(self._linears)):
            weight, bias = self._parameters[2 * layer : 2 * layer + 2]
            dropouts = self._dropouts[layer] if layer < len(self._dropouts) else ()
            rows = _Layer.apply(rows, weight, bias, dropouts)  # type: ignore[no-untyped-call]
        return rows


class _Layer(torch.autograd.Function):
    """Linear layers of several heads, and ReLU and dropout behind each, if there are `dropouts`."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor, dropouts: Sequence[Dropout]) -> Tensor:
        """Rows (heads, n, in), weight (heads, out, in) and bias (heads, out) to (heads, n, out)."""
        scale = dropouts[0].scale if dropouts else 1  # of dropout, here already: a ReLU lets it through
        out = torch.baddbmm(bias[:, None], rows, weight.transpose(1, 2), beta=scale, alpha=scale)
        if dropouts:
            out.relu_().mul_(Dropout.kept(dropouts, out))
        ctx.scale = scale
        ctx.save_for_backward(rows, weight, out if dropouts else None)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor, Tensor, None]:
        """What was cut off or dropped is 0 in the output, and has no gradient."""
        rows, weight, out = ctx.saved_tensors
        if out is not None:
            gradient = torch.ops.aten.threshold_backward(gradient, out, 0).mul_(ctx.scale)
        for_rows = torch.bmm(gradient, weight) if ctx.needs_input_grad[0] else None
        # in the layout of the weight, which optimisers need
        return for_rows, torch.bmm(gradient.transpose(1, 2), rows), gradient.sum(1), None
