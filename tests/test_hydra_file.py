"""Files that inherit: composed as Hydra does it, with nothing of Hydra's state changed and no code run."""

from __future__ import annotations

import importlib
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mlflow import MlflowClient
from omegaconf import OmegaConf

from pipeline.__main__ import main
from pipeline.config.schema import Config
from pipeline.config.yaml_file import read_config, to_mapping
from pipeline.errors import ConfigError
from tests.support.data import make_task
from tests.support.programs import ROOT

hydra = pytest.importorskip("hydra", reason="needs hydra-core")

# What `pipeline/config/hydra_file.py` uses of Hydra that is not public. No public function composes a file without
# changing the state of Hydra.
PRIVATE = [
    "_internal.config_loader_impl:ConfigLoaderImpl._compose_config_from_defaults_list",
    "_internal.config_repository:ConfigRepository.load_config",
    "_internal.config_search_path_impl:ConfigSearchPathImpl",
    "_internal.core_plugins.file_config_source:FileConfigSource._normalize_file_name",
    "_internal.core_plugins.structured_config_source:StructuredConfigSource",
    "_internal.defaults_list:create_defaults_list",
    "plugins.config_source:ConfigSource._get_header_dict",
    "version:VersionBase.instance",
]


@pytest.mark.parametrize("name", PRIVATE)
def test_hydra_core_still_has(name: str) -> None:
    module, _, path = name.partition(":")
    attrgetter(path)(importlib.import_module(f"hydra.{module}"))


# The reference's own shape: a base with everything, its downstream task off, and a file that changes some of it.
BASE = """
name: esm1nv
trainer: {devices: "${num_gpus:}", precision: 16, val_check_interval: "${multiply:2,100}"}
exp_manager:
  name: ${name}
  exp_dir: ${oc.env:NOWHERE_AT_ALL}/${.name}
  wandb_logger_kwargs: {notes: "date: ${now:%y%m%d}", job_type: "gpus_${trainer.devices}"}
model:
  seq_length: 48
  hidden_size: 16
  ffn_hidden_size: ${multiply:${model.hidden_size},4}
  data: {dataset_path: /nowhere, num_workers: 8}
  dwnstr_task_validation:
    enabled: False
    dataset:
      class: bionemo.model.core.dwnstr_task_callbacks.SingleValuePredictionCallback
      task_type: regression
      infer_target: bionemo.model.protein.esm1nv.infer.ESM1nvInference
      max_seq_length: ${model.seq_length}
      emb_batch_size: 128
      batch_size: 8
      num_epochs: 10
      num_workers: 8
      task_name: melting
      dataset_path: ${model.data.dataset_path}/${.task_name}
      dataset: {train: x000, test: x000}
      target_column: y
      optim: {name: adam, lr: 1e-4, sched: {name: WarmupAnnealing, warmup_ratio: 0.01, max_steps: 1000}}
"""
SMALL = """
defaults:
  - base_config
  - override hydra/job_logging: stdout
restore_from_path: null
trainer: {devices: 1}
model:
  data: {dataset_path: DATA}
  dwnstr_task_validation:
    enabled: True
    dataset: {num_epochs: 2, optim: {lr: 0.01}}
"""


def tree(folder: Path, **files: str) -> Path:
    """Writes `a/b.yaml` for the keyword `a__b`; gives the file `main.yaml`."""
    for name, text in files.items():
        path = folder.joinpath(*name.split("__")).with_suffix(".yaml")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder / "main.yaml"


