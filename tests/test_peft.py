"""Adapters of the peft library, merged into their base model."""

from __future__ import annotations

import json
import os
import shutil
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoTokenizer,
    BartForConditionalGeneration,
    EsmForMaskedLM,
    EsmForSequenceClassification,
    EsmModel,
    GPT2LMHeadModel,
    T5ForConditionalGeneration,
)

from pipeline import EncoderOptions, LiveModel, Store, open_encoder, validate
from pipeline.__main__ import main
from pipeline.checkpoints.names import step_of
from pipeline.config.yaml_file import to_yaml
from pipeline.errors import CheckpointError
from tests.support.data import planted_task
from tests.support.decoders import decoder_folder
from tests.support.lab import every_metric, newest_run
from tests.support.training import section

peft: Any = pytest.importorskip("peft", reason="needs the extra peft: pip install 'downstream-validation[peft]'")
pytestmark = pytest.mark.filterwarnings("ignore")  # of peft about its own ways
CPU = EncoderOptions(device="cpu")
TEXTS = ["MKVLAAGIVGLLLAQW", "MK", "AGLVKRST"]


def adapter(folder: Path, base: Path, settings: Any, kind: Any = EsmForMaskedLM, **save: Any) -> Any:
    """Writes an adapter with random weights of a model of this kind, and gives what peft itself makes of the folder."""
    torch.manual_seed(1)
    model = peft.get_peft_model(kind.from_pretrained(base), settings)
    for weight in model.parameters():
        weight.data.normal_(0, 0.1) if weight.requires_grad else None
    model.save_pretrained(folder, **save)
    return peft.PeftModel.from_pretrained(kind.from_pretrained(base).float(), folder).merge_and_unload().eval()


def assert_same(encoder: Any, merged: nn.Module, prefix: str) -> None:
    """Every weight of the encoder, to the last bit, and so its hidden states; the adapter did something to it."""
    theirs = merged.state_dict()
    assert all(torch.equal(theirs[prefix + name], weight) for name, weight in encoder.model.state_dict().items())


