"""Reading the YAML section: the reference's spellings, interpolation, overrides, and errors with their lines."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from pipeline.__main__ import main
from pipeline.config.fields import parse_bytes
from pipeline.config.schema import Config
from pipeline.config.yaml_file import config_from, read_config, to_yaml
from pipeline.data.tables import expand
from pipeline.errors import ConfigError
from tests.support.programs import ROOT

REFERENCE = """
restore_from_path: null
name: esm1nv
exp_manager: {wandb_logger_kwargs: {name: "${name}-${oc.nonsense:1}"}}
trainer: {devices: "${num_gpus:}"}
model:
  seq_length: 512
  data: {path: "${data_path:uniref}"}
  dwnstr_task_validation:
    enabled: True
    dataset:
      class: bionemo.model.core.dwnstr_task_callbacks.PerTokenPredictionCallback
      task_type: token-level-classification
      infer_target: bionemo.model.protein.esm1nv.infer.ESM1nvInference
      max_seq_length: ${model.seq_length}
      emb_batch_size: 128
      batch_size: 64
      num_epochs: 10
      shuffle: True
      num_workers: 8
      task_name: secondary_structure
      dataset_path: data/ss
      dataset: {train: "x[000..049]", test: x000}
      sequence_col: sequence
      target_column: ["3state", "resolved"]
      target_sizes: [3, 2]
      mask_col: ["resolved", null]
      random_seed: 1234
      optim: {name: adam, lr: 1e-4}
