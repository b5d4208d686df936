"""For notebooks and scripts: a call that measures, and one that embeds."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from pipeline.checkpoints.names import name_of, step_of, with_step
from pipeline.command.engine import engine_of, open_on
from pipeline.command.keywords import config_of, config_of_frames, frames_of
from pipeline.command.measuring import Opened, measure_encoder, tracked
from pipeline.config.fields import check_choice
from pipeline.config.schema import POOLINGS, Config
from pipeline.config.shipped import CKPT, shipped_path
from pipeline.config.task import Task
from pipeline.data.parts import Part
from pipeline.embed import embed
from pipeline.encoders.custom import CustomEncoder
from pipeline.encoders.devices import find_device
from pipeline.encoders.live import LiveModel
from pipeline.encoders.options import EncoderOptions
from pipeline.encoders.protocol import Encoder, HasHiddenStates
from pipeline.engines.ray_engine import RayEngine
from pipeline.engines.workers import ALONE
from pipeline.errors import ConfigError, DataError, nearest
from pipeline.load import Examples
from pipeline.report.measured import Measured
from pipeline.store.embedding_table import Store
from pipeline.training.untouched import untouched
from pipeline.training.unwrapped import arithmetic, unwrapped, without_autocast_wrapper
from pipeline.validation import check

if TYPE_CHECKING:
    import pandas as pd

logger = logging.getLogger(__name__)


def measure(
    ckpt: str | PathLike[str] | nn.Module | Encoder | HasHiddenStates | None = None,
    config: str | PathLike[str] | Config | Mapping[str, Any] | Mapping[str, pd.DataFrame] | None = None,
    *,
    tokenizer: Any = None,
    track: bool | str = False,
    overrides: str = "",
    **settings: Any,
) -> Measured:
    """Measures what the embeddings of a checkpoint or a module are worth on labelled sequences.

        measure("models/esm2", "my.yaml").report("report.html")
        measure("models/esm2", {"train": train, "test": test}, target_column="stability")

    A module is afterwards what it was: weights, modes, random states. Embeddings and heads are kept in the store of the
    configuration, so that a second call takes seconds.

    Args:
        ckpt: as on the command line, see `open_encoder`; a module with a Hugging Face model in it; an encoder, or
            any object with `hidden_size` and `hidden_states(sequences)`. By default the sample's checkpoint.
        config: a YAML file, its content, a `Config`; or the parts `train`, `test` and, for early stopping, `val` as
            DataFrames. By default the sample's configuration.
        tokenizer: the Hugging Face tokenizer of a module; by default that in it.
        track: whether the result goes to MLflow and the trackers of the configuration; a text is the server's address.
        overrides: dot-list such as `device=cpu dataset.num_epochs=3`, for a file or its content alone.
        settings: keys of the configuration: of the section, such as `device`, or of every task, such as `num_epochs`.
            With DataFrames, `target_column` may be left out where there is one beside `sequence_column`; `level`
            (`sequence` or `token`) and `task_type` are inferred from the labels where they are not given.

    Raises:
        PipelineError: see `read_config`, `open_encoder` and `validate`.
    """
    frames, notes = frames_of(config), list[str]()
    if frames and overrides:
        raise ConfigError("overrides: DataFrames take none; give keywords")
    checked = config_of_frames(frames, settings, notes) if frames else config_of(config, overrides, settings)
    notes += checked.notes
    for note in notes:
        logger.info("config      %s", note)
    store = Store.from_config(checked)
    store.clear()
    with engine_of(checked) as engine, _opened(ckpt, EncoderOptions.from_config(checked), tokenizer, engine) as bare:
        check(checked.dataset, with_files=not frames)
        found, workers = bare.with_data(checked, frames=frames or None), engine or ALONE
        if track is False:
            silent = replace(checked, logging=replace(checked.logging, figures=False, log_model=False))
            result, run_id = measure_encoder(found, silent, store, workers=workers), None
        else:
            uri = track if isinstance(track, str) else ""
            with tracked(found.label, checked, uri) as (run, others):
                result = measure_encoder(found, checked, store, run.run, others, workers=workers)
            run_id = run.ids[1] if run.ids else None
    return Measured(found.label, result.scores, result.changes, result.facts, checked, tuple(notes), run_id)


def embed_sequences(
    sequences: Iterable[str],
    ckpt: str | PathLike[str] | nn.Module | Encoder | HasHiddenStates | None = None,
    *,
    pooling: str = "mean",
    tokenizer: Any = None,
    store: str | PathLike[str] | None = None,
    **options: Any,
) -> npt.NDArray[np.float32]:
    """The embeddings of sequences, in the order given.

    Args:
        sequences: of any number; each distinct one is embedded once.
        ckpt: see `measure`.
        pooling: `mean` of a sequence's token states, `cls` or `last`; an `Encoder` has its own.
        tokenizer: see `measure`.
        store: folder of stored embeddings; by default that of the configuration.
        options: of `EncoderOptions`, such as `device`, `precision`, `layer` and `architecture`.

    Returns:
        Shape (n, hidden_size), float32.

    Raises:
        DataError: a sequence is empty, has more characters than the encoder takes, or none that it knows.
        ConfigError: an option is not known.
        PipelineError: see `open_encoder` and `embed`.
    """
    texts = _checked_texts(sequences)
    check_choice("pooling", pooling, POOLINGS)
    known = [field.name for field in dataclasses.fields(EncoderOptions)]
    for name in options:
        if name not in known:
            raise ConfigError(f"embed_sequences: unknown option '{name}'{nearest(name, known)}")
    with _opened(ckpt, EncoderOptions(**options, pooling=pooling), tokenizer) as found:
        encoder = found.encoder
        if not texts:
            return np.zeros((0, encoder.hidden_size), np.float32)
        limit = encoder.max_seq_length
        for place, text in enumerate(texts):
            if limit is not None and len(text) > limit:
                too_long = f"expected at most {limit} characters, which is all the encoder takes, found {len(text)}"
                raise DataError(f"sequences[{place}]: {too_long}; cut it, or leave it out")
        (embedded,) = embed([_unlabelled(texts)], encoder, Store(Path(store or Config().store)))
        for note in (*embedded.notes, *encoder.notes):
            logger.warning("embed_sequences: %s", note)
        return np.asarray(embedded.rows("train").gather(np.arange(len(texts))).numpy())


@contextmanager
def _opened(
    ckpt: str | PathLike[str] | nn.Module | Encoder | HasHiddenStates | None,
    options: EncoderOptions,
    tokenizer: Any,
    engine: RayEngine | None = None,
) -> Iterator[Opened]:
    """The encoder of whatever is measured; a module is put back as it was."""
    if engine is not None and not isinstance(ckpt, (str, PathLike, type(None))):
        expected = f"engine: expected a checkpoint that Ray's workers can open, found a {type(ckpt).__name__}"
        raise ConfigError(f"{expected}; save it, or set engine to local")
    if isinstance(ckpt, nn.Module):
        module = unwrapped(ckpt)
        if options.compile:
            logger.info("compile is left out: a module is run as it is, without compiling it")
            options = replace(options, compile=False)
        first = next(module.parameters(), None)
        with without_autocast_wrapper(module), untouched(module):
            context, mode = arithmetic(torch.device("cpu") if first is None else first.device)
            live = LiveModel(module, options.infer_target, tokenizer, context, mode)
            try:
                yield Opened(live.encoder(module, options), "live weights", None, type(module).__name__)
            finally:
                live.release()
        return
    if ckpt is not None and not isinstance(ckpt, (str, PathLike)):
        encoder, kind = _as_encoder(ckpt, options), type(ckpt).__name__
        yield Opened(encoder, kind, encoder.step, kind)
        return
    name = shipped_path(CKPT) if ckpt is None else str(ckpt)
    encoder = open_on(engine, name, options)
    step = step_of(name, encoder)
    yield Opened(encoder, name, step, with_step(name_of(name), step))


def _as_encoder(ckpt: Any, options: EncoderOptions) -> Encoder:
    """An `Encoder`, or an object with what it takes to be one. Raises ConfigError for anything else."""
    if Encoder in type(ckpt).__mro__:
        return cast(Encoder, ckpt)
    if isinstance(ckpt, Mapping) or hasattr(ckpt, "columns"):
        raise ConfigError("ckpt: expected a checkpoint, module or encoder, found data; write measure(ckpt, data)")
    if not (hasattr(ckpt, "hidden_states") and hasattr(ckpt, "hidden_size")):
        expected = "a path, a module, or an object with hidden_states and hidden_size"
        raise ConfigError(f"ckpt: expected {expected}, found {ckpt!r:.60}; see pipeline.Encoder")
    return CustomEncoder.from_object(ckpt, find_device(options.device)).with_pooling(options.pooling)


def _checked_texts(sequences: Iterable[str]) -> list[str]:
    if isinstance(sequences, str):
        raise DataError("sequences: expected a list of texts, found one text; write [text]")
    texts = list(sequences)
    for place, text in enumerate(texts):
        if not isinstance(text, str) or not text:
            raise DataError(f"sequences[{place}]: expected a text that is not empty, found {text!r:.60}; leave it out")
    return texts


def _unlabelled(texts: list[str]) -> Examples:
    """Sequences in the form in which they are embedded."""
    lengths = np.array([len(text) for text in texts], dtype=np.int64)
    rows = [f"sequences:{place}" for place in range(len(texts))]
    part = Part(texts, rows, np.ones(len(texts), dtype=np.int64), [], [], 0, lengths)
    return Examples(Task(task_name="sequences", sequence_column="sequences"), (), part, part)
