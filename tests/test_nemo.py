"""`.nemo` archives of the reference: ESM-1nv, ProtT5nv and MegaMolBART, as NeMo computes them."""

from __future__ import annotations

import json
import tarfile
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pipeline.__main__ import main
from pipeline.checkpoints.names import expand, name_of, step_of
from pipeline.encoders.megatron_encoder import MegatronEncoder
from pipeline.errors import ConfigError
from tests.support import nemo
from tests.support.data import proteins, write_csv
from tests.support.lab import ALONE, newest_run
from tests.support.nemo_states import PROTEINS, TOLERANCE, assert_states, distance

GOLDEN = {
    "golden.json": ["esm1nv_tiny", "prott5nv_tiny", "megamolbart_tiny"],
    "golden_variants.json": [
        "esm1nv_tiny_legacyqkv",
        "esm1nv_tiny_tp2",
        "megamolbart_tiny_normformer",
        "megamolbart_tiny_postln",
        "prott5nv_tiny_relative_geglu",
    ],
}
ENDS = ("weight", "bias")


@pytest.mark.parametrize(("file", "name"), [(file, name) for file, names in GOLDEN.items() for name in names])
def test_an_archive_gives_what_nemo_gave(file: str, name: str, shared_data: Path) -> None:
    """Alone and in a batch; of some sequences several unknown residues in a row are one token."""
    folder = shared_data.parent / "golden" / "nemo"
    if not folder.is_dir():
        pytest.skip("needs the small archives with what NeMo's code gave, in the folder golden beside the data sets")
    golden = json.loads((folder / file).read_text())["models"][name]
    encoder = nemo.opened(folder / f"{name}.nemo")
    together = encoder.hidden_states([one["sequence"] for one in golden["sequences"]])
    for one, batched, embedding in zip(golden["sequences"], together, golden["batch"]["embedding"], strict=True):
        (alone,) = encoder.hidden_states([one["sequence"]])
        ids = encoder.tokens.ids(one["sequence"])
        assert [*encoder.tokens.before, *ids, *encoder.tokens.after] == one["ids"]
        expected = np.array(one["hidden"])[np.array(one["embed_mask"], bool)]
        assert distance(alone, expected) < TOLERANCE
        assert distance(batched, expected) < TOLERANCE
        assert distance(alone.mean(0), one["embedding"]) < TOLERANCE
        assert distance(batched.mean(0), embedding) < TOLERANCE


FUSED = ("gelu", "geglu", "fast-geglu")
BOTH = st.booleans()
SETTINGS = st.fixed_dictionaries(
    {
        "activation": st.sampled_from(
            [*FUSED, "reglu", "swiglu", "fast-reglu", "fast-swiglu", "squared-relu", "approx-gelu"]
        ),
        "transformer_block_type": st.sampled_from(["pre_ln", "post_ln", "normformer"]),
        "normalization": st.sampled_from(["layernorm", "layernorm1p", "rmsnorm", "low_precision_layernorm"]),
        "position_embedding_type": st.sampled_from(["learned_absolute", "relative"]),
        "relative_attention_num_buckets": st.sampled_from([8, 32]),
        "relative_attention_max_distance": st.sampled_from([12, 128]),
        "bias": BOTH,
        "headscale": BOTH,
        "openai_gelu": BOTH,
        "apply_query_key_layer_scaling": BOTH,
        "normalize_attention_scores": BOTH,
        "megatron_legacy": BOTH,
        "kv_channels": st.sampled_from([None, 3, 4]),
        "layernorm_epsilon": st.sampled_from([1e-5, "1e-3"]),
    }
)


