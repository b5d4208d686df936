"""Four ranks on a mesh of two dimensions: parts and copies of them (HSDP), and tensor parallelism."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.programs import alike, seen_by_ranks

pytestmark = pytest.mark.slow

CASES = ["fsdp2", "fsdp1", "tensors", "both"]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory, model_folder: Any) -> Any:
    """What each rank saw."""
    return seen_by_ranks(4, "tests.support.mesh_ranks", tmp_path_factory.mktemp("meshes"), model_folder("esm"))


@pytest.mark.parametrize("case", CASES)
def test_training_is_untouched(case: str, ranks: Any) -> None:
    for rank in ranks:
        assert rank[f"{case} with"] == rank[f"{case} without"]


@pytest.mark.parametrize("case", CASES)
def test_all_ranks_have_the_scores_of_the_whole_model(case: str, ranks: Any) -> None:
    curve, expected = alike(ranks, f"{case} curve"), ranks[0]["whole"]
    assert [step for step, _ in curve] == [0, 10, 1, 11, 2, 12]
    named = {name: value for name, value in expected.items() if name in curve[0][1] and "delta" not in name}
    assert len(named) > 15
    assert {name: curve[0][1][name] for name in named} == pytest.approx(named, abs=1e-5)


@pytest.mark.parametrize("case", ["tensors", "both"])
def test_ranks_that_divide_the_layers_embed_the_same_batches(case: str, ranks: Any) -> None:
    first, second, third, fourth = (rank[f"{case} batches"] for rank in ranks)
    assert first == second
    assert third == fourth
    assert first != third
    assert len(first) == len(third)


def test_ranks_with_copies_of_the_parts_embed_batches_of_their_own(ranks: Any) -> None:
    batches = [rank["fsdp2 batches"] for rank in ranks]
    assert all(one != other for place, one in enumerate(batches) for other in batches[:place])


@pytest.mark.parametrize("case", ["tensors", "both"])
def test_a_full_disk_of_one_rank_leaves_no_rank_waiting(case: str, ranks: Any) -> None:
    for rank in ranks:
        assert rank[f"{case} full curve"] == []
        assert rank[f"{case} full"] == rank[f"{case} without"]


def test_lightnings_strategy(ranks: Any) -> None:
    ours, without = (alike(ranks, f"lightning {name}") for name in ("with", "without"))
    assert ours["weights"] == without["weights"]
    assert [step for step, _ in ours["curve"]] == [0, 2, 4]
