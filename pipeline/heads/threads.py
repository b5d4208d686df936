"""How many threads train a head on the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from pipeline.heads.architectures import Head
from pipeline.load import Examples

FLOPS_PER_THREAD = 1e9  # of an optimizer step; `benchmarks/threads.py` shows what it saves and costs


def threads_of(head: Head, examples: Examples) -> int:
    """The threads that train a head: on a CPU all of torch's for a large one, one for a small one.

    That does not depend on how many heads are trained at once, nor, for a small one, on the machine. Where other
    programs keep the processors busy, each of the many small products of a step waits for its last thread.
    """
    if next(head.parameters()).device.type != "cpu":
        return torch.get_num_threads()
    units = examples.train.counts.mean() * examples.task.batch_size
    parameters = sum(parameter.numel() for parameter in head.parameters())
    work = 6 * units * parameters  # a product and a sum for each, of the outputs and of two gradients
    return max(1, min(torch.get_num_threads(), round(float(work) / FLOPS_PER_THREAD)))


@contextmanager
def on_threads(count: int) -> Iterator[None]:
    """Torch computes with so many threads; afterwards with as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
