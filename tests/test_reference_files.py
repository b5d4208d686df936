"""Configurations as a BioNeMo user has them, inside whole pre-training files; and any mapping at all."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from mlflow import MlflowClient

from pipeline import setup_dwnstr_task_validation_callbacks
from pipeline.__main__ import main
from pipeline.config.schema import Config
from pipeline.config.task import Files, Task
from pipeline.config.yaml_file import config_from, read_config, to_mapping
from pipeline.errors import ConfigError
from tests.support.lab import every_metric
from tests.support.programs import ROOT

# A pre-training file of the reference: Hydra's defaults, resolvers that nobody registered, unrelated sections.
PRETRAINING = """
defaults:
  - pretrain_base
  - override hydra/job_logging: stdout
do_training: true
restore_from_path: null
trainer:
  devices: ${num_gpus:}
  val_check_interval: ${multiply:2,100}
  precision: 16-mixed
exp_manager:
  name: ${name}
  exp_dir: ${oc.env:NOWHERE_AT_ALL}/${.name}
  create_wandb_logger: true
name: esm1nv
model:
  micro_batch_size: 8
  seq_length: 512
  hidden_size: ${bionemo.size:model}
  tokenizer: {library: sentencepiece, model: "${oc.env:BIONEMO_HOME}/tokenizers/x.model"}
  data:
    dataset_path: ${oc.env:DATA}/uniref
    dataset: {train: "x[000..049]", test: "x[000..049]", val: "x[000..049]"}
  optim: {name: fused_adam, lr: 2e-4, sched: {name: CosineAnnealing, warmup_steps: 500, min_lr: 2e-5}}
  dwnstr_task_validation:
    enabled: True
    dataset:
"""

SCHED = """
      optim:
        name: adam
        lr: 0.0001
        betas:
          - 0.9
          - 0.999
        eps: 1e-8
        weight_decay: 0.01
        sched:
          name: WarmupAnnealing
          min_lr: 0.00001
          last_epoch: -1
          warmup_ratio: 0.01
          max_steps: 1000
"""

SECONDARY_STRUCTURE = """
      class: bionemo.model.core.dwnstr_task_callbacks.PerTokenPredictionCallback
      task_type: token-level-classification
      infer_target: bionemo.model.protein.esm1nv.infer.ESM1nvInference
      max_seq_length: ${model.seq_length}
      emb_batch_size: 128
      batch_size: 128
      num_epochs: 10
      shuffle: True
      num_workers: 8
      task_name: secondary_structure
      dataset_path: DATA/ss3_ss8
      dataset:
        train: x000
        test: x000
      sequence_column: "sequence"
      target_column: ["3state", "8state", "resolved"]
      target_sizes: [3, 8, 2]
      mask_column: ["resolved", "resolved", null]
      random_seed: 1234
"""

# The same as files of the reference's first versions have it, with one name of a column and one mask.
OLDER = """
      class: PerTokenPredictionCallback
      task_type: classification
      infer_target: bionemo.model.protein.esm1nv.infer.ESM1nvInference
      max_seq_length: ${model.seq_length}
      task_name: secondary_structure
      dataset_path: DATA/ss3_ss8
      dataset: {train: x000, test: x000}
      sequence_col: sequence
      labels_col: LABELS
      labels_size: SIZES
      mask_col: MASKS
"""

LOCALISATION = """
      class: bionemo.model.core.dwnstr_task_callbacks.SingleValuePredictionCallback
      task_type: classification
      infer_target: bionemo.model.protein.prott5nv.infer.ProtT5nvInference
      max_seq_length: ${model.seq_length}
      emb_batch_size: 64
      batch_size: 32
      num_epochs: 3
      shuffle: True
      num_workers: 8
      task_name: scl
      dataset_path: DATA/scl10
      dataset: {train: "x[000..001]", test: x000}
      sequence_column: "sequence"
      target_column: "location"
      num_classes: 10
      random_seed: 1234
