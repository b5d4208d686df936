"""Training heads, per epoch: ours, plain autograd, and the reference's procedure.

    python benchmarks/heads.py [--proteins FOLDER] [--limit N] [--rounds 3] [--cpu-time] [--json FILE]

Plain autograd is torch's layers, `loss.backward()` and torch's Adam, on the batches that ours trains on. The ConvNet is
trained on rows of random numbers of width 320, as many as the proteins have tokens; the MLP on 10,000 rows (the
reference with persistent workers), beside the matrix products that it consists of; MLPs of eight seeds on 2,000 rows of
width 512 in batches of 32, at once and one after another. The losses of ours and the reference are compared first: same
weights, same batches, no dropout.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import reference
import torch
from timing import in_turn, report, write
from torch import Tensor, nn
from torch.nn import functional
from work import chosen, parser

from pipeline import Store, Task
from pipeline.data.parts import Part, Target
from pipeline.embed import Embeddings, embed
from pipeline.encoders.protocol import Encoder
from pipeline.heads.architectures import Dropout, Head
from pipeline.heads.batches import Batch, Data
from pipeline.heads.fit import fit
from pipeline.heads.loss import loss_of
from pipeline.load import Examples
from pipeline.train_head import make_head

CPU = torch.device("cpu")
EPOCHS = 3  # of which the mean is taken
CLOCK = [time.perf_counter]


class Random(Encoder):
    """An encoder of random numbers."""

    max_seq_length: int | None = None
    device = CPU

    def __init__(self, hidden_size: int) -> None:
        """Any width."""
        self.hidden_size, self.digest = hidden_size, f"random {hidden_size}"

    def hidden_states(self, sequences: Sequence[str]) -> list[Tensor]:
        """See `pipeline.Encoder`."""
        return [torch.randn(len(sequence), self.hidden_size) for sequence in sequences]

    def count_unknown(self, sequences: Sequence[str]) -> list[tuple[int, int]]:
        """See `pipeline.Encoder`."""
        return [(0, len(sequence)) for sequence in sequences]


def values(rows: int, task: Task) -> Examples:
    """A number for each of `rows` short sequences."""
    texts = [f"{number:08d}" for number in range(rows)]
    ones, labels = np.ones(rows, np.int64), np.random.default_rng(0).standard_normal(rows)
    part = Part(texts, texts, ones, [labels], [np.ones(rows, bool)], 0, ones)
    return Examples(task, (Target("y", None, 1),), part, part)


def tokens(options: argparse.Namespace) -> Examples:
    """The proteins' labels."""
    return chosen(options, "proteins", EPOCHS)[2]


def heads_of(embeddings: Embeddings, seeds: Sequence[int]) -> list[Head]:
    """Fresh heads of a task."""
    examples, width = embeddings.examples, embeddings.table.hidden_size
    return [make_head(replace(examples.task, random_seed=seed), width, examples.targets, CPU) for seed in seeds]


def ours(embeddings: Embeddings, seeds: Sequence[int] = (0,)) -> float:
    """Seconds of an epoch of fresh heads at once, the reading of the store included."""
    heads, began = heads_of(embeddings, seeds), CLOCK[0]()
    fit(heads, seeds, embeddings, CPU)
    return (CLOCK[0]() - began) / embeddings.examples.task.num_epochs


class PlainConvNet(nn.Module):
    """Two `Conv2d` over sequences that lie one behind the other, three free places between them."""

    def __init__(self, width: int, outputs: int) -> None:
        """One target."""
        super().__init__()
        self.body = nn.Conv2d(width, 32, (7, 1), padding=(3, 0))
        self.dropout = nn.Dropout(0.25)
        self.head = nn.Conv2d(32, outputs, (7, 1), padding=(3, 0))

    def forward(self, rows: Tensor, counts: Tensor) -> Tensor:
        """Rows (tokens, width) to (tokens, outputs)."""
        places = torch.arange(len(rows)) + 3 * torch.arange(len(counts)).repeat_interleave(counts)
        hidden = self.dropout(torch.relu(self._convolve(self.body, rows, places)))
        return self._convolve(self.head, hidden, places)

    def _convolve(self, layer: nn.Module, rows: Tensor, places: Tensor) -> Tensor:
        image = rows.new_zeros(int(places[-1]) + 1, rows.shape[1]).index_copy(0, places, rows)
        convolved: Tensor = layer(image.T[None, :, :, None])[0, :, :, 0]
        return convolved.T.index_select(0, places)


