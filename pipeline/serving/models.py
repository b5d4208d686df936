"""The models of a measurement that MLflow serves: for each task the encoder and the head of the first seed."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.config.trackers import model_name
from pipeline.embed import BATCH_TOKENS
from pipeline.encoders.protocol import Encoder
from pipeline.score import Scores
from pipeline.serving.encoder_files import why_not, write_encoder
from pipeline.serving.predictor import CONTENT, ENCODER, Predictor
from pipeline.store.embedding_table import Store
from pipeline.store.temporary import link_folder, temporary_folder
from pipeline.tracking.protocol import Served, Tracker

if TYPE_CHECKING:
    from pipeline.data.parts import Target

SCRIPT = Path(__file__).with_name("pyfunc_script.py")
PACKAGE = Path(__file__).parents[1]
CODE = "__init__.py errors.py config data encoders heads serving store".split()  # of the package: what answers needs
# What `Predictor` imports, by the names under which pip knows it; beside MLflow, which adds itself.
REQUIRED = "filelock numpy pandas protobuf safetensors sentencepiece tokenizers torch transformers".split()
EXAMPLES = 2  # sequences in the example of a request

logger = logging.getLogger(__name__)


def log_models(
    encoder: Encoder, scores: Sequence[Scores], store: Store, tracker: Tracker, registered: str | None = None
) -> list[str]:
    """Gives the tracker a model for each task that can be served without code of the user's.

    Args:
        encoder: what was measured.
        scores: of each task, with the head.
        store: of the measurement; the models are written into its folder first.
        tracker: gets them.
        registered: the name that they are registered under.

    Returns:
        Why others are not given.
    """
    if why := why_not(encoder):
        return [f"no model is logged: {why}"]
    reasons = {one.task_name: _own_head(one) for one in scores}
    with temporary_folder(store.root.expanduser() / "live") as folder:
        files = folder / ENCODER
        how = write_encoder(encoder, files)
        for one in scores:
            if not reasons[one.task_name]:
                place = folder / "models" / model_name(one.task_name)
                _write(place, encoder, how, files, one, store)
                tracker.served(place, _described(one, registered))
                size = sum(path.stat().st_size for path in place.rglob("*") if path.is_file())
                logger.info("log_model   %s: %.1f MB", one.task_name, size / 1e6)
    return [f"no model of {name} is logged: {reason}" for name, reason in reasons.items() if reason]


def _write(path: Path, encoder: Encoder, how: dict[str, object], files: Path, scores: Scores, store: Store) -> None:
    """Writes the model of a task as MLflow has it.

    Args:
        path: a new folder.
        encoder: what was measured.
        how: what `write_encoder` gave.
        files: where it wrote.
        scores: of the task, with the head.
        store: of the measurement.
    """
    from pipeline.tracking.pyfunc import save_served

    examples, task = scores.examples, scores.examples.task
    tokens = {kind: store.max_batch_tokens or most for kind, most in BATCH_TOKENS.items()}
    assert scores.head is not None
    about = (task.level, task.sequence_column, examples.limit, tokens, task.emb_batch_size, store.dtype)
    answers = {name: kinds for one in examples.targets for name, kinds in _answers(one, task.level).items()}
    sequences = sorted(examples.test.sequences, key=len)[:EXAMPLES]
    with temporary_folder(path.parent) as folder:
        content, code = folder / CONTENT, folder / PACKAGE.name
        shutil.copytree(PACKAGE, code, ignore=_not_needed)
        link_folder(files, content / ENCODER)
        Predictor(encoder, scores.head, examples.targets, *about).write(content, how)
        columns, example = {task.sequence_column: "string"}, {task.sequence_column: sequences}
        save_served(path, content, SCRIPT, code, columns, answers, example, requirements())


def _not_needed(folder: str, names: list[str]) -> list[str]:
    """Which of the files in a folder of the package are not copied."""
    if Path(folder) == PACKAGE:
        return [name for name in names if name not in CODE]
    return [name for name in names if name == "__pycache__"]


def requirements() -> list[str]:
    """What pip installs where a model is served, in the versions that are installed here."""
    found = []
    for name in REQUIRED:
        try:
            found.append(f"{name}=={version(name).partition('+')[0]}")  # of `2.9.0+cpu` the registry has 2.9.0 alone
        except PackageNotFoundError:
            continue
    return found


def _own_head(scores: Scores) -> str:
    own = scores.examples.task.head
    return f"the head {own} is code of your own, which is not copied" if own else ""


def _described(scores: Scores, registered: str | None) -> Served:
    """What a tracker is told of the model of a task."""
    headline = next((one for one in scores.results if one.is_headline and not one.probe), None)
    return Served(
        model_name(scores.task_name),
        sorted(scores.metrics),
        headline.short if headline else "",
        headline.value if headline else None,
        bool(headline and headline.lower_is_better),
        scores.examples.test.digest[:16],
        registered,
    )


def _answers(target: Target, level: str) -> dict[str, list[str]]:
    """The types of a target's columns, innermost first."""
    each = ["list"] if level == "token" else []
    if target.classes is None:
        return {f"{target.name}_prediction": ["double", *each]}
    return {
        f"{target.name}_prediction": ["string", *each],
        f"{target.name}_probabilities": ["double", *each, "map"],
    }