def by_hydra(path: Path, version_base: str = "1.3") -> Config:
    """What Hydra itself makes of a file."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with hydra.initialize_config_dir(str(path.parent), version_base=version_base):
            return read_config(hydra.compose(path.stem))


@pytest.fixture
def small(tmp_path: Path) -> Path:
    return tree(tmp_path / "conf", base_config=BASE, main=SMALL.replace("DATA", str(tmp_path)))


def test_a_file_of_the_reference_is_composed(small: Path, tmp_path: Path) -> None:
    config = read_config(small, "dataset.optim.lr=0.5 dataset.batch_size=4")
    task = config.dataset[0]
    assert config.enabled
    assert (task.max_seq_length, task.num_epochs, task.batch_size) == (48, 2, 4)
    assert task.dataset_path == f"{tmp_path}/melting"
    assert task.optim["lr"] == 0.5
    assert task.optim["sched"]["name"] == "WarmupAnnealing"
    assert config.notes.count("exp_manager is not read") == 1
    assert to_mapping(read_config(small)) == to_mapping(by_hydra(small))


def test_it_is_measured_through_mlflow_run(model_folder: Callable[..., Path], tracking: str, tmp_path: Path) -> None:
    rows = [{"sequence": "MKVLAAGDE"[n % 5 :] + "WYHC"[: n % 4], "y": n % 5} for n in range(24)]
    make_task(tmp_path / "data" / "melting", rows)
    path = tree(tmp_path / "conf", base_config=BASE, main=SMALL.replace("DATA", str(tmp_path / "data")))
    given = {"ckpt": model_folder("esm"), "config": path, "overrides": f"store={tmp_path / 'store'} device=cpu"}
    parameters = [text for key, value in given.items() for text in ("-P", f"{key}={value}")]
    command = ["mlflow", "run", str(ROOT), "--env-manager", "local", *parameters]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "_self_" not in done.stderr
    (run,) = MlflowClient(tracking).search_runs(["0"], "metrics.test_y_mse >= 0 and params.`cfg.enabled` = 'True'")
    assert run.data.params["cfg.dataset.optim.sched.name"] == "WarmupAnnealing"
    assert run.data.params["cfg.dataset.num_epochs"] == "2"


def task(values: str) -> str:
    """A file that sets keys of the one task."""
    return f"model: {{dwnstr_task_validation: {{dataset: {{{values}}}}}}}"


TASK = task("dataset_path: d, target_column: y, num_epochs: 1")
AT = "@model.dwnstr_task_validation.dataset"
LONG = "num_epochs: 7\noptim: {lr: 0.2}"
# The epochs that come out, and the files beside `base.yaml`, which has one.
TREES: dict[str, tuple[int, dict[str, str]]] = {
    "no _self_": (3, {"main": f"defaults: [base]\n{task('num_epochs: 3')}"}),
    "_self_ first": (1, {"main": f"defaults: [_self_, base]\n{task('num_epochs: 3')}"}),
    "a chain": (4, {"main": "defaults: [middle]", "middle": f"defaults: [base]\n{task('num_epochs: 4')}"}),
    "a group at a package": (7, {"main": f"defaults: [base, esm/head{AT}: long]", "esm__head__long": LONG}),
    "a header": (7, {"main": "defaults: [base, head: long]", "head__long": f"# @package {AT[1:]}\n{LONG}"}),
    "a global header": (
        9,
        {"main": "defaults: [base, more: one]", "more__one": f"# @package _global_\n{task('num_epochs: 9')}"},
    ),
    "an overridden group": (
        8,
        {
            "main": f"defaults: [base, middle, override /head{AT}: short]",
            "middle": f"defaults: [head{AT}: long]",
            "head__long": LONG,
            "head__short": "num_epochs: 8",
        },
    ),
    "a group that is pointed to": (
        5,
        {
            "main": "defaults: [base, esm1nv/data: default]\n" + task("num_epochs: '${esm1nv.data.epochs}'"),
            "esm1nv__data__default": "epochs: 5",
        },
    ),
    "a group that is not there": (1, {"main": "defaults: [base, optional head: none_such]"}),
    "a group named by another": (
        6,
        {
            "main": f"defaults: [base, size: six, {{head{AT}: '${{size}}'}}]",
            "size__six": "x: 1",
            "head__six": "num_epochs: 6",
        },
    ),
    "a node that stands for another": (
        5,
        {
            "main": "defaults: [base, nodes]\nother: {n: 3}\n" + task("num_epochs: '${other.m}'"),
            "nodes": "more: {n: 2, m: 5}\nother: ${more}",
        },
    ),
    "a search path": (
        4,
        {
            "main": "defaults: [base, far]\nhydra: {searchpath: ['file://FOLDER/a', '${oc.env:NAMED}/b']}",
            "b__far": task("num_epochs: 4"),
        },
    ),
}


@pytest.mark.parametrize("version_base", ["1.1", "1.3"])
@pytest.mark.parametrize("name", TREES)
def test_trees_are_composed_as_hydra_composes_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, version_base: str
) -> None:
    monkeypatch.setenv("NAMED", str(tmp_path))
    epochs, files = TREES[name]
    path = tree(tmp_path, base=TASK, **{key: text.replace("FOLDER", str(tmp_path)) for key, text in files.items()})
    expected = by_hydra(path, version_base)
    config = read_config(path)
    assert config.dataset[0].num_epochs == epochs
    assert to_mapping(config) == to_mapping(expected)


def test_a_relative_search_path_begins_here_or_at_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tree(tmp_path / "a", base=TASK, main="defaults: [base, far]\nhydra: {searchpath: ['file://more']}")
    tree(tmp_path / "a", more__far=task("num_epochs: 3"))
    monkeypatch.chdir(tmp_path)
    assert read_config(path).dataset[0].num_epochs == 3
    tree(tmp_path, more__far=task("num_epochs: 4"))
    assert read_config(path).dataset[0].num_epochs == 4


def test_a_package_on_the_search_path_is_read_and_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree(tmp_path / "of_their_own", conf__base=TASK)
    (tmp_path / "of_their_own" / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    path = tree(tmp_path, main="defaults: [base]\nhydra: {searchpath: ['pkg://of_their_own.conf']}")
    assert read_config(path).dataset[0].num_epochs == 1
    assert "of_their_own" not in sys.modules


CALLED: list[str] = []


class Recorder:
    """What a configuration names as an object to be made."""

    def __init__(self, **given: Any) -> None:
        CALLED.append("made")


@pytest.fixture
def called() -> Iterator[list[str]]:
    """What was run: resolvers `count`, `num_gpus` and `multiply`, and objects made."""
    CALLED.clear()

    def resolve(*given: Any) -> str:
        CALLED.append("resolved")
        return "a word"

    for name in ("count", "num_gpus", "multiply"):
        OmegaConf.register_new_resolver(name, resolve)
    yield CALLED
    for name in ("count", "num_gpus", "multiply"):
        OmegaConf.clear_resolver(name)


def test_resolvers_outside_the_section_do_not_run(small: Path, called: list[str]) -> None:
    """Hydra runs that of a value which another file overrides."""
    by_hydra(small)
    assert called
    called.clear()
    assert read_config(small).dataset[0].max_seq_length == 48
    assert not called
    with pytest.raises(ConfigError, match="num_epochs"):
        read_config(small, "dataset.num_epochs='${count:1}'")
    assert called  # in the section they do


def test_nothing_that_a_file_names_is_made(small: Path, called: list[str]) -> None:
    target = {"_target_": f"{__name__}.Recorder"}
    assert isinstance(hydra.utils.instantiate(target), Recorder)
    assert called == ["made"]
    called.clear()
    more = yaml.safe_dump({"hydra": {"callbacks": {"mine": target}}, "object": target})
    small.write_text(f"{small.read_text()}\n{more}")
    read_config(small)
    assert not called


def test_plugins_that_a_training_is_launched_with_need_not_be_here(small: Path) -> None:
    text = small.read_text().replace("hydra/job_logging: stdout", "hydra/launcher: submitit_slurm")
    small.write_text(f"{text}\nhydra: {{launcher: {{partition: gpu}}, job: {{env_copy: [NOWHERE_AT_ALL]}}}}\n")
    with pytest.raises(hydra.errors.HydraException, match="submitit_slurm"):
        by_hydra(small)
    assert read_config(small).dataset[0].num_epochs == 2


def hydra_state() -> list[Any]:
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.utils import JobRuntime
    from hydra.version import VersionBase
    from omegaconf.basecontainer import BaseContainer

    runtime = OmegaConf.to_container(JobRuntime.instance().conf)
    resolvers = dict(BaseContainer._resolvers)
    return [
        GlobalHydra.instance(),
        GlobalHydra.instance().hydra,
        VersionBase.instance().version_base,
        runtime,
        resolvers,
    ]


@pytest.mark.parametrize("initialized", [True, False])
def test_the_state_of_hydra_stays(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, initialized: bool
) -> None:
    version = importlib.import_module("hydra.version")
    if not initialized:
        monkeypatch.setattr(version.VersionBase.instance(), "version_base", version._UNSPECIFIED_)
        before = hydra_state()
        assert before[1] is None
        read_config(small)
        assert hydra_state() == before
        return
    tree(tmp_path / "theirs", main="x: 1")
    with hydra.initialize_config_dir(str(tmp_path / "theirs"), job_name="theirs", version_base="1.2"):
        before = hydra_state()
        assert before[1] is not None
        read_config(small)
        with pytest.raises(ConfigError, match="none_such"):
            read_config(tree(tmp_path, main="defaults: [none_such]"))
        assert hydra_state() == before
        assert hydra.compose("main") == {"x": 1}


def test_a_training_script_under_hydra_may_read_a_file(small: Path, tmp_path: Path) -> None:
    tree(tmp_path / "theirs", main="x: 1")
    script = tmp_path / "train.py"
    script.write_text(f"""
