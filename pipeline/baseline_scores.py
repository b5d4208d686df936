"""What a baseline reaches on a task, beside the `Scores` of a checkpoint.

A baseline goes through the same stages as a checkpoint, with the same settings of head and probe. What it predicts is
kept, since it depends on the data alone:

    <store>/baselines/<key>.parquet    `Scores.table` of the baseline, its headline metrics among the file's metadata

Its embeddings and heads are not kept. A file that is missing or damaged is made again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from pipeline.embed import embed
from pipeline.encoders.baselines import BASELINES, VERSION
from pipeline.errors import CacheError, PipelineError
from pipeline.heads.verdict import NO_BETTER, Verdict
from pipeline.load import Examples
from pipeline.score import Scores, score
from pipeline.statistics.intervals import changes
from pipeline.statistics.metrics import Change, Metric, metric_name
from pipeline.statistics.predictions import from_table
from pipeline.store.embedding_table import Store
from pipeline.store.temporary import temporary_folder
from pipeline.train_head import code_of_head, head_key, train_head

logger = logging.getLogger(__name__)

METRICS = b"headline metrics"  # where the metadata of a file hold them


@dataclass(frozen=True)
class BaselineScores:
    """What a baseline reaches on a task.

    Attributes:
        name: of the baseline, in words.
        values: headline metrics by name, of head and probe; of a task that is in no list.
        table: its predictions, as `Scores.table`.
    """

    name: str
    values: dict[str, float]
    table: pa.Table


def beside_baseline(
    scores: Scores,
    store: Store,
    device: torch.device,
    in_list: bool = False,
    measured: BaselineScores | PipelineError | None = None,
) -> Scores:
    """The scores of a checkpoint with those of the baseline, and a note on each target where they are no better.

    Args:
        scores: of the checkpoint.
        store: where the scores of baselines are kept.
        device: where heads are trained.
        in_list: see `score`.
        measured: what `measure_baseline` gave, or raised, where it was called before.

    Returns:
        The scores as they were, with a note, where the baseline cannot be measured: a checkpoint's scores do not
        depend on it.
    """
    if not scores.examples.task.baselines:
        return scores
    baseline = measured or try_baseline(scores.examples, store, device)
    if isinstance(baseline, PipelineError):
        return replace(scores, notes=(*scores.notes, f"there is no baseline: {baseline}"))
    prefix = f"{metric_name(scores.task_name)}/" if in_list else ""
    values = {prefix + name: value for name, value in baseline.values.items()}
    found = _no_better(replace(scores, baselines=values), baseline)
    notes = (*scores.notes, *(one.text for one in found))
    return replace(scores, baselines=values, notes=notes, verdicts=(*scores.verdicts, *found))


def try_baseline(examples: Examples, store: Store, device: torch.device) -> BaselineScores | PipelineError:
    """As `measure_baseline`, with the error as a result."""
    try:
        return measure_baseline(examples, store, device)
    except PipelineError as error:
        return error


def measure_baseline(examples: Examples, store: Store, device: torch.device) -> BaselineScores:
    """Embeds the examples, trains heads and scores them; or reads what was kept of that.

    Raises:
        PipelineError: see `embed` and `train_head`; or what is to be kept cannot be written.
    """
    kind, path = BASELINES[examples.task.level], baseline_path(examples, store, device)
    found = path and _restore(path, kind.name)
    if found:
        return found
    began = time.perf_counter()
    encoder = kind(examples.train.sequences)
    with temporary_folder(store.root.expanduser() / "live") as folder:
        own = replace(store, root=folder)
        (embeddings,) = embed([examples], encoder, own)
        scores = score(embeddings, train_head(embeddings, own, device))
        del embeddings
    seconds = time.perf_counter() - began
    logger.info("baseline    %s: %s, measured in %.1f s", scores.task_name, kind.name, seconds)
    values = {metric.key: metric.value for metric in scores.results if metric.is_headline}
    measured = BaselineScores(kind.name, values, scores.table)
    if path:
        _keep(measured, path)
    return measured


def baseline_path(examples: Examples, store: Store, device: torch.device) -> Path | None:
    """Where a baseline's predictions are stored once they are made; None where the code of the head is not known."""
    key = _key(examples, store, device)
    return (store.lasting or store.root).expanduser() / "baselines" / f"{key}.parquet" if key else None


def _key(examples: Examples, store: Store, device: torch.device) -> str | None:
    """A digest of everything that a baseline's predictions depend on; None where the code of a head is not known.

    The train part, which is in the keys of the heads, stands for the baseline's own digest: that takes a look at every
    sequence.
    """
    task, code = examples.task, code_of_head(examples.task)
    if code is None:
        return None
    encoder = f"{BASELINES[task.level].name} {VERSION} {store.dtype}"
    threads = torch.get_num_threads()  # of which some train the heads, the same ones of as many
    parts = {
        "heads": [head_key(examples, encoder, seed, code, device, threads) for seed in task.seeds],
        "seeds": task.seeds,
        "probe": [task.probe, task.probe_window],
        "targets": [(target.name, target.classes) for target in examples.targets],
        "test": [examples.test.digest, examples.test.rows],
    }
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def _restore(path: Path, name: str) -> BaselineScores | None:
    """What was kept; None where there is nothing that can be read."""
    try:
        table = pq.read_table(path, page_checksum_verification=True)
        return BaselineScores(name, json.loads(table.schema.metadata[METRICS]), table)
    except (OSError, pa.ArrowException, KeyError, TypeError, ValueError):
        return None


def _keep(scores: BaselineScores, path: Path) -> None:
    table = scores.table.replace_schema_metadata({METRICS: json.dumps(scores.values)})
    try:
        with temporary_folder(path.parent) as folder:
            pq.write_table(table, folder / path.name, compression="zstd", write_page_checksum=True)
            (folder / path.name).replace(path)
    except OSError as error:
        raise CacheError(f"store: '{path.parent}' cannot be written ({error}); set store to another folder") from error


def _no_better(scores: Scores, baseline: BaselineScores) -> list[Verdict]:
    """The targets of which neither the head nor the probe is better than the baseline's, beyond chance."""
    short, found = f"not better than {baseline.name}", []
    for target in scores.examples.targets:
        compared = [
            (metric, change)
            for metric in scores.results
            if metric.target == target.name and metric.key in scores.baselines
            if (change := _difference(scores, baseline, metric))
        ]
        if compared and not any(_improved(metric, change) for metric, change in compared):
            first, *others = [_words(metric, scores.baselines[metric.key], change) for metric, change in compared]
            said = ", ".join([f"{first[0]} is {short} {first[1]}", *(f"nor is {key} {why}" for key, why in others)])
            found.append(Verdict(target.name, NO_BETTER, said))
    return found


def _difference(scores: Scores, baseline: BaselineScores, metric: Metric) -> Change | None:
    """The checkpoint's metric less the baseline's, with the paired interval; None where there is none."""
    ours, theirs = (from_table(table, metric.target, metric.probe) for table in (scores.table, baseline.table))
    return changes(ours, theirs, only=metric.name).values.get(metric.name)


def _improved(metric: Metric, change: Change) -> bool:
    return change.interval.high < 0 if metric.lower_is_better else change.interval.low > 0


def _words(metric: Metric, value: float, change: Change) -> tuple[str, str]:
    ends = f"{change.interval.low:z.3f} to {change.interval.high:z.3f}"
    return metric.key, f"({metric.value:.3f} against {value:.3f}, interval of the difference {ends})"
