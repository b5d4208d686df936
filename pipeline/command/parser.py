"""The arguments of the command line. Each `--help` fits a terminal of 24 lines of 80 characters."""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from pipeline.command.program import add_traceback
from pipeline.config.shipped import CONFIG, shipped_path
from pipeline.errors import ConfigError

STAGES = ("load", "embed", "train_head", "score")
DESCRIPTION = "Measures what the embeddings of sequence models are worth on your labelled data."
EXIT_CODES = """\
exit codes:
  0  done
  1  an error in this program, with a traceback
  2  a mistake or a thing that is missing: one line says what, and the remedy
  130, 143  interrupted (SIGINT, SIGTERM); the same command goes on from there"""
ENTRY_POINTS = """\
MLproject's entry points main, load, embed, train_head and score are `measure`
as far as that stage. `downstream COMMAND --help` has the options of each.
"""


class Parser(argparse.ArgumentParser):
    """Raises a ConfigError for a wrong argument, so that it is reported like every other error."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """Refuses what is not known where the options are: in the parser of a command."""
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:
            near = difflib.get_close_matches(unknown[0].partition("=")[0], self._option_string_actions, n=1)
            meant = f"; did you mean '{near[0]}'?" if near else ""
            self.error(f"unrecognized arguments: {' '.join(unknown)}{meant}")
        return found, unknown

    def error(self, message: str) -> NoReturn:
        """See above."""
        raise ConfigError(f"{message}; see {self.prog} --help")


def make_parser() -> argparse.ArgumentParser:
    """The parser of all commands. `main` and the stages, which are entry points of MLproject, are `measure`."""
    prog = "python -m pipeline" if Path(sys.argv[0]).name == "__main__.py" else "downstream"
    style: dict[str, Any] = {"allow_abbrev": False, "formatter_class": argparse.RawDescriptionHelpFormatter}
    parser = Parser(prog=prog, description=DESCRIPTION, epilog=f"{ENTRY_POINTS}\n{EXIT_CODES}", **style)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    every = argparse.ArgumentParser(add_help=False)
    add_traceback(every)
    every.add_argument("--json", action="store_true", help="print one JSON object; all else goes to stderr")
    style |= {"parents": [every], "epilog": EXIT_CODES}
    for name, (text, add_arguments) in COMMANDS.items():
        add_arguments(commands.add_parser(name, help=text, description=f"{text.capitalize()}.", **style))
    for name in ("main", *STAGES):  # without help, so that they are not listed
        entry_point = commands.add_parser(name, **style)
        _add_measured(entry_point)
        entry_point.set_defaults(command="measure", until="score" if name == "main" else name)
    _worker(commands.add_parser("worker", description="Measures the snapshots of a training.", **style))  # nor this
    return parser


def _measure(parser: argparse.ArgumentParser) -> None:
    _add_measured(parser)
    until = "last stage to run: load, embed, train_head or score (score)"
    parser.add_argument("--until", choices=STAGES, default="score", metavar="STAGE", help=until)


def _compare(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", metavar="RUN_ID", help="MLflow run of measurements, or of a training")
    parser.add_argument("--by", default="", metavar="METRIC", help="rank by this one (the first task's main one)")
    _add_tracking(parser)


def _replay(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("journal", nargs="+", metavar="JOURNAL", help="the .jsonl file that a warning named")
    _add_tracking(parser)


def _config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", nargs="?", default=shipped_path(CONFIG), help="YAML file (the sample's)")
    parser.add_argument("--overrides", default="", metavar="LIST", help="such as 'dataset.num_epochs=3 device=cpu'")
    parser.add_argument("--schema", action="store_true", help="print every key: type, default and meaning")


def _worker(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="where the training writes them")
    parser.add_argument("--parent", type=int, metavar="PID", help="wait for more as long as this process lives")


def _doctor(parser: argparse.ArgumentParser) -> None:
    _add_measured(parser)
    parser.add_argument("--quick", action="store_true", help="leave out the cost, which takes seconds")


def _add_measured(parser: argparse.ArgumentParser) -> None:
    ckpt = "folder, file, hub id or MLflow URI; a,b or a pattern (the sample's)"
    parser.add_argument("--ckpt", help=ckpt)
    parser.add_argument("--config", default=shipped_path(CONFIG), metavar="FILE", help="YAML file (the sample's)")
    parser.add_argument("--overrides", default="", metavar="LIST", help="such as 'dataset.num_epochs=3 device=cpu'")
    _add_tracking(parser)


def _add_tracking(parser: argparse.ArgumentParser) -> None:
    text = "MLflow server or database (MLFLOW_TRACKING_URI)"
    parser.add_argument("--tracking-uri", default="", metavar="URI", help=text)
    parser.add_argument("--tracking_uri", default=argparse.SUPPRESS, help=argparse.SUPPRESS)  # as MLflow spells it


# Of each, what it is for, and what adds its arguments.
COMMANDS: dict[str, tuple[str, Callable[[argparse.ArgumentParser], None]]] = {
    "measure": ("measure checkpoints, and track the result", _measure),
    "compare": ("rank measurements that were made before", _compare),
    "replay": ("send to MLflow what it has missed", _replay),
    "config": ("print a configuration with every key, or what the keys mean", _config),
    "doctor": ("say what is installed and works, and what a measurement costs", _doctor),
}
