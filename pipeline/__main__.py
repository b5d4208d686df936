"""`python -m pipeline <entry point> ...`: parses, calls, prints. Errors are one line, with exit code 2."""

from __future__ import annotations

import argparse
import gc
import logging
import os
import signal
import sys
import traceback
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from pipeline.errors import ConfigError, PipelineError, TrackingError

if TYPE_CHECKING:
    from pipeline.config.schema import Config
    from pipeline.tracking.runs import OpenRun

DEFAULT_CONFIG = "configs/default.yaml"
DEFAULT_CKPT = "sample/checkpoint"
OVERRIDES = "dot-list, such as 'dataset.num_epochs=3 device=cpu'"
CKPT = "model folder, hub id, .ckpt or MLflow URI; several are a list with commas, or a pattern such as 'run/*.ckpt'"
STAGES = {
    "main": "the whole path: load, embed, train_head, score",
    "load": "read and check the CSV files",
    "embed": "as far as the embeddings in the store",
    "train_head": "as far as the trained heads",
    "score": "as far as the scores (the same as main)",
}


class _Parser(argparse.ArgumentParser):
    """Reports a wrong argument as every other error is reported."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see python -m pipeline --help")


class PartlyError(PipelineError):
    """Some of several checkpoints could not be measured; the run says so already."""


class _Interrupted(BaseException):
    """SIGTERM or SIGINT."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs an entry point. Returns the exit code: 0, 2 for a user's mistake, 130 or 143 when interrupted."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("pipeline").setLevel(logging.INFO)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _interrupt)
    options = argparse.Namespace(traceback=False)
    try:
        _parser().parse_args(arguments, options)
        if options.traceback:
            logging.getLogger("pipeline").setLevel(logging.DEBUG)  # what the work goes on after is logged at it
        options.run(options)
    except PipelineError as error:
        if options.traceback:
            traceback.print_exc()
        if not isinstance(error, PartlyError):
            _say_on_run(str(error))
        print(f"error: {error}", file=sys.stderr)
        return 2
    except _Interrupted as interrupted:
        return 128 + interrupted.number
    return 0


def _interrupt(number: int, _frame: Any) -> NoReturn:
    """Further signals are not heard while the runs are being ended: Ctrl-C under `mlflow run` sends two."""
    for further in (signal.SIGTERM, signal.SIGINT):
        signal.signal(further, signal.SIG_IGN)
    raise _Interrupted(number)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m pipeline", description="Validation with a downstream task.", allow_abbrev=False)
    commands = parser.add_subparsers(dest="stage", required=True, metavar="ENTRY_POINT")
    every = argparse.ArgumentParser(add_help=False)
    every.add_argument("--traceback", action="store_true", help="print where in the program an error is from")
    common: dict[str, Any] = {"allow_abbrev": False, "parents": [every]}
    for name, text in STAGES.items():
        stage = commands.add_parser(name, help=text, description=text, **common)
        _add_config(stage)
        stage.add_argument("--ckpt", default=DEFAULT_CKPT, help=CKPT)
        stage.add_argument("--tracking-uri", "--tracking_uri", default="", help="MLflow server or database")
        stage.set_defaults(run=_measure)
    text = "train a small ESM, and watch its embeddings get better"
    pretrain = commands.add_parser("pretrain", help=text, description=text, **common)
    _add_config(pretrain, "configs/pretrain.yaml")
    pretrain.add_argument("--data", default="sample/data/unlabelled/train", help="folder of CSV files")
    pretrain.add_argument("--files", default="x[000..001]", help="file or range of files with a column `sequence`")
    pretrain.add_argument(
        "--out", default="", help="new folder for checkpoints and the model; by default pretrained/RUN"
    )
    pretrain.add_argument("--steps", type=int, default=1800)
    pretrain.add_argument("--validations", type=int, default=6, help="how often it is measured on the way")
    pretrain.add_argument("--seed", type=int, default=1234)
    pretrain.add_argument("--tracking-uri", "--tracking_uri", default="", help="MLflow server or database")
    pretrain.set_defaults(run=_pretrain)
    compare = commands.add_parser("compare", help="measurements already made, side by side", **common)
    compare.add_argument("runs", nargs="+", metavar="RUN_ID", help="run of a measurement, of several, or of a training")
    compare.add_argument("--by", default="", help="metric to rank by; by default the first task's main one")
    compare.add_argument("--tracking-uri", "--tracking_uri", default="", help="MLflow server or database")
    compare.set_defaults(run=_compare)
    replay = commands.add_parser("replay", help="send what MLflow has missed", **common)
    replay.add_argument("journal", nargs="+", metavar="JOURNAL", help="the .jsonl file that a warning named")
    replay.add_argument("--tracking-uri", "--tracking_uri", default="", help="by default, where it was meant for")
    replay.set_defaults(run=_replay)
    config = commands.add_parser("config", help="print the resolved configuration", **common)
    config.add_argument("file", nargs="?", default=DEFAULT_CONFIG, help="YAML file")
    config.add_argument("--overrides", default="", help=OVERRIDES)
    config.add_argument("--schema", action="store_true", help="print every key with type, default and meaning")
    config.set_defaults(run=_print_config)
    return parser


