"""Imports point one way, down the path; heavy libraries are imported where they are needed and nowhere else."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import pipeline
from tests.support.data import make_task
from tests.support.programs import ROOT, loaded_after

# The rooms, folders and files at the top: each may import those before it.
ORDER = """
errors progress engines statistics config data load store encoders tracking checkpoints embed heads train_head score
baseline_scores sharing serving report random_init validation command training interface __main__
""".split()
DEEPEST = 16  # floors of module-level imports
MLFLOW = "client mlflow mlflow_served pyfunc runs earlier_runs training_run".split()
ADAPTERS = {
    "mlflow": {f"tracking.{name}" for name in MLFLOW} | {"serving.pyfunc_script"},
    "peft": {"checkpoints.peft"},
    "ray": {"engines.ray_engine", "engines.ray_worker"},
    "wandb": {"tracking.wandb"},
    "torch.utils.tensorboard": {"tracking.tensorboard"},
    "pytorch_lightning": {"training.lightning_package"},
    "lightning": {"training.lightning_package"},
}


def imports_of(path: Path, within_functions: bool = True) -> set[str]:
    """Every module that a file imports, type checking left out; of a package, what is imported from it too."""
    names: set[str] = set()
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree) if within_functions else tree.body:
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            node.body = []
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names - {"pipeline"}


def modules() -> dict[str, Path]:
    folder = ROOT / "pipeline"
    found = {}
    for path in folder.rglob("*.py"):
        name = ".".join(path.relative_to(folder).with_suffix("").parts).removesuffix(".__init__")
        found[name] = path
    return found


MODULES = sorted(set(modules()) - {"__init__"})


def own_imports(name: str, within_functions: bool = True) -> set[str]:
    """The modules of the project that one of them imports."""
    found = imports_of(modules()[name], within_functions)
    return {one.removeprefix("pipeline.") for one in found} & set(MODULES) - {name}


def room_of(name: str) -> str:
    return name.partition(".")[0]


def test_every_room_has_its_place_in_the_order() -> None:
    assert {room_of(name) for name in MODULES} == set(ORDER)


@pytest.mark.parametrize("name", MODULES)
def test_imports_point_one_way(name: str) -> None:
    """From room to room, imports within functions included."""
    earlier = ORDER[: ORDER.index(room_of(name)) + 1]
    assert {room_of(one) for one in own_imports(name)} <= set(earlier)


def test_no_module_imports_itself_by_way_of_others() -> None:
    """Within a room too; and a chain of imports is no longer than it has to be."""
    depths: dict[str, int] = {}

    def depth(name: str, above: tuple[str, ...] = ()) -> int:
        assert name not in above, f"{' -> '.join(above)} -> {name}"
        if name not in depths:
            depths[name] = 1 + max((depth(one, (*above, name)) for one in own_imports(name, False)), default=0)
        return depths[name]

    assert max(depth(name) for name in MODULES) <= DEEPEST


def uses(name: str, library: str) -> bool:
    """Whether a module of the project imports a library, or a part of it."""
    return any(f"{one}.".startswith(f"{library}.") for one in imports_of(modules()[name]))


@pytest.mark.parametrize("library", ADAPTERS)
def test_trackers_are_imported_by_their_adapters_alone(library: str) -> None:
    """Lightning, of which there are two packages, is imported by a name that is found as the program runs."""
    importing = {name for name in MODULES if uses(name, library)}
    assert importing <= ADAPTERS[library]
    assert importing or "lightning" in library


def test_no_public_name_is_hidden_by_a_module() -> None:
    """`import pipeline.x` binds the module `x` in the package: a function of that name could not be imported."""
    assert not set(pipeline.__all__) & set(modules())
    assert all(getattr(pipeline, name) is not None for name in pipeline.__all__)


def test_stages_run_where_no_tracker_is_installed() -> None:
    names = ["mlflow", "wandb", "tensorboard", "pytorch_lightning", "lightning"]
    blocked = f"import sys\nfor name in {names}: sys.modules[name] = None\n"
    code = blocked + "from pipeline import Store, Task, open_encoder, read_config, validate"
    assert {"torch", "pipeline"} <= loaded_after(code)


def test_benchmarks_run_with_few_libraries(tmp_path: Path) -> None:
    """As on a machine with a GPU that has torch, transformers, pyarrow, pandas, scikit-learn, OmegaConf and xxhash."""
    make_task(tmp_path, [{"sequence": "MKV", "3state": "HEC"}, {"sequence": "GG", "3state": "CC"}])
    names = ["mlflow", "wandb", "tensorboard", "pytorch_lightning", "lightning", "pytorch_optimizer", "braceexpand"]
    code = f"""
import sys
for name in {[*names, "matplotlib", "torchmetrics"]}: sys.modules[name] = None
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
