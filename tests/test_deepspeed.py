"""DeepSpeed checkpoints: in their documented layout, and as DeepSpeed itself writes them where it is installed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import AutoTokenizer, EsmForMaskedLM

from pipeline import EncoderOptions, LiveModel, Store, open_encoder, validate
from pipeline.__main__ import main
from pipeline.checkpoints.names import step_of
from pipeline.checkpoints.zero import in_groups, of_each
from pipeline.config.yaml_file import to_yaml
from pipeline.encoders.description import DESCRIPTION
from pipeline.errors import CheckpointError
from tests.support.data import planted_task
from tests.support.lab import every_metric, newest_run
from tests.support.programs import ROOT
from tests.support.training import section
from tests.support.zero import split_each, split_groups, write_zero

TEXTS = ["MKVLAAGIVGLLLAQW", "MK", "AGLVKRST"]
EMBEDDING = "esm.embeddings.word_embeddings.weight"
HEAD = {"lm_head.decoder.weight": EMBEDDING}


@pytest.fixture(scope="module")
def model(model_folder: Callable[..., Path]) -> Any:
    return EsmForMaskedLM.from_pretrained(model_folder("esm", width=24)).float().eval()


@pytest.fixture(scope="module")
def esm(model_folder: Callable[..., Path]) -> EncoderOptions:
    """How bare weights of that model are opened."""
    return EncoderOptions(device="cpu", architecture=str(model_folder("esm", width=24)))


def weights_of(model: nn.Module, prefix: str = "") -> dict[str, Tensor]:
    """Its weights by name, those that are others' left out."""
    return {prefix + name: weight.detach().clone() for name, weight in model.named_parameters()}


def buffers_of(model: nn.Module, prefix: str = "") -> dict[str, Tensor]:
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return {prefix + name: value for name, value in model.state_dict().items() if name not in parameters}


def states_of(encoder: Any) -> list[Tensor]:
    states: list[Tensor] = encoder.hidden_states(TEXTS)
    return states


def live_states(model: nn.Module, tokenizer: Any) -> list[Tensor]:
    live = LiveModel(model, tokenizer=tokenizer)
    return states_of(live.encoder(model, EncoderOptions(device="cpu")))