import hydra
from hydra.core.hydra_config import HydraConfig
from pipeline import read_config

@hydra.main(config_path="theirs", config_name="main", version_base="1.3")
def train(cfg):
    config = read_config({str(small)!r})
    print(cfg.x, config.dataset[0].num_epochs, HydraConfig.get().job.name, HydraConfig.get().job.config_name)

train()
""")
    command = [sys.executable, "-W", "error", str(script), f"hydra.run.dir={tmp_path / 'out'}"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1", "2", "train", "main"]


PATH = "hydra: {searchpath: "
# The files beside `base.yaml`, and what the error says.
BAD: list[tuple[dict[str, str], list[str]]] = [
    ({"main": "defaults: [bass]"}, ["main.yaml: In 'main.yaml': Could not load 'bass'. Looked in", "hydra.searchpath"]),
    ({"main": "defaults: [base, head: x]", "head__y": "a: 1"}, ["Could not find 'head/x'", "Available options", "y"]),
    ({"main": f"defaults: [x]\n{PATH}[none_such]}}"}, ["none_such' (no such folder)"]),
    (
        {"main": f"defaults: [base]\n{PATH}['${{oc.env:NOWHERE_AT_ALL}}']}}"},
        ["searchpath cannot be resolved", "NOWHERE"],
    ),
    ({"main": f"defaults: [base]\n{PATH}3}}"}, ["expected a list of folders, found 3"]),
    ({"main": f"defaults: [base]\n{PATH}['s3://x']}}"}, ["expected file://FOLDER or pkg://PACKAGE"]),
    (
        {"main": "defaults: [base, head: '???']", "head__y": "a: 1"},
        ["must specify 'head'", "put the defaults list right"],
    ),
    ({"main": "defaults: [base, override head: y]", "head__y": "a: 1"}, ["Could not override 'head'"]),
    ({"main": "defaults: [main]"}, ["main.yaml: cannot be composed", "recursion"]),
    ({"main": "defaults: [base, list]", "list": "[1]"}, ["list.yaml: expected a mapping, found list"]),
    ({"main": "defaults: [base, broken]", "broken": "a: [1"}, ["broken.yaml: not valid YAML"]),
    (
        {"main": "defaults: [base]\nmodel:\n  dwnstr_task_validation:\n    enable: 1"},
        ["main.yaml:4: unknown key 'enable'"],
    ),
    ({"main": "defaults: [two]", "two": f"defaults: [base]\n\n{task('num_epoch: 3')}"}, ["two.yaml:3: unknown key"]),
    ({"main": f"defaults: [base, head{AT}: y]", "head__y": "\nnum_epoch: 1"}, ["head/y.yaml:2: unknown key"]),
    ({"main": "defaults: [base]\nmodel: 3"}, ["main.yaml: expected a mapping model.dwnstr_task_validation"]),
]


@pytest.mark.parametrize(("files", "messages"), BAD)
def test_errors_name_the_file_and_the_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], files: dict[str, str], messages: list[str]
) -> None:
    path = tree(tmp_path, **{"base": TASK, **files})
    assert main(["config", str(path), "--overrides=device=cpu"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    for message in messages:
        assert message in line


def test_a_key_of_the_overrides_is_not_blamed_on_a_file(small: Path) -> None:
    with pytest.raises(ConfigError, match=r"^overrides: unknown key 'num_epoch'"):
        read_config(small, "dataset.num_epoch=3")


def test_a_name_that_hydra_does_not_compose(small: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.txt: expected a name that ends in \.yaml"):
        read_config(small.rename(small.with_name("config.txt")))


def test_a_mapping_named_defaults_is_not_a_defaults_list(tmp_path: Path) -> None:
    assert read_config(tree(tmp_path, main=f"defaults: {{lr: 1}}\n{TASK}")).dataset[0].num_epochs == 1


NAMES = st.sampled_from(["base", "_self_", "head", "head: y", "???", "/base", "../base", "x@y", "", "${x}", "a b: c"])
ENTRIES = (
    st.none() | st.integers(0, 3) | NAMES | st.dictionaries(NAMES, st.none() | NAMES | st.lists(NAMES), max_size=2)
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(defaults=st.lists(ENTRIES, max_size=4), searchpath=st.none() | st.lists(NAMES | st.integers(), max_size=2))
def test_any_defaults_list_is_a_configuration_or_a_one_line_error(
    tmp_path: Path, defaults: list[Any], searchpath: list[Any] | None
) -> None:
    path = tree(tmp_path, base=TASK, head__y="a: 1")
    path.write_text(yaml.safe_dump({"defaults": defaults, "hydra": {"searchpath": searchpath}}))
    try:
        message = read_config(path).dataset[0].dataset_path
    except ConfigError as error:
        message = str(error)
    assert message == " ".join(message.split()) != ""
