"""The command line, `downstream COMMAND ...` or `python -m pipeline COMMAND ...`: parses arguments, calls, prints."""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import logging
import math
import os
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pipeline.command.parser import make_parser
from pipeline.command.program import PartlyError, check_tracking, links, run_program
from pipeline.config.shipped import CKPT, shipped_path
from pipeline.errors import ConfigError, PipelineError, TrackingError

if TYPE_CHECKING:
    import pandas as pd

    from pipeline.config.schema import Config
    from pipeline.report.comparison import Leaderboard, Row
    from pipeline.tracking.runs import OpenRun

logger = logging.getLogger("pipeline")
DEFAULT = " (the default: give --ckpt)"
WITHOUT_RUN = ("config", "doctor", "replay", "worker")  # commands that log to no run of their own


@dataclass(frozen=True)
class Answer:
    """What a command prints.

    Attributes:
        lines: for people.
        content: the same as a JSON object, for scripts.
        error: raised after that, where a part of the work failed.
    """

    lines: Sequence[str]
    content: Mapping[str, Any] = field(default_factory=dict)
    error: PipelineError | None = None


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command. Returns the exit code, see `run_program`."""
    return run_program(make_parser(), _run, arguments, WITHOUT_RUN)


def _run(options: argparse.Namespace) -> None:
    """Runs a command and prints its answer; as JSON, an error too: then it is the only key."""
    command = COMMANDS[options.command]
    if not options.json:
        answer = command(options)
        text = "\n".join(answer.lines)
    else:
        with contextlib.redirect_stdout(sys.stderr):  # libraries print there
            try:
                answer = command(options)
            except PipelineError as error:
                answer = Answer((), {"error": str(error)}, error)
        text = json.dumps(_finite(answer.content), allow_nan=False)
    with _reader_may_stop():
        print(text)
    if answer.error:
        raise answer.error


@contextlib.contextmanager
def _reader_may_stop() -> Iterator[None]:
    """Whoever reads may have read enough, such as `head`: the rest is not printed, and nothing else changes."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _finite(content: Any) -> Any:
    """The content with null for the numbers that JSON does not have."""
    if isinstance(content, Mapping):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def _config(options: argparse.Namespace) -> Answer:
    from pipeline.config.documentation import markdown
    from pipeline.config.yaml_file import read_config, to_mapping, to_yaml

    if options.schema:
        return Answer([markdown()], {"schema": markdown()})
    config = read_config(options.file, options.overrides)
    notes = [f"# {note}" for note in config.notes]
    return Answer([*notes, to_yaml(config).rstrip("\n")], {"config": to_mapping(config), "notes": config.notes})


def _measure(options: argparse.Namespace) -> Answer:
    """Measures a checkpoint in a run with a nested run per stage; several checkpoints in nested runs of a run."""
    from pipeline.config.yaml_file import read_config

    config = read_config(options.config, options.overrides)
    if options.until == "load" and not options.ckpt:
        options.ckpt = None  # the data alone, whatever an encoder takes
        logger.info("reading     the data of %s", options.config)
    else:
        unnamed, options.ckpt = options.ckpt is None, _ckpt(options)
        if os.environ.get("MLFLOW_RUN_ID"):  # then MLproject gives the default
            unnamed = options.ckpt == shipped_path(CKPT)
        logger.info("measuring   %s%s as in %s", options.ckpt, DEFAULT if unnamed else "", options.config)
    for note in config.notes:
        logger.info("config      %s", note)
    check_tracking(options.tracking_uri)
    try:
        return _measure_tracked(options, config)
    except SystemExit:
        print("interrupted: what is finished is kept, and the same command goes on from there", file=sys.stderr)
        raise


def _ckpt(options: argparse.Namespace) -> str:
    """The checkpoint that the user names, or else the sample's."""
    return shipped_path(CKPT) if options.ckpt is None else str(options.ckpt)


def _measure_tracked(options: argparse.Namespace, config: Config) -> Answer:
    from pipeline.checkpoints.names import expand, name_of
    from pipeline.command.engine import engine_of
    from pipeline.command.measuring import tracked
    from pipeline.command.ready import ready
    from pipeline.store.embedding_table import Store
    from pipeline.tracking.runs import reach

    reach(config, options.tracking_uri)  # the engine's processes download from there
    ckpts = expand(options.ckpt) if options.ckpt is not None else []
    name = name_of(ckpts[0]) if len(ckpts) == 1 else f"{len(ckpts)} checkpoints" if ckpts else "data"
    store = Store.from_config(config)
    store.clear()
    with engine_of(config) as engine:
        work = ready(ckpts, config, store, options.until, engine)
        with tracked(name, config, options.tracking_uri) as (opened, others):
            done = work(opened.run, others)
            failed = {row.label: row.error for row in done.rows if row.error}
            if failed:
                opened.run.end("FAILED")
    error = PartlyError("; ".join(f"{name}: {why}" for name, why in failed.items())) if failed else None
    content = {"checkpoints": _plain(done.rows), "table": _records(done.table), "run": _address(opened)}
    where = links(opened)
    return Answer([*done.lines, *_by_another(done.board, opened, options.tracking_uri), *where], content, error)