def assert_equal(found: list[Tensor], expected: list[Tensor]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("frozen", [(), (EMBEDDING,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ranks", [1, 2, 5])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_checkpoint_gives_the_hidden_states_of_the_weights(
    model: Any, esm: EncoderOptions, tmp_path: Path, stage: int, ranks: int, dtype: torch.dtype, frozen: Any
) -> None:
    """To the last bit: of the float32 weights in the optimizers; frozen ones and those of ZeRO 0 as the module's."""
    weights = weights_of(model)
    place = write_zero(tmp_path, weights, stage, ranks, dtype, frozen, buffers_of(model), HEAD, padded=ranks == 2)
    rounded = [name for name in weights if stage == 0 or name in frozen]
    expected = EsmForMaskedLM(model.config)
    state = {name: weight.to(dtype).float() if name in rounded else weight for name, weight in weights.items()}
    expected.load_state_dict(state, strict=False)
    encoder = open_encoder(str(tmp_path), esm)
    assert_equal(states_of(encoder), live_states(expected.eval(), AutoTokenizer.from_pretrained(str(esm.architecture))))
    assert encoder.step == 7
    assert open_encoder(str(place), esm).digest == encoder.digest, "the inner folder itself"
    assert not (tmp_path / "ran").exists()


@settings(max_examples=60)
@given(
    shapes=st.lists(st.lists(st.lists(st.integers(1, 5), max_size=3), min_size=1, max_size=4), min_size=1, max_size=3),
    ranks=st.integers(1, 7),
    padded=st.booleans(),
)
def test_parts_become_the_whole(shapes: list[list[list[int]]], ranks: int, padded: bool) -> None:
    groups = [{f"{i}.{j}": torch.rand(shape) for j, shape in enumerate(one)} for i, one in enumerate(shapes)]
    named = [{name: weight.shape for name, weight in group.items()} for group in groups]
    vectors = [[torch.cat(list(split_each(g, ranks)[rank].values())) for g in groups] for rank in range(ranks)]
    for found in (in_groups(split_groups(groups, ranks, padded), named), of_each(vectors, named)):
        for group in groups:
            for name, weight in group.items():
                assert torch.equal(found[name].whole(), weight)


class Module(nn.Module):
    """As a LightningModule has it."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        super().__init__()
        self.model, self.tokenizer = model, tokenizer


@pytest.mark.parametrize("wrapper", ["", "_forward_module."])
def test_what_lightning_writes_is_measured_without_a_flag(
    model: Any, esm: EncoderOptions, tmp_path: Path, tracking: str, wrapper: str
) -> None:
    """Its strategy's folder ends in `.ckpt`, and the callback's description is among what the trainer adds."""
    module = Module(model, AutoTokenizer.from_pretrained(str(esm.architecture)))
    live = LiveModel(module)
    client = {DESCRIPTION: live.description, "global_step": 40, "epoch": 1, "state": print}
    weights, buffers = weights_of(model, f"{wrapper}model."), buffers_of(model, f"{wrapper}model.")
    folder = tmp_path / "epoch=1.ckpt"
    write_zero(folder, weights, 3, 2, buffers=buffers, tag="checkpoint", client=client)
    task = planted_task(tmp_path / "data", num_epochs=1)
    encoder = open_encoder(str(folder), EncoderOptions(device="cpu"))
    assert step_of(str(folder), encoder) == 40
    (expected,) = validate(live.encoder(module, EncoderOptions(device="cpu")), task, Store(tmp_path / "live"))
    (found,) = validate(encoder, task, Store(tmp_path / "stored"))
    assert found.metrics == expected.metrics
    (tmp_path / "task.yaml").write_text(to_yaml(section(tmp_path / "cli", task)))
    assert main(["main", f"--ckpt={folder}", f"--config={tmp_path / 'task.yaml'}"]) == 0
    run = newest_run()
    assert every_metric(run) == found.metrics
    assert run.info.run_name.startswith("step=40 epoch=1: ")


def test_what_other_trainers_write(model: Any, esm: EncoderOptions, tmp_path: Path) -> None:
    """Hugging Face's, with its configuration beside, and whole weights or not; accelerate's tag."""
    expected = live_states(model, AutoTokenizer.from_pretrained(str(esm.architecture)))
    folder = tmp_path / "checkpoint-7"
    place = write_zero(folder, weights_of(model), 3, 2, buffers=buffers_of(model))
    for path in Path(str(esm.architecture)).iterdir():
        if path.suffix != ".safetensors":
            shutil.copy(path, folder)
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": 7}))
    plain = EncoderOptions(device="cpu")
    for path in (folder, place):
        encoder = open_encoder(str(path), plain)
        assert_equal(states_of(encoder), expected)
        assert step_of(str(path), encoder) == 7
    changed = EsmForMaskedLM(model.config).eval()
    changed.save_pretrained(tmp_path / "changed")
    shutil.copy(tmp_path / "changed" / "model.safetensors", folder)
    whole = live_states(changed, AutoTokenizer.from_pretrained(folder))
    assert_equal(states_of(open_encoder(str(folder), plain)), whole)
    write_zero(tmp_path / "state", weights_of(model), 2, 2, buffers=buffers_of(model), tag="pytorch_model")
    (tmp_path / "state" / "random_states_0.pkl").write_bytes(b"")
    assert_equal(states_of(open_encoder(str(tmp_path / "state"), esm)), expected)


class Code:
    """Unpickled as pickle would, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def edit(path: Path, change: Callable[[Any], Any]) -> None:
    content = torch.load(path, weights_only=False)
    change(content)
    torch.save(content, path)


MODEL, OPTIM = "mp_rank_00_model_states.pt", "bf16_zero_pp_rank_{}_mp_rank_00_optim_states.pt"
ATTENTION = "esm.encoder.layer.0.attention.self.query.weight"


def parts(content: Any) -> list[Tensor]:
    vectors: list[Tensor] = content["optimizer_state_dict"]["single_partition_of_fp32_groups"]
    return vectors


def removed(*paths: Path) -> None:
    for path in paths:
        path.unlink()


def into_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def with_nan(content: Any) -> None:
    parts(content)[0][5] = torch.nan


def replaced(content: Any, value: Any) -> None:
    content["optimizer_state_dict"]["single_partition_of_fp32_groups"] = value


def reshaped(content: Any) -> None:
    content["param_shapes"][0][ATTENTION] = torch.Size([12, 48])


def renamed(content: Any) -> None:
    for names in (content["module"], content["param_shapes"][0]):
        moved = {name.replace(ATTENTION, "esm.encoder.layer.0.other.weight"): value for name, value in names.items()}
        names.clear()
        names.update(moved)


def added(content: Any) -> None:
    content["module"]["esm.encoder.layer.0.adapter.weight"] = torch.ones(2)


BROKEN: dict[str, tuple[Callable[[Path, Path], Any], str]] = {
    "latest names what is gone": (
        lambda top, _: (top / "latest").write_text("global_step8"),
        "found 'global_step8'; name an",
    ),
    "latest leads elsewhere": (lambda top, _: (top / "latest").write_text(".."), "expected the name of a folder"),
    "latest is empty": (lambda top, _: (top / "latest").write_text(""), "expected the name of a folder beside it"),
    "latest is no text": (lambda top, _: (top / "latest").write_bytes(b"\xff\xfe\x00"), "cannot be read"),
    "nothing in the folder": (
        lambda _, place: removed(*place.iterdir()),
        "expected a file of rank 0",
    ),
    "no file of the model": (lambda _, place: (place / MODEL).unlink(), "expected a file of rank 0"),
    "no optimizers": (
        lambda _, place: removed(*(place / OPTIM.format(rank) for rank in (0, 1))),
        "of 2 ranks, found 0: rank 0",
    ),
    "a rank is missing": (
        lambda _, place: (place / OPTIM.format(1)).unlink(),
        "files of 2 ranks, found 1: rank 1 is miss",
    ),
    "a rank too many": (
        lambda _, place: shutil.copy(place / OPTIM.format(1), place / OPTIM.format(2)),
        "files of 2 ranks, found 3: rank 2 is of another checkpoint",
    ),
    "of more ranks than it says": (
        lambda _, place: edit(place / OPTIM.format(0), lambda c: c["optimizer_state_dict"].update(partition_count=[3])),
        "files of 3 ranks, found 2: rank 2 is missing",
    ),
    "a file is cut off": (
        lambda _, place: os.truncate(place / OPTIM.format(1), 2000),
        "is damaged, or no file of torch",
    ),
    "a file is empty": (lambda _, place: os.truncate(place / MODEL, 0), "is damaged, or no file of torch.save"),
    "a file is text": (lambda _, place: (place / MODEL).write_text("step 7"), "is damaged, or no file of torch.save"),
    "a file is a folder": (
        lambda _, place: into_folder(place / MODEL),
        "is damaged, or no file of torch.save",
    ),
    "a file of something else": (lambda _, place: torch.save([1], place / MODEL), "with module, found none"),
    "a part is too short": (
        lambda _, place: edit(place / OPTIM.format(1), lambda c: replaced(c, [p[:-40] for p in parts(c)])),
        "values of the weights in param_shapes, found",
    ),
    "a part is no tensor": (
        lambda top, place: edit(place / OPTIM.format(1), lambda c: replaced(c, [Code(top / "ran"), 1])),
        "expected 2 vectors, found a list",
    ),
    "code for a part": (
        lambda top, place: edit(place / OPTIM.format(0), lambda c: replaced(c, Code(top / "ran"))),
        "expected 2 vectors, found a mkdir",
    ),
    "code for a file": (lambda top, place: torch.save(Code(top / "ran"), place / MODEL), "with module, found none"),
    "no shapes": (
        lambda _, place: edit(place / MODEL, lambda c: c.update(param_shapes=[3])),
        "shapes of weights by name, in it, found .3",
    ),
    "not a number": (
        lambda _, place: edit(place / OPTIM.format(0), with_nan),
        "found 1 of .* that are NaN or infinite",
    ),
    "another shape": (
        lambda _, place: edit(place / MODEL, reshaped),
        r"expected the shape \(24, 24\), found \(12, 48\)",
    ),
    "a weight is missing": (lambda _, place: edit(place / MODEL, renamed), "one that lacks encoder.layer.0.attention"),
    "a weight is left over": (lambda _, place: edit(place / MODEL, added), "does not have: encoder.layer.0.adapter"),
    "model-parallel": (
        lambda _, place: shutil.copy(place / MODEL, place / "mp_rank_01_model_states.pt"),
        r"a model in model-parallel ranks \(mp_rank_01_model_states.pt\), which are not read; export",
    ),
    "in stages": (lambda _, place: (place / "layer_00-model_states.pt").touch(), "a model in pipeline stages"),
    "with experts": (
        lambda _, place: (place / "layer_0_expert_1_mp_rank_00_model_states.pt").touch(),
        "a model in experts",
    ),
    "universal": (lambda _, place: (place / "zero").mkdir(), "is a universal checkpoint, which is not read"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_checkpoint_is_one_line_and_runs_nothing(
    model: Any, esm: EncoderOptions, tmp_path: Path, what: str
) -> None:
    place = write_zero(tmp_path, weights_of(model), 2, 2, buffers=buffers_of(model))
    breaking, expected = BROKEN[what]
    breaking(tmp_path, place)
    with pytest.raises(CheckpointError, match=expected) as caught:
        open_encoder(str(tmp_path), esm)
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)
    assert not (tmp_path / "ran").exists()


def test_other_models_and_zero_3_with_a_missing_rank(
    model: Any, esm: EncoderOptions, model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    other = EncoderOptions(device="cpu", architecture=str(model_folder("esm")))
    place = write_zero(tmp_path / "a", weights_of(model), 3, 3, buffers=buffers_of(model), frozen=[EMBEDDING])
    with pytest.raises(CheckpointError, match=r"expected the shape \(33, 32\), found \(33, 24\)"):
        open_encoder(str(place), other)
    with pytest.raises(CheckpointError, match="does not say what model it holds; set architecture"):
        open_encoder(str(place), EncoderOptions(device="cpu"))
    (place / "zero_pp_rank_1_mp_rank_00_model_states.pt").unlink()
    with pytest.raises(
        CheckpointError, match=r"_model_states.pt: expected files of 3 ranks, found 2: rank 1 is missing"
    ):
        open_encoder(str(place), esm)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_what_deepspeed_itself_writes(
    model: Any, esm: EncoderOptions, tmp_path: Path, tracking: str, stage: int
) -> None:
    """On two ranks: the weights are those that its own script consolidates, and rounded, those of its module.

    The module within the engine is measured meanwhile, unless it is in parts.
    """
    pytest.importorskip("deepspeed", reason="needs DeepSpeed: pip install deepspeed")
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    task = planted_task(tmp_path / "data", num_epochs=1)
    environment = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(29650 + stage)}
    command = [sys.executable, "-m", "tests.support.deepspeed_rank", str(esm.architecture), str(tmp_path), str(stage)]
    start = partial(subprocess.Popen, command, cwd=ROOT)
    ranks = [start(env={**environment, "RANK": str(r), "LOCAL_RANK": str(r), "DS_ACCELERATOR": "cpu"}) for r in (0, 1)]
    assert [rank.wait(timeout=280) for rank in ranks] == [0, 0]
    encoder: Any = open_encoder(str(tmp_path / "written"), esm)
    official = get_fp32_state_dict_from_zero_checkpoint(str(tmp_path / "written"))
    live = torch.load(tmp_path / "live.pt", weights_only=True)
    first, second = (json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    if stage == 3:
        assert "ZeRO-3" in str(first)
    else:
        trained = EsmForMaskedLM(model.config)
        trained.load_state_dict(live)
        (expected,) = validate(
            LiveModel(trained.eval(), tokenizer=AutoTokenizer.from_pretrained(str(esm.architecture))).encoder(trained),
            task,
            Store(tmp_path / "expected"),
        )
        assert {name: first[name] for name in expected.metrics} == pytest.approx(expected.metrics, rel=1e-5)
    for name, weight in encoder.model.state_dict().items():
        assert torch.equal(weight.bfloat16(), live[f"esm.{name}"].bfloat16())
        if stage > 1 or f"esm.{name}" != EMBEDDING:  # of ZeRO 1 its script leaves out what is frozen
            assert torch.equal(weight, official[f"esm.{name}"].float())
    assert encoder.step == 3
