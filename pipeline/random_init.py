"""What the same model reaches with random weights, beside a checkpoint: what its training has brought.

In a training the first measurement is of the untrained model. On the command line `baseline: random_init` takes its
place. The weights are drawn from `random_seed`, so their embeddings and heads are in the store after the first time.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch

from pipeline.config.schema import Config
from pipeline.embed import Embeddings, embed
from pipeline.encoders.protocol import Encoder
from pipeline.engines.workers import ALONE, Workers
from pipeline.errors import CheckpointError
from pipeline.report.differences import headline_changes
from pipeline.report.overview import Changes
from pipeline.score import Scores, score
from pipeline.sharing import for_heads
from pipeline.store.embedding_table import Store
from pipeline.tracking.protocol import AtStep, Tracker
from pipeline.train_head import train_head

logger = logging.getLogger(__name__)


class RandomInit:
    """The architecture of a checkpoint with random weights, measured on the same data with the same heads.

    Attributes:
        scores: of each task, once `compare` was called.
    """

    def __init__(
        self, encoder: Encoder, config: Config, store: Store, tracker: Tracker, step: int, workers: Workers = ALONE
    ) -> None:
        """Draws the weights.

        Args:
            encoder: of the checkpoint.
            config: the tasks; the weights are drawn from the first one's `random_seed`.
            store: where embeddings and heads are kept.
            tracker: gets the changes, at `step`.
            step: of the checkpoint.
            workers: may fit and score the heads.

        Raises:
            CheckpointError: the encoder is of a class that cannot be made anew.
        """
        self.seed, self.in_list = config.dataset[0].random_seed, config.is_list
        self.scores: list[Scores] = []
        self._store, self._tracker, self._workers = store, AtStep(tracker, step), workers
        untrained = encoder.untrained(self.seed)
        if untrained is None:
            kind = f"{type(encoder).__module__}.{type(encoder).__qualname__}"
            raise CheckpointError(f"baseline: a {kind} cannot be made anew with random weights; leave baseline out")
        self._untrained = untrained

    def compare(self, scores: Sequence[Scores]) -> Changes:
        """How far each main metric of the checkpoint is above that of random weights, with paired intervals.

        Raises:
            PipelineError: see `embed` and `train_head`.
        """
        self.scores = self._measure(scores)
        found: dict[str, float] = {}
        for one, other in zip(scores, self.scores, strict=True):
            for metric, change, _ in headline_changes(one, other):
                found |= change.named(metric.key, "random_init") if change else {}
        self._tracker.metrics(found)
        return Changes(found, "random_init", f"random weights (seed {self.seed})")

    def _measure(self, scores: Sequence[Scores]) -> list[Scores]:
        examples = [one.examples for one in scores]
        embedded = embed(examples, self._untrained, self._store)
        workers, device = for_heads(embedded, self._untrained.device, self._workers)
        measure = partial(_scored, embeddings=embedded, store=self._store, device=device, in_list=self.in_list)
        without = workers.each(measure, range(len(embedded)), [float(len(one.train)) for one in examples])
        found = [replace(one, examples=own) for one, own in zip(without, examples, strict=True)]
        for one in found:
            numbers = ", ".join(f"{metric.key} {metric.value:.4f}" for metric in one.results if metric.is_headline)
            logger.info("random_init %s: %s", one.task_name, numbers)
        return found


def _scored(place: int, embeddings: Sequence[Embeddings], store: Store, device: torch.device, in_list: bool) -> Scores:
    """The scores of a task without its examples, which whoever asks has."""
    one = embeddings[place]
    found = score(one, train_head(one, store, device), in_list)
    return replace(found, examples=None)  # type: ignore[arg-type]
