"""A measurement of a training, which its ranks make as one: the same weights, the same buffers, one store."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from pipeline import validation
from pipeline.config.schema import Config
from pipeline.encoders.digests import weights_digest
from pipeline.encoders.parts import is_dtensor, is_sharded
from pipeline.encoders.protocol import Encoder
from pipeline.engines.workers import ALONE, Workers
from pipeline.errors import CheckpointError
from pipeline.load import Examples
from pipeline.store.embedding_table import Store
from pipeline.store.temporary import temporary_folder
from pipeline.tracking.protocol import AtStep, Tracker
from pipeline.training.progress import Progress


@contextmanager
def measuring_store(config: Config, workers: Workers) -> Iterator[Store]:
    """The store of a measurement: the configured one, or a temporary folder in it, which all ranks share if they can.

    Where they have no file system in common each has a folder of its own. The configured one is then the first's alone:
    ranks of one node would wait for one another's lock.
    """
    root = Path(config.store).expanduser()
    with temporary_folder(root / "live") as own:
        first = workers.from_first(lambda: own)  # a new folder: who sees it has the same file system
        shared = all(workers.together(first.is_dir))
        takes_root = config.keep_embeddings and (shared or workers.rank == 0)
        folder = root if takes_root else first if shared else own
        yield replace(Store.from_config(config, folder), shared=shared)


@contextmanager
def first_ranks_buffers(module: nn.Module, workers: Workers) -> Iterator[None]:
    """Within, the buffers are those of the first rank: under DDP each rank has, for example, batch norms of its own."""
    if workers.count == 1:
        yield
        return
    every = [one for one in module.buffers() if not isinstance(one, UninitializedBuffer)]
    buffers = [one for one in every if not is_dtensor(one)]
    digests = workers.together(lambda: [weights_digest([("", one.detach().cpu())]) for one in buffers])
    if len({len(each) for each in digests}) > 1:
        raise CheckpointError(f"{type(module).__name__}: the ranks have other buffers; set mode to blocking")
    differing = [one for one, *each in zip(buffers, *digests, strict=True) if len({*each}) > 1]
    theirs: list[Tensor] = workers.from_first(lambda: [one.detach().cpu() for one in differing])
    before = [one.detach().clone() for one in differing]
    _copy(differing, theirs)
    try:
        yield
    finally:
        _copy(differing, before)


@torch.no_grad()
def _copy(buffers: list[Tensor], values: list[Tensor]) -> None:
    for buffer, value in zip(buffers, values, strict=True):
        buffer.copy_(value)


def check_same(encoder: Encoder, module: nn.Module, workers: Workers) -> None:
    """Raises CheckpointError where the ranks have different weights, as between the steps of local SGD.

    The digest of an encoder that is not reusable says nothing of them: then those of the whole module are compared,
    except where each rank has a part of them.
    """
    if workers.count == 1:
        return

    def digest() -> str:
        if encoder.reusable:
            return encoder.digest
        named = [] if is_sharded(module) else module.named_parameters()
        return weights_digest((name, one) for name, one in named if not isinstance(one, UninitializedParameter))

    digests = workers.together(digest)
    if len({*digests}) > 1:
        raise CheckpointError("the ranks have different weights; set mode to blocking, which measures those of rank 0")


def measured(
    encoder: Encoder,
    config: Config,
    examples: Sequence[Examples],
    progress: Progress,
    tracker: Tracker,
    mirrors: Tracker,
    source: str,
    step: int,
    workers: Workers = ALONE,
) -> dict[str, float]:
    """Measures the weights of a training, and follows what they have changed by.

    Returns all metrics, changes too; on other ranks than the first, none.

    Args:
        encoder: of the weights.
        config: of the measurement.
        examples: of each task.
        progress: knows the measurements before.
        tracker: see `measure_and_publish`.
        mirrors: see `measure_and_publish`.
        source: see `measure_and_publish`.
        step: of the training.
        workers: that share the measurement.

    Raises:
        PipelineError: see `validate`.
    """
    with measuring_store(config, workers) as store:
        if workers.rank > 0:
            validation.validate(encoder, config.tasks, store, examples=examples, workers=workers)
            return {}
        scores, changes = validation.measure_and_publish(
            encoder,
            config,
            store,
            tracker,
            mirrors,
            source,
            step,
            f"step={step}",
            examples=examples,
            compare=lambda scores: progress.log(scores, step, tracker, AtStep(mirrors, step)),
            workers=workers,
        )
    return validation.metrics_of(scores) | dict(changes.values)
