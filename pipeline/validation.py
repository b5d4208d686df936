"""Runs the four stages load, embed, train_head and score (`validate`); `measure_and_publish` also publishes the result.

The command line, the callbacks and Python users call these two, and differ in where the encoder comes from and what
the tracker is.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Protocol

import pyarrow.parquet as pq
import torch

from pipeline.baseline_scores import beside_baseline
from pipeline.config.schema import Config
from pipeline.config.task import Task, check_names
from pipeline.config.yaml_file import to_yaml
from pipeline.embed import Embeddings, differences, embed, made_with
from pipeline.encoders.protocol import Encoder
from pipeline.engines.workers import ALONE, Workers
from pipeline.heads import optimizers
from pipeline.load import Examples, load_all
from pipeline.report.overview import Changes
from pipeline.report.publishing import facts_of, publish
from pipeline.score import Scores, companions, score
from pipeline.serving.models import log_models
from pipeline.sharing import share_out
from pipeline.statistics.metrics import metric_name
from pipeline.store.embedding_table import Store
from pipeline.store.temporary import temporary_folder
from pipeline.tracking.protocol import PREDICTIONS, AtStep, Data, NullTracker, Several, Tracker, attempt
from pipeline.train_head import FittedHead, make_head, train_head

logger = logging.getLogger(__name__)

STAGES = ("load", "embed", "train_head", "score")
SHARED = "heads and scores"  # of all tasks, where workers share them; what each gave is logged in its own stage


class Result(Protocol):
    """What every stage gives: beside its content, what there is to log of it."""

    @property
    def metrics(self) -> Mapping[str, float]:
        """Numbers by name."""
        ...

    @property
    def notes(self) -> Sequence[str]:
        """Warnings for whoever reads the result."""
        ...


def validate(
    encoder: Encoder,
    tasks: Task | Sequence[Task],
    store: Store,
    tracker: Tracker | None = None,
    until: str = "score",
    examples: Sequence[Examples] | None = None,
    workers: Workers = ALONE,
) -> list[Scores]:
    """Measures what an encoder's embeddings are worth on each task.

    Args:
        encoder: gives the hidden states; see `open_encoder`.
        tasks: one task, or a list, whose metrics are then prefixed with `<task_name>/`.
        store: where embeddings and heads are kept.
        tracker: where results go; nowhere by default.
        until: the last stage to run: `load`, `embed`, `train_head` or `score`.
        examples: what `load` gave for each task, where it is at hand: the files are not read again.
        workers: who share the work; all call this alike, and only the first has a `tracker`.

    Returns:
        The scores of each task, in order; none where `until` is an earlier stage.

    Raises:
        PipelineError: see `load`, `embed`, `train_head` and `score`.
    """
    tracker = tracker or NullTracker()
    in_list, last = not isinstance(tasks, Task), STAGES.index(until)
    tasks = [tasks] if isinstance(tasks, Task) else list(tasks)
    check(tasks, with_files=examples is None)
    with _stage(tracker, "load") as run:
        examples = list(examples or load_all(tasks, encoder.max_seq_length))
        _log_load(examples, run, tracker)
    if last < STAGES.index("embed"):
        return []
    with _stage(tracker, "embed") as run:
        embeddings = embed(examples, encoder, store, workers)
        _log_embed(embeddings, encoder, store, run)
        _log_label_free(embeddings, in_list, run)
    if last < STAGES.index("train_head"):
        return []
    tests, device = last >= STAGES.index("score"), encoder.device
    shared = None
    if workers.shares:
        with _stage(tracker, SHARED):
            shared = share_out(embeddings, store, device, in_list, tests, workers)
        if workers.rank > 0:  # the first logs
            return shared.scores
    scores = []
    for place, task_embeddings in enumerate(embeddings):
        suffix = f" {task_embeddings.examples.task.task_name}" if in_list else ""
        with _stage(tracker, f"train_head{suffix}") as run:
            head = shared.heads[place] if shared else train_head(task_embeddings, store, device)
            _log_head(head, task_embeddings.examples.task.task_name, run)
        if not tests:
            continue
        with _stage(tracker, f"score{suffix}") as run:
            if shared:
                scores.append(shared.scores[place])
            else:
                scores.append(beside_baseline(score(task_embeddings, head, in_list), store, device, in_list))
            scores[-1] = replace(scores[-1], head=head.head)
            _log_scores(scores[-1], run, tracker)
    return scores


def log_data(examples: Sequence[Examples], tracker: Tracker) -> None:
    """Logs what `load` gave as `validate` does, where no encoder is measured on it."""
    with _stage(tracker, "load") as run:
        _log_load(examples, run, tracker)


def measure_and_publish(
    encoder: Encoder,
    config: Config,
    store: Store,
    tracker: Tracker,
    mirrors: Tracker,
    source: str,
    step: int | None = None,
    title: str = "",
    until: str = "score",
    examples: Sequence[Examples] | None = None,
    compare: Callable[[Sequence[Scores]], Changes] = lambda _: Changes(),
    workers: Workers = ALONE,
) -> tuple[list[Scores], Changes]:
    """Validates an encoder and publishes the result: numbers, pictures and the page.

    Args:
        encoder: what is measured.
        config: the tasks, and what is published.
        store: where embeddings and heads are kept.
        tracker: gets everything, each stage too.
        mirrors: get the numbers, the pictures and the page.
        source: where the weights are from: the checkpoint's path, or `live weights`.
        step: of the training that made the weights; None where it is not known.
        title: of the page.
        until: see `validate`.
        examples: see `validate`.
        compare: gives what the scores have changed by since the training began, and logs it.
        workers: see `validate`; this is the first of them.

    Returns:
        The scores of each task, and those changes.

    Raises:
        PipelineError: see `validate`. What cannot be drawn only warns.
    """
    here, beside = AtStep(tracker, step or 0), AtStep(mirrors, step or 0)
    scores = validate(encoder, config.tasks, store, here, until, examples, workers)
    if not scores:
        return scores, Changes()
    beside.metrics(metrics_of(scores))
    if config.logging.log_model:
        registered = config.logging.register_model
        notes = attempt("log_model", lambda: log_models(encoder, scores, store, here, registered))
        _warn(notes or (), "log_model", here)
    changes = compare(scores)
    if config.logging.figures:
        facts, both = facts_of(source, step, encoder, scores), Several([here, beside])
        attempt(
            "the report", lambda: publish(scores, changes, both, f"{title}: {config.title}", facts, to_yaml(config))
        )
    return scores, changes


def metrics_of(scores: Sequence[Scores]) -> dict[str, float]:
    """The metrics of all tasks by name."""
    return {name: value for one in scores for name, value in one.metrics.items()}


def check(tasks: Sequence[Task], with_files: bool = True) -> None:
    """Raises ConfigError where a task, its optimizer or the names of several cannot be: before hours of embedding.

    Args:
        tasks: what is to be measured.
        with_files: the data are read from files, so each task must say where they are.
    """
    check_names(tasks)
    for task in tasks:
        task.check(with_files)
        optimizers.check(task.optim)


def dry_run(encoder: Encoder, examples: Sequence[Examples], workers: Workers = ALONE) -> None:
    """Embeds the shortest sequences of each task, and makes its head: what would fail later fails now.

    All `workers` call it alike; what fails on one fails on all.

    Raises:
        PipelineError: see `embed` and `train_head`.
    """
    shortest = [replace(one, train=one.train.shortest(), test=one.test.shortest(), val=None) for one in examples]
    with temporary_folder() as folder:
        embed(shortest, encoder, Store(folder, shared=False), workers)
    for one in examples:
        make_head(one.task, encoder.hidden_size, one.targets, encoder.device)


def data_of(examples: Examples, part: str) -> Data:
    """A part of a task's data as trackers know it."""
    task, content = examples.task, examples.parts[part]
    source = f"{task.dataset_path}/{part}" if task.dataset_path else "DataFrame"
    return Data(task.task_name, part, source, content.digest, len(content), content.left_out)


