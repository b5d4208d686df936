"""Two real ranks, over gloo: the same metrics and the same decisions on both, and never a deadlock."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from mlflow import MlflowClient
from pytorch_lightning import LightningModule

from pipeline import DownstreamValidation
from pipeline.errors import ConfigError
from tests.support.data import planted_task
from tests.support.programs import run_two_ranks
from tests.support.training import section

STAGES = ("load", "embed", "train_head", "score")


def run(scenario: str, folder: Path, model: Path, tracking: str, wait_for: tuple[int, ...] = (0, 1)) -> list[Any]:
    """What each rank wrote; None for one that wrote nothing. Both end when those that are waited for do."""
    planted_task(folder / "data")
    shutil.copytree(model, folder / "esm")
    run_two_ranks("tests.support.two_ranks", [scenario, str(folder)], folder, wait_for, MLFLOW_TRACKING_URI=tracking)
    files = [folder / f"rank-{rank}.json" for rank in range(2)]
    return [json.loads(file.read_text()) if file.exists() else None for file in files]


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory, model_folder: Any, empty_database: Path) -> Any:
    """Every scenario that the ranks survive, the database they logged to, and the folder."""
    folder = tmp_path_factory.mktemp("ranks")
    shutil.copy(empty_database, folder / "mlflow.db")
    tracking = f"sqlite:///{folder}/mlflow.db"
    found = run("everything", folder, model_folder("esm"), tracking)
    assert all(found), (folder / "rank-0.log").read_text()[-3000:] + (folder / "rank-1.log").read_text()[-3000:]
    return SimpleNamespace(ranks=found, tracking=tracking, folder=folder)


def of(both: Any, case: str) -> dict[str, Any]:
    """What both ranks saw alike."""
    first, second = (rank[case] for rank in both.ranks)
    for what in ("curve", "metrics", "epochs", "weights"):
        assert first[what] == second[what], what
    return dict(first)


def test_one_rank_talks_to_trackers(both: Any) -> None:
    found = of(both, "journal")
    lines = [json.loads(line) for line in (both.folder / "journal.jsonl").read_text().splitlines()]
    assert [line["op"] for line in lines].count("run") == 1
    client = MlflowClient(both.tracking)
    (run,) = client.search_runs(["0"], "attributes.run_name = 'two ranks'")
    name = "test_label_accuracy"
    curve = [(one.step, one.value) for one in client.get_metric_history(run.info.run_id, name)]
    assert curve == [(step, metrics[name]) for step, metrics in found["curve"]]
    losses = [one.step for one in client.get_metric_history(run.info.run_id, "train_loss")]
    assert losses == list(range(6))
    assert run.info.status == "FINISHED"


def test_metrics_are_the_same_on_both_ranks_and_training_is_untouched(both: Any) -> None:
    found = of(both, "with")
    assert [step for step, _ in found["curve"]] == [0, 2, 4, 6]
    assert found["metrics"]["test_label_accuracy"] == pytest.approx(found["curve"][-1][1]["test_label_accuracy"])
    assert found["weights"] == of(both, "without")["weights"]
    for rank in both.ranks:
        assert rank["with"]["buffers"] == rank["without"]["buffers"]


def test_only_rank_0_logs(both: Any) -> None:
    """A run for each scenario that measured, though two ranks trained."""
    runs = MlflowClient(both.tracking).search_runs(["0"])
    measured = [case for case in both.ranks[0] if case not in ("without", "setup", "interrupted")]
    assert len(runs) == len(measured)


def test_lightnings_monitors_on_two_ranks(both: Any) -> None:
    found = of(both, "monitors")
    assert found["epochs"] == 2  # patience 1, and nothing improves by 100
    assert {path.name for path in (both.folder / "best").iterdir()} == {"step=2.ckpt", "step=4.ckpt"}


def test_every_second_validation_on_two_ranks(both: Any) -> None:
    found = of(both, "every")
    assert [step for step, _ in found["curve"]] == [2, 6]
    assert found["epochs"] == 3
    assert {path.name for path in (both.folder / "every").iterdir()} == {"step=2.ckpt", "step=6.ckpt"}


def test_an_empty_rank_takes_part(both: Any) -> None:
    assert [step for step, _ in of(both, "uneven")["curve"]] == [2, 4, 6]


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("stage", STAGES)
def test_a_failure_on_one_rank_is_passed_over_by_both(stage: str, rank: int, both: Any) -> None:
    found = of(both, f"{stage} warn {rank}")
    assert found["curve"] == []
    assert found["epochs"] == 3
    assert found["error"] == ""
    assert found["weights"] == of(both, "without")["weights"]
    error = "rank 1: DataError: injected" if rank else "injected"
    assert found["said"] == [
        f"downstream validation failed at step {step}, training goes on: {error}" for step in (2, 4, 6)
    ]


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("stage", STAGES)
def test_a_failure_on_one_rank_ends_both(stage: str, rank: int, both: Any) -> None:
    case = f"{stage} raise {rank}"
    assert of(both, case)["epochs"] == 0
    assert both.ranks[rank][case]["error"] == "DataError: injected"
    assert both.ranks[1 - rank][case]["error"] == f"RankError: rank {rank}: DataError: injected"


def test_an_interrupt_on_rank_0_is_no_failure_to_be_passed_over(both: Any) -> None:
    first, second = (rank["interrupted"]["error"] for rank in both.ranks)
    assert first == "KeyboardInterrupt: "
    assert second == "LostRankError: downstream validation: rank 0 was stopped: KeyboardInterrupt"


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What each rank heard of the other."""
    folder = tmp_path_factory.mktemp("told")
    run_two_ranks("tests.support.told_ranks", [str(folder)], folder)
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(2)]


