"""Training heads: ours and the reference's procedure per epoch, and several heads at once beside one after another.

    python benchmarks/heads.py [--proteins FOLDER] [--limit N] [--rounds 3] [--json FILE]

The ConvNet is trained on rows of random numbers of width 320, as many as the proteins have tokens; the MLP on 10,000
rows (the reference with persistent workers), beside the matrix products that it consists of; eight MLPs on 2,000 rows
of width 512 in batches of 32. The losses of both procedures are compared first: same weights, same batches, no dropout.
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
from work import chosen, parser

from pipeline import Encoder, Store, Task
from pipeline.embed import Embeddings, embed
from pipeline.heads.architectures import Dropout, Head
from pipeline.heads.fit import fit
from pipeline.load import Examples, Part, Target
from pipeline.train_head import make_head

CPU = torch.device("cpu")


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
    return chosen(options, "proteins")[2]


def heads_of(some: Sequence[Embeddings]) -> list[Head]:
    """Fresh heads."""
    return [make_head(one.examples.task, one.table.hidden_size, one.examples.targets, CPU) for one in some]


def ours(some: Sequence[Embeddings]) -> float:
    """Seconds of an epoch of fresh heads at once, the reading of the store included."""
    heads, began = heads_of(some), time.perf_counter()
    fit(heads, some, CPU)
    return (time.perf_counter() - began) / some[0].examples.task.num_epochs


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
    began = time.perf_counter()
    for _ in range(task.num_epochs):
        next(training)
    return (time.perf_counter() - began) / task.num_epochs


def products(width: int, rows: int, batch_size: int) -> float:
    """Seconds of the matrix products alone in an epoch of an MLP, forward and backward: about the least there is."""
    widths = [width, width, 256, 128, 1]
    inputs = [torch.randn(batch_size, one) for one in widths]
    weights = [torch.randn(out, into) for into, out in pairwise(widths)]
    began = time.perf_counter()
    for _ in range(-(-rows // batch_size)):
        for layer, weight in enumerate(weights):
            torch.mm(inputs[layer], weight.T)
            torch.mm(inputs[layer + 1].T, inputs[layer])  # stands for the gradient of the weight
            if layer:
                torch.mm(inputs[layer + 1], weight)  # and that of the layer's input
    return time.perf_counter() - began


def difference(embeddings: Embeddings, data: reference.TokenData | reference.ValueData) -> float:
    """The largest between the losses of both: same weights and batches, no dropout, three epochs."""
    task = replace(embeddings.examples.task, num_epochs=3, shuffle=False)
    same = replace(embeddings, examples=replace(embeddings.examples, task=task))
    (head,) = heads_of([same])
    sizes = embeddings.table.hidden_size, embeddings.examples.targets[0].outputs
    other = reference.mlp(*sizes) if task.level == "sequence" else reference.ConvNet(*sizes)
    kinds = (nn.Linear, nn.Conv2d)
    layers = [[one for one in module.modules() if isinstance(one, kinds)] for module in (head, other)]
    for one, its in zip(*layers, strict=True):
        its.load_state_dict(one.state_dict())
    for one in [*head.modules(), *other.modules()]:
        if isinstance(one, (Dropout, nn.Dropout)):
            one.p = 0.0
    ((losses, _),) = fit([head], [same], CPU)
    training = reference.epochs(other, data, 1e-3)
    return max(abs(loss - next(training)) for loss in losses)


def main() -> None:
    """Prints the tables."""
    options = parser(__doc__).parse_args()
    results = []
    with tempfile.TemporaryDirectory() as folder:
        store = Store(Path(folder))
        task = Task(level="sequence", batch_size=128, num_epochs=10, optim={"name": "adam", "lr": 1e-3})
        few = replace(task, batch_size=32)
        (net,) = embed([tokens(options)], Random(320), store)
        (mlp,) = embed([values(10_000, task)], Random(320), store)
        rows = mlp.rows("train").gather(np.arange(10_000))  # labels that can be learnt: noise would magnify rounding
        mlp.examples.train.values[0][:] = rows[:, :8].sum(1).numpy()
        eight = embed([values(2_000, replace(few, random_seed=seed)) for seed in range(8)], Random(512), store)
        for name, one in (("ConvNet", net), ("MLP, 10,000 rows", mlp)):
            data = data_of(one)
            worst = difference(one, data)
            assert worst < 1e-4, worst
            ways: dict[str, Callable[[], float]] = {
                "ours": partial(ours, [one]),
                "reference": partial(theirs, one, data),
            }
            if one is mlp:
                ways["limit: products alone"] = partial(products, 320, 10_000, task.batch_size)
            title = f"an epoch of a {name}; losses differ by {worst:.0e}"
            results.append(report(title, in_turn(ways, options.rounds), "ours"))
        at_once: dict[str, Callable[[], float]] = {
            "eight at once": partial(ours, eight),
            "one after another": lambda: sum(ours([one]) for one in eight),
        }
        results.append(
            report("an epoch of eight MLPs", in_turn(at_once, options.rounds, warm=True), "one after another")
        )
    write(results, options.json)


if __name__ == "__main__":
    main()
