"""What a pre-training has gained on a data set, by every way to measure it, for `signal_noise.py`."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from scipy.special import stdtrit
from signal_models import Composition, Set

from pipeline import Encoder, Scores, Store
from pipeline.embed import Embeddings, embed
from pipeline.heads.probe import fit_probe
from pipeline.load import load
from pipeline.report.tables import Table, number
from pipeline.score import score
from pipeline.statistics.intervals import changes
from pipeline.statistics.metrics import HEADLINE, Metric
from pipeline.statistics.predictions import from_table
from pipeline.train_head import train_head

CPU = torch.device("cpu")
REFERENCE = {
    "num_epochs": 10,
    "batch_size": 128,
    "standardize": False,
    "optim": {"name": "adam", "lr": 1e-4},
}
OURS = {"batch_size": 32, "optim": {"name": "adam", "lr": 1e-3}}
COUNTS = (1, 3, 5, 10)


@dataclass(frozen=True)
class Way:
    """Scores of one way to measure, and its CPU seconds."""

    scores: Scores
    seconds: float
    probe: bool = False

    @property
    def metric(self) -> Metric:
        """The headline metric; without a value where it is not defined, as for a head that says the same of all."""
        found = [one for one in self.scores.results if one.is_headline and one.probe == self.probe]
        task = self.scores.examples.task
        return found[0] if found else Metric("", task.target_column[0], HEADLINE[task.task_type])

    @property
    def text(self) -> str:
        """The value, and its noise over head seeds."""
        deviation = self.metric.seed_std
        if self.metric.value != self.metric.value:
            return "not defined"
        return f"{self.metric.value:.3f}" + ("" if deviation is None else f" ± {deviation:.3f}")


def settings_of(embeddings: Embeddings, reference: bool = False) -> dict[str, Any]:
    """Of heads: the reference's example, or those in `configs/`."""
    task = embeddings.examples.task
    epochs = 40 if (task.level, task.task_type) == ("sequence", "regression") else 20
    return REFERENCE if reference else {**OURS, "num_epochs": epochs}


def with_task(embeddings: Embeddings, **settings: Any) -> Embeddings:
    """The same embeddings for a task of other settings."""
    examples = embeddings.examples
    return replace(embeddings, examples=replace(examples, task=replace(examples.task, **settings)))


def by_head(embeddings: Embeddings, store: Store, **settings: Any) -> Way:
    """Fresh heads alone."""
    one = with_task(embeddings, probe="none", **settings)
    began = time.process_time()
    head = train_head(one, store, CPU)
    seconds = time.process_time() - began
    return Way(score(one, head), seconds)


def by_probe(embeddings: Embeddings, store: Store) -> Way:
    """The probe, beside a head that is not trained."""
    one = with_task(embeddings, probe="none", num_seeds=1, num_epochs=0)
    head, began = train_head(one, store, CPU), time.process_time()
    probe = fit_probe(embeddings)
    seconds = time.process_time() - began
    return Way(score(one, replace(head, probe=probe)), seconds, probe=True)


def sampling(later: Way, earlier: Way) -> float:
    """The standard error of a difference, over draws of the test sequences, paired; NaN where it is refused."""
    target = later.metric.target
    now, before = (from_table(way.scores.table, target, way.probe) for way in (later, earlier))
    found = changes(now, before).values.get(later.metric.name)
    if found is None:
        return float("nan")
    return (found.interval.high - found.interval.low) / 2 / float(stdtrit(len(now) - 1, 0.975))


def gains(one: Set, encoders: Sequence[Encoder], store: Store, options: argparse.Namespace) -> dict[str, Any]:
    """A set's scores by every way, before and after the pre-training."""
    limit = options.tokens if one.options.get("level") == "token" else None
    task = one.task(options.data, limit, limit, num_seeds=options.seeds)
    both = [embed([load(task, encoder.max_seq_length)], encoder, store)[0] for encoder in encoders]
    ways = {
        "reference": [by_head(each, store, **settings_of(each, reference=True)) for each in both],
        "head": [by_head(each, store, **settings_of(each)) for each in both],
        "probe": [by_probe(each, store) for each in both],
    }
    costs = {count: _cost(both[-1], store, count) for count in COUNTS}
    baseline = Composition(one.smiles, pairs=task.level == "sequence")
    wide = replace(task, probe_window=15) if task.level == "token" else task
    composition = by_probe(embed([load(wide, encoders[0].max_seq_length)], baseline, store)[0], store)
    found: dict[str, Any] = {
        "set": one.name,
        "metric": ways["head"][0].metric.name,
        "train": len(both[0].examples.train),
        "test": len(both[0].examples.test),
        "constant": ways["head"][0].metric.constant,
        "composition": composition.metric.value,
        "seconds of heads": costs,
    }
    for name, (before, after) in ways.items():
        found[name] = {
            "values": [before.metric.value, after.metric.value],
            "noise": [before.metric.seed_std, after.metric.seed_std],
            "texts": [before.text, after.text],
            "seconds": after.seconds / (1 if name == "probe" else options.seeds),
            "sampling": sampling(after, before),
        }
    return found


def _cost(embeddings: Embeddings, store: Store, count: int) -> float:
    """CPU seconds of so many heads at once, from a fifth of the epochs, with seeds that the store has no heads of."""
    one = {**settings_of(embeddings), "num_seeds": count, "random_seed": 10_000 * count}
    one["num_epochs"] //= 5
    return 5 * by_head(embeddings, store, **one).seconds


def gain_tables(found: Sequence[dict[str, Any]]) -> list[Table]:
    """The scores, then noise against cost."""
    about = ("set", "metric", "train, test", "constant guess", "composition")
    ways = ("head, reference's settings", "head", "probe")
    heads = [f"{count} head{'s'[: count > 1]}" for count in COUNTS]
    seconds = [f"s, {head}" for head in heads]
    noise = ("set", "gain, heads", *heads, "test rows", *seconds, "gain, probe", "test rows, probe", "s, probe")
    scores = Table((*about, *ways), [_score_row(one) for one in found], frozenset({0, 1}))
    return [scores, Table(noise, [_noise_row(one) for one in found])]


def _score_row(one: dict[str, Any]) -> list[str]:
    ways = [", ".join(one[way]["texts"]) for way in ("reference", "head", "probe")]
    rows, baseline = f"{one['train']:,}, {one['test']:,}", f"{one['composition']:.3f}"
    return [one["set"], one["metric"], rows, number(one["constant"])[:5], baseline, *ways]


def _noise_row(one: dict[str, Any]) -> list[str]:
    """The gain, the noise of a gain over head seeds, that over draws of the test rows, and seconds."""
    head, probe = one["head"], one["probe"]
    defined = None not in head["noise"]  # a head that says the same of all has no rank correlation
    deviation = float(np.hypot(*head["noise"])) if defined else float("nan")
    noise = [f"{deviation / count**0.5:.3f}" for count in COUNTS]
    seconds = [f"{one['seconds of heads'][count]:.2f}" for count in COUNTS]
    gains_of = [f"{way['values'][1] - way['values'][0]:+.3f}" for way in (head, probe)]
    of_probe = [gains_of[1], f"{probe['sampling']:.3f}", f"{probe['seconds']:.3f}"]
    return [one["set"], gains_of[0], *noise, f"{head['sampling']:.3f}", *seconds, *of_probe]
