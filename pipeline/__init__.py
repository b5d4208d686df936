"""Validation with a downstream task.

    CSV --load--> Examples --embed--> Embeddings (Parquet) --train_head--> FittedHead --score--> Scores --> a tracker

In a notebook or a script, a call measures a checkpoint or a module, with a configuration or with DataFrames:

    from pipeline import measure

    measure("models/esm2", {"train": train, "test": test}, target_column="stability").report("report.html")

A file per noun: the type, and the function that makes it from the one before. `validate` walks the path:

    from pipeline import Store, open_encoder, read_config, validate

    config = read_config("configs/default.yaml")
    encoder = open_encoder("sample/checkpoint")
    for scores in validate(encoder, config.tasks, Store.from_config(config)):
        print(scores.task_name, scores.metrics)

In a Lightning script, two lines measure the weights in training at each validation:

    from pipeline import setup_dwnstr_task_validation_callbacks

    trainer = Trainer(callbacks=setup_dwnstr_task_validation_callbacks("my.yaml"))

The Hugging Face `Trainer` takes a `DownstreamTrainerCallback("my.yaml")`, and any other loop calls a `Downstream`:

    downstream = Downstream("my.yaml", tokenizer=tokenizer)
    metrics = downstream(model, step)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.checkpoints.opening import open_encoder as open_encoder
    from pipeline.config.schema import Config as Config
    from pipeline.config.shipped import shipped_path as shipped_path
    from pipeline.config.task import Files as Files
    from pipeline.config.task import Task as Task
    from pipeline.config.yaml_file import read_config as read_config
    from pipeline.encoders.description import DESCRIPTION as DESCRIPTION
    from pipeline.encoders.huggingface import HuggingFaceEncoder as HuggingFaceEncoder
    from pipeline.encoders.live import LiveModel as LiveModel
    from pipeline.encoders.options import EncoderOptions as EncoderOptions
    from pipeline.encoders.protocol import Encoder as Encoder
    from pipeline.errors import PipelineError as PipelineError
    from pipeline.interface import embed_sequences as embed_sequences
    from pipeline.interface import measure as measure
    from pipeline.report.measured import Measured as Measured
    from pipeline.score import Scores as Scores
    from pipeline.store.embedding_table import Store as Store
    from pipeline.tracking.protocol import NullTracker as NullTracker
    from pipeline.tracking.protocol import Tracker as Tracker
    from pipeline.training.huggingface import DownstreamTrainerCallback as DownstreamTrainerCallback
    from pipeline.training.lightning import DownstreamValidation as DownstreamValidation
    from pipeline.training.lightning import (
        setup_dwnstr_task_validation_callbacks as setup_dwnstr_task_validation_callbacks,
    )
    from pipeline.training.loggers import JournalLogger as JournalLogger
    from pipeline.training.loop import Downstream as Downstream
    from pipeline.training.monitors import DownstreamEarlyStopping as DownstreamEarlyStopping
    from pipeline.training.monitors import DownstreamModelCheckpoint as DownstreamModelCheckpoint
    from pipeline.training.untouched import untouched as untouched
    from pipeline.validation import validate as validate

_HOMES = {
    "Config": "config.schema",
    "DESCRIPTION": "encoders.description",
    "Downstream": "training.loop",
    "DownstreamEarlyStopping": "training.monitors",
    "DownstreamModelCheckpoint": "training.monitors",
    "DownstreamTrainerCallback": "training.huggingface",
    "DownstreamValidation": "training.lightning",
    "Encoder": "encoders.protocol",
    "EncoderOptions": "encoders.options",
    "Files": "config.task",
    "HuggingFaceEncoder": "encoders.huggingface",
    "JournalLogger": "training.loggers",
    "LiveModel": "encoders.live",
    "Measured": "report.measured",
    "NullTracker": "tracking.protocol",
    "PipelineError": "errors",
    "Scores": "score",
    "Store": "store.embedding_table",
    "Task": "config.task",
    "Tracker": "tracking.protocol",
    "embed_sequences": "interface",
    "measure": "interface",
    "open_encoder": "checkpoints.opening",
    "read_config": "config.yaml_file",
    "setup_dwnstr_task_validation_callbacks": "training.lightning",
    "shipped_path": "config.shipped",
    "untouched": "training.untouched",
    "validate": "validation",
}

__version__ = "0.1.0"
__all__ = sorted(_HOMES)  # pyright: ignore


def __getattr__(name: str) -> Any:
    """Imports a public name when it is used: `--help` and `import pipeline` do not wait for torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'pipeline' has no attribute '{name}'")
    value = getattr(importlib.import_module(f"pipeline.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
