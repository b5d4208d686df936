"""The encoder of a `.nemo` archive: layers, precision, digest, random weights, names, and the whole job from it."""

from __future__ import annotations

import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

from pipeline.__main__ import main
from pipeline.checkpoints.names import expand, name_of, step_of
from pipeline.encoders.megatron_encoder import MegatronEncoder
from pipeline.errors import ConfigError
from tests.support import nemo
from tests.support.data import proteins, write_csv
from tests.support.lab import ALONE, every_metric, newest_run
from tests.support.nemo_states import PROTEINS, TOLERANCE, assert_states, distance


@pytest.mark.parametrize("layer", [0, 1, -2, 2, -1])
def test_another_layer(layer: int, tmp_path: Path) -> None:
    state = nemo.write(tmp_path / "x.nemo", "esm1nv")
    encoder = nemo.opened(tmp_path / "x.nemo", layer=layer)
    assert len(encoder.model.layers) == layer % (nemo.LAYERS + 1)
    assert_states(encoder, state, "esm1nv", {}, layer=layer % (nemo.LAYERS + 1))
    with pytest.raises(ConfigError, match="layer: expected -3 to 2 for a model of 2 layers, found 3"):
        nemo.opened(tmp_path / "x.nemo", layer=3)


def test_precision(tmp_path: Path) -> None:
    """Also with a bias of positions, padding, and a norm that torch does not compute itself."""
    made = {"position_embedding_type": "relative", "normalization": "rmsnorm"}
    nemo.write(tmp_path / "x.nemo", "prott5nv", made)
    exact = nemo.opened(tmp_path / "x.nemo").hidden_states(PROTEINS)
    encoder = nemo.opened(tmp_path / "x.nemo", precision="bf16")
    for found, expected in zip(encoder.hidden_states(PROTEINS), exact, strict=True):
        assert found.dtype == torch.float32
        assert TOLERANCE < distance(found, expected) < 0.1
    assert encoder.precision == "bf16"


def test_the_digest_changes_with_all_that_states_depend_on(tmp_path: Path) -> None:
    path = tmp_path / "x.nemo"
    digests = []

    def add(kind: str = "prott5nv", made: Mapping[str, Any] = {}, seed: int = 0, **options: Any) -> str:
        nemo.write(path, kind, made, seed=seed)
        digests.append(nemo.opened(path, **options).digest)
        return digests[-1]

    first = add()
    add(seed=1)
    add(made={"num_attention_heads": 2, "kv_channels": 8})
    add(made={"bias_gelu_fusion": False})
    add(made={"apply_query_key_layer_scaling": False})
    add(precision="bf16")
    add(layer=1)
    files = nemo.members("prott5nv", nemo.make_config("prott5nv"), [nemo.make_state("prott5nv")])
    name = next(name for name in files if name.endswith(".model"))
    other = nemo.protein_model(nemo.LETTERS.replace("O", "J"))
    digests.append(nemo.opened(nemo.pack(path, {**files, name: other})).digest)
    assert len(set(digests)) == len(digests)
    nemo.write(tmp_path / "again.nemo", "prott5nv", compressed=True, style="both")
    assert nemo.opened(tmp_path / "again.nemo").digest == first