@settings(max_examples=60)
@given(
    made=SETTINGS,
    kind=st.sampled_from([*nemo.TARGETS]),
    style=st.sampled_from(["flat", "both", "encoder"]),
    ranks=st.sampled_from([1, 2, 4]),
    fused=BOTH,
    seed=st.integers(0, 9),
)
def test_whatever_the_options(made: dict[str, Any], kind: str, style: str, ranks: int, fused: bool, seed: int) -> None:
    """Drawn at random, the settings that have no effect on ESM-1nv among them."""
    if kind == "esm1nv":
        style, made = "flat", {**made, "position_embedding_type": "learned_absolute"}
    elif made["activation"] not in FUSED:
        fused = False
    if made["transformer_block_type"] == "normformer" and made["normalization"] != "rmsnorm":
        made = {**made, "normalization": "layernorm"}
    key = "bias_gelu_fusion" if style == "flat" else "bias_activation_fusion"
    made = {**made, key: fused}
    with tempfile.TemporaryDirectory() as folder:
        state = nemo.write(Path(folder) / "x.nemo", kind, made, style, ranks, seed)
        assert_states(nemo.opened(Path(folder) / "x.nemo"), state, kind, made, fused=fused, ranks=ranks)


@pytest.mark.parametrize("block", ["pre_ln", "post_ln"])
def test_layers_are_those_of_torch(block: str, tmp_path: Path) -> None:
    """Of torch's own `TransformerEncoderLayer`, whose projection has queries, keys and values one after another."""
    made = {"transformer_block_type": block, "bias_gelu_fusion": False, "megatron_legacy": True}
    state = nemo.write(tmp_path / "x.nemo", "prott5nv", made)
    encoder = nemo.opened(tmp_path / "x.nemo")
    layer = nn.TransformerEncoderLayer(
        nemo.HIDDEN, nemo.HEADS, nemo.INNER, 0.0, "gelu", batch_first=True, norm_first=block == "pre_ln"
    ).eval()
    stack = "enc_dec_model.enc_dec_model.encoder.model."
    names = {
        "self_attn.in_proj_": "self_attention.query_key_value.",
        "self_attn.out_proj.": "self_attention.dense.",
        "linear1.": "mlp.dense_h_to_4h.",
        "linear2.": "mlp.dense_4h_to_h.",
        "norm1.": "input_layernorm.",
        "norm2.": "post_attention_layernorm.",
    }
    embedding = "enc_dec_model.encoder_embedding."
    ids = encoder.tokens.ids(PROTEINS[0])
    states = state[f"{embedding}word_embeddings.weight"][ids][None]
    states = states + state[f"{embedding}position_embeddings.weight"][: len(ids)]
    with torch.no_grad():
        for number in range(nemo.LAYERS):
            own = {f"{a}{end}": state[f"{stack}layers.{number}.{b}{end}"] for a, b in names.items() for end in ENDS}
            layer.load_state_dict(own)
            states = layer(states)
        if block == "pre_ln":
            weight, bias = (state[f"{stack}final_layernorm.{end}"] for end in ENDS)
            states = nn.functional.layer_norm(states, (nemo.HIDDEN,), weight, bias)
    assert distance(encoder.hidden_states([PROTEINS[0]])[0], states[0]) < TOLERANCE


# What GELU an archive has, by its style and the settings that it does not have as they are by default.
FUSIONS = [
    ("esm1nv", "flat", {}, True),
    ("esm1nv", "flat", {"bias_activation_fusion": False}, True),
    ("esm1nv", "flat", {"bias_gelu_fusion": False, "openai_gelu": True}, False),
    ("prott5nv", "encoder", {}, True),
    ("prott5nv", "encoder", {"bias_gelu_fusion": False}, True),
    ("prott5nv", "encoder", {"bias_activation_fusion": False}, False),
    ("megamolbart", "flat", {}, True),
    ("megamolbart", "flat", {"bias": False}, False),
    ("megamolbart", "flat", {"bias_activation_fusion": False}, False),
    ("megamolbart", "flat", {"bias_gelu_fusion": True, "bias_activation_fusion": False}, True),
    ("megamolbart", "flat", {"bias_gelu_fusion": False, "bias_activation_fusion": True}, False),
]


