"""FSDP2 on two ranks: each has a part of the weights, and both measure in step."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.programs import alike, seen_by_ranks

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory, model_folder: Any) -> Any:
    """What each rank saw."""
    return seen_by_ranks(2, "tests.support.fsdp_ranks", tmp_path_factory.mktemp("fsdp"), model_folder("esm"))


def test_hidden_states_are_those_of_the_whole_model(ranks: Any) -> None:
    assert all(rank["difference"] < 1e-5 for rank in ranks)


@pytest.mark.parametrize(
    ("case", "without"), [("with", "without"), ("compiled", "without"), ("own with", "own without")]
)
def test_training_is_untouched(case: str, without: str, ranks: Any) -> None:
    for rank in ranks:
        assert rank[case] == rank[without]


@pytest.mark.parametrize("case", ["curve", "compiled curve", "own curve"])
def test_both_ranks_have_the_same_curve(case: str, ranks: Any) -> None:
    assert [step for step, _ in alike(ranks, case)] == [0, 10, 1, 11, 2, 12]


@pytest.mark.parametrize(
    ("case", "whole"), [("curve", "whole"), ("compiled curve", "whole"), ("own curve", "own whole")]
)
def test_scores_are_those_of_the_whole_model(case: str, whole: str, ranks: Any) -> None:
    start, expected = alike(ranks, case)[0][1], alike(ranks, whole)
    named = {name: value for name, value in expected.items() if name in start and "delta" not in name}
    assert len(named) > 20
    assert {name: start[name] for name in named} == pytest.approx(named, abs=1e-5)


@pytest.mark.parametrize("case", ["failing", "full"])
def test_a_failure_on_one_rank_leaves_no_rank_waiting(case: str, ranks: Any) -> None:
    assert alike(ranks, f"{case} curve") == []
    for rank in ranks:
        assert rank[case] == rank["own without"]


def test_copies_of_the_weights_on_two_ranks(ranks: Any) -> None:
    """A mesh of two dimensions, of which one has parts and the other copies (HSDP)."""
    assert alike(ranks, "copies whole") == pytest.approx(alike(ranks, "own whole"), abs=1e-5)


def test_what_cannot_be_measured_is_refused_in_words(ranks: Any) -> None:
    assert ranks[0]["blocking"] == (
        "ConfigError: mode blocking: the weights are in parts on several ranks; use mode: sharded without save"
    )
    assert ranks[1]["blocking"] == f"RankError: rank 0: {ranks[0]['blocking']}"
    found = [rank["one by one"] for rank in ranks]
    words = "1 calls of sharded layers for one sequence, and 2 for two; give all sequences to the layers in one padded"
    assert all("OneByOne: " in one and words in one for one in found), found


def test_lightnings_strategy(ranks: Any) -> None:
    ours, without = (alike(ranks, f"lightning {name}") for name in ("with", "without"))
    assert ours["weights"] == without["weights"]
    assert [step for step, _ in ours["curve"]] == [0, 2, 4]
