"""Tokens in `.nemo` archives: what is unknown, what is a row of its own, how long a sequence may be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline import Store, validate
from pipeline.errors import DataError
from tests.support import nemo
from tests.support.data import token_task
from tests.support.nemo_states import TOLERANCE, distance, expected_states


def test_unknown_residues(tmp_path: Path) -> None:
    """Several in a row are one token, as in the reference; each residue has a state of its own where that is asked."""
    nemo.write(tmp_path / "x.nemo", "prott5nv")
    encoder = nemo.opened(tmp_path / "x.nemo")
    text = "MAL*WE-jjK"
    assert encoder.count_unknown([text, "MK", "j"]) == [(4, 10), (0, 2), (1, 1)]
    (states,) = encoder.hidden_states([text])
    assert len(states) == 8
    places = [0, 1, 2, 3, 4, 5, 6, 6, 6, 7]
    assert torch.equal(encoder.per_character(text, states), states[places])
    assert torch.equal(encoder.per_character("MK", states[:2]), states[:2])
    assert "write sequences in them" in encoder.why_unknown("mkt")
    assert encoder.why_unknown("**") == ""


def test_blanks_at_an_end_are_no_token(tmp_path: Path) -> None:
    nemo.write(tmp_path / "x.nemo", "esm1nv")
    encoder = nemo.opened(tmp_path / "x.nemo")
    assert encoder.count_unknown([" MK ", "M K"]) == [(0, 2), (1, 3)]
    (states,) = encoder.hidden_states([" MK "])
    assert len(encoder.per_character(" MK ", states)) == 2
    with pytest.raises(DataError, match="at least one token"):
        encoder.hidden_states(["  "])


def test_a_token_level_task_has_a_row_for_each_unknown_residue(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    nemo.write(tmp_path / "x.nemo", "esm1nv")
    task = token_task(tmp_path, ["MKjjT", "GG--", "MKT", "AAA"])
    validate(nemo.opened(tmp_path / "x.nemo"), task, Store(tmp_path / "store"))
    assert "4 tokens in 2 of 4 sequences are unknown to the tokenizer" in caplog.text


def test_unknown_tokens_of_smiles_stay_single(tmp_path: Path) -> None:
    nemo.write(tmp_path / "x.nemo", "megamolbart")
    encoder = nemo.opened(tmp_path / "x.nemo")
    assert encoder.count_unknown(["C[Se]?xx", "C[nH]Br"]) == [(4, 5), (0, 3)]
    assert len(encoder.hidden_states(["C[Se]?xx"])[0]) == 5


@pytest.mark.parametrize(
    ("kind", "made", "limit"),
    [
        ("esm1nv", {}, 38),
        ("prott5nv", {}, 40),
        ("prott5nv", {"seq_length": 30}, 30),
        ("esm1nv", {"seq_length": 99}, 38),
        ("prott5nv", {"seq_length": 99, "position_embedding_type": "relative"}, 99),
        ("prott5nv", {"seq_length": None, "position_embedding_type": "relative"}, None),
    ],
)
def test_the_longest_sequence(kind: str, made: dict[str, Any], limit: int | None, tmp_path: Path) -> None:
    state = nemo.write(tmp_path / "x.nemo", kind, made)
    encoder = nemo.opened(tmp_path / "x.nemo")
    assert encoder.max_seq_length == limit
    longest = ("MK" * 100)[: limit or 200]
    (found,) = encoder.hidden_states([longest])
    ids = [*encoder.tokens.before, *encoder.tokens.ids(longest), *encoder.tokens.after]
    special = len(encoder.tokens.before)
    expected = expected_states(state, kind, made, ids)[special : len(ids) - special]
    assert distance(found, expected) < TOLERANCE
    if limit is not None:
        with pytest.raises(DataError, match="as the model takes, found"):
            encoder.hidden_states([longest + "A"])
