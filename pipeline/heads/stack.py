"""MLPs of one shape, trained at once: batched matrix products for all of them.

Each head has the batches, the dropout and the schedule that it would have alone. A single one is trained this way too:
the gradients are worked out layer by layer, into memory that stays.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.heads.architectures import MLP, Dropout
from pipeline.heads.batches import Batch


class Stack:
    """Heads whose parameters are slices of one tensor, until `release`.

    Attributes:
        weights: all parameters of all heads, shape (count,), for an optimiser of all of them; each head's parameters
            will do as well. The gradients that `backward` sets belong to both.
    """

    def __init__(self, heads: Sequence[MLP], classes: bool) -> None:
        """`classes`: cross-entropy rather than squared error."""
        self.heads, self.classes = heads, classes
        linears = [[one for one in head.modules() if isinstance(one, nn.Linear)] for head in heads]
        dropouts = [[one for one in head.modules() if isinstance(one, Dropout)] for head in heads]
        self._dropouts = list(zip(*dropouts, strict=True))
        by_layer = [group for layer in zip(*linears, strict=True) for group in _groups(layer)]
        values = torch.cat([parameter.detach().flatten() for group in by_layer for parameter in group])
        self.weights = nn.Parameter(values)
        self.weights.grad = torch.zeros_like(values)
        shapes = [(len(heads), *group[0].shape) for group in by_layer]
        self._values, self._gradients = (_views(one, shapes) for one in (values, self.weights.grad))
        for place, group in enumerate(by_layer):
            for parameter, value, gradient in zip(group, self._values[place], self._gradients[place], strict=True):
                parameter.data, parameter.grad = value, gradient

    @torch.no_grad()
    def backward(self, batches: Sequence[Batch]) -> Tensor:
        """Sets the gradients of every head's parameters, each from a batch of its own; their losses, shape (heads,).

        All batches have one size.
        """
        hidden = self._forward(_together([batch.rows for batch in batches]))
        losses, gradient = _loss(hidden.pop(), _together([batch.values[0] for batch in batches]), self.classes)
        for layer, rows in reversed(list(enumerate(hidden))):  # `gradient` is that of the layer's output
            weight, of_weight, of_bias = self._values[2 * layer], *self._gradients[2 * layer : 2 * layer + 2]
            torch.bmm(gradient.transpose(1, 2), rows, out=of_weight)
            torch.sum(gradient, 1, out=of_bias)
            if layer:  # what was cut off or dropped is 0 in the rows, and has no gradient
                gradient = torch.ops.aten.threshold_backward(torch.bmm(gradient, weight), rows, 0)
                gradient.mul_(self._dropouts[layer - 1][0].scale)
        return losses

    def release(self) -> None:
        """Gives each head parameters of its own again."""
        for head in self.heads:
            for parameter in head.parameters():
                parameter.data, parameter.grad = parameter.data.clone(), None

    def _forward(self, rows: Tensor) -> list[Tensor]:
        """Rows (heads, n, hidden_size) to the input of each layer, and the output (heads, n, outputs) behind them."""
        hidden = [rows]
        for layer in range(len(self._values) // 2):
            weight, bias = self._values[2 * layer : 2 * layer + 2]
            dropouts = self._dropouts[layer] if layer < len(self._dropouts) else ()
            scale = dropouts[0].scale if dropouts else 1  # of dropout, here already: a ReLU lets it through
            out = torch.baddbmm(bias[:, None], hidden[-1], weight.transpose(1, 2), beta=scale, alpha=scale)
            if dropouts:
                out.relu_().mul_(Dropout.kept(dropouts, out))
            hidden.append(out)
        return hidden


def _groups(layer: Sequence[nn.Linear]) -> list[list[Tensor]]:
    """The weights of a layer of each head, and the biases."""
    return [[one.weight for one in layer], [one.bias for one in layer]]


def _views(flat: Tensor, shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
    """Tensors of these shapes that lie in `flat` one after another."""
    counts = [torch.Size(shape).numel() for shape in shapes]
    return [one.view(shape) for one, shape in zip(flat.split(counts), shapes, strict=True)]


def _together(some: Sequence[Tensor]) -> Tensor:
    """With the heads in front."""
    return some[0][None] if len(some) == 1 else torch.stack(list(some))


def _loss(outputs: Tensor, values: Tensor, classes: bool) -> tuple[Tensor, Tensor]:
    """The mean cross-entropy or squared error of each head, shape (heads,), and the gradient of their sum.

    Outputs of shape (heads, n, outputs), which that of the gradient is, too; values of shape (heads, n).
    """
    count = values.shape[1]
    if not classes:
        off = outputs[..., 0] - values.to(outputs.dtype)
        return (off**2).mean(1), (off * (2 / count))[..., None]
    logs = functional.log_softmax(outputs, -1)
    wanted = values.long()[..., None]
    losses = -logs.gather(-1, wanted)[..., 0].mean(1)
    ones = torch.ones_like(wanted, dtype=logs.dtype)
    return losses, logs.exp_().scatter_add_(-1, wanted, -ones).div_(count)