"""

FREESOLV = """
      class: bionemo.model.core.dwnstr_task_callbacks.SingleValuePredictionCallback
      task_type: regression
      infer_target: bionemo.model.molecule.megamolbart.infer.MegaMolBARTInference
      max_seq_length: ${model.seq_length}
      emb_batch_size: 128
      batch_size: 128
      num_epochs: 10
      shuffle: True
      dataset_path: DATA/freesolv
      task_name: SAMPL
      dataset: {train: x000, test: x000}
      sequence_column: "smiles"
      target_column: "expt"
      random_seed: 1234
"""

CASES = [
    (SECONDARY_STRUCTURE, "esm", {"test_3state_accuracy", "test_8state_accuracy", "test_resolved_accuracy"}),
    (LOCALISATION, "prott5", {"test_location_accuracy"}),
    (FREESOLV, "smiles_bart", {"test_expt_mse"}),
]


def written(folder: Path, task: str, data: Path) -> Path:
    pytest.importorskip("hydra", reason="needs hydra-core: its files inherit")
    (folder / "pretrain_base.yaml").write_text("model: {seq_length: 64, num_layers: 6}\n")
    path = folder / "pretrain.yaml"
    path.write_text(PRETRAINING + task.replace("DATA", str(data)) + SCHED)
    return path


@pytest.mark.parametrize(("task", "model", "metrics"), CASES, ids=[case[1] for case in CASES])
def test_a_file_of_the_reference_runs_unchanged(
    shared_data: Path,
    model_folder: Callable[..., Path],
    tracking: str,
    tmp_path: Path,
    task: str,
    model: str,
    metrics: set[str],
) -> None:
    path = written(tmp_path, task, shared_data)
    ckpt = model_folder(model)
    assert main(["main", f"--ckpt={ckpt}", f"--config={path}", f"--overrides=store={tmp_path / 'store'}"]) == 0
    runs = MlflowClient(tracking).search_runs(["0"])
    (run,) = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    assert {"dwnstr_task_val_loss", *metrics} <= every_metric(run).keys()
    assert run.data.params["cfg.dataset.optim.sched.name"] == "WarmupAnnealing"


@pytest.mark.slow
@pytest.mark.parametrize(("task", "model", "metrics"), CASES, ids=[case[1] for case in CASES])
def test_a_file_of_the_reference_runs_through_mlflow_run(
    shared_data: Path,
    model_folder: Callable[..., Path],
    tracking: str,
    tmp_path: Path,
    task: str,
    model: str,
    metrics: set[str],
) -> None:
    path = written(tmp_path, task, shared_data)
    given = {"ckpt": model_folder(model), "config": path, "overrides": f"store={tmp_path / 'store'}"}
    parameters = [text for key, value in given.items() for text in ("-P", f"{key}={value}")]
    subprocess.run(["mlflow", "run", str(ROOT), "--env-manager", "local", *parameters], check=True, cwd=ROOT)
    runs = MlflowClient(tracking).search_runs(["0"], f"metrics.`{min(metrics)}` >= 0")
    assert any("mlflow.parentRunId" not in run.data.tags for run in runs)


def test_config_says_what_unusual_keys_were_taken_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path, SECONDARY_STRUCTURE, tmp_path)
    assert main(["config", str(path)]) == 0
    printed = capsys.readouterr().out
    assert "# num_workers is accepted and not used" in printed
    assert "PerTokenPredictionCallback is read as token" in printed
    assert "# exp_manager is not read" in printed
    assert yaml.safe_load(printed)["model"]["dwnstr_task_validation"]["dataset"]["max_seq_length"] == 512


@pytest.mark.parametrize(
    ("labels", "sizes", "masks", "expected"),
    [
        ("[3state, resolved]", "[3, 2]", "[resolved, null]", (["3state", "resolved"], [3, 2], ["resolved", None])),
        ("[resolved, 3state]", "[2, 3]", "[null, resolved]", (["resolved", "3state"], [2, 3], [None, "resolved"])),
        ("[3state, 8state]", "[3, 8]", "null", (["3state", "8state"], [3, 8], [None, None])),
        ("3state", "3", "resolved", (["3state"], [3], ["resolved"])),
    ],
)
def test_an_older_file_of_the_reference_is_read_as_a_newer_one(
    tmp_path: Path, labels: str, sizes: str, masks: str, expected: tuple[list[str], list[int], list[str | None]]
) -> None:
    text = OLDER.replace("LABELS", labels).replace("SIZES", sizes).replace("MASKS", masks)
    config = read_config(written(tmp_path, text, tmp_path))
    (task,) = config.dataset
    assert (task.level, task.sequence_column) == ("token", "sequence")
    assert (task.target_column, task.sizes, task.masks) == expected
    assert {"labels_col is read as target_column", "labels_size is read as target_sizes"} <= set(config.notes)


@pytest.mark.parametrize("path", ["model.dwnstr_task_validation.dataset.target_column", "dataset.target_sizes"])
def test_an_older_key_and_the_one_that_it_stands_for_must_agree(tmp_path: Path, path: str) -> None:
    text = OLDER.replace("LABELS", "[3state]").replace("SIZES", "[3]").replace("MASKS", "[null]")
    with pytest.raises(
        ConfigError, match=r"'(labels_col|target_column|target_sizes)' and .* are one key with different values"
    ):
        read_config(written(tmp_path, text, tmp_path), f"{path}=[8]")


MOLMIM = "bionemo.model.molecule.molmim.infer.MolMIMInference"


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("bionemo.model.molecule.megamolbart.infer.MegaMolBARTInference", MOLMIM, "auto, esm, prott5, megamolbart"),
        (
            "bionemo.model.molecule.megamolbart.infer.MegaMolBARTInference",
            "bionemo.model.dna.enformer.Enformer",
            "auto",
        ),
        (
            "bionemo.model.core.dwnstr_task_callbacks.SingleValuePredictionCallback",
            "bionemo.model.core.mlp_model.MLPModel",
            "sequence, token, or the path of a class of your own",
        ),
    ],
)
def test_a_class_of_the_reference_that_is_not_here_is_an_error_that_says_what_there_is(
    tmp_path: Path, old: str, new: str, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert old in FREESOLV
    assert main(["config", str(written(tmp_path, FREESOLV.replace(old, new), tmp_path))]) == 2
    (printed,) = capsys.readouterr().err.splitlines()
    assert f"'{new}' is neither a short name nor a class of the reference that is known here" in printed
    assert f"; expected {expected}" in printed


def test_a_file_for_a_model_that_is_not_here_may_have_the_section_switched_off(
    tmp_path: Path, model_folder: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """There are no callbacks then; the command line, which measures all the same, says it."""
    path = written(
        tmp_path, FREESOLV.replace("megamolbart.infer.MegaMolBARTInference", "molmim.infer.MolMIMInference"), tmp_path
    )
    path.write_text(path.read_text().replace("enabled: True", "enabled: False"))
    assert setup_dwnstr_task_validation_callbacks(path) == []
    assert main(["main", f"--ckpt={model_folder('smiles_bart')}", f"--config={path}"]) == 2
    assert f"infer_target: '{MOLMIM}' is neither a short name" in capsys.readouterr().err


KEYS = [one.metadata.get("key", one.name) for one in (*fields(Config), *fields(Task), *fields(Files))]
KEYS += ["sequence_col", "mask_col", "labels_col", "labels_size", "num_workers", "nonsense"]
SCALARS = st.none() | st.booleans() | st.integers(-3, 600) | st.floats() | st.text(max_size=5)
WORDS = st.sampled_from(["token", "sequence", "classification", "token-level-regression", "auto", "a.b", "bionemo.X"])
VALUES = st.recursive(
    SCALARS | WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS) | SCALARS, inner, max_size=4),
    max_leaves=8,
)
GOOD: dict[str, Any] = {"dataset_path": "d", "target_column": "y"}


SECTIONS = st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=5)
TASKS = st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=4)


@settings(max_examples=200, deadline=None)
@given(section=SECTIONS, task=TASKS, listed=st.booleans())
def test_any_mapping_is_a_configuration_or_a_one_line_error(
    section: dict[Any, Any], task: dict[Any, Any], listed: bool
) -> None:
    one = {**GOOD, **task}
    for mapping in (section, {**section, "dataset": one}, {"dataset": [one] if listed else one}):
        try:
            config = config_from(mapping)
            config.check()
        except ConfigError as error:
            message = str(error)
        else:
            message = "valid"
            assert config_from(to_mapping(config)) == config
        assert message == " ".join(message.split()) != ""