def _add_config(parser: argparse.ArgumentParser, default: str = DEFAULT_CONFIG) -> None:
    parser.add_argument("--config", default=default, help="YAML file with model.dwnstr_task_validation")
    parser.add_argument("--overrides", default="", help=OVERRIDES)


def _print_config(options: argparse.Namespace) -> None:
    from pipeline.config.documentation import markdown
    from pipeline.config.yaml_file import read_config, to_yaml

    if options.schema:
        print(markdown())
        return
    config = read_config(options.file, options.overrides)
    for note in config.notes:
        print(f"# {note}")
    print(to_yaml(config), end="")


def _pretrain(options: argparse.Namespace) -> None:
    from pathlib import Path

    from pipeline.config.yaml_file import read_config
    from pipeline.pretrain import Settings, make_loggers, pretrain, read_sequences
    from pipeline.report.tables import curve, curve_markdown
    from pipeline.score import headlines
    from pipeline.tracking.runs import open_run

    _check_tracking(options.tracking_uri)
    for name in ("steps", "validations"):
        if getattr(options, name) < 1:
            raise ConfigError(f"{name}: expected at least 1, found {getattr(options, name)}")
    logging.getLogger("pipeline.validation").setLevel(logging.WARNING)  # the stages' lines, at every validation again
    config = read_config(options.config, options.overrides)
    sequences = read_sequences(Path(options.data), options.files)
    settings = Settings(steps=options.steps, validations=options.validations, seed=options.seed)
    with open_run("pretrain", config, options.tracking_uri) as opened:
        out = Path(options.out or f"pretrained/{os.environ.get('MLFLOW_RUN_ID', opened.run.key)[:8]}")
        loggers = make_loggers(out, opened.run)
        measured = pretrain(sequences, out, settings, config, loggers)
        opened.run.describe(curve_markdown(measured, headlines(config)))
        loggers[-1].experiment.finish()  # Lightning leaves W&B writing behind the program's end
    _print(curve(measured, headlines(config)))
    print(f"Measure it:     mlflow run . --env-manager local -P ckpt={out}")
    print(f"All of them:    mlflow run . --env-manager local -P ckpt='{out}/checkpoints/*' -P config={options.config}")
    print(f"TensorBoard:    tensorboard --logdir {out}")
    print(f"W&B:            wandb sync {out}/wandb/offline-run-*")
    _print_links(opened)


def _measure(options: argparse.Namespace) -> None:
    """A measurement is a run with a nested run per stage; several are nested in one."""
    from pipeline.config.yaml_file import read_config

    config = read_config(options.config, options.overrides)
    for note in config.notes:
        logging.getLogger("pipeline").info("config      %s", note)
    _check_tracking(options.tracking_uri)
    until = "score" if options.stage == "main" else options.stage
    failed = _measure_tracked(options, config, until)
    if failed:
        raise PartlyError("; ".join(f"{name}: {why}" for name, why in failed.items()))


