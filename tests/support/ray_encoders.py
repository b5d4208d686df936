"""Encoders that workers of Ray open: some end their process, or fail, when they come to a certain sequence.

The checkpoint is a file with the path of a folder. There each forward pass leaves the number of its process.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from tests.support.encoders import FakeEncoder

FATAL = "MKVLAAGITRWYFDENQHPSCMKVLAAG"


class Known(FakeEncoder):
    digest = "version 1"

    def __init__(self, folder: Path) -> None:
        self.hidden_size, self.folder = 24, folder

    @classmethod
    def from_checkpoint(cls, path: str) -> Known:
        return cls(Path(Path(path).read_text()))

    def hidden_states(self, sequences: Sequence[str]) -> list[Tensor]:
        (self.folder / f"pid-{os.getpid()}").touch()
        if FATAL in sequences:
            self.come_to_it()
        return [self.state(sequence) for sequence in sequences]

    def come_to_it(self) -> None:
        """What happens at the fatal sequence."""


class Asks(Known):
    """Writes down where MLflow is for the process that opens it."""

    @classmethod
    def from_checkpoint(cls, path: str) -> Known:
        encoder = super().from_checkpoint(path)
        (encoder.folder / f"uri-{os.getpid()}").write_text(os.environ.get("MLFLOW_TRACKING_URI", ""))
        return encoder


class KilledOnce(Known):
    def come_to_it(self) -> None:
        mark = self.folder / "killed"
        if not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)


class KilledAlways(Known):
    def come_to_it(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


class Wrong(Known):
    def hidden_states(self, sequences: Sequence[str]) -> list[Tensor]:
        states = super().hidden_states(sequences)
        return [state[:, :-1] for state in states] if FATAL in sequences else states


class Raises(Known):
    def come_to_it(self) -> None:
        raise KeyError("of the user's own code")