@pytest.mark.parametrize(("kind", "style", "made", "fused"), FUSIONS)
def test_which_gelu(kind: str, style: str, made: dict[str, Any], fused: bool, tmp_path: Path) -> None:
    """They differ by more than the tolerance."""
    state = nemo.write(tmp_path / "x.nemo", kind, made, style)
    encoder = nemo.opened(tmp_path / "x.nemo")
    assert_states(encoder, state, kind, made, fused=fused)
    with pytest.raises(AssertionError):
        assert_states(encoder, state, kind, made, fused=not fused)


def renamed(old: str, new: str) -> Callable[[dict[str, Any], nemo.State], object]:
    def change(_: dict[str, Any], state: nemo.State) -> None:
        for name in list(state):
            state[name.replace(old, new)] = state.pop(name)

    return change


# What is read as if it was not there.
READ: dict[str, Callable[[dict[str, Any], nemo.State], object]] = {
    "a level of mixed precision": renamed("model.language_model.", "model.module.language_model."),
    "torch.compile": renamed("model.language_model.", "model._orig_mod.language_model."),
    "an extra state": lambda _, state: state.update({"model.language_model.encoder.layers.0._extra_state": None}),
    "a head": lambda _, state: state.update({"model.binary_head.weight": torch.ones(2, 2)}),
    "a pooler": lambda _, state: state.update({"model.language_model.pooler.dense.weight": torch.ones(2, 2)}),
    "no target": lambda config, _: config.pop("target"),
    "a path for the tokenizer": lambda config, _: config["tokenizer"].update(model="/home/somebody/x.model"),
    "no vocabulary file": lambda config, _: config["tokenizer"].update(vocab_file=None),
    "no sizes": lambda config, _: [config.pop(key) for key in ("num_layers", "hidden_size", "ffn_hidden_size")],
    "a number as text": lambda config, _: config.update(layernorm_epsilon="1e-5"),
    "a level of the configuration": lambda config, _: config.update(model=dict(config), num_layers=7),
}


@pytest.mark.parametrize("what", READ)
@pytest.mark.parametrize("compressed", [False, True], ids=["tar", "tar.gz"])
def test_what_is_read(what: str, compressed: bool, tmp_path: Path) -> None:
    path = nemo.spoilt(tmp_path, "esm1nv", READ[what], compressed=compressed)
    assert_states(nemo.opened(path), nemo.make_state("esm1nv"), "esm1nv", {})
    assert [one.name for one in tmp_path.iterdir()] == ["x.nemo"]


def test_legacy_names(tmp_path: Path) -> None:
    def change(config: dict[str, Any], state: nemo.State) -> None:
        renamed(".encoder.", ".transformer.")(config, state)
        renamed(".self_attention.", ".attention.")(config, state)

    made = {"megatron_legacy": True}
    assert_states(
        nemo.opened(nemo.spoilt(tmp_path, "esm1nv", change, made=made)), nemo.make_state("esm1nv"), "esm1nv", made
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_of_half_precision_are_made_float32(dtype: torch.dtype, tmp_path: Path) -> None:
    def change(_: dict[str, Any], state: nemo.State) -> None:
        state.update({name: value.to(dtype) for name, value in state.items()})

    rounded = {name: value.to(dtype).float() for name, value in nemo.make_state("prott5nv").items()}
    assert_states(nemo.opened(nemo.spoilt(tmp_path, "prott5nv", change)), rounded, "prott5nv", {})


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
    assert {"value/test_value_mse", "state/test_state_accuracy"} <= set(run.data.metrics)
    content = (tmp_path / "esm-step=70.nemo").read_bytes()
    (tmp_path / "esm-step=70.nemo").write_bytes(content[: len(content) // 2])
    capsys.readouterr()
    assert main(command) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: ckpt: ")


TARGET = "bionemo.model.protein.esm1nv.infer.ESM1nvInference"
