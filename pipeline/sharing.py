"""Stages 3 and 4 with several workers: heads, probes and baselines of all tasks are fitted at once, then scored.

Each gives the bits that it has in one process. So the seeds of a task that are trained at once stay together; other
heads of one task, and its probe, may be fitted by different workers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from pipeline.baseline_scores import beside_baseline, try_baseline
from pipeline.embed import Embeddings
from pipeline.engines.workers import Workers, here
from pipeline.heads.fit import trained_at_once
from pipeline.heads.probe import fit_probe
from pipeline.score import Scores, score
from pipeline.store.embedding_table import Store
from pipeline.train_head import FittedHead, PackedHead, fit_seeds, fitted_head


@dataclass(frozen=True)
class Job:
    """What one worker fits.

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
    jobs = [job for place, one in enumerate(embeddings) for job in _jobs(place, one, with_scores)]
    mine = _shared_out(jobs, workers.count)[workers.rank]
    found = workers.together(lambda: [(job, _fit(job, embeddings[job.task], store, device)) for job in mine])
    done = [pair for of_worker in found for pair in of_worker]

    def of(place: int, kind: str) -> list[Any]:
        return [result for job, result in done if (job.task, job.kind) == (place, kind)]

    def head(place: int) -> FittedHead:
        one, task = embeddings[place], embeddings[place].examples.task
        packed = {head.head.seed: head for heads in of(place, "heads") for head in heads}
        heads = [packed[seed].unpacked(one, device) for seed in task.seeds]
        return fitted_head(task, heads, *(of(place, "probe") or [None]))

    def scored(place: int) -> Any:
        measured = score(embeddings[place], heads[place], in_list)
        found = beside_baseline(measured, store, device, in_list, *of(place, "baseline"))
        return replace(found, examples=None)  # type: ignore[arg-type]  # every worker has them

    heads = here(workers, lambda: [head(place) for place in range(len(embeddings))])
    if not with_scores:
        return Shared(heads, [])
    own = range(workers.rank, len(embeddings), workers.count)
    each = workers.together(lambda: [scored(place) for place in own])
    scores = [each[place % workers.count][place // workers.count] for place in range(len(embeddings))]
    return Shared(heads, [replace(one, examples=these.examples) for one, these in zip(scores, embeddings, strict=True)])


def _jobs(place: int, embeddings: Embeddings, with_baseline: bool) -> list[Job]:
    examples = embeddings.examples
    task, rows = examples.task, float(examples.train.counts.sum())
    at_once = trained_at_once(task, examples.targets, len(task.seeds))
    groups = [tuple(task.seeds)] if at_once else [(seed,) for seed in task.seeds]
    jobs = [Job(place, "heads", seeds, rows * task.num_epochs * len(seeds)) for seeds in groups]
    if with_baseline and task.baselines:
        jobs.append(Job(place, "baseline", (), sum(job.cost for job in jobs)))
    return jobs if task.probe == "none" else [*jobs, Job(place, "probe", (), rows / 2)]


def _shared_out(jobs: Sequence[Job], count: int) -> list[list[Job]]:
    """The jobs of each worker: the most costly first, each to the one with the least to do."""
    shares: list[list[Job]] = [[] for _ in range(count)]
    for job in sorted(jobs, key=lambda job: -job.cost):
        min(shares, key=lambda share: sum(one.cost for one in share)).append(job)
    return shares


def _fit(job: Job, embeddings: Embeddings, store: Store, device: torch.device) -> Any:
    if job.kind == "probe":
        return fit_probe(embeddings)
    if job.kind == "baseline":
        return try_baseline(embeddings.examples, store, device)
    return [PackedHead.of(head) for head in fit_seeds(embeddings, job.seeds, store, device)]
