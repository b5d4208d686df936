"""Hidden states equal transformers' own, one sequence at a time without padding; every kind of checkpoint opens."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoTokenizer, BartModel, BertModel, EsmForMaskedLM, EsmModel, T5EncoderModel

from pipeline.checkpoints.opening import open_encoder
from pipeline.encoders.description import DESCRIPTION, describe
from pipeline.encoders.huggingface import HuggingFaceEncoder
from pipeline.encoders.options import EncoderOptions
from pipeline.errors import CheckpointError
from tests.support.models import RESIDUES
from tests.support.programs import ROOT

Make = Callable[..., Path]
PROTEINS = ["MKV", RESIDUES, "A", "MKVLAAGIVGLLLAQWERTY" * 3, "MKVXUZOBLA", "GG"]
MOLECULES = ["CC(=O)Oc1ccccc1C(=O)NCCBr", "C", "C[C@@H](N)[O-].[Na+]", "c1cc[nH]c1"]


def alone(model: Any, tokenizer: Any, text: str, before: int, after: int) -> Tensor:
    """The real tokens' hidden states of one sequence, by transformers alone."""
    batch = tokenizer(text, return_tensors="pt", return_token_type_ids=False)
    with torch.no_grad():
        states: Tensor = model.eval()(**batch).last_hidden_state[0]
    return states[before : len(states) - after]


@pytest.mark.parametrize("options", [{}, {"max_shard_size": "20KB"}, {"dtype": torch.float16}])
def test_esm_equals_transformers(model_folder: Make, options: dict[str, Any]) -> None:
    folder = model_folder("esm", **options)
    model = EsmModel.from_pretrained(folder, add_pooling_layer=False).float()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    encoder = open_encoder(str(folder))
    for text, state in zip(PROTEINS, encoder.hidden_states(PROTEINS), strict=True):
        torch.testing.assert_close(state, alone(model, tokenizer, text, 1, 1), atol=1e-5, rtol=0)
    assert encoder.max_seq_length == 1022


@pytest.mark.parametrize("slow", [True, False])
def test_prott5_equals_transformers_on_spaced_residues(model_folder: Make, slow: bool) -> None:
    folder = model_folder("prott5", slow=slow)
    model = T5EncoderModel.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    encoder = open_encoder(str(folder), EncoderOptions("prott5"))
    for text, state in zip(PROTEINS, encoder.hidden_states(PROTEINS), strict=True):
        spaced = " ".join(text).translate(str.maketrans("UZOB", "XXXX"))
        torch.testing.assert_close(state, alone(model, tokenizer, spaced, 0, 1), atol=1e-5, rtol=0)
    assert encoder.max_seq_length is None


@pytest.mark.parametrize("split", [True, False])
def test_bart_equals_transformers_on_smiles(model_folder: Make, split: bool) -> None:
    folder = model_folder("smiles_bart", split=split)
    model = BartModel.from_pretrained(folder).get_encoder()
    tokenizer = AutoTokenizer.from_pretrained(model_folder("smiles_bart", split=True))
    encoder = open_encoder(str(folder), EncoderOptions("megamolbart"))
    for text, state in zip(MOLECULES, encoder.hidden_states(MOLECULES), strict=True):
        torch.testing.assert_close(state, alone(model, tokenizer, text, 1, 1), atol=1e-5, rtol=0)
    assert encoder.max_seq_length == 254
    assert encoder.count_unknown(["CC[Fe]C", "[Fe]"]) == [(1, 4), (1, 1)]


def test_other_encoders_open_through_the_auto_classes(model_folder: Make) -> None:
    folder = model_folder("protbert")
    model = BertModel.from_pretrained(folder)
    encoder = open_encoder(str(folder))
    for text, state in zip(PROTEINS[:3], encoder.hidden_states(PROTEINS[:3]), strict=True):
        expected = alone(model, AutoTokenizer.from_pretrained(folder), " ".join(text), 1, 1)
        torch.testing.assert_close(state, expected, atol=1e-5, rtol=0)
    assert encoder.max_seq_length == 62


@settings(max_examples=30, deadline=None)
@given(texts=st.lists(st.text(RESIDUES + "XBUZO*?j", min_size=1, max_size=60), min_size=1, max_size=9))
def test_a_batch_never_changes_a_hidden_state(model_folder: Make, texts: list[str]) -> None:
    encoder = open_encoder(str(model_folder("esm")))
    for text, state in zip(texts, encoder.hidden_states(texts), strict=True):
        assert state.shape == (len(text), encoder.hidden_size)
        torch.testing.assert_close(state, encoder.hidden_states([text])[0], atol=1e-5, rtol=0)


def test_unknown_characters_stay_one_token_each(model_folder: Make) -> None:
    encoder = open_encoder(str(model_folder("esm")))
    assert encoder.count_unknown(["MK*?JV", "<cls>", "MKV"]) == [(3, 6), (5, 5), (0, 3)]