def _by_another(board: Leaderboard | None, opened: OpenRun, tracking_uri: str) -> list[str]:
    """The command that ranks the same checkpoints by the next metric that the leaderboard shows.

    None for one checkpoint, and where the server has not given the run an id, by when the run has ended.
    """
    if board is None or opened.ids is None or len(board.names) < 2:
        return []
    words = ["downstream", "compare", opened.ids[1], f"--by={board.names[1]}"]
    words += [f"--tracking-uri={tracking_uri}"] if tracking_uri else []
    return [f"By another:     {shlex.join(words)}"]


def _compare(options: argparse.Namespace) -> Answer:
    from pipeline.command import measuring
    from pipeline.config.schema import Config
    from pipeline.report import comparison as compare
    from pipeline.tracking.earlier_runs import read_runs, with_predictions
    from pipeline.tracking.runs import open_run

    check_tracking(options.tracking_uri)
    runs = read_runs(options.runs, options.tracking_uri)
    rows = [row for run in runs for row in measuring.rows_of_run(run)]
    names = compare.choose(rows, options.by)
    measurements = "1 measurement" if len(rows) == 1 else f"{len(rows)} measurements compared"
    with open_run(measurements, Config(), options.tracking_uri) as opened:
        board = measuring.compare_runs(with_predictions(runs, names[0]), names, opened.run)
    lines = [board.table.text(), *board.remarks, *links(opened)]
    return Answer(lines, {"by": names[0], "leaderboard": _records(board.frame), "run": _address(opened)})


def _replay(options: argparse.Namespace) -> Answer:
    from pipeline.tracking.earlier_runs import replay_journal

    lines, journals, failed = list[str](), dict[str, Any](), list[str]()
    for name in options.journal:
        try:
            arrived, refused = replay_journal(name, options.tracking_uri)
        except PipelineError as error:
            failed.append(str(error))
            journals[name] = {"error": str(error)}
            continue
        refusals = f", {refused} were refused" if refused else ""
        where = f" to {options.tracking_uri}" if options.tracking_uri else ""
        lines.append(f"{name}: {arrived} records sent{where}{refusals}")
        journals[name] = {"sent": arrived, "refused": refused}
    return Answer(lines, {"journals": journals}, TrackingError("; ".join(failed)) if failed else None)


def _doctor(options: argparse.Namespace) -> Answer:
    from pipeline.command.doctor import examine

    found = examine(_ckpt(options), options.config, options.overrides, options.tracking_uri, options.quick)
    error = ConfigError("; ".join(found.problems)) if found.problems else None
    return Answer(found.lines, found.content, error)


def _records(frame: pd.DataFrame | None) -> Any:
    """The rows of a table, for JSON: what is not defined is null."""
    return [] if frame is None else json.loads(frame.to_json(orient="records", double_precision=15))


def _plain(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Checkpoints with their metrics, for JSON."""
    keys = ("label", "step", "metrics", "error")
    return [{key: value for key in keys if (value := getattr(row, key)) not in (None, "")} for row in rows]


def _address(opened: OpenRun) -> dict[str, str]:
    """Where a run is, for JSON; without ids where it has not reached the server."""
    from pipeline.tracking.client import shown

    ids = dict(zip(("experiment_id", "run_id"), opened.ids or (), strict=False))
    return {"tracking_uri": shown(opened.uri), **ids}


def _work(options: argparse.Namespace) -> Answer:
    from pipeline.training.worker import Worker

    Worker(options.folder).run(options.parent)
    return Answer(())


COMMANDS = {
    "measure": _measure,
    "compare": _compare,
    "replay": _replay,
    "config": _config,
    "doctor": _doctor,
    "worker": _work,
}


def run() -> int:
    """The program `downstream`."""
    # The imported libraries' 700,000 objects are never freed: walking through them again and again, and at the end,
    # would cost the garbage collector two seconds.
    gc.set_threshold(20_000)
    code = main()
    with _reader_may_stop():
        pass  # what libraries have printed
    gc.freeze()
    return code


if __name__ == "__main__":
    sys.exit(run())
