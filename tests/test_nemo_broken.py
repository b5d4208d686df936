"""Broken `.nemo` archives: each gives one line, and nothing is run or left behind."""

from __future__ import annotations

import io
import os
import pickle
import random
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from pipeline.errors import PipelineError
from tests.support import nemo
from tests.support.nemo_states import assert_states


class Code:
    """What would write a file if it were unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.path}",)


Files = dict[str, bytes]
CONFIG, WEIGHTS = "model_config.yaml", "model_weights.ckpt"


def changed(files: Files, **values: Any) -> None:
    """Changes settings in the configuration."""
    files[CONFIG] = yaml.safe_dump({**yaml.safe_load(files[CONFIG]), **values}).encode()


def weights(files: Files, change: Callable[[nemo.State], object]) -> None:
    """Changes weights in the first of the files of weights."""
    name = next(name for name in files if name.endswith(WEIGHTS))
    state = torch.load(io.BytesIO(files[name]), weights_only=True)
    change(state)
    stream = io.BytesIO()
    torch.save(state, stream)
    files[name] = stream.getvalue()


def moved(files: Files, old: str, new: str) -> None:
    for name in list(files):
        if old in name:
            files[name.replace(old, new)] = files.pop(name)


WORDS, FIRST = "encoder_embedding.word_embeddings.weight", "enc_dec_model.enc_dec_model.encoder.model.layers.0."
ENDLESS = "a0: &a0 [x]\n" + "".join(f"a{n + 1}: &a{n + 1} [{','.join([f'*a{n}'] * 9)}]\n" for n in range(12))
ENDLESS += "tokenizer: *a12"
# What is done to the files of an archive, of two ranks or of one, and what the message says.
BROKEN: dict[str, tuple[Callable[[Files], object], str]] = {
    "empty": (lambda files: files.clear(), "expected 'model_config.yaml' in the archive, found no file"),
    "no configuration": (lambda files: files.pop(CONFIG), "expected 'model_config.yaml' in the archive, found "),
    "no YAML": (lambda files: files.update({CONFIG: b"a: [1"}), "model_config.yaml: expected YAML, found none"),
    "bytes for YAML": (lambda files: files.update({CONFIG: b"\xff\xfe\x00"}), "expected YAML, found none"),
    "a list for settings": (lambda files: files.update({CONFIG: b"- 1"}), "expected the settings of a model, found"),
    "code in YAML": (
        lambda files: files.update({CONFIG: b"a: !!python/object/apply:os.system ['touch ran']"}),
        "expected YAML, found none (could not determine a constructor",
    ),
    "endless settings": (
        lambda files: files.update({CONFIG: ENDLESS.encode()}),
        "expected the settings of tokenizer, found [[[[",
    ),
    "no tokenizer settings": (lambda files: changed(files, tokenizer=None), "expected the settings of tokenizer"),
    "no weights": (lambda files: files.pop(WEIGHTS), "expected model_weights.ckpt, found model_config.yaml"),
    "weights of a pipeline": (
        lambda files: moved(files, WEIGHTS, f"tp_rank_00_pp_rank_000/{WEIGHTS}"),
        f"not cut into stages of a pipeline, found 'tp_rank_00_pp_rank_000/{WEIGHTS}'",
    ),
    "a distributed checkpoint": (
        lambda files: moved(files, WEIGHTS, "model_weights/.metadata"),
        "found the folder model_weights/ of a distributed checkpoint",
    ),
    "truncated weights": (lambda files: files.update({WEIGHTS: files[WEIGHTS][:5000]}), "is damaged (RuntimeError"),
    "text for weights": (
        lambda files: files.update({WEIGHTS: b"weights\n"}),
        "'model_weights.ckpt': expected weights alone, found other objects, or damage",
    ),
    "empty weights": (lambda files: files.update({WEIGHTS: b""}), "'model_weights.ckpt' is damaged (EOFError"),
    "a list for weights": (
        lambda files: files.update({WEIGHTS: saved([torch.ones(1)])}),
        "expected weights by name, found a list",
    ),
    "no weight": (lambda files: weights(files, lambda state: state.clear()), "expected weights of ESM-1nv"),
    "a weight missing": (
        lambda files: weights(files, lambda state: state.pop(f"{FIRST}mlp.dense_h_to_4h.bias")),
        "it lacks layers.0.mlp.dense_h_to_4h.bias",
    ),
    "no token embedding": (
        lambda files: weights(files, lambda state: state.pop(f"enc_dec_model.{WORDS}")),
        "lacks weights of the encoder: word_embeddings.weight",
    ),
    "no positions": (
        lambda files: weights(files, lambda state: state.pop("enc_dec_model." + WORDS.replace("word", "position"))),
        "lacks weights of the encoder: position_embeddings.weight",
    ),
    "a weight in another shape": (
        lambda files: weights(files, lambda s: s.update({f"{FIRST}input_layernorm.weight": torch.ones(3)})),
        "'layers.0.input_layernorm.weight': expected the shape (16,), found (3,)",
    ),
    "a token embedding of one axis": (
        lambda files: weights(files, lambda s: s.update({f"enc_dec_model.{WORDS}": torch.ones(3)})),
        "expected the weight word_embeddings.weight with two axes",
    ),
    "whole numbers for a weight": (
        lambda files: weights(files, lambda s: s.update({f"{FIRST}input_layernorm.weight": torch.ones(16).long()})),
        "expected a tensor of floating-point numbers, found one of torch.int64",
    ),
    "text for a weight": (
        lambda files: weights(files, lambda s: s.update({f"{FIRST}input_layernorm.weight": "ones"})),
        "expected a tensor of floating-point numbers, found a str",
    ),
    "NaN": (
        lambda files: weights(files, lambda s: s[f"{FIRST}input_layernorm.weight"].fill_(torch.nan)),
        "'layers.0.input_layernorm.weight': expected finite numbers, found others",
    ),
    "no vocabulary": (
        lambda files: changed(files, tokenizer={**yaml.safe_load(files[CONFIG])["tokenizer"], "vocab_file": None}),
        "tokenizer.vocab_file: expected the name of a file, found None",
    ),
    "no tokenizer": (lambda files: moved(files, "_x.model", "_y.model"), "expected 'nemo:00000000000000000000000000"),
    "an empty tokenizer": (
        lambda files: files.update({name: b"" for name in files if name.endswith(".model")}),
        "expected a regular expression, found an empty file",
    ),
    "a regular expression with groups": (
        lambda files: files.update({name: b"(Br)|C" for name in files if name.endswith(".model")}),
        "expected a regular expression without groups, found '(Br)|C'",
    ),
    "no regular expression": (
        lambda files: files.update({name: b"[a" for name in files if name.endswith(".model")}),
        "expected a regular expression, found '[a' (",
    ),
    "bytes for a vocabulary": (
        lambda files: files.update({name: b"\xff" for name in files if name.endswith(".vocab")}),
        "tokenizer: expected UTF-8, found other bytes",
    ),
    "no unknown token": (
        lambda files: files.update({name: b"<PAD>\nC" for name in files if name.endswith(".vocab")}),
        "expected a vocabulary with '?' for unknown tokens",
    ),
    "a larger vocabulary": (
        lambda files: files.update(
            {n: b"\n".join(b"?%d" % i for i in range(99)) + b"\n?" for n in files if "vocab" in n}
        ),
        "expected a tokenizer of at most 24 tokens, as the model has, found one of 100",
    ),
}
RANKS: dict[str, tuple[Callable[[Files], object], str]] = {
    "the last missing": (lambda files: files.pop(f"mp_rank_01/{WEIGHTS}"), "expected the weights of 2 ranks (tensor_m"),
    "the first missing": (
        lambda files: files.pop(f"mp_rank_00/{WEIGHTS}"),
        f"expected the weights of every rank from mp_rank_00 on, found mp_rank_01/{WEIGHTS}",
    ),
    "fewer in the settings": (lambda files: changed(files, tensor_model_parallel_size=1), "of 1 ranks"),
    "other weights": (
        lambda files: weights(files, lambda state: state.pop(f"{FIRST}input_layernorm.weight")),
        "expected the same weights of every rank, found in some alone layers.0.input_layernorm.weight",
    ),
    "other shapes": (
        lambda files: weights(files, lambda s: s.update({f"{FIRST}mlp.dense_h_to_4h.bias": torch.ones(3)})),
        "'layers.0.mlp.dense_h_to_4h.bias': expected the same shape of every rank, found [(3,), (12,)]",
    ),
    "one of them truncated": (
        lambda files: files.update({f"mp_rank_01/{WEIGHTS}": files[f"mp_rank_01/{WEIGHTS}"][:999]}),
        f"'mp_rank_01/{WEIGHTS}' is damaged",
    ),
    "a whole one beside them": (
        lambda files: files.update({WEIGHTS: files[f"mp_rank_01/{WEIGHTS}"]}),
        f"of 2 ranks (tensor_model_parallel_size), found 3: {WEIGHTS}",
    ),
}


def saved(content: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(content, stream)
    return stream.getvalue()


@pytest.mark.parametrize(
    ("ranks", "what"), [(1, what) for what in BROKEN] + [(2, what) for what in RANKS], ids=lambda x: str(x)
)
def test_a_broken_archive(ranks: int, what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    change, message = (BROKEN if ranks == 1 else RANKS)[what]
    monkeypatch.chdir(tmp_path)
    config = nemo.make_config("megamolbart", {"tensor_model_parallel_size": ranks})
    state = nemo.make_state("megamolbart")
    files = nemo.members("megamolbart", config, nemo.cut(state, ranks, {}, "megamolbart"))
    change(files)
    nemo.refused(nemo.pack(tmp_path / "x.nemo", files), message)
    assert [one.name for one in tmp_path.iterdir()] == ["x.nemo"]


@pytest.mark.parametrize("protocol", ["zip", "pickle"])
def test_code_in_the_weights_is_not_run(protocol: str, tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    content = {**nemo.make_state("esm1nv"), "more": Code(ran)}
    files = nemo.members("esm1nv", nemo.make_config("esm1nv"), [{}])
    files[WEIGHTS] = saved(content) if protocol == "zip" else pickle.dumps(content)
    message = "'model_weights.ckpt': expected weights alone, found "
    message += "posix.system" if protocol == "zip" else "other objects, or damage"
    for trust in (False, True):
        nemo.refused(nemo.pack(tmp_path / "x.nemo", files), message, trust_pickle=trust)
    assert not ran.exists()


@pytest.mark.parametrize("compressed", [False, True], ids=["tar", "tar.gz"])
def test_half_an_archive(compressed: bool, tmp_path: Path) -> None:
    """As an interrupted download leaves it, cut at any place."""
    nemo.write(tmp_path / "whole.nemo", "esm1nv", compressed=compressed)
    content = (tmp_path / "whole.nemo").read_bytes()
    for cut in range(0, len(content) - 12_000, len(content) // 12):  # a tar ends in up to 10 kB of zeros
        (tmp_path / "x.nemo").write_bytes(content[:cut])
        nemo.refused(tmp_path / "x.nemo", "")


@pytest.mark.parametrize("compressed", [False, True], ids=["tar", "tar.gz"])
@pytest.mark.parametrize("name", ["x.nemo", "x.bin"])
def test_bytes_that_are_not_what_they_were(name: str, compressed: bool, tmp_path: Path) -> None:
    """Some of them damaged, anywhere or in the first headers: whatever a library raises becomes one line."""
    nemo.write(tmp_path / "whole", "esm1nv", compressed=compressed)
    whole, draw = (tmp_path / "whole").read_bytes(), random.Random(0)
    messages = []
    (tmp_path / "whole").unlink()
    for _ in range(40):
        content, end = bytearray(whole), draw.choice([100, 2048, len(whole)])
        for _ in range(draw.choice([1, 8, 64])):
            content[draw.randrange(end)] = draw.choice([0, 48, 57, 128, 255])
        (tmp_path / name).write_bytes(content)
        try:
            nemo.opened(tmp_path / name)
        except PipelineError as error:
            messages.append(str(error))
    assert not [text for text in messages if "\n" in text or str(tmp_path / name) not in text]
    assert len(messages) > 10  # others are damaged where nobody looks, or their weights have other values


def test_no_archive_at_all(tmp_path: Path) -> None:
    path = tmp_path / "x.nemo"
    path.write_text("a text\n")
    nemo.refused(path, "expected a .nemo archive (a tar file), found none, or part of one (ReadError")
    path.unlink()
    nemo.refused(path, f"ckpt: '{path}' does not exist")
    path.mkdir()
    nemo.refused(path, "found none")


def test_other_tokenizers_files_are_refused(tmp_path: Path) -> None:
    """Sentencepiece reads what it can of other bytes."""
    files = nemo.members("esm1nv", nemo.make_config("esm1nv"), [nemo.make_state("esm1nv")])
    name = next(name for name in files if name.endswith(".model"))
    for content, message in ((b"", "found an empty file"), (b"no model", "expected a sentencepiece model, found none")):
        nemo.refused(nemo.pack(tmp_path / "x.nemo", {**files, name: content}), message)


def test_links_and_paths_that_lead_out_are_not_followed(tmp_path: Path) -> None:
    (tmp_path / "secret.yaml").write_text("a: 1\n")
    files = nemo.members("esm1nv", nemo.make_config("esm1nv"), [nemo.make_state("esm1nv")])
    with tarfile.open(nemo.pack(tmp_path / "x.nemo", {**files, "../outside": b"x", "/tmp/../x": b"x"}), "a") as tar:
        link = tarfile.TarInfo("./model_config.yaml")
        link.type, link.linkname = tarfile.SYMTYPE, str(tmp_path / "secret.yaml")
        tar.addfile(link)
    assert_states(nemo.opened(tmp_path / "x.nemo"), nemo.make_state("esm1nv"), "esm1nv", {})
    assert sorted(one.name for one in tmp_path.iterdir()) == ["secret.yaml", "x.nemo"]
