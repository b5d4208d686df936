"""Two ranks that differ: a pass of weights in parts (FSDP2) fails on one, or they have other weights, or own disks."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.programs import seen_by_ranks


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory, model_folder: Any) -> Any:
    """What each rank saw."""
    return seen_by_ranks(2, "tests.support.in_step_ranks", tmp_path_factory.mktemp("in_step"), model_folder("esm"))


def test_ranks_without_a_common_file_system_hear_of_a_batch_that_failed(ranks: Any) -> None:
    """On a CPU, and where the next batch is made while one is written; then none fails."""
    first, second = (rank["apart"][:3] for rank in ranks)
    assert first[:2] == ["RankError: rank 1: DataError: injected"] * 2
    assert second[:2] == ["DataError: injected"] * 2
    assert first[2] == second[2] > 100


def test_what_the_ranks_share_is_a_stage(ranks: Any) -> None:
    stages = [rank["apart"][3] for rank in ranks]
    assert stages == [
        ["load", "embed", "heads and scores", "train_head", "score"],
        ["load", "embed", "heads and scores"],
    ]


def test_a_failure_ends_the_pass_of_the_outermost_part(ranks: Any) -> None:
    assert ranks[0]["outermost"] == [True, True, True]
    assert ranks[1]["outermost"] == ["DataError: injected", True, True]


def test_a_part_that_is_never_called_is_not_gathered(ranks: Any) -> None:
    assert ranks[0]["a part"] == [[1, 8], [1, 8]]
    assert ranks[1]["a part"] == ["DataError: injected", [1, 8]]


@pytest.mark.parametrize("kind", ["roots", "nested", "wrapped"])
def test_a_layer_that_fails_within_its_pass_changes_no_later_one(kind: str, ranks: Any) -> None:
    """Of FSDP2, where layers are outermost parts and where they are not, and of FSDP1."""
    assert ranks[0]["layers"][kind] == [True, True, False]
    assert ranks[1]["layers"][kind] == ["DataError: injected", True, False]


def test_tensor_parallelism(ranks: Any) -> None:
    """Both ranks make all passes, though one keeps the result; alone each makes its own."""
    (first, passes), *divided = ranks[0]["tensors"]
    assert [one for one, _ in ranks[1]["tensors"]] == [one for one, _ in ranks[0]["tensors"]]
    for place, (metrics, made) in enumerate(divided, 1):
        same = {name: value for name, value in first.items() if "seconds" not in name}
        assert {name: metrics[name] for name in same} == pytest.approx(same, abs=1e-5)
        assert made == ranks[1]["tensors"][place][1]
        assert len(made) > len(passes)


def test_other_weights_are_refused_where_the_code_is_not_known(ranks: Any) -> None:
    """But not where each rank has a part of them."""
    for rank in ranks:
        drifted, in_parts, alike = rank["weights"]
        assert drifted.startswith("CheckpointError: the ranks have different weights; set mode to blocking")
        assert in_parts is None
        assert alike is None


def test_the_first_rank_alone_keeps_embeddings_where_each_has_a_disk_of_its_own(ranks: Any) -> None:
    """Ranks of one node would wait for one another's lock."""
    assert [rank["disks"] for rank in ranks] == [["store"], ["store", "live"]]


def test_a_failure_on_one_rank_before_anything_is_measured(ranks: Any) -> None:
    first, second = (rank["tried out"] for rank in ranks)
    assert second[:2] == ["DataError: injected", "ZeroDivisionError: integer division or modulo by zero"]
    assert "CacheError: " in second[2]
    assert first == [*(f"RankError: rank 1: {one}" for one in second[:3]), None]
    assert second[3] is None