def test_layout_and_head_do_not_change_the_digest_and_weights_do(model_folder: Make) -> None:
    plain = open_encoder(str(model_folder("esm"))).digest
    assert open_encoder(str(model_folder("esm", max_shard_size="20KB"))).digest == plain
    assert open_encoder(str(model_folder("esm", seed=1))).digest != plain
    assert open_encoder(str(model_folder("esm")), EncoderOptions(precision="bf16")).digest != plain
    live = EsmForMaskedLM.from_pretrained(model_folder("esm")).esm
    assert HuggingFaceEncoder(live, AutoTokenizer.from_pretrained(model_folder("esm"))).digest == plain


@pytest.mark.parametrize(
    ("kind", "options", "prefix"),
    [
        ("esm", {}, "model."),
        ("prott5", {"slow": True}, "net.t5."),
        ("prott5", {"slow": False}, ""),
        ("smiles_bart", {}, "module.bart."),
    ],
)
def test_a_lightning_checkpoint_that_describes_itself(
    model_folder: Make, tmp_path: Path, kind: str, options: dict[str, Any], prefix: str
) -> None:
    folder = model_folder(kind, **options)
    classes = {"esm": EsmForMaskedLM, "prott5": __import__("transformers").T5ForConditionalGeneration}
    model = classes.get(kind, __import__("transformers").BartForConditionalGeneration).from_pretrained(folder)
    state = {prefix + name: value for name, value in model.state_dict().items()}
    described = describe(model, AutoTokenizer.from_pretrained(folder), prefix)
    torch.save({"state_dict": {**state, "extra": torch.zeros(2)}, DESCRIPTION: described}, tmp_path / "a.ckpt")
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "b.ckpt")
    expected = open_encoder(str(folder))
    texts = MOLECULES if kind == "smiles_bart" else PROTEINS
    for encoder in (
        open_encoder(str(tmp_path / "a.ckpt")),
        open_encoder(str(tmp_path / "b.ckpt"), EncoderOptions(architecture=str(folder))),
    ):
        assert encoder.digest == expected.digest
        for one, other in zip(encoder.hidden_states(texts), expected.hidden_states(texts), strict=True):
            assert torch.equal(one, other)


def test_a_lightning_checkpoint_is_found_by_what_it_holds(model_folder: Make, tmp_path: Path) -> None:
    folder = model_folder("esm")
    state = EsmForMaskedLM.from_pretrained(folder).state_dict()
    options = EncoderOptions(architecture=str(folder))
    torch.save({"state_dict": state}, tmp_path / "last.pt")
    assert open_encoder(str(tmp_path / "last.pt"), options).digest == open_encoder(str(folder)).digest
    torch.save({**state, "_state_dict_hooks": {}}, tmp_path / "weights.pt")
    assert open_encoder(str(tmp_path / "weights.pt"), options).digest == open_encoder(str(folder)).digest
    (tmp_path / "notes.txt").write_text("state_dict")
    with pytest.raises(CheckpointError, match=r"expected a model folder or a file of weights.*notes.txt"):
        open_encoder(str(tmp_path / "notes.txt"), options)
    assert open_encoder(str(tmp_path), options).step is None  # the one checkpoint in the folder


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [("num_hidden_layers", 10**9, "expected 0 to 100000, found 1000000000"), ("attn_implementation", "a/b", "'a/b'")],
)
def test_the_configuration_of_a_hub_id_is_checked_before_it_is_used(
    model_folder: Make, tmp_path: Path, key: str, value: Any, message: str
) -> None:
    cached = tmp_path / "hub" / "models--someone--model"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("0" * 40)
    shutil.copytree(model_folder("esm"), cached / "snapshots" / ("0" * 40))
    path = cached / "snapshots" / ("0" * 40) / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    code = "from pipeline import open_encoder; open_encoder('someone/model')"
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert f"{key}: " in run.stderr.splitlines()[-1]
    assert message in run.stderr.splitlines()[-1]


def test_two_copies_of_the_weights_need_a_word_on_which(model_folder: Make, tmp_path: Path) -> None:
    folder = model_folder("esm")
    state = EsmForMaskedLM.from_pretrained(folder).state_dict()
    twice = {f"{prefix}.{name}": value for prefix in ("net", "ema") for name, value in state.items()}
    torch.save({"state_dict": twice}, tmp_path / "a.ckpt")
    with pytest.raises(CheckpointError, match="expected one set of weights"):
        open_encoder(str(tmp_path / "a.ckpt"), EncoderOptions(architecture=str(folder)))


def test_a_folder_as_mlflow_lays_it_out(model_folder: Make, tmp_path: Path) -> None:
    plain = model_folder("esm")
    for path in plain.iterdir():
        part = "components/tokenizer" if "tokenizer" in path.name or path.name == "vocab.txt" else "model"
        (tmp_path / "logged" / part).mkdir(parents=True, exist_ok=True)
        shutil.copy(path, tmp_path / "logged" / part)
    assert open_encoder(str(tmp_path / "logged")).digest == open_encoder(str(plain)).digest