@pytest.mark.parametrize("layer", [None, 1])
@pytest.mark.parametrize("norm", ["layernorm", "layernorm1p"])
def test_random_weights_for_the_baseline(norm: str, layer: int | None, tmp_path: Path) -> None:
    """Drawn from the seed alone, as Megatron draws them: normal, norms that change nothing else, biases 0."""
    made = {"normalization": norm, "headscale": True, "init_method_std": "3e-2", "layernorm_epsilon": 1e-9}
    nemo.write(tmp_path / "x.nemo", "prott5nv", made)
    encoder = nemo.opened(tmp_path / "x.nemo", layer=layer)
    before = torch.random.get_rng_state()
    first, again, other = (encoder.untrained(seed) for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert isinstance(first, MegatronEncoder)
    assert first.digest == again.digest
    assert len({first.digest, other.digest, encoder.digest}) == 3
    assert (first.max_seq_length, first.layer) == (encoder.max_seq_length, layer)
    state = first.model.state_dict()
    assert state.keys() == encoder.model.state_dict().keys()
    assert 0.025 < state["word_embeddings.weight"].std() < 0.035  # of 512 values: 5 standard errors
    assert 0.012 < state["layers.0.mlp.dense_4h_to_h.weight"].std() < 0.018  # less by the root of twice the layers
    assert state["layers.0.mlp.dense_4h_to_h.bias"].count_nonzero() == 0
    states = first.hidden_states([PROTEINS[0]])[0]
    assert torch.equal(states, again.hidden_states([PROTEINS[0]])[0])
    if layer is None:
        plain = nn.functional.layer_norm(states, states.shape[-1:])  # the last norm leaves nothing to it
        assert distance(states, plain) < 1e-3


def test_an_archive_is_known_by_its_content(tmp_path: Path) -> None:
    for name in ("x.ckpt", "archive", "x.tar.gz"):
        nemo.write(tmp_path / name, "esm1nv", compressed=name.endswith("gz"))
        assert nemo.opened(tmp_path / name).max_seq_length == 38
    with tarfile.open(tmp_path / "other.tar", "w") as tar:
        tar.add(tmp_path / "archive", "archive")
    nemo.refused(tmp_path / "other.tar", "found the file")
    nemo.write(tmp_path / "folder" / "below" / "x.nemo", "esm1nv")
    assert nemo.opened(tmp_path / "folder").max_seq_length == 38


def test_several_archives_their_names_and_steps(tmp_path: Path) -> None:
    names = ["bert--val_loss=2.10-step=300-consumed_samples=9.0", "bert--val_loss=2.05-step=1200-consumed_samples=9.0"]
    for name in reversed(names):
        nemo.write(tmp_path / f"{name}.nemo", "esm1nv")
    found = expand(f"{tmp_path}/*step=*.nemo")
    assert [name_of(ckpt) for ckpt in found] == sorted(names)
    assert {step_of(ckpt, nemo.opened(ckpt)) for ckpt in found} == {300, 1200}


@pytest.mark.parametrize(
    ("kind", "target", "model"),
    [("esm1nv", "esm", "ESM-1nv"), ("prott5nv", "prott5", "ProtT5nv"), ("megamolbart", "megamolbart", "MegaMolBART")],
)
def test_infer_target(kind: str, target: str, model: str, tmp_path: Path) -> None:
    nemo.write(tmp_path / "x.nemo", kind)
    assert nemo.opened(tmp_path / "x.nemo", infer_target=target).hidden_size == nemo.HIDDEN
    for other, name in (("esm", "ESM-1nv"), ("prott5", "ProtT5nv"), ("megamolbart", "MegaMolBART")):
        if other != target:
            message = f"infer_target '{other}' is for {name}, but '{tmp_path / 'x.nemo'}' is {model}; use auto"
            nemo.refused(tmp_path / "x.nemo", message, infer_target=other)


def test_a_factory_is_refused(tmp_path: Path) -> None:
    nemo.write(tmp_path / "x.nemo", "esm1nv")
    nemo.refused(tmp_path / "x.nemo", "a .nemo archive needs no model_factory", model_factory="torch.nn.Identity")


def test_the_whole_job_from_the_command_line(tmp_path: Path, tracking: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A sequence-level and a token-level task, two epochs each; then from an archive that was cut."""
    texts = proteins(40, 1)
    rows = [
        {"sequence": t, "value": t.count("A") / len(t), "state": "HC" * (len(t) // 2) + "H" * (len(t) % 2)}
        for t in texts
    ]
    for part, some in (("train", rows[:30]), ("test", rows[30:])):
        write_csv(tmp_path / "data" / part / "x000.csv", some)
    given = {"dataset_path": str(tmp_path / "data"), "num_epochs": 2, "infer_target": TARGET, **ALONE}
    tasks = [
        {**given, "task_name": "value", "class": "sequence", "task_type": "regression", "target_column": "value"},
        {**given, "task_name": "state", "class": "token", "task_type": "classification", "target_column": ["state"]},
    ]
    section = {"dataset": tasks, "store": str(tmp_path / "store"), "device": "cpu", "logging": {"figures": False}}
    (tmp_path / "x.yaml").write_text(yaml.safe_dump({"model": {"dwnstr_task_validation": section}}))
    nemo.write(tmp_path / "esm-step=70.nemo", "esm1nv", ranks=2)
    command = ["main", f"--ckpt={tmp_path / 'esm-step=70.nemo'}", f"--config={tmp_path / 'x.yaml'}"]
    assert main(command) == 0
    run = newest_run()
    assert {"value/test_value_mse", "state/test_state_accuracy"} <= every_metric(run).keys()
    content = (tmp_path / "esm-step=70.nemo").read_bytes()
    (tmp_path / "esm-step=70.nemo").write_bytes(content[: len(content) // 2])
    capsys.readouterr()
    assert main(command) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: ckpt: ")


TARGET = "bionemo.model.protein.esm1nv.infer.ESM1nvInference"
