"""TensorBoard: a folder of its own for each measurement, below one that `tensorboard --logdir` is given."""

from __future__ import annotations

import re
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import ConfigError
from pipeline.tracking.protocol import Data, NullTracker

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class TensorBoardTracker(NullTracker):
    """Writes results and pictures; stages, notes and other files are MLflow's."""

    def __init__(self, writer: SummaryWriter) -> None:
        """The writer must be open."""
        self.writer = writer

    def metrics(self, values: Mapping[str, float], step: int = 0, data: Data | None = None) -> None:  # noqa: ARG002
        """See `Tracker.metrics`. TensorBoard keeps them in single precision."""
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def artifact(self, path: Path, folder: str = "", step: int = 0) -> None:
        """See `Tracker.artifact`. Pictures are shown, other files are not kept."""
        if path.suffix == ".png":
            log_picture(self.writer, f"{folder}/{path.stem}" if folder else path.stem, path, step)


def log_picture(writer: Any, key: str, path: Path, step: int) -> None:
    """Shows a PNG file at a step; the file may go afterwards."""
    import numpy as np
    from PIL import Image

    with Image.open(path) as picture:
        writer.add_image(key, np.asarray(picture.convert("RGB")), step, dataformats="HWC")


@contextmanager
def open_tensorboard(folder: Path, name: str) -> Iterator[TensorBoardTracker]:
    """A writer to a new sub-folder, which TensorBoard shows by its name: `<name>-<date>-<time>`.

    Raises:
        ConfigError: TensorBoard is not installed, or the folder cannot be written.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of old ways that TensorBoard's imports have
            from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ConfigError("logging.tensorboard needs TensorBoard: pip install tensorboard") from error
    try:
        writer = SummaryWriter(str(_new_folder(folder, name)))
    except OSError as error:
        remedy = "set it to another folder"
        raise ConfigError(f"logging.tensorboard: '{folder}' cannot be written ({error}); {remedy}") from error
    try:
        yield TensorBoardTracker(writer)
    finally:
        writer.close()


def _new_folder(folder: Path, name: str) -> Path:
    """Made here, so that two measurements at once get two."""
    stem = re.sub(r"[^\w.=-]", "_", name)[:100] + time.strftime("-%Y%m%d-%H%M%S")
    folder.mkdir(parents=True, exist_ok=True)
    for number in count(1):
        path = folder / (stem if number == 1 else f"{stem}-{number}")
        try:
            path.mkdir()
            break
        except FileExistsError:
            continue
    return path
