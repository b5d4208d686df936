"""A run that is logged by way of a journal."""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.tracking.journal import Journal
from pipeline.tracking.journal_owner import writer_tags
from pipeline.tracking.protocol import KIND, STAGE, Data, Served

NOTE = "mlflow.note.content"


class JournalRun:
    """A `Tracker` that writes a run to a journal; its steps are nested runs. No call waits for a server.

    Attributes:
        key: the run's, in the journal; on the server it is the tag `pipeline.journal`.
        time: of its metrics, in milliseconds since 1970; None for that of each call.
    """

    def __init__(self, journal: Journal, key: str, context: Mapping[str, str]) -> None:
        """The run must be in the journal already; see `begin`."""
        self.journal = journal
        self.key = key
        self.context = context
        self.model: str | None = None  # the digest of the weights that metrics are linked to
        self.in_stages: bool = False  # then metrics on data are linked by the runs of the stages, here the others alone
        self.measured: str | None = None  # of a stage: the digest of the weights that its metrics on data are linked to
        self.time: int | None = None
        self.ended: str | None = None
        self._notes: list[str] = []
        self._described = ""

    @classmethod
    def begin(
        cls,
        journal: Journal,
        key: str | None = None,
        context: Mapping[str, str] | None = None,
        mine: bool = True,
        **what: Any,
    ) -> JournalRun:
        """Begins a run, or continues the run with this key.

        Args:
            journal: where it is written.
            key: of a run that is to be continued.
            context: tags of the run and of those nested in it, such as who began it.
            mine: whether the run ends when this process does.
            what: `name`; `parent`, the key of another run; `run_id` of a run that is on the server already;
                `experiment`, the name or the id of its experiment.
        """
        run = cls(journal, key or uuid.uuid4().hex, context or {})
        tags = {**run.context, **writer_tags(journal.path)} if mine else {}
        run._write("run", tags=tags, time=now(), **what)
        return run

    @contextmanager
    def stage(self, name: str) -> Iterator[JournalRun]:
        """See `Tracker.stage`. Its run ends as FINISHED, FAILED or KILLED.

        What it measures on data is linked to this run's checkpoint, if that is measured in stages; else it is linked to
        no model.
        """
        context = {**self.context, KIND: STAGE}
        child = JournalRun.begin(self.journal, context=context, name=name, parent=self.key)
        child.measured = self.model if self.in_stages else None
        with child.ending():
            yield child

    def metrics(self, values: Mapping[str, float], step: int = 0, data: Data | None = None) -> None:
        """See `Tracker.metrics`. On a run with a checkpoint, the metrics are linked to it too."""
        numbers = {key: float(value) for key, value in values.items()}
        on = [dataset_name(data), data.digest[:16]] if data else None
        model = self.measured if data and (self.measured or self.in_stages) else self.model
        self._write("metrics", values=numbers, step=step, time=self.time or now(), model=model, data=on)

    def artifact(self, path: Path, folder: str = "", step: int = 0) -> None:  # noqa: ARG002
        """See `Tracker.artifact`."""
        self._file(path, path.name, folder)

    def served(self, folder: Path, model: Served, step: int = 0) -> None:
        """See `Tracker.served`. A run without a checkpoint, such as one nested in another, has none."""
        self.serving(folder, model, step)()

    def serving(self, folder: Path, model: Served, step: int) -> Callable[[], None]:
        """As `served`: the files are kept now, and the model is logged by the call that is returned."""
        kept = self.journal.keep(folder, model.task) if self.model else None
        if kept is None:
            return lambda: None
        # A training that goes on after it was killed may log the same model once more.
        key = uuid.uuid5(uuid.NAMESPACE_OID, f"{self.key} {self.model} {model.task} {step}").hex
        return partial(self._write, "served", file=kept, key=key, model=self.model, step=step, served=asdict(model))

    def text(self, content: str, name: str) -> None:
        """A text artifact; `name` may have folders in it."""
        folder, _, file = name.rpartition("/")
        self._file(content, file, folder)

    def rename(self, name: str) -> None:
        """Gives the run another name."""
        self._write("name", name=name)

    def note(self, text: str) -> None:
        """See `Tracker.note`. Notes are at the end of the run's description."""
        self._notes.append(text)
        self.describe(self._described)

    def data(self, data: Data) -> None:
        """See `Tracker.data`."""
        self._write("data", data={**asdict(data), "name": dataset_name(data)})

    def parameters(self, values: Mapping[str, Any], prefix: str = "cfg.") -> None:
        """See `Run.parameters`. With a prefix, as `mlflow run` logs MLproject's own parameters under their names."""
        flat = {clean(f"{prefix}{key}"): str(value)[:6000] for key, value in _flatten(values)}
        self._write("parameters", values=flat)

    def tags(self, values: Mapping[str, str]) -> None:
        """Tags of the run."""
        self._write("tags", values={key: value[:8000] for key, value in values.items()})

    def describe(self, markdown: str) -> None:
        """The description on the run's page, with the notes below it."""
        self._described = markdown
        notes = "\n".join(f"- {note}" for note in self._notes)
        self.tags({NOTE: "\n\n".join(filter(None, (markdown, notes)))})

    def checkpoint(self, name: str, digest: str, source: str, step: int | None = None, in_stages: bool = False) -> None:
        """Links metrics from here on to the LoggedModel of the weights; it is made if it does not exist.

        With `in_stages` those that are measured on data are linked by the runs of the stages, which have all of them.
        """
        self.model, self.in_stages = digest, in_stages
        self._write("model", name=name, digest=digest, source=source, step=step)

    def end(self, status: str) -> None:
        """Ends the run: FINISHED, FAILED or KILLED."""
        if status != self.ended:
            self._write("end", status=status, time=now())
        self.ended = status

    @contextmanager
    def ending(self) -> Iterator[None]:
        """Ends the run: FAILED after an exception, KILLED after an interrupt, else FINISHED."""
        try:
            yield
        except Exception as error:
            self.describe(f"**Failed:** {error}")
            self.end("FAILED")
            raise
        except BaseException:
            self.end("KILLED")
            raise
        self.end(self.ended or "FINISHED")

    def _file(self, source: Path | str, name: str, folder: str) -> None:
        kept = self.journal.keep(source, name)
        if kept is not None:
            self._write("artifact", file=kept, folder=folder)

    def _write(self, op: str, **what: Any) -> None:
        self.journal.append({"op": op, "run": self.key, **what})


def dataset_name(data: Data) -> str:
    """The name of a part of a task's data in MLflow."""
    return f"{data.name} {data.part}"


def clean(name: str) -> str:
    """A name that MLflow takes: with `_` for every character that it refuses, and no longer than it takes.

    >>> clean("/a//b@c/")
    'a/b_c'
    """
    return re.sub(r"/+", "/", re.sub(r"[^\w./ :-]", "_", name)).strip("/")[:250] or "_"


def now() -> int:
    """Milliseconds since 1970."""
    return int(time.time() * 1000)


def _flatten(values: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(values, (Mapping, list)) and values:
        items = values.items() if isinstance(values, Mapping) else enumerate(values)
        for key, value in items:
            yield from _flatten(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, values