def test_an_mlflow_uri(model_folder: Make, tracking: str) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(tracking)
    run = client.create_run("0")
    client.log_artifacts(run.info.run_id, str(model_folder("esm")), "weights")
    encoder = open_encoder(f"runs:/{run.info.run_id}/weights")
    assert encoder.digest == open_encoder(str(model_folder("esm"))).digest
    with pytest.raises(CheckpointError, match="cannot be downloaded"):
        open_encoder(f"runs:/{run.info.run_id}/nothing")


class OwnEncoder:
    """A user's encoder with no more than it must have."""

    hidden_size = 4

    @classmethod
    def from_checkpoint(cls, _path: str) -> OwnEncoder:
        return cls()

    def hidden_states(self, sequences: Sequence[str]) -> list[Tensor]:
        return [torch.full((len(text), 4), float(len(text)), dtype=torch.float64) for text in sequences]


class FullEncoder(OwnEncoder):
    """Has more of the protocol."""

    max_seq_length = 9
    packs = True
    step = 3
    notes = ("a note",)

    def why_unknown(self, sequence: str) -> str:
        return f"; spell {sequence}"


class WrongEncoder(OwnEncoder):
    """Says 4 and gives 3."""

    def hidden_states(self, sequences: Sequence[str]) -> list[Tensor]:
        return [torch.zeros(len(text), 3) for text in sequences]


def test_a_class_of_the_users_own(tmp_path: Path) -> None:
    path = tmp_path / "weights.ckpt"
    path.write_bytes(b"one")
    encoder = open_encoder(str(path), EncoderOptions("tests.test_encoders.OwnEncoder"))
    assert encoder.hidden_states(["MK"])[0].tolist() == [[2.0] * 4] * 2
    assert encoder.hidden_states(["MK"])[0].dtype == torch.float32
    path.write_bytes(b"two")
    assert open_encoder(str(path), EncoderOptions("tests.test_encoders.OwnEncoder")).digest != encoder.digest
    with pytest.raises(CheckpointError, match=r"expected 1 tensors of shape \(tokens, 4\), found shapes \[\(2, 3\)\]"):
        open_encoder(str(path), EncoderOptions("tests.test_encoders.WrongEncoder")).hidden_states(["MK"])


def test_a_class_of_the_users_own_has_what_it_lacks_by_default(tmp_path: Path) -> None:
    (tmp_path / "weights.ckpt").write_bytes(b"one")
    own, full = (
        open_encoder(str(tmp_path / "weights.ckpt"), EncoderOptions(f"tests.test_encoders.{name}"))
        for name in ("OwnEncoder", "FullEncoder")
    )
    assert (own.max_seq_length, own.packs, own.step, own.notes, own.why_unknown("MK")) == (None, False, None, (), "")
    assert (full.max_seq_length, full.packs, full.step) == (9, True, 3)
    assert (*full.notes, full.why_unknown("MK")) == ("a note", "; spell MK")
    assert own.count_unknown(["MK"]) == full.count_unknown(["MK"]) == [(0, 2)]
    assert own.reusable
    assert full.reusable


def test_opening_a_checkpoint_leaves_the_random_state_alone(model_folder: Make, tmp_path: Path) -> None:
    model = EsmForMaskedLM.from_pretrained(model_folder("esm"))
    tokenizer = AutoTokenizer.from_pretrained(model_folder("esm"))
    torch.save({"state_dict": model.state_dict(), DESCRIPTION: describe(model, tokenizer, "")}, tmp_path / "a.ckpt")
    before = torch.random.get_rng_state()
    open_encoder(str(tmp_path / "a.ckpt"))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_rules_of_a_tokenizer_are_in_the_digest(model_folder: Make) -> None:
    from tokenizers import normalizers

    from pipeline.encoders.tokens import Tokens

    plain, ruled = (AutoTokenizer.from_pretrained(model_folder("protbert")) for _ in range(2))
    ruled.backend_tokenizer.normalizer = normalizers.Replace("L", "X")
    assert Tokens(plain).digest() == Tokens(AutoTokenizer.from_pretrained(model_folder("protbert"))).digest()
    assert Tokens(ruled).digest() != Tokens(plain).digest()


def test_a_ckpt_file_behind_an_mlflow_uri(model_folder: Make, tracking: str, tmp_path: Path) -> None:
    from mlflow import MlflowClient

    model = EsmForMaskedLM.from_pretrained(model_folder("esm"))
    tokenizer = AutoTokenizer.from_pretrained(model_folder("esm"))
    state = {f"model._orig_mod.{name}": value for name, value in model.state_dict().items()}
    path = tmp_path / "epoch=3.ckpt"
    torch.save({"state_dict": state, DESCRIPTION: describe(model, tokenizer, "model._orig_mod.")}, path)
    client = MlflowClient(tracking)
    run = client.create_run("0")
    client.log_artifact(run.info.run_id, str(path), "checkpoints")
    encoder = open_encoder(f"runs:/{run.info.run_id}/checkpoints/epoch=3.ckpt")
    assert encoder.digest == open_encoder(str(model_folder("esm"))).digest
