"""FSDP1 on two ranks: in loops, under Lightning's FSDPStrategy, accelerate and the Hugging Face Trainer."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.programs import alike, seen_by_ranks

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory, model_folder: Any) -> Any:
    """What each rank saw in loops and under Lightning."""
    return seen_by_ranks(2, "tests.support.fsdp1_ranks", tmp_path_factory.mktemp("fsdp1"), model_folder("esm"))


@pytest.fixture(scope="module")
def trainers(tmp_path_factory: pytest.TempPathFactory, model_folder: Any) -> Any:
    """What each rank saw under accelerate and the Hugging Face Trainer, of FSDP1 and FSDP2."""
    return seen_by_ranks(2, "tests.support.fsdp_trainers", tmp_path_factory.mktemp("trainers"), model_folder("esm"))


def test_hidden_states_are_those_of_the_whole_model(ranks: Any) -> None:
    assert all(rank["difference"] < 1e-5 for rank in ranks)


@pytest.mark.parametrize("case", ["full", "flat", "grad op", "half", "compiled", "own", "anywhere"])
def test_training_is_untouched(case: str, ranks: Any) -> None:
    """Also where it measures between a pass and its backward pass, with gradients that are not shared yet."""
    for rank in ranks:
        assert rank[f"{case} with"] == rank["full without" if case == "compiled" else f"{case} without"]


@pytest.mark.parametrize(
    ("case", "whole"), [("full", "whole"), ("flat", "whole"), ("grad op", "whole"), ("own", "own whole")]
)
def test_scores_are_those_of_the_whole_model(case: str, whole: str, ranks: Any) -> None:
    curve, expected = alike(ranks, f"{case} curve"), alike(ranks, whole)
    assert [step for step, _ in curve] == [0, 10, 1, 11, 2, 12]
    start = curve[0][1]
    named = {name: value for name, value in expected.items() if name in start and "delta" not in name}
    assert len(named) > 20
    assert {name: start[name] for name in named} == pytest.approx(named, abs=1e-5)


def test_a_failure_on_one_rank_leaves_no_rank_waiting(ranks: Any) -> None:
    assert alike(ranks, "failing curve") == []
    for rank in ranks:
        assert rank["failing"] == rank["own without"]


def test_the_module_within_the_wrapper_is_refused_in_words(ranks: Any) -> None:
    words = "FSDP around it has '_flat_param' in parts; hand over what FullyShardedDataParallel returned"
    assert alike(ranks, "within").startswith(f"ConfigError: EsmForMaskedLM: {words}")


def test_lightnings_strategy(ranks: Any) -> None:
    ours, without = (alike(ranks, f"lightning {name}") for name in ("with", "without"))
    assert ours["weights"] == without["weights"]
    assert [step for step, _ in ours["curve"]] == [0, 2, 4]


@pytest.mark.parametrize("version", [1, 2])
def test_accelerate(version: int, trainers: Any) -> None:
    for rank in trainers:
        assert rank[f"accelerate {version} with"] == rank[f"accelerate {version} without"]
    assert [step for step, _ in alike(trainers, f"accelerate {version} curve")] == [0, 10, 1, 11, 2, 12]


@pytest.mark.parametrize(("version", "kind"), [(1, "FullyShardedDataParallel"), (2, "FSDPEsmForMaskedLM")])
def test_the_hugging_face_trainer(version: int, kind: str, trainers: Any) -> None:
    assert alike(trainers, f"trainer {version} kind") == kind
    for rank in trainers:
        assert rank[f"trainer {version} with"] == rank[f"trainer {version} without"]
    assert [step for step, _ in alike(trainers, f"trainer {version} curve")] == [0, 2, 4]
    assert "eval_test_label_probe_accuracy" in alike(trainers, f"trainer {version} history")
