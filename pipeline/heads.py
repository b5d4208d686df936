"""The heads: an MLP for sequences, a ConvNet for tokens.

Both take rows packed one sequence after another, so there is no padding that could add to anything. Weights and dropout
come from the head's own generator: the global random state is neither read nor changed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.utils import skip_init

KERNEL = 7
CHANNELS = 32


class Head(nn.Module):
    """A head maps embedding rows to one output per target; see `forward` of `MLP` and `ConvNet`.

    A user's own is a subclass with `level` (`sequence` or `token`) and the constructor `(hidden_size, outputs)`, named
    by its path in `class`. `reset` initialises linear and 2-D convolution layers; one with others overrides it.
    """

    def reset(self, seed: int) -> None:
        """Fresh weights, as torch initialises linear and convolution layers, and dropout, both from `seed`.

        Weights and biases are uniform in ±1/sqrt(fan_in) (`torch.nn.Linear`, `torch.nn.Conv2d`), the same on every
        device. Call it where the head is to be trained: dropout draws on the device.
        """
        generator = torch.Generator().manual_seed(seed)
        own = int(torch.randint(2**62, (), generator=generator))  # dropout must not repeat the weights' numbers
        dropout = torch.Generator(next(self.parameters()).device).manual_seed(own)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                bound = 1 / math.sqrt(module.weight[0].numel())
                for parameter in module.parameters():
                    values = torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator)
                    parameter.data.copy_(values)
            elif isinstance(module, Dropout):
                module.generator = dropout


class Dropout(nn.Module):
    """Dropout that draws from a generator of its own (`torch.nn.Dropout` draws from the global one)."""

    def __init__(self, p: float) -> None:
        """Drops a value with probability `p`."""
        super().__init__()
        self.p = p
        self.generator: torch.Generator | None = None

    def forward(self, values: Tensor) -> Tensor:
        """Any shape; the same in evaluation mode."""
        if not self.training:
            return values
        keep = torch.empty_like(values).bernoulli_(1 - self.p, generator=self.generator)
        return values * keep / (1 - self.p)


class MLP(Head):
    """Hidden layers of `hidden_size`, 256 and 128, each with ReLU and dropout 0.1; then the output layer."""

    def __init__(self, hidden_size: int, outputs: int) -> None:
        """`outputs`: 1 for regression, else the number of classes."""
        super().__init__()
        widths = [hidden_size, hidden_size, 256, 128]
        layers: list[nn.Module] = []
        for into, out in pairwise(widths):
            layers += [skip_init(nn.Linear, into, out), nn.ReLU(), Dropout(0.1)]
        self.layers = nn.Sequential(*layers, skip_init(nn.Linear, widths[-1], outputs))

    def forward(self, rows: Tensor, counts: Tensor) -> list[Tensor]:
        """Rows of shape (n, hidden_size), one per sequence, to one tensor of shape (n, outputs)."""
        assert len(rows) == len(counts)
        return [self.layers(rows)]


class ConvNet(Head):
    """A convolution `hidden_size` to 32 with ReLU and dropout 0.25, then one convolution per target.

    Kernels (7, 1), padding (3, 0): a position sees the 13 around it, of its own sequence alone.
    """

    def __init__(self, hidden_size: int, outputs: Sequence[int]) -> None:
        """`outputs`: for each target, 1 for regression, else the number of classes."""
        super().__init__()
        self.body = _convolution(hidden_size, CHANNELS)
        self.dropout = Dropout(0.25)
        self.heads = nn.ModuleList(_convolution(CHANNELS, out) for out in outputs)

    def forward(self, rows: Tensor, counts: Tensor) -> list[Tensor]:
        """Rows to one output per target.

        Args:
            rows: tokens of all sequences, one sequence after another, shape (tokens, hidden_size).
            counts: tokens of each sequence, shape (n,).

        Returns:
            For each target, shape (tokens, outputs).
        """
        gap = KERNEL // 2
        sequence = torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts)
        places = torch.arange(len(rows), device=rows.device) + gap * (sequence + 1)
        length = len(rows) + gap * (len(counts) + 1)
        hidden = self.dropout(torch.relu(convolve(rows, self.body, places, length)))
        return [convolve(hidden, head, places, length) for head in self.heads]


def convolve(rows: Tensor, layer: nn.Module, places: Tensor, length: int) -> Tensor:
    """The convolution of `layer` over packed sequences: one matrix product, then seven shifted sums.

    Between two sequences lie three places that stay zero, as the padding of a sequence alone would: what a sequence
    gets does not depend on its neighbours.

    Args:
        rows: shape (tokens, in channels).
        layer: a Conv2d with kernel (7, 1).
        places: where each token lies among `length` places, shape (tokens,).
        length: number of places, gaps counted.

    Returns:
        Shape (tokens, out channels).
    """
    assert isinstance(layer, nn.Conv2d)
    assert layer.bias is not None
    weight = layer.weight[..., 0]  # (out, in, 7)
    taps = rows @ weight.permute(1, 2, 0).reshape(rows.shape[1], -1)  # (tokens, 7 * out)
    spread = taps.new_zeros(length, taps.shape[1]).index_copy(0, places, taps)
    spread = spread.view(length, KERNEL, layer.out_channels)
    window = length - KERNEL + 1
    summed = sum((spread[k : window + k, k] for k in range(1, KERNEL)), spread[:window, 0])
    return summed.index_select(0, places - KERNEL // 2) + layer.bias


def _convolution(into: int, out: int) -> nn.Module:
    module: nn.Module = skip_init(nn.Conv2d, into, out, kernel_size=(KERNEL, 1), padding=(KERNEL // 2, 0))
    return module
