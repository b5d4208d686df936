"""The command line, `python -m pipeline ENTRY_POINT ...`: parses arguments, calls, prints."""

from __future__ import annotations

import argparse
import gc
import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from pipeline.errors import ConfigError, PipelineError, TrackingError
from pipeline.program import PartlyError, add_traceback, check_tracking, print_links, run_program

if TYPE_CHECKING:
    from pipeline.config.schema import Config

logger = logging.getLogger("pipeline")
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
    """Raises a ConfigError for a wrong argument, so that it is reported like every other error."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see python -m pipeline --help")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs an entry point. Returns the exit code, see `run_program`."""
    return run_program(_parser(), lambda options: options.run(options), arguments)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m pipeline", description="Validation with a downstream task.", allow_abbrev=False)
    commands = parser.add_subparsers(dest="stage", required=True, metavar="ENTRY_POINT")
    every = argparse.ArgumentParser(add_help=False)
    add_traceback(every)
    common: dict[str, Any] = {"allow_abbrev": False, "parents": [every]}
    for name, text in STAGES.items():
        stage = commands.add_parser(name, help=text, description=text, **common)
        stage.add_argument("--config", default=DEFAULT_CONFIG, help="YAML file with model.dwnstr_task_validation")
        stage.add_argument("--overrides", default="", help=OVERRIDES)
        stage.add_argument("--ckpt", default=DEFAULT_CKPT, help=CKPT)
        stage.add_argument("--tracking-uri", "--tracking_uri", default="", help="MLflow server or database")
        stage.set_defaults(run=_measure)
    compare = commands.add_parser("compare", help="measurements already made, side by side", **common)
    compare.add_argument("runs", nargs="+", metavar="RUN_ID", help="run of a measurement, of several, or of a training")
    compare.add_argument("--by", default="", help="metric to rank by; by default the first task's main one")
    compare.add_argument("--tracking-uri", "--tracking_uri", default="", help="MLflow server or database")
    compare.set_defaults(run=_compare)
    replay = commands.add_parser("replay", help="send what MLflow has missed", **common)
    replay.add_argument("journal", nargs="+", metavar="JOURNAL", help="the .jsonl file that a warning named")
    replay.add_argument("--tracking-uri", "--tracking_uri", default="", help="by default, where it was meant for")
    replay.set_defaults(run=_replay)
    worker = commands.add_parser("worker", help="measure the snapshots of a training in the background", **common)
    worker.add_argument("folder", metavar="FOLDER", type=Path, help="where the training writes them")
    worker.add_argument("--parent", type=int, help="wait for more as long as this process lives")
    worker.set_defaults(run=_work)
    config = commands.add_parser("config", help="print the resolved configuration", **common)
    config.add_argument("file", nargs="?", default=DEFAULT_CONFIG, help="YAML file")
    config.add_argument("--overrides", default="", help=OVERRIDES)
    config.add_argument("--schema", action="store_true", help="print every key with type, default and meaning")
    config.set_defaults(run=_print_config)
    return parser


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


def _measure(options: argparse.Namespace) -> None:
    """Measures a checkpoint in a run with a nested run per stage; several checkpoints in nested runs of a run."""
    from pipeline.config.yaml_file import read_config

    config = read_config(options.config, options.overrides)
    unnamed = " (the default: give --ckpt)" if options.ckpt == DEFAULT_CKPT else ""
    logger.info("measuring   %s%s as in %s", options.ckpt, unnamed, options.config)
    for note in config.notes:
        logger.info("config      %s", note)
    check_tracking(options.tracking_uri)
    until = "score" if options.stage == "main" else options.stage
    failed = _measure_tracked(options, config, until)
    if failed:
        raise PartlyError("; ".join(f"{name}: {why}" for name, why in failed.items()))


def _measure_tracked(options: argparse.Namespace, config: Config, until: str) -> Mapping[str, str]:
    """Measures and prints the scores. Returns the error of each checkpoint that failed, where there are several."""
    from pipeline import commands
    from pipeline.checkpoints.names import expand, name_of
    from pipeline.config.yaml_file import to_mapping
    from pipeline.report import comparison as compare
    from pipeline.report.publishing import describe
    from pipeline.store.embedding_table import Store
    from pipeline.tracking.mirrors import mirrors
    from pipeline.tracking.runs import open_run

    ckpts = expand(options.ckpt)
    name = name_of(ckpts[0]) if len(ckpts) == 1 else f"{len(ckpts)} checkpoints"
    store = Store.from_config(config)
    store.clear()
    with (
        open_run(name, config, options.tracking_uri) as opened,
        mirrors(config.logging, name, to_mapping(config), store.root.expanduser()) as others,
    ):
        describe(opened.run, config)
        if len(ckpts) == 1:
            measured = commands.measure_checkpoint(ckpts[0], config, store, opened.run, others, until)
            table = measured.overview if measured.scores else None
            failed, remarks = {}, list[str]()
        else:
            rows = commands.measure_checkpoints(ckpts, config, store, opened.run, others, until)
            names = commands.shown(rows, config)
            some = any(row.metrics for row in rows)
            table = compare.board_table(compare.leaderboard(rows, names), names) if some else None
            remarks = compare.remarks(rows, names)
            failed = {row.label: row.error for row in rows if row.error}
        if failed:
            opened.run.end("FAILED")
    if table is not None:
        print("\n".join([table.text(), *remarks]))
    print_links(opened)
    return failed


def _compare(options: argparse.Namespace) -> None:
    from pipeline import commands
    from pipeline.config.schema import Config
    from pipeline.report import comparison as compare
    from pipeline.tracking.earlier_runs import read_runs
    from pipeline.tracking.runs import open_run

    check_tracking(options.tracking_uri)
    runs = read_runs(options.runs, options.tracking_uri)
    rows = [row for run in runs for row in commands.rows_of_run(run)]
    names = compare.choose(rows, options.by)
    with open_run(f"{len(runs)} runs compared", Config(), options.tracking_uri) as opened:
        board = commands.compare_runs(runs, names, opened.run)
    print("\n".join([compare.board_table(board, names).text(), *compare.remarks(rows, names)]))
    print_links(opened)


def _replay(options: argparse.Namespace) -> None:
    from pipeline.tracking.earlier_runs import replay_journal

    failed = []
    for name in options.journal:
        try:
            arrived, refused = replay_journal(name, options.tracking_uri)
        except PipelineError as error:
            failed.append(str(error))
            continue
        refusals = f", {refused} were refused" if refused else ""
        where = f" to {options.tracking_uri}" if options.tracking_uri else ""
        print(f"{name}: {arrived} records sent{where}{refusals}")
    if failed:
        raise TrackingError("; ".join(failed))


def _work(options: argparse.Namespace) -> None:
    from pipeline.training.worker import Worker

    Worker(options.folder).run(options.parent)


if __name__ == "__main__":
    # The imported libraries' 700,000 objects are never freed: walking through them again and again, and at the end,
    # would cost the garbage collector two seconds.
    gc.set_threshold(20_000)
    code = main()
    gc.freeze()
    sys.exit(code)
