"""Stages 3 and 4 with several workers: heads, probes and baselines of all tasks are fitted at once, then scored.

Each gives the bits that it has in one process. So the seeds of a task that are trained at once stay together; other
heads of one task, and its probe, may be fitted by different workers. What they fit and score is sent to them where they
have not embedded it themselves.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from pipeline.baseline_scores import beside_baseline, try_baseline
from pipeline.embed import Embeddings
from pipeline.engines.workers import ALONE, Workers, here
from pipeline.heads.fit import trained_at_once
from pipeline.heads.probe import fit_probe
from pipeline.score import Scores, score
from pipeline.store.embedding_table import Store
from pipeline.train_head import FittedHead, PackedHead, fit_seeds, fitted_head

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """What a worker fits.

    Attributes:
        task: the place of the task in the list.
        kind: `heads`, `probe` or `baseline`.
        seeds: of the heads.
        cost: in rows that a head is trained on, roughly.
    """

    task: int
    kind: str
    seeds: tuple[int, ...]
    cost: float


@dataclass(frozen=True)
class Shared:
    """For each task what `train_head` gives, and the scores beside those of the baseline; the same on every worker."""

    heads: list[FittedHead]
    scores: list[Scores]


def share_out(
    embeddings: Sequence[Embeddings],
    store: Store,
    device: torch.device,
    in_list: bool,
    with_scores: bool,
    workers: Workers,
) -> Shared:
    """Fits and scores all tasks.

    Raises:
        PipelineError: see `train_head`.
    """
    workers, device = for_heads(embeddings, device, workers)
    jobs = [job for place, one in enumerate(embeddings) for job in _jobs(place, one, with_scores)]
    fit = partial(_fit, embeddings=embeddings, store=store, device=device)
    done = list(zip(jobs, workers.each(fit, jobs, [job.cost for job in jobs]), strict=True))

    def of(place: int, kind: str) -> list[Any]:
        return [result for job, result in done if (job.task, job.kind) == (place, kind)]

    def head(place: int, device: torch.device) -> FittedHead:
        one, task = embeddings[place], embeddings[place].examples.task
        packed = {head.head.seed: head for heads in of(place, "heads") for head in heads}
        heads = [packed[seed].unpacked(one, device) for seed in task.seeds]
        return fitted_head(task, heads, *(of(place, "probe") or [None]))

    def scored(place: int) -> Any:
        measured = score(embeddings[place], head(place, device), in_list)
        found = beside_baseline(measured, store, device, in_list, *of(place, "baseline"))
        return replace(found, examples=None)  # type: ignore[arg-type]  # every worker has them

    places = range(len(embeddings))
    heads = here(workers, lambda: [head(place, torch.device("cpu")) for place in places])
    if not with_scores:
        return Shared(heads, [])
    scores = workers.each(scored, places, [float(len(one.examples.test)) for one in embeddings])
    return Shared(heads, [replace(one, examples=these.examples) for one, these in zip(scores, embeddings, strict=True)])


def for_heads(embeddings: Sequence[Embeddings], device: torch.device, workers: Workers) -> tuple[Workers, torch.device]:
    """Who fits heads, and on which device: this process, where others would have to be sent more than it has in memory.

    Ranks have the rows already, or read them from the same files.
    """
    if workers.count > 1 or not workers.shares or all(one.all_rows.in_memory for one in embeddings):
        return workers, device
    logger.info("heads and scores are made in this process: the embeddings are more than memory_budget")
    return ALONE, device if device.type != "cuda" or torch.cuda.is_available() else torch.device("cpu")


def _jobs(place: int, embeddings: Embeddings, with_baseline: bool) -> list[Job]:
    examples = embeddings.examples
    task, rows = examples.task, float(examples.train.counts.sum())
    at_once = trained_at_once(task, examples.targets, len(task.seeds))
    groups = [tuple(task.seeds)] if at_once else [(seed,) for seed in task.seeds]
    jobs = [Job(place, "heads", seeds, rows * task.num_epochs * len(seeds)) for seeds in groups]
    if with_baseline and task.baselines:
        jobs.append(Job(place, "baseline", (), sum(job.cost for job in jobs)))
    return jobs if task.probe == "none" else [*jobs, Job(place, "probe", (), rows / 2)]


def _fit(job: Job, embeddings: Sequence[Embeddings], store: Store, device: torch.device) -> Any:
    own = embeddings[job.task]
    if job.kind == "probe":
        return fit_probe(own)
    if job.kind == "baseline":
        return try_baseline(own.examples, store, device)
    return [PackedHead.of(head) for head in fit_seeds(own, job.seeds, store, device)]
