"""The result of a measurement as Python users and notebooks have it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.config.schema import Config
from pipeline.config.yaml_file import to_yaml
from pipeline.report.differences import difference_frame
from pipeline.report.overview import Changes, headlines, overview, overview_frame
from pipeline.report.page import notebook_table
from pipeline.report.publishing import write_report
from pipeline.score import Scores

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure


@dataclass(frozen=True, repr=False)
class Measured:
    """What the embeddings of a checkpoint or a module are worth; a notebook shows it as a table.

    Attributes:
        name: what was measured.
        scores: of each task, with predictions and every metric.
        changes: since random weights, where `baseline: random_init` asks for it.
        facts: what else the report says: checkpoint, data, device, versions, date.
        config: the configuration, with every key.
        notes: how settings were understood that were not given.
        run_id: of the MLflow run; None where nothing was tracked, or MLflow has not been reached yet.
    """

    name: str
    scores: list[Scores]
    changes: Changes
    facts: Mapping[str, str]
    config: Config
    notes: tuple[str, ...] = ()
    run_id: str | None = None

    @property
    def metrics(self) -> dict[str, float]:
        """Every metric by the name that it is logged under, such as `test_3state_accuracy`."""
        return {name: value for one in self.scores for name, value in one.metrics.items()}

    @cached_property
    def table(self) -> pd.DataFrame:
        """A row per target: its headline metric, interval, probe, baseline and verdict; see `overview_frame`."""
        return overview_frame(self.scores, self.changes)

    def plot(self) -> Figure:
        """The table as a figure: scores with their intervals, and what they have to beat."""
        from pipeline.report.figures.overview import overview_figure

        return overview_figure(headlines(self.scores), self._title)

    def report(self, path: str | Path = "report.html") -> Path:
        """Writes the whole result with all figures as a page; returns its path.

        Args:
            path: the file, or a folder, which then gets a `report.html`.

        Raises:
            ConfigError: it cannot be written.
        """
        file = Path(path).expanduser()
        file = file / "report.html" if file.is_dir() else file
        write_report(file, self.scores, self.changes, self._title, self.facts, to_yaml(self.config))
        return file

    def compare(self, other: Measured) -> pd.DataFrame:
        """How far this is from another checkpoint on the same test sequences: a row per headline metric.

        Args:
            other: measured with the same configuration and data, such as the checkpoint before.

        Returns:
            Columns `task`, `metric` (the head's, then the probe's), `score`, `other`, `change` (the former less the
            latter), `ci_low`, `ci_high` (of the change, the ends of its paired 95 % interval), `p_improved` (1
            less the one-sided p-value of a paired t test of no improvement, 0.5 for no change: not the probability that
            this one is better) and `verdict`: `improved`, `worse`, or `not told apart` where the interval holds 0;
            where there is none, the reason.

        Raises:
            DataError: the two were not measured on the same tasks, sequences and labels.
        """
        return difference_frame(self.scores, other.scores)

    def __str__(self) -> str:
        return overview(self.scores, self.changes, self._title).text()

    __repr__ = __str__

    def _repr_html_(self) -> str:
        notes = [*self.notes, *(note for one in self.scores for note in (*one.earlier_notes, *one.notes))]
        return notebook_table(self._title, self.scores, self.changes, notes)

    @property
    def _title(self) -> str:
        return f"{self.name}: {self.config.title}"
