"""The code of a served model, in MLflow's words: `save_served` copies it, and MLflow runs it where the model is loaded.

MLflow puts the model's copy of this package on the path first.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE
from mlflow.pyfunc.model import PythonModel

from pipeline.errors import PipelineError
from pipeline.serving.predictor import CONTENT, Predictor


class ServedTask(PythonModel):
    """Answers with the predictions of a task, see `Predictor.predict`."""

    def load_context(self, context: Any) -> None:  # noqa: ARG002
        """Opens the files beside this one; MLflow 3.1 calls it once before they are there, as the model is written."""
        folder = Path(__file__).with_name(CONTENT)
        if folder.is_dir():
            self.predictor = Predictor.read(folder)

    def predict(self, context: Any, model_input: pd.DataFrame, params: Any = None) -> pd.DataFrame:  # noqa: ARG002
        """A row for each sequence. Raises MlflowException, which is 400 over HTTP, for one that is not valid."""
        try:
            return pd.DataFrame(self.predictor.predict(model_input[self.predictor.sequence_column].tolist()))
        except PipelineError as error:
            raise MlflowException(str(error), INVALID_PARAMETER_VALUE) from error


mlflow.models.set_model(ServedTask())
