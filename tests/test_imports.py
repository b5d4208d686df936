"""Imports point one way, down the path; heavy libraries are imported where they are needed and nowhere else."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import pipeline
from tests.conftest import ROOT, make_task

# Each module may import those before it.
ORDER = """
errors scratch names config hydra_file config_file progress schema tables labels load companions tokens packing unpickle
weights source encoders custom huggingface metrics
tracking tracking.process tracking.journal tracking.delivery tracking.sender tracking.client
tracking.mlflow tracking.earlier tracking.runs
tracking.wandb tracking.tensorboard tracking.mirrors tracking.training
formats live checkpoints shards store rows forward embed
heads schedules optim batches stack fit train_head score validation
figures.canvas figures.classes figures.examples figures report page publish compare measure
neutral distributed measurement lightning callback monitors loggers esm pretrain __main__
""".split()
ADAPTERS = {
    "mlflow": {f"tracking.{name}" for name in ("client", "mlflow", "runs", "earlier", "training")},
    "wandb": {"tracking.wandb"},
    "tensorboard": {"tracking.tensorboard"},
    "pytorch_lightning": {"lightning"},
    "lightning": {"lightning"},
}
# `__init__` gives the public names their homes and `__main__` calls everything: both stand outside the order.
LINKS: dict[str, set[str]] = {}


def imports_of(path: Path) -> set[str]:
    """Every module that a file imports, at its top or within a function, type checking left out."""
    names: set[str] = set()
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            node.body = []
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
            if node.module == "pipeline":
                names |= {f"pipeline.{alias.name}" for alias in node.names}
    return names - {"pipeline"}


def modules() -> dict[str, Path]:
    folder = ROOT / "pipeline"
    found = {}
    for path in folder.rglob("*.py"):
        name = ".".join(path.relative_to(folder).with_suffix("").parts).removesuffix(".__init__")
        found[name] = path
    return found


def test_every_module_has_its_place_in_the_order() -> None:
    assert set(modules()) == {*ORDER, "__init__"}


@pytest.mark.parametrize("name", ORDER)
def test_imports_point_one_way(name: str) -> None:
    own = {module.removeprefix("pipeline.") for module in imports_of(modules()[name]) if module.startswith("pipeline.")}
    assert own <= set(ORDER[: ORDER.index(name)])


@pytest.mark.parametrize("name", ORDER)
def test_trackers_are_imported_by_their_adapters_alone(name: str) -> None:
    tops = {module.split(".")[0] for module in imports_of(modules()[name])}
    for library, adapters in ADAPTERS.items():
        assert library not in tops or name in adapters or library in LINKS.get(name, set())


def test_no_public_name_is_hidden_by_a_module() -> None:
    """`import pipeline.x` binds the module `x` in the package: a function of that name could not be imported."""
    assert not set(pipeline.__all__) & set(modules())
    assert all(getattr(pipeline, name) is not None for name in pipeline.__all__)


def loaded_after(code: str) -> set[str]:
    """The top-level modules that are loaded in a fresh interpreter after running `code`."""
    script = f"{code}\nimport sys; print(*sorted({{name.split('.')[0] for name in sys.modules}}))"
    run = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(run.stdout.split("\n")[-2].split())


def test_stages_run_where_no_tracker_is_installed() -> None:
    names = ["mlflow", "wandb", "tensorboard", "pytorch_lightning", "lightning"]
    blocked = f"import sys\nfor name in {names}: sys.modules[name] = None\n"
    code = blocked + "from pipeline import Store, Task, open_encoder, read_config, validate"
    assert {"torch", "pipeline"} <= loaded_after(code)


def test_benchmarks_run_with_few_libraries(tmp_path: Path) -> None:
    """As on a machine with a GPU that has torch, transformers, pyarrow, pandas, scikit-learn and OmegaConf."""
    make_task(tmp_path, [{"sequence": "MKV", "3state": "HEC"}, {"sequence": "GG", "3state": "CC"}])
    names = ["mlflow", "wandb", "tensorboard", "pytorch_lightning", "lightning", "pytorch_optimizer", "braceexpand"]
    code = f"""
import sys
for name in {[*names, "matplotlib", "torchmetrics", "xxhash"]}: sys.modules[name] = None
sys.path.insert(0, "benchmarks")
import heads, embed, store, validation
from pathlib import Path
from pipeline import Store, validate
from work import make_esm, proteins
folder = Path({str(tmp_path)!r})
(scores,) = validate(make_esm(1, 16, 2), proteins(folder, epochs=1), Store(folder / "store"))
assert scores.metrics
"""
    assert "sklearn" in loaded_after(code)


def test_help_and_configuration_errors_do_not_wait_for_torch() -> None:
    code = """
from pipeline.__main__ import main
assert main(['main', '--config=configs/default.yaml', '--overrides=nonsense=1']) == 2
try:
    main(['--help'])
except SystemExit:
    pass
"""
    assert not {"torch", "mlflow", "transformers", "pandas", "sklearn"} & loaded_after(code)
