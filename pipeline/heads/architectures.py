"""The heads: an MLP for sequences, a ConvNet for tokens.

Both take the rows of one sequence after another, without padding. Weights and dropout are drawn from the head's own
generator: the global random state is neither read nor changed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.utils import skip_init

KERNEL = 7
GAP = KERNEL // 2
CHANNELS = 32
ALL = 2**62
CHUNK = {"cpu": 4_096}  # tokens that the ConvNet convolves at a time; on other devices all


class Head(nn.Module):
    """A head maps embedding rows to one output per target; see `forward` of `MLP` and `ConvNet`.

    A user's own is a subclass with `level` (`sequence` or `token`) and the constructor `(hidden_size, outputs)`, named
    by its path in `class`. `reset` initialises linear and 2-D convolution layers; a head with others overrides it.

    Attributes:
        label_scale: per target, mean and deviation of the labels that it was trained on, where those were standardised
            (0 and 1 for classes): `in_own_units` undoes that. None where it was trained on labels as they are.
    """

    label_scale: Sequence[tuple[float, float]] | None = None

    def in_own_units(self, outputs: Sequence[Tensor]) -> list[Tensor]:
        """What `forward` gives, in the units of the labels: per target float64 on the CPU, of the same shape."""
        exact = [output.cpu().double() for output in outputs]
        if self.label_scale is None:
            return exact
        return [output * deviation + mean for output, (mean, deviation) in zip(exact, self.label_scale, strict=True)]

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

    @property
    def dropout_generator(self) -> torch.Generator | None:
        """The generator that all dropout layers draw from; None for a head without dropout."""
        return next((layer.generator for layer in self.modules() if isinstance(layer, Dropout)), None)


class Dropout(nn.Module):
    """Dropout that draws from the head's generator (`torch.nn.Dropout` draws from the global one)."""

    def __init__(self, p: float) -> None:
        """Drops a value with probability `p`."""
        super().__init__()
        self.p = p
        self.generator: torch.Generator | None = None

    def forward(self, values: Tensor) -> Tensor:
        """Any shape; the same in evaluation mode."""
        return values * self.kept([self], values[None])[0] * self.scale if self.training else values

    @property
    def share(self) -> int:
        """How many of 65,536 values are dropped: `p` to a precision of 1e-5."""
        return round(self.p * 2**16)

    @property
    def scale(self) -> float:
        """The factor of the values that are kept, so that the mean stays the same."""
        return 2**16 / (2**16 - self.share)

    @staticmethod
    def kept(layers: Sequence[Dropout], values: Tensor) -> Tensor:
        """The masks of layers of equal `p`: 1 where a layer keeps a value, else 0.

        16 random bits decide on a value, which takes a fifth of the time of `bernoulli_`. The masks are floats because
        a product with booleans is slower.

        Args:
            layers: each draws its mask from its own generator.
            values: shape (layers, ...), as of the result.
        """
        count = values[0].numel()
        words = torch.empty(len(layers), -(-count // 4), dtype=torch.int64, device=values.device)
        for layer, own in zip(layers, words.unbind(), strict=True):
            own.random_(-(2**63), None, generator=layer.generator)
        kept = values.new_empty(len(layers), count)
        torch.ge(words.view(torch.int16)[:, :count], layers[0].share - 2**15, out=kept)
        return kept.view(values.shape)


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
        pack = _Pack.of(counts, rows.device)
        hidden = self.dropout(torch.relu(_convolve(rows, self.body, pack)))
        return [_convolve(hidden, head, pack) for head in self.heads]


@dataclass(frozen=True)
class _Pack:
    """Packed sequences with padding: three places before, between and behind them.

    Attributes:
        places: the place of each token, shape (tokens,).
        chunks: first token, last token and first place of groups of whole sequences.
    """

    places: Tensor
    chunks: list[tuple[int, int, int]]

    @classmethod
    def of(cls, counts: Tensor, device: torch.device) -> _Pack:
        """`counts`: tokens of each sequence, shape (n,)."""
        lengths = counts.cpu()
        ends = lengths.cumsum(0)
        free = GAP * torch.arange(len(lengths)).repeat_interleave(lengths)
        most, chunks, begin, begin_place = CHUNK.get(device.type, ALL), list[tuple[int, int, int]](), 0, 0
        bounds = ends.tolist()
        for number, end in enumerate(bounds):
            last = number + 1 == len(bounds)
            if last or bounds[number + 1] - begin > most:
                chunks.append((begin, end, begin_place))
                begin, begin_place = end, end + GAP * (number + 1)
        return cls((torch.arange(len(free)) + free + GAP).to(device), chunks)


def _convolve(rows: Tensor, layer: Any, pack: _Pack) -> Tensor:
    """The convolution of `layer`, a Conv2d with kernel (7, 1), over packed sequences.

    The output of a sequence does not depend on its neighbours: three zeros stand between two sequences, as much as the
    padding of a sequence by itself. Rows of shape (tokens, in channels) to (tokens, out channels).
    """
    out: Tensor = _Convolution.apply(rows, layer.weight[..., 0], pack)  # type: ignore[no-untyped-call]
    return torch.add(out, layer.bias)


class _Convolution(torch.autograd.Function):
    """One matrix product gives the seven terms that each token adds to the outputs around it; shifted sums add them.

    This is done chunk by chunk, so that the terms stay in a CPU's caches.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, pack: _Pack) -> Tensor:
        """Rows (tokens, in) and weight (out, in, 7) to (tokens, out)."""
        ctx.save_for_backward(rows, weight)
        ctx.pack = pack
        out, taps = len(weight), weight.permute(1, 2, 0).reshape(weight.shape[1], -1)  # (in, 7 * out)
        result = rows.new_empty(len(rows), out)
        for begin, end, place in pack.chunks:
            places = pack.places[begin:end] - place
            window = int(places[-1]) + 1 - GAP
            spread = rows.new_zeros(window + KERNEL - 1, KERNEL * out)
            spread = spread.index_copy_(0, places, rows[begin:end] @ taps).view(-1, KERNEL, out)
            summed = spread[:window, 0].clone()
            for tap in range(1, KERNEL):
                summed += spread[tap : tap + window, tap]
            torch.index_select(summed, 0, places - GAP, out=result[begin:end])
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor, None]:
        """A token's seven terms have the gradients of the outputs around it, which are adjacent in memory."""
        rows, weight = ctx.saved_tensors
        out, into = weight.shape[:2]
        taps = weight.flip(2).permute(2, 0, 1).reshape(-1, into)  # (7 * out, in), in the order of the places
        for_taps = rows.new_zeros(into, KERNEL * out)
        for_rows = torch.empty_like(rows) if ctx.needs_input_grad[0] else None
        for begin, end, place in ctx.pack.chunks:
            places = ctx.pack.places[begin:end] - place
            window = int(places[-1]) + 1 - GAP
            spread = gradient.new_zeros(window + KERNEL - 1, out).index_copy_(0, places, gradient[begin:end])
            around = spread.as_strided((window, KERNEL * out), (out, 1)).index_select(0, places - GAP)
            for_taps.addmm_(rows[begin:end].T, around)
            if for_rows is not None:
                torch.mm(around, taps, out=for_rows[begin:end])
        return for_rows, for_taps.view(into, KERNEL, out).flip(1).permute(2, 0, 1), None


def standard_head(level: str, hidden_size: int, outputs: Sequence[int]) -> Head:
    """The head of this project for a level, its weights not drawn yet; `outputs` are those of each target."""
    return ConvNet(hidden_size, outputs) if level == "token" else MLP(hidden_size, outputs[0])


def _convolution(into: int, out: int) -> nn.Module:
    module: nn.Module = skip_init(nn.Conv2d, into, out, kernel_size=(KERNEL, 1), padding=(KERNEL // 2, 0))
    return module