"""


def written(folder: Path, text: str) -> Path:
    path = folder / "config.yaml"
    path.write_text(text)
    return path


def test_a_file_of_the_reference_is_read_unchanged(tmp_path: Path) -> None:
    config = read_config(written(tmp_path, REFERENCE))
    task = config.dataset[0]
    assert (task.level, task.task_type, task.infer_target, task.task_name) == (
        "token",
        "classification",
        "esm",
        "secondary_structure",
    )
    assert (task.max_seq_length, task.batch_size, task.emb_batch_size) == (512, 64, 128)
    assert task.sequence_column == "sequence"
    assert task.target_column == ["3state", "resolved"]
    assert (task.sizes, task.masks) == ([3, 2], ["resolved", None])
    assert task.optim == {"name": "adam", "lr": 1e-4}
    assert config.tasks is task


def test_the_resolved_file_reads_back_to_the_same(tmp_path: Path) -> None:
    for path in [written(tmp_path, REFERENCE), *sorted((ROOT / "configs").glob("*.yaml"))]:
        config = read_config(path)
        assert read_config(written(tmp_path, to_yaml(config))) == config


def test_a_list_of_one_task_has_prefixed_metrics_and_a_mapping_has_not(tmp_path: Path) -> None:
    one = {"dataset_path": "d", "target_column": "y"}
    assert isinstance(config_from({"dataset": [one]}).tasks, list)
    assert config_from({"dataset": one}).tasks == config_from({"dataset": [one]}).dataset[0]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ("dataset.num_epochs=3 device=cpu", (3, "cpu", "secondary_structure")),
        ("model.dwnstr_task_validation.dataset.num_epochs=4", (4, "auto", "secondary_structure")),
        ("dataset.task_name='a b; c=d'", (10, "auto", "a b; c=d")),
        ("dataset.task_name=-x", (10, "auto", "-x")),
        ("", (10, "auto", "secondary_structure")),
    ],
)
def test_overrides(tmp_path: Path, overrides: str, expected: tuple[int, str, str]) -> None:
    config = read_config(written(tmp_path, REFERENCE), overrides)
    task = config.dataset[0]
    assert (task.num_epochs, config.device, task.task_name) == expected


def test_an_override_sets_a_key_of_every_task_or_of_one() -> None:
    path = ROOT / "configs" / "default.yaml"
    everywhere = read_config(path, "dataset.num_epochs=2")
    assert {task.num_epochs for task in everywhere.dataset} == {2}
    once = read_config(path, "dataset.1.num_epochs=2")
    assert [task.num_epochs for task in once.dataset] == [40, 2, 20, 40]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("num_epochs: 10", "num_epoch: 10", "config.yaml:18: unknown key 'num_epoch'; did you mean 'num_epochs'?"),
        ("enabled: True", "enable: True", "config.yaml:10: unknown key 'enable'; did you mean 'enabled'?"),
        ("num_epochs: 10", "num_epochs: many", "config.yaml:18: num_epochs: Value 'many'"),
        ("train: ", "trian: ", "unknown key 'trian'; did you mean 'train'?"),
        ("[3, 2]", "[3]", "target_sizes has 1 entries for 2 target columns"),
        ("${model.seq_length}", "${model.sequence_length}", "cannot be resolved"),
        ("${model.seq_length}", "${unheard_of:1}", "Unsupported interpolation type unheard_of"),
        ("batch_size: 64", "batch_size: 0", "batch_size is 0, expected at least 1"),
        (
            "PerTokenPredictionCallback",
            "OtherCallback",
            "class: 'bionemo.model.core.dwnstr_task_callbacks.OtherCallback' is neither a short name",
        ),
        ("dwnstr_task_validation:", "section:", "mapping model.dwnstr_task_validation, found none; see configs/"),
        ("dwnstr_task_validation:", "dwnstr_task_validaton:", "found none; rename 'dwnstr_task_validaton'"),
        ("enabled: True", "device: tpu", "device: expected one of auto, cpu, cuda, mps, found 'tpu'"),
        ("enabled: True", "memory_budget: 3 cups", "memory_budget: expected a size such as 500MB"),
        ("num_workers: 8", "sequence_column: other", "are one key with different values"),
    ],
)
def test_errors_say_where_what_and_the_remedy(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in REFERENCE
    with pytest.raises(ConfigError) as caught:
        read_config(written(tmp_path, REFERENCE.replace(old, new, 1)))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("dataset.num_epochs=many", "overrides: num_epochs: Value 'many'"),
        ("model.dwnstr_task_validation.dataset.num_epochs=many", "overrides: num_epochs: Value 'many'"),
        ("enabled=perhaps", "overrides: enabled: Value 'perhaps'"),
        ("dataset.max_rows.train=many", "overrides: max_rows.train: Value 'many'"),
        ("dataset.max_rows.tran=3", "overrides: unknown key 'tran'"),
        ("dataset.dataset={train: [1]}", "overrides: dataset"),
        ("dataset.nonsense.x=3", "overrides: unknown key 'nonsense'"),
        ("logging.tags=[[1]]", "overrides: tags"),
    ],
)
def test_a_wrong_override_is_not_blamed_on_a_line_of_the_file(tmp_path: Path, overrides: str, message: str) -> None:
    more = REFERENCE.replace("num_workers: 8", "max_rows: {test: 3}")
    with pytest.raises(ConfigError) as caught:
        read_config(written(tmp_path, more), f"'{overrides}'")
    assert str(caught.value).startswith(message)


def test_a_wrong_override_of_one_task_of_a_list(tmp_path: Path) -> None:
    """What the file itself has wrong is still blamed on its line."""
    tasks = (
        "dataset:\n    - {dataset_path: d, target_column: y}\n    - {dataset_path: d, target_column: y, num_epochs: 1}"
    )
    path = written(tmp_path, f"model:\n  dwnstr_task_validation:\n    {tasks}\n")
    for key in ("dataset.1.num_epochs", "dataset[1].num_epochs", "dataset.num_epochs"):
        with pytest.raises(ConfigError, match=r"^overrides: num_epochs: Value 'many'"):
            read_config(path, f"{key}=many")
    path.write_text(path.read_text().replace("num_epochs: 1", "num_epochs: many"))
    with pytest.raises(ConfigError, match=r"config\.yaml:5: num_epochs: Value 'many'"):
        read_config(path, "dataset.0.num_epochs=3")


def test_a_resolver_outside_the_section_does_not_run(tmp_path: Path) -> None:
    """Nor one in place of the section, or of a mapping around it."""
    called: list[str] = []
    OmegaConf.register_new_resolver("elsewhere", called.append)
    try:
        read_config(written(tmp_path, REFERENCE.replace("name: esm1nv", "name: '${elsewhere:x}'")))
        for text in ("model: '${elsewhere:x}'", "model: {dwnstr_task_validation: '${elsewhere:x}'}", "model: null"):
            sources: list[Any] = [written(tmp_path, text), OmegaConf.create(text)]
            for source in sources:
                with pytest.raises(ConfigError, match="expected a mapping model"):
                    read_config(source)
    finally:
        OmegaConf.clear_resolver("elsewhere")
    assert not called


def test_a_file_that_inherits_needs_hydra_core_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    written(tmp_path, REFERENCE).rename(tmp_path / "base.yaml")
    path = written(tmp_path, "defaults: [base]")
    for name in {"hydra", *(name for name in sys.modules if name.startswith("hydra."))}:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "pipeline.config.hydra_file", raising=False)
    assert main(["config", str(path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{path}: expected hydra-core, which composes files with a defaults list" in line
    assert line.endswith("pip install 'hydra-core>=1.3,<1.4'")


def test_tasks_of_one_name_or_of_two_encoders_are_refused() -> None:
    one = {"dataset_path": "d", "target_column": "y", "task_name": "a"}
    for other, message in (
        ({"task_name": "a"}, "task_name"),
        ({"task_name": "b", "infer_target": "esm"}, "infer_target"),
    ):
        with pytest.raises(ConfigError, match=message):
            config_from({"dataset": [one, {**one, **other}]}).check()


@given(first=st.integers(0, 999), more=st.integers(0, 20), bracket=st.sampled_from(["[]", "{}", "()", "<>", "__"]))
def test_ranges_in_every_bracket_form(first: int, more: int, bracket: str) -> None:
    opening, closing = ("_OP_", "_CL_") if bracket == "__" else (bracket[0], bracket[1])
    span = f"{first:04d}..{first + more:04d}"
    expected = [f"x{number:04d}.csv" for number in range(first, first + more + 1)]
    assert expand(f"x{opening}{span}{closing}") == expected
    assert expand(f"x{opening}{span}{closing}.csv") == expected
    assert expand(f"x{first:03d}") == [f"x{first:03d}.csv"]


@pytest.mark.parametrize(("text", "size"), [("1GB", 10**9), ("1.5 KiB", 1536), ("12", 12), ("2m", None), ("", None)])
def test_sizes(text: str, size: int | None) -> None:
    if size is None:
        with pytest.raises(ConfigError, match="expected"):
            parse_bytes(text)
    else:
        assert parse_bytes(text) == size


def test_defaults_are_valid_but_for_the_task() -> None:
    with pytest.raises(ConfigError, match="dataset is missing"):
        Config().check()


def test_a_value_that_is_still_to_be_given_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"dataset\.max_seq_length: expected a value, found '\?\?\?'"):
        config_from({"dataset": {"dataset_path": "d", "target_column": "y", "max_seq_length": "???"}})
