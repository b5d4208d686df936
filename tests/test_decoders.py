"""Decoder-only models, and the ways in which token states become the embedding of a sequence."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import AutoTokenizer

from pipeline import EncoderOptions, LiveModel, Store, open_encoder, setup_dwnstr_task_validation_callbacks, validate
from pipeline.config.schema import Config
from pipeline.config.task import Task
from pipeline.embed import Embeddings, embed
from pipeline.encoders.description import DESCRIPTION
from pipeline.encoders.protocol import Encoder
from pipeline.errors import CheckpointError, ConfigError
from pipeline.load import load
from tests.support.data import make_task, token_task
from tests.support.decoders import POSITIONS, decoder, decoder_folder, tokenizer_of
from tests.support.training import Recorder, section, sequences, trainer

TEXTS = ["MKVLAAGIVGLLLAQW", "MK", "AGLVKRST", "MKVLAAGIVGLLLAQY", "GGSTWYFPLVKRAGMK"]
CPU = EncoderOptions(device="cpu", precision="fp32")
KINDS = ("gpt2", "gpt_neo", "llama", "mistral")
NEW = int(version("transformers").split(".")[0]) >= 5


def own_states(folder: Path, kind: str, text: str) -> Tensor:
    """What the model itself gives for one sequence alone, without padding, shape (tokens, hidden_size)."""
    ids = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        states: Tensor = decoder(kind)(input_ids=ids, output_hidden_states=True).hidden_states[-1][0]
    return states


@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_decoder_is_opened_and_neighbours_do_not_matter(tmp_path: Path, kind: str, pairs: bool) -> None:
    """Alone, in a batch, packed and padded on the right: a real token's state depends on what is before it alone."""
    folder = decoder_folder(tmp_path, kind, pairs)
    encoder: Any = open_encoder(str(folder), CPU)
    assert encoder.max_seq_length == POSITIONS
    together = encoder.hidden_states(TEXTS)
    if NEW:  # earlier ones do not let attention be replaced
        assert encoder.packs == (kind in ("gpt2", "llama"))  # the others have attention of their own, or a window
    encoder.__dict__["_packing"] = None
    padded = encoder.hidden_states(TEXTS)
    for text, packed, beside in zip(TEXTS, together, padded, strict=True):
        expected = own_states(folder, kind, text)
        assert len(expected) == len(text) if not pairs else len(expected) < len(text)
        assert torch.equal(encoder.hidden_states([text])[0], expected)
        torch.testing.assert_close(packed, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(beside, expected, rtol=1e-5, atol=1e-5)
        longer = encoder.hidden_states([text + "C"])[0]
        torch.testing.assert_close(longer[: len(expected)], expected, rtol=1e-5, atol=1e-5, msg="it is not causal")


def test_a_causal_model_is_packed_only_where_nothing_leaks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With an attention over the whole row, which is causal too, the hidden states become others: it is padded."""
    encoder: Any = open_encoder(str(decoder_folder(tmp_path)), CPU)
    whole = lambda _module, q, k, v, _mask, **_: (  # noqa: E731
        torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2),
        None,
    )
    monkeypatch.setattr("pipeline.encoders.packing.attention", whole)
    assert not encoder.packs
    torch.testing.assert_close(encoder.hidden_states(TEXTS)[1], own_states(tmp_path, "gpt2", TEXTS[1]))


def test_masks_among_the_weights_are_no_weights(tmp_path: Path) -> None:
    """As in the files of GPT-2 and ProtGPT2, which earlier releases of transformers wrote; in a `.ckpt` too."""
    folder = decoder_folder(tmp_path / "gpt")
    expected = open_encoder(str(folder), CPU).hidden_states(TEXTS[:1])[0]
    weights = {name: weight.clone() for name, weight in load_file(folder / "model.safetensors").items()}
    for layer in ("transformer.h.0", "transformer.h.1"):
        weights[f"{layer}.attn.bias"] = torch.ones(1, 1, POSITIONS, POSITIONS).tril()
        weights[f"{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    torch.save({"state_dict": weights}, tmp_path / "a.ckpt")
    options = EncoderOptions(device="cpu", precision="fp32", architecture=str(folder))
    for encoder in (open_encoder(str(folder), CPU), open_encoder(str(tmp_path / "a.ckpt"), options)):
        assert torch.equal(encoder.hidden_states(TEXTS[:1])[0], expected)


@pytest.fixture
def task(tmp_path: Path) -> Task:
    rows = [{"sequence": text, "y": float(text.count("L"))} for text in [*TEXTS, *sequences()]]
    return make_task(tmp_path / "data", rows, num_epochs=2)


def embedded(encoder: Encoder, tasks: Sequence[Task], store: Store) -> list[Embeddings]:
    return embed([load(task, encoder.max_seq_length) for task in tasks], encoder, store)


def rows_of(embeddings: Embeddings) -> np.ndarray[Any, Any]:
    """Shape (train sequences, hidden_size)."""
    rows = embeddings.rows("train")
    return np.stack([rows.gather(np.array([i]))[0].numpy() for i in range(len(embeddings.examples.train.sequences))])


@pytest.mark.parametrize("pooling", ["mean", "last", "cls"])
def test_pooling_of_an_encoder(tmp_path: Path, task: Task, model_folder: Callable[..., Path], pooling: str) -> None:
    """By the model's own states of each sequence alone; beside a token-level task, which is not pooled."""
    folder = model_folder("esm")
    encoder = open_encoder(str(folder), EncoderOptions(device="cpu", pooling=pooling))
    both = embedded(encoder, [task, token_task(tmp_path, TEXTS)], Store(tmp_path / "store"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    plain: Any = open_encoder(str(folder), CPU)
    for row, text in zip(rows_of(both[0]), both[0].examples.train.sequences, strict=True):
        with torch.no_grad():
            states = plain.model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
        expected = {"mean": states[1:-1].mean(0), "last": states[-2], "cls": states[0]}[pooling]
        torch.testing.assert_close(torch.from_numpy(row), expected, rtol=1e-5, atol=1e-5)
    assert both[0].table.settings["pooling"] == pooling
    assert both[1].table.settings["pooling"] == "none"
    found = both[1].rows("train").gather(np.array([0])).numpy()
    np.testing.assert_allclose(found, plain.hidden_states([TEXTS[0]])[0].numpy(), rtol=1e-5, atol=1e-5)


def test_each_pooling_has_embeddings_of_its_own(tmp_path: Path, task: Task) -> None:
    folder, store = decoder_folder(tmp_path / "gpt", pairs=True), Store(tmp_path / "store")
    found = {}
    for pooling in ("mean", "last"):
        encoder = open_encoder(str(folder), EncoderOptions(device="cpu", pooling=pooling))
        (one,) = embedded(encoder, [task], store)
        assert one.metrics["cached"] == 0
        found[pooling] = one
    assert found["mean"].key != found["last"].key
    last = own_states(folder, "gpt2", TEXTS[0])[-1].numpy()
    np.testing.assert_allclose(rows_of(found["last"])[0], last, rtol=1e-5, atol=1e-5)
    assert not np.allclose(rows_of(found["mean"])[0], last, rtol=1e-3, atol=1e-3)


def test_what_cls_is_not_there_for(tmp_path: Path) -> None:
    """No special token before the sequence; one that sees nothing of it; a user's own code without it."""
    options = EncoderOptions(device="cpu", pooling="cls")
    with pytest.raises(CheckpointError, match=r"the tokenizer, a \w+, puts none there; set pooling to mean or last"):
        open_encoder(str(decoder_folder(tmp_path / "a")), options)
    with pytest.raises(CheckpointError, match=r"in a GPT2Model that is the same for every sequence: it sees none of"):
        open_encoder(str(decoder_folder(tmp_path / "b", start=True)), options)
    (tmp_path / "own.ckpt").touch()
    with pytest.raises(CheckpointError, match=r"pooling: cls .* OwnEncoder has no states_from_first\(sequences\)"):
        open_encoder(str(tmp_path / "own.ckpt"), EncoderOptions("tests.test_decoders.OwnEncoder", pooling="cls"))
    with pytest.raises(CheckpointError, match=r"WithMethod has no states_from_first"):
        LiveModel(WithMethod()).encoder(WithMethod(), options)
    with pytest.raises(ConfigError, match="pooling: expected one of mean, cls, last, found 'first'"):
        Config(dataset=[Task(target_column=["y"], dataset_path="x")], pooling="first").check()


class OwnEncoder(Encoder):
    """A user's own: the state of a token is its number in the alphabet, and its place."""

    hidden_size, device, digest = 2, torch.device("cpu"), "own"

    @classmethod
    def from_checkpoint(cls, _path: str) -> Any:
        return cls()

    @staticmethod
    def hidden_states(sequences: Sequence[str]) -> list[Tensor]:
        return [torch.tensor([[ord(c), i] for i, c in enumerate(text)], dtype=torch.float32) for text in sequences]


class WithFirst:
    """A user's own with a special token before each sequence."""

    def __init__(self) -> None:
        self.hidden_size, self.digest = 2, "first"

    @classmethod
    def from_checkpoint(cls, _path: str) -> WithFirst:
        return cls()

    def hidden_states(self, texts: Sequence[str]) -> list[Tensor]:
        return OwnEncoder.hidden_states(texts)

    def states_from_first(self, texts: Sequence[str]) -> list[Tensor]:
        return [torch.cat([torch.tensor([[-1.0, len(text)]]), OwnEncoder.hidden_states([text])[0]]) for text in texts]


class WithMethod(nn.Module):
    """A live module with a method of its own."""

    def hidden_states(self, texts: Sequence[str]) -> list[Tensor]:
        return OwnEncoder.hidden_states(texts)


@pytest.mark.parametrize("pooling", ["last", "cls"])
def test_pooling_of_ones_own_encoder(tmp_path: Path, task: Task, pooling: str) -> None:
    (tmp_path / "own.ckpt").touch()
    options = EncoderOptions("tests.test_decoders.WithFirst", device="cpu", pooling=pooling)
    (one,) = embedded(open_encoder(str(tmp_path / "own.ckpt"), options), [task], Store(tmp_path / "store"))
    texts = one.examples.train.sequences
    expected = {"last": [[ord(text[-1]), len(text) - 1] for text in texts], "cls": [[-1, len(text)] for text in texts]}
    assert rows_of(one).tolist() == expected[pooling]


class Causal(pl.LightningModule):
    """A pre-training of a GPT-2."""

    def __init__(self) -> None:
        super().__init__()
        self.gpt, self.tokenizer = decoder(), tokenizer_of(pairs=True)

    def training_step(self, batch: Sequence[str], _index: int) -> Tensor:
        ids = self.tokenizer(batch[0], return_tensors="pt")["input_ids"]
        loss: Tensor = self.gpt(input_ids=ids, labels=ids).loss
        return loss

    def validation_step(self, batch: Sequence[str], _index: int) -> None:
        pass

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def test_a_training_is_measured_with_the_last_token(
    tmp_path: Path, task: Task, tracking: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The same from the callback and from its `.ckpt`; another pooling is said; the training is what it is without."""
    config = section(tmp_path, task, pooling="last", on_error="raise", device="cpu")
    (callback,) = setup_dwnstr_task_validation_callbacks(config)
    keep = pl.callbacks.ModelCheckpoint(tmp_path / "kept", "{step}", save_top_k=-1)
    data = DataLoader(sequences(), batch_size=8)  # type: ignore[arg-type, var-annotated]
    ends = []
    for callbacks in ([callback, keep], []):
        recorder = Recorder()
        trainer(tmp_path, [*callbacks, recorder]).fit(Causal(), data, data)
        ends.append(recorder.end)
    assert ends[0] == ends[1]
    path = tmp_path / "kept" / "step=4.ckpt"
    assert torch.load(path, weights_only=True)[DESCRIPTION]["made_with"]["pooling"] == "last"
    found = {}
    for pooling in ("last", "mean"):
        encoder = open_encoder(str(path), EncoderOptions(device="cpu", pooling=pooling))
        (scores,) = validate(encoder, task, Store(tmp_path / pooling))
        found[pooling] = scores.metrics
    assert callback.curve[-1] == (4, found["last"])  # type: ignore[attr-defined]
    assert found["mean"] != found["last"]
    if not version("mlflow").startswith("3.1."):  # which turns loggers off
        assert "in training it was measured with pooling last, here mean" in caplog.text


def test_names_of_the_limit(tmp_path: Path) -> None:
    """GPT-2's own `n_positions`, and the tokenizer's special tokens taken off it."""
    folder = decoder_folder(tmp_path, start=True)
    assert json.loads((folder / "config.json").read_text())["n_positions"] == POSITIONS
    assert open_encoder(str(folder), CPU).max_seq_length == POSITIONS - 1