class PlainMLPs(nn.Module):
    """MLPs of several seeds: weights of shape (seeds, inputs, outputs) in batched products."""

    def __init__(self, width: int, seeds: int) -> None:
        """One output each."""
        super().__init__()
        sizes = [(seeds, *size) for size in pairwise([width, width, 256, 128, 1])]
        self.weights = nn.ParameterList(0.05 * torch.randn(size) for size in sizes)
        self.biases = nn.ParameterList(torch.zeros(size[0], 1, size[2]) for size in sizes)

    def forward(self, rows: Tensor) -> Tensor:
        """Rows (seeds, n, width) to (seeds, n)."""
        *layers, last = zip(self.weights, self.biases, strict=True)
        for weight, bias in layers:
            rows = functional.dropout(torch.relu(torch.baddbmm(bias, rows, weight)), 0.1, self.training)
        output: Tensor = torch.baddbmm(last[1], rows, last[0])[..., 0]
        return output


def train_plainly(head: nn.Module, embeddings: Embeddings, loss: Callable[[Batch], Tensor], seeds: int = 1) -> float:
    """Seconds of an epoch of plain autograd, the reading of the store included."""
    began, examples = CLOCK[0](), embeddings.examples
    data, count, task = Data(embeddings.rows("train"), examples.train, CPU), len(examples.train), examples.task
    adam = torch.optim.Adam(head.parameters(), lr=1e-3, fused=True)
    for _ in range(task.num_epochs):
        orders = [torch.randperm(count).split(task.batch_size) for _ in range(seeds)]
        order = torch.cat([torch.cat(batch) for batch in zip(*orders, strict=True)]).numpy()
        total = torch.zeros(())
        for batch in data.batches(order, seeds * task.batch_size):
            adam.zero_grad()
            value = loss(batch)
            value.backward()
            adam.step()
            total += value.detach()
        float(total)
    return (CLOCK[0]() - began) / task.num_epochs


def plain(embeddings: Embeddings) -> float:
    """Seconds of an epoch of a head of torch's layers."""
    targets, width = embeddings.examples.targets, embeddings.table.hidden_size
    if embeddings.examples.task.level == "token":
        net = PlainConvNet(width, targets[0].outputs)
        return train_plainly(
            net, embeddings, lambda b: loss_of([net(b.rows, b.counts)], b.values, b.masks, targets, weighted=True)
        )
    mlp = reference.mlp(width, 1)
    return train_plainly(mlp, embeddings, lambda b: loss_of([mlp(b.rows)], b.values, b.masks, targets, weighted=True))


def plain_at_once(embeddings: Embeddings, seeds: int) -> float:
    """Seconds of an epoch of MLPs of several seeds."""
    mlps = PlainMLPs(embeddings.table.hidden_size, seeds)

    def loss(batch: Batch) -> Tensor:
        off: Tensor = mlps(batch.rows.view(seeds, -1, batch.rows.shape[1])) - batch.values[0].view(seeds, -1)
        total: Tensor = (off**2).mean(1).sum()
        return total

    return train_plainly(mlps, embeddings, loss, seeds)


def data_of(embeddings: Embeddings) -> reference.TokenData | reference.ValueData:
    """What the reference makes of the same."""
    examples, part = embeddings.examples, embeddings.examples.train
    rows = embeddings.rows("train").gather(np.arange(len(part)))
    if examples.task.level == "sequence":
        return reference.ValueData(rows, torch.from_numpy(part.values[0]))
    ends = np.cumsum(part.counts)[:-1]
    labels, masks = np.split(part.values[0], ends), np.split(part.masks[0], ends)
    states = [state.clone() for state in rows.split(part.counts.tolist())]
    return reference.TokenData(states, labels, masks, examples.targets[0].outputs, 1024)


def theirs(embeddings: Embeddings, data: reference.TokenData | reference.ValueData) -> float:
    """Seconds of an epoch of the reference's procedure."""
    task, width = embeddings.examples.task, embeddings.table.hidden_size
    head = reference.mlp(width, 1) if task.level == "sequence" else reference.ConvNet(width, 3)
    training = reference.epochs(head, data, 1e-3, persistent=task.level == "sequence")
    if task.level == "sequence":
        next(training)  # its workers stay
    began = CLOCK[0]()
    for _ in range(task.num_epochs):
        next(training)
    return (CLOCK[0]() - began) / task.num_epochs