def test_all_have_what_the_first_rank_did(told: Any) -> None:
    for rank in told:
        assert rank["first"] == {"rank": 0, "content": "x" * 1_000}
        assert rank["nothing"] is None


def test_all_fail_where_the_first_rank_does(told: Any) -> None:
    assert told[0]["failed"] == "ZeroDivisionError: integer division or modulo by zero"
    assert told[1]["failed"] == f"RankError: rank 0: {told[0]['failed']}"
    assert "pickle" in told[0]["unpicklable"]
    assert told[1]["unpicklable"] == f"RankError: rank 0: {told[0]['unpicklable']}"


def test_an_interrupt_is_told_once(told: Any) -> None:
    """Else rank 0 tells it to nobody, and what the ranks exchange next is not what they mean."""
    assert [rank["nested"] for rank in told] == [
        "KeyboardInterrupt: ",
        "LostRankError: downstream validation: rank 0 was stopped: KeyboardInterrupt",
    ]
    assert [rank["afterwards"] for rank in told] == [[0, 1], [0, 1]]


def test_an_interrupt_within_an_exchange_ends_both(told: Any) -> None:
    """Rank 0 cannot tell it any more; the other finds out as its process ends."""
    first, second = (rank["in exchange"] for rank in told)
    assert first == "KeyboardInterrupt: "
    assert second.startswith("LostRankError: downstream validation: rank 1 waited up to 40 s for every rank: ")


def test_a_data_error_stops_both_before_the_first_step(both: Any) -> None:
    first, second = (rank["setup"]["error"] for rank in both.ranks)
    assert first.startswith("DataError: ")
    assert "x999" in first
    assert second == f"RankError: rank 0: {first}"


@pytest.mark.parametrize(
    ("scenario", "rank", "message"),
    [
        ("late", 0, "rank 0 waited up to 20 s for every rank: .*[Rr]anks?.* 1"),
        ("dead", 0, "rank 0 waited up to 20 s for every rank: .*[Rr]anks?.* 1"),
        ("killed", 0, "rank 0 waited up to 20 s for every rank: .*see the output of that rank"),
        ("stuck", 1, "rank 1 waited up to 20 s for every rank: .*rank 0.*raise timeout if it was still at work"),
    ],
)
def test_a_rank_that_does_not_come_is_named(
    scenario: str, rank: int, message: str, tmp_path: Path, tracking: str, model_folder: Any
) -> None:
    error = run(scenario, tmp_path, model_folder("esm"), tracking, (rank,))[rank][scenario]["error"]
    assert re.search(f"^LostRankError: downstream validation: {message}", error), error


def test_strategies_that_shard_the_weights_are_refused(tmp_path: Path) -> None:
    callback = DownstreamValidation(section(tmp_path, planted_task(tmp_path)))
    strategy = type("DeepSpeedStrategy", (), {})()  # Lightning's own takes the package
    trainer: Any = SimpleNamespace(strategy=strategy, world_size=2)
    with pytest.raises(ConfigError, match=r"DeepSpeedStrategy: .* needs all weights on a rank; use ddp, or FSDP"):
        callback.setup(trainer, LightningModule(), "fit")