SETTINGS: dict[str, Callable[[], Any]] = {
    "lora": lambda: peft.LoraConfig(r=4, lora_alpha=7, target_modules=["query", "value"]),
    "rank-stabilised, with patterns": lambda: peft.LoraConfig(
        r=4,
        use_rslora=True,
        target_modules=["query", "value"],
        rank_pattern={"layer.0.attention.self.query": 2},
        alpha_pattern={"esm.encoder.layer.1.attention.self.query": 9},
    ),
    "layers and biases": lambda: peft.LoraConfig(r=4, target_modules=["query", "key", "value", "dense"], bias="all"),
    "dora": lambda: peft.LoraConfig(r=4, use_dora=True, target_modules=["dense"]),
    "a pattern": lambda: peft.LoraConfig(r=2, target_modules=r"esm\.encoder\.layer\.1\..*query", bias="lora_only"),
    "embeddings": lambda: peft.LoraConfig(r=4, target_modules=["word_embeddings", "key"]),
    "whole modules": lambda: peft.LoraConfig(
        r=4, target_modules=["query"], modules_to_save=["lm_head", "emb_layer_norm_after"]
    ),
    "pissa": lambda: peft.LoraConfig(r=4, target_modules=["query"], init_lora_weights="pissa"),
    "ia3": lambda: peft.IA3Config(
        target_modules=["key", "value", "intermediate.dense"], feedforward_modules=["intermediate.dense"]
    ),
    "loha": lambda: peft.LoHaConfig(r=4, target_modules=["query"]),
    "lokr": lambda: peft.LoKrConfig(r=4, target_modules=["query"]),
    "adalora": lambda: peft.AdaLoraConfig(init_r=4, target_r=2, total_step=10, target_modules=["query"]),
    "oft": lambda: peft.OFTConfig(oft_block_size=8, r=0, target_modules=["query"]),
    "hra": lambda: peft.HRAConfig(r=4, target_modules=["query"]),
    "norms": lambda: peft.LNTuningConfig(target_modules=["LayerNorm"]),
    "fourier": lambda: peft.FourierFTConfig(n_frequency=10, target_modules=["query"]),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_an_adapter_is_merged_as_peft_does(model_folder: Callable[..., Path], tmp_path: Path, name: str) -> None:
    base = model_folder("esm")
    merged = adapter(tmp_path / "a", base, SETTINGS[name](), safe_serialization=name != "lora")
    encoder: Any = open_encoder(str(tmp_path / "a"), CPU)
    assert_same(encoder, merged, "esm.")
    live = LiveModel(merged, tokenizer=AutoTokenizer.from_pretrained(base)).encoder(merged, CPU)
    for found, expected in zip(encoder.hidden_states(TEXTS), live.hidden_states(TEXTS), strict=True):
        assert torch.equal(found, expected)
    plain = open_encoder(str(base), CPU)
    assert encoder.digest != plain.digest
    assert not torch.equal(encoder.hidden_states(TEXTS)[0], plain.hidden_states(TEXTS)[0])


KINDS: dict[str, tuple[Any, str, str, list[str], str]] = {
    "bare": (EsmModel, "FEATURE_EXTRACTION", "", ["query"], "esm"),
    "with a classifier": (EsmForSequenceClassification, "SEQ_CLS", "esm.", ["query"], "esm"),
    "gpt2": (GPT2LMHeadModel, "CAUSAL_LM", "transformer.", ["c_attn", "c_fc"], "gpt2"),
    "t5": (T5ForConditionalGeneration, "SEQ_2_SEQ_LM", "", ["q", "wo"], "prott5"),
    "bart": (BartForConditionalGeneration, "SEQ_2_SEQ_LM", "model.encoder.", ["q_proj", "fc1"], "smiles_bart"),
}


@pytest.mark.parametrize("name", KINDS)
def test_whatever_model_was_trained(model_folder: Callable[..., Path], tmp_path: Path, name: str) -> None:
    """The encoder's part is taken: decoders, heads and what was trained in them are left out."""
    kind, task, prefix, targets, folder = KINDS[name]
    base = decoder_folder(tmp_path / "gpt2", pairs=True) if folder == "gpt2" else model_folder(folder)
    settings = peft.LoraConfig(r=4, target_modules=targets, task_type=task, fan_in_fan_out=folder == "gpt2")
    merged = adapter(tmp_path / "a", base, settings, kind)
    encoder: Any = open_encoder(str(tmp_path / "a"), CPU)
    assert_same(encoder, merged, prefix)
    assert encoder.digest != open_encoder(str(base), CPU).digest


def test_an_adapter_is_measured(model_folder: Callable[..., Path], tmp_path: Path, tracking: str) -> None:
    """As Hugging Face's trainer writes it, from Python and from the command line, with its step; the base elsewhere."""
    base, folder = tmp_path / "base", tmp_path / "checkpoint-12"
    shutil.copytree(model_folder("esm"), base)
    merged = adapter(folder, base, SETTINGS["lora"]())
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": 12}))
    base.rename(tmp_path / "moved")
    with pytest.raises(
        CheckpointError, match=r"its base model '.*base' cannot be read \(.*\); set architecture to the"
    ):
        open_encoder(str(folder), CPU)
    options = EncoderOptions(device="cpu", architecture=str(tmp_path / "moved"))
    task = planted_task(tmp_path / "data", num_epochs=1)
    encoder = open_encoder(str(folder), options)
    assert step_of(str(folder), encoder) == 12
    (found,) = validate(encoder, task, Store(tmp_path / "stored"))
    live = LiveModel(merged, tokenizer=AutoTokenizer.from_pretrained(tmp_path / "moved")).encoder(merged, CPU)
    (expected,) = validate(live, task, Store(tmp_path / "live"))
    assert found.metrics == expected.metrics
    (tmp_path / "task.yaml").write_text(to_yaml(section(tmp_path / "cli", task, architecture=str(tmp_path / "moved"))))
    assert main(["main", f"--ckpt={folder}", f"--config={tmp_path / 'task.yaml'}"]) == 0
    run = newest_run()
    assert every_metric(run) == found.metrics
    assert run.info.run_name.startswith("checkpoint-12")


class Code:
    """Unpickled as pickle would, it makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
QUERY = "base_model.model.esm.encoder.layer.0.attention.self.query"


def configured(**values: Any) -> Callable[[Path], Any]:
    """Changes the adapter's configuration."""

    def change(folder: Path) -> None:
        settings = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps({**settings, **values}))

    return change


def weighted(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], Any]:
    """Changes the adapter's weights."""

    def write(folder: Path) -> None:
        weights = {name: weight.clone() for name, weight in load_file(folder / WEIGHTS).items()}
        change(weights)
        save_file(weights, folder / WEIGHTS)

    return write


def pickled(value: Callable[[Path], Any]) -> Callable[[Path], Any]:
    """Puts a pickle in the place of the weights."""

    def write(folder: Path) -> None:
        (folder / WEIGHTS).unlink()
        torch.save(value(folder), folder / "adapter_model.bin")

    return write


def cut(name: str, length: int) -> Callable[[Path], Any]:
    return lambda folder: os.truncate(folder / name, length)


def into_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def of_no_model(weights: dict[str, Tensor]) -> None:
    moved = {name.replace("esm.encoder", "transformer"): value for name, value in weights.items()}
    weights.clear()
    weights.update(moved)


BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no weights": (
        lambda folder: (folder / WEIGHTS).unlink(),
        "expected adapter_model.safetensors or adapter_model.bin",
    ),
    "weights are a folder": (
        lambda folder: into_folder(folder / WEIGHTS),
        "expected adapter_model.safetensors or adapter_model.bin, found neither",
    ),
    "weights are cut off": (cut(WEIGHTS, 900), "is damaged, or no file of weights"),
    "weights are empty": (cut(WEIGHTS, 0), "is damaged, or no file of weights"),
    "weights are text": (
        lambda folder: (folder / WEIGHTS).write_text("no weights"),
        "is damaged, or no file of weights",
    ),
    "configuration is empty": (cut(CONFIG, 0), "expected a JSON object, found no JSON"),
    "configuration is cut off": (cut(CONFIG, 40), "expected a JSON object, found no JSON"),
    "configuration is a list": (lambda folder: (folder / CONFIG).write_text("[]"), "expected a JSON object, found"),
    "a learnt prompt": (configured(peft_type="PROMPT_TUNING"), "peft_type: expected an adapter that can be merged"),
    "no kind": (configured(peft_type=None), "peft_type: expected an adapter that can be merged .* found None"),
    "no base": (configured(base_model_name_or_path=None), "does not name the model that the adapter is of; set arch"),
    "a base that is gone": (
        configured(base_model_name_or_path="/gone/model"),
        "its base model '/gone/model' cannot be",
    ),
    "a revision": (configured(revision="abc"), "revision 'abc' of .*, and revisions are not fetched; set architecture"),
    "a start from elsewhere": (configured(init_lora_weights="loftq"), "init_lora_weights is 'loftq', which changes"),
    "code for layers": (configured(megatron_config={"a": 1}, megatron_core="this"), "megatron_config names code"),
    "an unknown setting": (configured(r="four"), "the adapter does not fit its base model: "),
    "another rank": (configured(r=3), r"lora_\w.weight': expected the shape \(.*\), found \(.*4.*\); take the base"),
    "other targets": (configured(target_modules=["nothing"]), "the adapter does not fit its base model: .*nothing"),
    "more targets": (
        configured(target_modules=["query", "key", "value"]),
        "the adapter lacks 'esm.*key.lora_A.weight'",
    ),
    "a weight is missing": (
        weighted(lambda w: w.pop(f"{QUERY}.lora_A.weight")),
        "the adapter lacks 'esm.*query.lora_A",
    ),
    "a weight is left over": (
        weighted(lambda w: w.update({f"{QUERY}.lora_C.weight": torch.ones(1)})),
        "has 'esm.*query.lora_C.weight', for which the model has no place",
    ),
    "a weight has another shape": (
        weighted(lambda w: w.update({f"{QUERY}.lora_A.weight": torch.ones(4, 31)})),
        r"query.lora_A.weight': expected the shape \(4, 32\), found \(4, 31\); take the base model",
    ),
    "not a number": (
        weighted(lambda w: w[f"{QUERY}.lora_A.weight"].fill_(torch.nan)),
        "'encoder.layer.0.attention.self.query.weight': expected finite numbers, found 1024 of 1024",
    ),
    "of another architecture": (
        weighted(of_no_model),
        "expected an adapter of a EsmModel, found one with 'transformer",
    ),
    "of something else": (weighted(lambda w: w.update(a=torch.ones(1))), "expected tensors called base_m"),
    "code for weights": (pickled(lambda folder: Code(folder / "ran")), "expected tensors called base_model.model"),
    "code for a weight": (
        pickled(lambda folder: {f"{QUERY}.lora_A.weight": Code(folder / "ran")}),
        "expected tensors called base_model.model",
    ),
}


@pytest.fixture(scope="module")
def whole(model_folder: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapter(folder, model_folder("esm"), SETTINGS["lora"]())
    return folder


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_adapter_is_one_line_and_runs_nothing(whole: Path, tmp_path: Path, what: str) -> None:
    folder = shutil.copytree(whole, tmp_path / "adapter")
    (folder / "code.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\n")
    breaking, expected = BROKEN[what]
    configured(auto_mapping={"base_model_class": "Own", "parent_library": "code"})(folder)
    open_encoder(str(folder), CPU)
    breaking(folder)
    with pytest.raises(CheckpointError, match=expected) as caught:
        open_encoder(str(folder), CPU)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value) or "'encoder.layer.0" in str(caught.value)
    assert not (folder / "ran").exists()


def test_another_base_and_no_library(
    whole: Path, model_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wider = EncoderOptions(device="cpu", architecture=str(model_folder("esm", width=24)))
    with pytest.raises(
        CheckpointError, match=r"expected the shape \(4, 24\), found \(4, 32\); take the base model that"
    ):
        open_encoder(str(whole), wider)
    other = EncoderOptions(device="cpu", architecture=str(decoder_folder(tmp_path)))
    with pytest.raises(CheckpointError, match="expected an adapter of a GPT2Model, found one with 'esm"):
        open_encoder(str(whole), other)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(CheckpointError, match=r"takes the peft library: pip install 'downstream-validation\[peft\]'"):
        open_encoder(str(whole), CPU)