def _measure_tracked(options: argparse.Namespace, config: Config, until: str) -> Mapping[str, str]:
    """Measures, and prints. Returns what failed of several checkpoints, and why."""
    from pathlib import Path

    from pipeline import commands as measure
    from pipeline.checkpoints.names import expand, name_of
    from pipeline.config.yaml_file import to_mapping
    from pipeline.report import comparison as compare
    from pipeline.report.publishing import describe
    from pipeline.report.tables import table
    from pipeline.tracking.mirrors import mirrors
    from pipeline.tracking.runs import open_run

    ckpts = expand(options.ckpt)
    name = name_of(ckpts[0]) if len(ckpts) == 1 else f"{len(ckpts)} checkpoints"
    store = Path(config.store).expanduser()
    with (
        open_run(name, config, options.tracking_uri) as opened,
        mirrors(config.logging, name, to_mapping(config), store) as others,
    ):
        describe(opened.run, config)
        if len(ckpts) == 1:
            scores = measure.measure(ckpts[0], config, opened.run, others, until).scores
            view = table(scores) if scores else None
            failed = {}
        else:
            rows = measure.measure_several(ckpts, config, opened.run, others, until)
            names = measure.shown(rows, config)
            view = compare.table(compare.rank(rows, names[0]), names) if any(row.metrics for row in rows) else None
            failed = {row.label: row.error for row in rows if row.error}
        if failed:
            opened.run.end("FAILED")
    if view is not None:
        _print(view)
    _print_links(opened)
    return failed


def _compare(options: argparse.Namespace) -> None:
    from pipeline import commands as measure
    from pipeline.config.schema import Config
    from pipeline.report import comparison as compare
    from pipeline.tracking.earlier import read_runs
    from pipeline.tracking.runs import open_run

    _check_tracking(options.tracking_uri)
    runs = read_runs(options.runs, options.tracking_uri)
    names = compare.choose([row for run in runs for row in measure.rows_of_run(run)], options.by)
    with open_run(f"{len(runs)} runs compared", Config(), options.tracking_uri) as opened:
        board = measure.compare_runs(runs, names, opened.run)
    _print(compare.table(board, names))
    _print_links(opened)


def _replay(options: argparse.Namespace) -> None:
    from pipeline.tracking.earlier import replay_journal

    failed = []
    for name in options.journal:
        try:
            arrived, refused = replay_journal(name, options.tracking_uri)
        except PipelineError as error:
            failed.append(str(error))
            continue
        said = f", {refused} were refused" if refused else ""
        where = f" to {options.tracking_uri}" if options.tracking_uri else ""
        print(f"{name}: {arrived} records sent{where}{said}")
    if failed:
        raise TrackingError("; ".join(failed))


def _print(table: Any) -> None:
    from rich.console import Console

    Console(width=None if sys.stdout.isatty() else 120).print(table)


def _check_tracking(tracking_uri: str) -> None:
    """`mlflow run` has made the run already, where its own variable says; another place cannot have it."""
    given = os.environ.get("MLFLOW_TRACKING_URI", "")
    if os.environ.get("MLFLOW_RUN_ID") and tracking_uri and given and tracking_uri != given:
        raise ConfigError(f"tracking_uri: the run is at '{given}' already; set MLFLOW_TRACKING_URI for mlflow run")


def _print_links(opened: OpenRun) -> None:
    """Where to look at the run; for a local database, how to start the UI first."""
    from pipeline.tracking.client import shown
    from pipeline.tracking.runs import link, runs_link

    if opened.ids is None:  # what is to be done is said already
        return
    server = opened.uri if opened.uri.startswith("http") else "http://127.0.0.1:5000"
    if server != opened.uri:
        print(f"To look at it:  mlflow ui --backend-store-uri {shown(opened.uri)}")
    server = shown(server)
    print(f"This run:       {server}{link(opened.ids)}")
    print(f"All runs:       {server}{runs_link(opened.ids)}")


def _say_on_run(message: str) -> None:
    """Under `mlflow run`, an error before the run was opened is said on its page too."""
    if os.environ.get("MLFLOW_RUN_ID"):
        from pipeline.tracking.client import fail_run

        fail_run(message)


if __name__ == "__main__":
    # What libraries make when they are imported, 700,000 objects, stays: the collector is not to walk through it again
    # and again, least of all at the end. That takes two seconds.
    gc.set_threshold(20_000)
    code = main()
    gc.freeze()
    sys.exit(code)
