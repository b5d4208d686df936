"""The whole path. The command line, the callback and Python users all call `validate`."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import pyarrow.parquet as pq
import torch

from pipeline.config.schema import Task, check_names, metric_name
from pipeline.embed import Embeddings, differences, embed, made_with
from pipeline.encoders.protocol import Encoder
from pipeline.heads import optimizers as optim
from pipeline.load import Examples, load
from pipeline.score import Scores, score
from pipeline.store.embedding_table import Store
from pipeline.store.temporary import temporary_folder
from pipeline.tracking import Data, NullTracker, Tracker
from pipeline.train_head import FittedHead, make_head, train_heads

logger = logging.getLogger(__name__)

STAGES = ("load", "embed", "train_head", "score")


def validate(
    encoder: Encoder,
    tasks: Task | Sequence[Task],
    store: Store,
    tracker: Tracker | None = None,
    until: str = "score",
    examples: Sequence[Examples] | None = None,
) -> list[Scores]:
    """Measures what an encoder's embeddings are worth on each task.

    Args:
        encoder: gives the hidden states; see `open_encoder`.
        tasks: one task, or a list, whose metrics are then prefixed with `<task_name>/`.
        store: where embeddings and heads are kept.
        tracker: where results go; nowhere by default.
        until: the last stage to run: `load`, `embed`, `train_head` or `score`.
        examples: what `load` gave for each task, where it is at hand: the files are not read again.

    Returns:
        The scores of each task, in order; none where `until` is an earlier stage.

    Raises:
        PipelineError: see `load`, `embed`, `train_head` and `score`.
    """
    tracker = tracker or NullTracker()
    several = not isinstance(tasks, Task)
    wanted = [tasks] if isinstance(tasks, Task) else list(tasks)
    last = STAGES.index(until)
    check(wanted)
    with _stage(tracker, "load") as step:
        loaded = list(examples or read(wanted, encoder.max_seq_length))
        _tell(loaded, tracker, step)
    embeddings = _embed(loaded, encoder, store, tracker) if last >= 1 else []
    scores = []
    heads = train_heads(embeddings, store, encoder.device)
    for one in embeddings if last >= 2 else []:
        name = one.examples.task.task_name
        suffix = f" {name}" if several else ""
        prefix = f"{metric_name(name)}/" if several else ""
        scores += _fit_and_score(one, heads, tracker, (prefix, suffix, last))
    return scores


def check(tasks: Sequence[Task]) -> None:
    """Raises ConfigError where a task, its optimiser or the names of several cannot be: before hours of embedding."""
    check_names(tasks)
    for task in tasks:
        task.check()
        optim.check(task.optim)


def read(tasks: Sequence[Task], max_seq_length: int | None) -> list[Examples]:
    """The first stage for each task; see `load`."""
    return [load(task, max_seq_length) for task in tasks]


def dry_run(encoder: Encoder, examples: Sequence[Examples]) -> None:
    """Embeds the shortest sequences of each task, and makes its head: what would fail later fails now.

    Raises:
        PipelineError: see `embed` and `train_head`.
    """
    for one in examples:
        shortest = replace(one, train=one.train.shortest(), test=one.test.shortest(), val=None)
        with temporary_folder() as folder:
            embed([shortest], encoder, Store(folder))
        make_head(one.task, encoder.hidden_size, one.targets, encoder.device)


def data_of(examples: Examples, part: str) -> Data:
    """What trackers are told of a part."""
    task, content = examples.task, examples.parts[part]
    source = f"{task.dataset_path}/{part}"
    return Data(task.task_name, part, source, content.digest, len(content), content.left_out)


@contextmanager
def _stage(tracker: Tracker, name: str) -> Iterator[Tracker]:
    """A step of the tracker that is told at its end what it took: wall-clock seconds, and the process's peak memory."""
    with tracker.step(name) as step:
        began = time.perf_counter()
        yield step
        step.metrics({"seconds": time.perf_counter() - began, **_peak_memory()})


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


def _tell(examples: Sequence[Examples], tracker: Tracker, step: Tracker) -> None:
    """Tells the trackers and the user of the data."""
    for one in examples:
        name = one.task.task_name
        for part, content in one.parts.items():
            rows, left_out = len(content), content.left_out
            step.metrics({f"{metric_name(name)}/{part}_rows": rows, f"{metric_name(name)}/{part}_left_out": left_out})
            for run in (step, tracker):
                run.data(data_of(one, part))
        logger.info("load        %s: %s", name, ", ".join(f"{len(c)} {p}" for p, c in one.parts.items()))
        for note in one.notes:
            _note(step, name, note)


def _embed(examples: list[Examples], encoder: Encoder, store: Store, tracker: Tracker) -> list[Embeddings]:
    with _stage(tracker, "embed") as step:
        began = time.perf_counter()
        embeddings = embed(examples, encoder, store)
        seconds, metrics = time.perf_counter() - began, embeddings[0].metrics
        step.metrics(metrics)
        if metrics["tokens"]:
            step.metrics({"tokens_per_second": metrics["tokens"] / seconds})
        logger.info("embed       %d sequences embedded, %d already stored", metrics["embedded"], metrics["cached"])
        for one in embeddings:
            for note in one.notes:
                _note(step, one.examples.task.task_name, note)
        for note in encoder.notes:
            _note(step, "encoder", note)
        here = made_with(encoder.device, encoder.precision, store, examples)
        for note in differences(encoder.made_with, here):
            _note(step, "checkpoint", note)
    return embeddings


def _fit_and_score(
    embeddings: Embeddings, heads: Iterator[FittedHead], tracker: Tracker, how: tuple[str, str, int]
) -> list[Scores]:
    prefix, suffix, last = how
    name = embeddings.examples.task.task_name
    with _stage(tracker, f"train_head{suffix}") as step:
        fitted = next(heads)
        for epoch, loss in enumerate(fitted.losses):
            step.metrics({"train_loss": loss}, step=epoch + 1)
        for epoch, loss in enumerate(fitted.held_losses):
            step.metrics({"val_loss": loss}, step=epoch + 1)
        step.metrics({"reused": float(fitted.reused)})
        state = "taken from the store" if fitted.reused else "trained"
        logger.info("train_head  %s: %s, %d epochs", name, state, len(fitted.losses))
        for note in fitted.notes:
            _note(step, name, note)
    if last < STAGES.index("score"):
        return []
    with _stage(tracker, f"score{suffix}") as step:
        scores = score(embeddings, fitted).prefixed(prefix)
        for run in (step, tracker):
            run.metrics(scores.metrics, data=data_of(embeddings.examples, "test"))
        for metric, reason in scores.omitted.items():
            _note(step, name, f"{metric} is left out: {reason}")
        with temporary_folder() as folder:
            path = folder / f"predictions_{metric_name(name)}.parquet"
            pq.write_table(scores.predictions, path)
            tracker.artifact(path)
    return [scores]


def _note(tracker: Tracker, task_name: str, text: str) -> None:
    logger.warning("%s: %s", task_name, text)
    tracker.note(f"{task_name}: {text}")
