"""The command line's measurements: of one checkpoint, or of several, to be compared."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline import compare
from pipeline.checkpoints import open_encoder, step_of
from pipeline.config import Config
from pipeline.config_file import to_mapping, to_yaml
from pipeline.encoders import Encoder
from pipeline.errors import PipelineError
from pipeline.load import Examples
from pipeline.publish import facts_of, publish, publish_curves, versions
from pipeline.report import markdown
from pipeline.score import Scores, headlines
from pipeline.store import Store
from pipeline.tracking import AtStep, Several, Tracker
from pipeline.tracking.journal import JournalRun
from pipeline.validation import validate

if TYPE_CHECKING:
    from pipeline.tracking.earlier import Earlier

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Measured:
    """A checkpoint's scores, or why there are none.

    Attributes:
        ckpt: as it was given.
        label: short, and beginning with what varies.
        step: of the training, where the checkpoint says it.
        scores: of each task.
        error: what stopped the measurement.
    """

    ckpt: str
    label: str
    step: int | None = None
    scores: list[Scores] = field(default_factory=list)
    error: str = ""

    @property
    def metrics(self) -> dict[str, float]:
        """Of all tasks."""
        return {name: value for one in self.scores for name, value in one.metrics.items()}


def describe(run: JournalRun, config: Config) -> None:
    """Logs the configuration, as parameters and as a file, and the versions."""
    run.parameters(to_mapping(config))
    run.text(to_yaml(config), "config.yaml")
    run.tags({f"version.{name}": number for name, number in versions().items()})


def measure(
    ckpt: str,
    config: Config,
    run: JournalRun,
    mirrors: Sequence[Tracker],
    until: str = "score",
    known: Sequence[Scores] = (),
) -> Measured:
    """Measures a stored checkpoint.

    Args:
        ckpt: see `open_encoder`.
        config: the tasks, and how embeddings are made and kept.
        run: what is told of the results; it is renamed after the checkpoint and the tasks.
        mirrors: are told the metrics and shown the pictures too.
        until: the last stage.
        known: of a checkpoint measured before: its data are not read again, if they are the same.

    Raises:
        PipelineError: see `open_encoder` and `validate`.
    """
    target = config.dataset[0].infer_target
    encoder = open_encoder(ckpt, target, config.device, config.precision, config.architecture, config.trust_pickle)
    step = step_of(ckpt, encoder)
    label = label_of(ckpt, step)
    run.rename(f"{label} {config.title}")
    if until == "score":
        run.checkpoint(label, encoder.digest, ckpt, step)
    store = Store(Path(config.store), config.embedding_dtype, config.memory_bytes, config.max_batch_tokens)
    here = AtStep(run, step or 0)
    scores = validate(encoder, config.tasks, store, here, until, _same(known, encoder))
    measured = Measured(ckpt, label, step, scores)
    if scores:
        facts = facts_of(ckpt, step, encoder, scores)
        run.describe(markdown(facts, scores))
        mirrored = AtStep(Several(mirrors), step or 0)
        mirrored.metrics(measured.metrics)
        if config.logging.figures:
            title = f"{label}: {config.title}"
            publish(scores, Several([here, mirrored]), title, facts, to_yaml(config))
    return measured


def measure_several(
    ckpts: Sequence[str], config: Config, run: JournalRun, mirrors: Sequence[Tracker], until: str = "score"
) -> list[Measured]:
    """Measures each of several checkpoints in a nested run, and compares them in `run`.

    One that cannot be measured is said and passed over. Data are read once; what two have in common, such as the same
    weights under two names, is embedded and fitted once.
    """
    run.rename(f"{len(ckpts)} checkpoints {config.title}")
    done: list[Measured] = []
    for number, ckpt in enumerate(ckpts, 1):
        logger.info("checkpoint  %d of %d: %s", number, len(ckpts), ckpt)
        known = next((one.scores for one in done if one.scores), [])
        try:
            with run.step(label_of(ckpt, None)) as child:
                done.append(measure(ckpt, config, child, [], until, known))
        except PipelineError as error:
            logger.warning("%s: %s", ckpt, error)
            done.append(Measured(ckpt, label_of(ckpt, None), error=str(error)))
    if any(one.scores for one in done):
        _compare(done, config, run, mirrors)
    return done


def _compare(done: Sequence[Measured], config: Config, run: JournalRun, mirrors: Sequence[Tracker]) -> None:
    """The leaderboard, and the curve against the step, or against the order given where checkpoints do not say one."""
    rows = rows_of(done)
    board = compare.rank(rows, headlines(config)[0])
    several = Several([run, *mirrors])
    steps = [row.step for row in rows if row.metrics]
    have_steps = None not in steps and len(set(steps)) == len(steps)
    points = [(row.step or 0 if have_steps else place, row.metrics) for place, row in enumerate(rows) if row.metrics]
    for step, metrics in points:
        several.metrics(metrics, step)
    compare.publish(board, headlines(config), several, run)
    if config.logging.figures and have_steps:
        publish_curves(sorted(points, key=lambda point: point[0]), several)


def rows_of(done: Sequence[Measured]) -> list[compare.Row]:
    """A row of the leaderboard for each."""
    return [compare.Row(one.label, one.step, one.metrics, one.error, _data_of(one.scores)) for one in done]


def compare_runs(runs: Sequence[Earlier], names: Sequence[str], run: JournalRun) -> list[compare.Row]:
    """Ranks measurements that were made before, and logs the leaderboard, and the curve of each training, in `run`."""
    board = compare.rank([row for one in runs for row in rows_of_run(one)], names[0])
    compare.publish(board, names, run, run)
    for one in runs:
        publish_curves(one.points, run, f"curves/{one.name}")
    return board


def rows_of_run(run: Earlier) -> list[compare.Row]:
    """A row for each step that a run was measured at."""
    single = len(run.points) == 1
    return [
        compare.Row(run.name if single else f"step={step} {run.name}", step, metrics, "", run.data)
        for step, metrics in run.points
    ]


def _data_of(scores: Sequence[Scores]) -> frozenset[str]:
    return frozenset(one.examples.test.digest for one in scores)


def _same(known: Sequence[Scores], encoder: Encoder) -> list[Examples] | None:
    """The data of another checkpoint, where this one takes sequences of the same lengths."""
    examples = [one.examples for one in known]
    return examples if examples and all(one.encoder_limit == encoder.max_seq_length for one in examples) else None


def label_of(ckpt: str, step: int | None) -> str:
    """A checkpoint's name, with its step in front where the name does not hold it: names are cut in the UI."""
    name = ckpt.rstrip("/").rpartition("/")[2].removesuffix(".ckpt") or "checkpoint"
    return name if step is None or str(step) in name else f"step={step} {name}"
