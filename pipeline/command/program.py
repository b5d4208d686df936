"""What the command line and the examples share: logging, signals, exit codes, errors of one line, links to the run."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from pipeline.errors import ConfigError, PipelineError

if TYPE_CHECKING:
    from pipeline.tracking.runs import OpenRun


class PartlyError(PipelineError):
    """Some of several checkpoints could not be measured. The run's description has the reasons already."""


def run_program(
    parser: argparse.ArgumentParser,
    run: Callable[[argparse.Namespace], None],
    arguments: Sequence[str] | None = None,
    without_run: Collection[str] = (),
) -> int:
    """Parses the arguments (by default those of the process) and calls `run` with them.

    An error is written to the run that `mlflow run` made, unless the command is one of `without_run`. `parser` gets one
    more option, `--traceback`: it prints where in the program an error comes from.

    Returns:
        The exit code: 0, or 2 for a user's mistake.

    Raises:
        SystemExit: with code 130 or 143, on SIGINT or SIGTERM.
    """
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("pipeline").setLevel(logging.INFO)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _interrupt)
    add_traceback(parser)
    options = argparse.Namespace(traceback=False)
    try:
        parser.parse_args(arguments, options)
        if options.traceback:
            logging.getLogger("pipeline").setLevel(logging.DEBUG)  # errors that do not end the program are logged so
        run(options)
    except PipelineError as error:
        if options.traceback:
            *stack, _message = traceback.TracebackException.from_exception(error).format()
            print("".join(stack), end="", file=sys.stderr)
        has_run = getattr(options, "command", None) not in without_run and not isinstance(error, PartlyError)
        if os.environ.get("MLFLOW_RUN_ID") and has_run:
            from pipeline.tracking.client import fail_run

            fail_run(str(error))  # the program may not have opened the run yet
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def add_traceback(parser: argparse.ArgumentParser) -> None:
    """Adds the option `--traceback`. Without a default, so that it may stand before or after a sub-command."""
    text = "print where in the program an error is from"
    parser.add_argument("--traceback", action="store_true", default=argparse.SUPPRESS, help=text)


def check_tracking(tracking_uri: str) -> None:
    """Raises ConfigError where `mlflow run` has made the run on another server than `tracking_uri`."""
    given = os.environ.get("MLFLOW_TRACKING_URI", "")
    if os.environ.get("MLFLOW_RUN_ID") and tracking_uri and given and tracking_uri != given:
        raise ConfigError(f"tracking_uri: the run is at '{given}' already; set MLFLOW_TRACKING_URI for mlflow run")


def links(opened: OpenRun) -> list[str]:
    """Lines that say where to look at the run; for a local database, how to start the UI first."""
    from pipeline.tracking.client import shown

    if opened.ids is None:  # the run has not reached the server; a warning has named the command that sends it
        return []
    server = opened.uri if opened.uri.startswith("http") else "http://127.0.0.1:5000"
    start = [] if server == opened.uri else [f"To look at it:  mlflow ui --backend-store-uri {shown(opened.uri)}"]
    experiment, run = opened.ids
    runs = f"{shown(server)}/#/experiments/{experiment}/runs"
    view = "?workflowType=machine_learning"  # else MLflow 3 opens its view for agents
    return [*start, f"This run:       {runs}/{run}{view}", f"All runs:       {runs}{view}"]


def _interrupt(number: int, _frame: Any) -> NoReturn:
    """Ignores further signals while the runs are being ended: Ctrl-C under `mlflow run` sends two."""
    for further in (signal.SIGTERM, signal.SIGINT):
        signal.signal(further, signal.SIG_IGN)
    raise SystemExit(128 + number)
