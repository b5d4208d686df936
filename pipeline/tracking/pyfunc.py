"""A folder that MLflow loads and serves as a pyfunc model: code beside the files, no pickle."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from mlflow.models import Model, ModelSignature
from mlflow.models.model import MLMODEL_FILE_NAME
from mlflow.types import ColSpec, DataType, Schema
from mlflow.types.schema import Array, Map

from pipeline.store.temporary import link_folder

with warnings.catch_warnings():
    warnings.simplefilter("ignore", UserWarning)  # MLflow 3.17 warns of its own classes
    import mlflow.pyfunc

OF_PROJECT = ("uv.lock", "pyproject.toml", ".python-version")  # MLflow copies those of the folder it is called in


def save_served(
    path: Path,
    content: Path,
    script: Path,
    code: Path,
    columns: Mapping[str, str],
    answers: Mapping[str, Sequence[str]],
    example: Mapping[str, list[Any]],
    requirements: Sequence[str],
) -> None:
    """Writes the model.

    Args:
        path: a new folder for it.
        content: a folder of the files that it is made of; the script finds it beside itself, under its own name.
        script: the Python file that answers.
        code: the folder of the package that it imports.
        columns: the type of each column of a request, by name.
        answers: the type of each column of an answer by name, innermost first: `["double", "list", "map"]`.
        example: of a request.
        requirements: what pip installs where it is served, beside MLflow.
    """
    log = logging.getLogger("mlflow.pyfunc")
    level = log.level
    log.setLevel(logging.WARNING)
    try:
        mlflow.pyfunc.save_model(
            str(path),
            python_model=str(script),
            code_paths=[str(code)],
            signature=ModelSignature(_schema({name: [kind] for name, kind in columns.items()}), _schema(answers)),
            input_example=pd.DataFrame(example),
            pip_requirements=list(requirements),
        )
    finally:
        log.setLevel(level)
    for name in OF_PROJECT:
        (path / name).unlink(missing_ok=True)
    described = Model.load(str(path))
    described.flavors["python_function"]["model_code_path"] = script.name  # not where it is on this machine
    described.save(str(path / MLMODEL_FILE_NAME))
    link_folder(content, path / content.name)


def _schema(columns: Mapping[str, Sequence[str]]) -> Schema:
    return Schema([ColSpec(_type(kinds), name) for name, kinds in columns.items()])


def _type(kinds: Sequence[str]) -> Any:
    found: Any = DataType[kinds[0]]
    for kind in kinds[1:]:
        found = Array(found) if kind == "list" else Map(found)
    return found
