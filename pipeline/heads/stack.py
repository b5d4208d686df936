"""MLPs of one shape, trained at once with batched matrix products.

Each head has the batches and the dropout that it would have alone. A single head is trained this way too: the gradients
are written out layer by layer, into memory that is used again at each step.
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
        weights: all parameters of all heads, shape (count,). `backward` sets its gradient; the gradients of the
            heads' own parameters are slices of that.
    """

    def __init__(self, heads: Sequence[MLP], classes: bool) -> None:
        """`classes`: cross-entropy rather than squared error."""
        self.heads, self.classes = heads, classes
        linears = [[layer for layer in head.modules() if isinstance(layer, nn.Linear)] for head in heads]
        dropouts = [[layer for layer in head.modules() if isinstance(layer, Dropout)] for head in heads]
        self._dropouts = list(zip(*dropouts, strict=True))
        groups = []  # of each layer the weights of all heads, then their biases
        for layers in zip(*linears, strict=True):
            groups += [[layer.weight for layer in layers], [layer.bias for layer in layers]]
        values = torch.cat([parameter.detach().flatten() for group in groups for parameter in group])
        self.weights = nn.Parameter(values)
        self.weights.grad = torch.zeros_like(values)
        shapes = [(len(heads), *group[0].shape) for group in groups]
        self._values, self._gradients = (_views(flat, shapes) for flat in (values, self.weights.grad))
        for group, slices, gradients in zip(groups, self._values, self._gradients, strict=True):
            for parameter, value, gradient in zip(group, slices, gradients, strict=True):
                parameter.data, parameter.grad = value, gradient

    @torch.no_grad()
    def backward(self, batch: Batch) -> Tensor:
        """Sets the gradients of every head.

        Args:
            batch: for each head in turn, as many sequences.

        Returns:
            The loss of each head, shape (heads,).
        """
        hidden = self._forward(batch.rows.view(len(self.heads), -1, batch.rows.shape[1]))
        losses, gradient = _loss(hidden.pop(), batch.values[0].view(len(self.heads), -1), self.classes)
        for layer, rows in reversed(list(enumerate(hidden))):  # `gradient` is of the layer's output
            weight, of_weight, of_bias = self._values[2 * layer], *self._gradients[2 * layer : 2 * layer + 2]
            torch.bmm(gradient.transpose(1, 2), rows, out=of_weight)
            torch.sum(gradient, 1, out=of_bias)
            if layer:  # rows that ReLU or dropout set to 0 have no gradient
                gradient = torch.ops.aten.threshold_backward(torch.bmm(gradient, weight), rows, 0)
                gradient.mul_(self._dropouts[layer - 1][0].scale)
        return losses

    def release(self) -> None:
        """Gives each head parameters of its own again."""
        for head in self.heads:
            for parameter in head.parameters():
                parameter.data, parameter.grad = parameter.data.clone(), None

    def _forward(self, rows: Tensor) -> list[Tensor]:
        """Rows (heads, n, hidden_size) to the input of each layer, and last the output (heads, n, outputs)."""
        hidden = [rows]
        for layer in range(len(self._values) // 2):
            weight, bias = self._values[2 * layer : 2 * layer + 2]
            dropouts = self._dropouts[layer] if layer < len(self._dropouts) else ()
            scale = dropouts[0].scale if dropouts else 1  # of dropout, before the ReLU: the product can do it
            out = torch.baddbmm(bias[:, None], hidden[-1], weight.transpose(1, 2), beta=scale, alpha=scale)
            if dropouts:
                out.relu_().mul_(Dropout.kept(dropouts, out))
            hidden.append(out)
        return hidden


def _views(flat: Tensor, shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
    """Tensors of these shapes that share the memory of `flat`, in this order."""
    counts = [torch.Size(shape).numel() for shape in shapes]
    return [part.view(shape) for part, shape in zip(flat.split(counts), shapes, strict=True)]


def _loss(outputs: Tensor, values: Tensor, classes: bool) -> tuple[Tensor, Tensor]:
    """The mean cross-entropy or squared error of each head, shape (heads,), and the gradient of their sum.

    Outputs and gradient have the shape (heads, n, outputs), values (heads, n).
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