@contextmanager
def _stage(tracker: Tracker, name: str) -> Iterator[Tracker]:
    """Runs a stage, and logs its seconds and the process's peak memory."""
    with tracker.stage(name) as run:
        began = time.perf_counter()
        yield run
        run.metrics({"seconds": time.perf_counter() - began, **_peak_memory()})


def _peak_memory() -> dict[str, float]:
    """Peak resident memory of the process so far, and of the GPU, in MB."""
    peak = {}
    if sys.platform != "win32":
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        peak["peak_memory_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6
    if torch.cuda.is_available():
        peak["peak_gpu_memory_mb"] = torch.cuda.max_memory_allocated() / 1e6
    return peak


def _log(result: Result, name: str, run: Tracker) -> None:
    """Logs what a stage gave: its numbers to the stage's run, its warnings there and to the user."""
    run.metrics(result.metrics)
    _warn(result.notes, name, run)


def _warn(notes: Sequence[str], name: str, run: Tracker) -> None:
    for note in notes:
        logger.warning("%s: %s", name, note)
        run.note(f"{name}: {note}")


def _log_load(examples: Sequence[Examples], run: Tracker, tracker: Tracker) -> None:
    for task in examples:
        name = task.task.task_name
        logger.info("load        %s: %s", name, ", ".join(f"{len(part)} {kind}" for kind, part in task.parts.items()))
        _log(task, name, run)
        for part in task.parts:
            run.data(data_of(task, part))
            tracker.data(data_of(task, part))


def _log_embed(embeddings: Sequence[Embeddings], encoder: Encoder, store: Store, run: Tracker) -> None:
    """One pass serves all tasks, so each has the same numbers."""
    numbers = embeddings[0].metrics
    logger.info("embed       %d sequences embedded, %d already stored", numbers["embedded"], numbers["cached"])
    for task in embeddings:
        _log(task, task.examples.task.task_name, run)
    _warn(encoder.notes, "encoder", run)
    here = made_with(encoder.device, encoder.precision, encoder.pooling, store, [task.examples for task in embeddings])
    _warn(differences(encoder.made_with, here), "checkpoint", run)


def _log_label_free(embeddings: Sequence[Embeddings], in_list: bool, run: Tracker) -> None:
    for task in embeddings:
        run.metrics(companions(task, in_list))


def _log_head(head: FittedHead, name: str, run: Tracker) -> None:
    count, stored = len(head.heads), sum(one.reused for one in head.heads)
    state = {0: "trained", count: "taken from the store"}.get(stored, f"trained, but {stored} taken from the store")
    heads, steps = f"{count} heads " if count > 1 else "", max(one.steps for one in head.heads)
    logger.info("train_head  %s: %s%s, %d epochs, %d steps", name, heads, state, len(head.losses), steps)
    for curve, losses in head.curves.items():
        for epoch, loss in enumerate(losses, 1):
            run.metrics({curve: loss}, step=epoch)
    _log(head, name, run)


def _log_scores(scores: Scores, run: Tracker, tracker: Tracker) -> None:
    data = data_of(scores.examples, "test")
    run.metrics(scores.metrics, data=data)
    tracker.metrics(scores.metrics, data=data)
    _warn(scores.notes, scores.task_name, run)
    with temporary_folder() as folder:
        path = folder / f"{PREDICTIONS}{metric_name(scores.task_name)}.parquet"
        pq.write_table(scores.table, path)
        tracker.artifact(path)
        if len(classes := scores.classes):
            path = folder / f"classes_{metric_name(scores.task_name)}.csv"
            classes.to_csv(path, index=False, float_format="%.6f")
            tracker.artifact(path)