def products(width: int, rows: int, batch_size: int) -> float:
    """Seconds of the matrix products alone in an epoch of an MLP, forward and backward: about the least there is."""
    widths = [width, width, 256, 128, 1]
    inputs = [torch.randn(batch_size, one) for one in widths]
    weights = [torch.randn(out, into) for into, out in pairwise(widths)]
    began = CLOCK[0]()
    for _ in range(-(-rows // batch_size)):
        for layer, weight in enumerate(weights):
            torch.mm(inputs[layer], weight.T)
            torch.mm(inputs[layer + 1].T, inputs[layer])  # stands for the gradient of the weight
            if layer:
                torch.mm(inputs[layer + 1], weight)  # and that of the layer's input
    return CLOCK[0]() - began


def difference(embeddings: Embeddings, data: reference.TokenData | reference.ValueData) -> float:
    """The largest between the losses of both: same weights and batches, no dropout, three epochs."""
    task = replace(embeddings.examples.task, num_epochs=3, shuffle=False)
    same = replace(embeddings, examples=replace(embeddings.examples, task=task))
    (head,) = heads_of(same, [0])
    sizes = embeddings.table.hidden_size, embeddings.examples.targets[0].outputs
    other = reference.mlp(*sizes) if task.level == "sequence" else reference.ConvNet(*sizes)
    kinds = (nn.Linear, nn.Conv2d)
    layers = [[one for one in module.modules() if isinstance(one, kinds)] for module in (head, other)]
    for one, its in zip(*layers, strict=True):
        its.load_state_dict(one.state_dict())
    for one in [*head.modules(), *other.modules()]:
        if isinstance(one, (Dropout, nn.Dropout)):
            one.p = 0.0
    ((losses, _),) = fit([head], [0], same, CPU)
    training = reference.epochs(other, data, 1e-3)
    return max(abs(loss - next(training)) for loss in losses)


def main() -> None:
    """Prints the tables."""
    arguments = parser(__doc__)
    arguments.add_argument("--cpu-time", action="store_true", help="CPU seconds of one thread: on a busy machine")
    options = arguments.parse_args()
    if options.cpu_time:
        torch.set_num_threads(1)
        CLOCK[0] = time.process_time
    results = []
    with tempfile.TemporaryDirectory() as folder:
        store = Store(Path(folder))
        task = Task(level="sequence", batch_size=128, num_epochs=EPOCHS, optim={"name": "adam", "lr": 1e-3})
        (net,) = embed([tokens(options)], Random(320), store)
        (mlp,) = embed([values(10_000, task)], Random(320), store)
        rows = mlp.rows("train").gather(np.arange(10_000))  # labels that can be learnt: noise would magnify rounding
        mlp.examples.train.values[0][:] = rows[:, :8].sum(1).numpy()
        (small,) = embed([values(2_000, replace(task, batch_size=32))], Random(512), store)
        for name, one in (("ConvNet", net), ("MLP, 10,000 rows", mlp)):
            data = data_of(one)
            worst = difference(one, data)
            assert worst < 1e-4, worst
            ways: dict[str, Callable[[], float]] = {"ours": partial(ours, one), "plain autograd": partial(plain, one)}
            if not options.cpu_time:  # the reference has other processes work too
                ways["reference"] = partial(theirs, one, data)
            if one is mlp:
                ways["limit: products alone"] = partial(products, 320, 10_000, task.batch_size)
            title = f"an epoch of a {name}; losses differ by {worst:.0e}"
            results.append(report(title, in_turn(ways, options.rounds, warm=True), "ours"))
        seeds = range(8)
        ways = {
            "ours, at once": partial(ours, small, seeds),
            "ours, one after another": lambda: sum(ours(small, [seed]) for seed in seeds),
            "plain autograd, at once": partial(plain_at_once, small, len(seeds)),
            "plain autograd, one after another": lambda: sum(plain(small) for _ in seeds),
        }
        results.append(
            report("an epoch of MLPs of eight seeds", in_turn(ways, options.rounds, warm=True), "ours, at once")
        )
    write(results, options.json)


if __name__ == "__main__":
    main()
