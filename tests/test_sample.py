"""What the project ships: data that can be made again byte for byte, configurations that run, pins that agree."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import yaml
from scipy.stats import spearmanr

import pipeline
from pipeline import Store, open_encoder, read_config, validate
from pipeline.data import tables
from tests.support.programs import ROOT

CHECKPOINT = ROOT / "sample" / "checkpoint"


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def test_the_sample_data_are_made_again_byte_for_byte(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "sample/make.py", "--out", str(tmp_path)], check=True, capture_output=True)
    shipped = {path.relative_to(ROOT / "sample" / "data") for path in (ROOT / "sample" / "data").rglob("*.csv")}
    assert {path.relative_to(tmp_path) for path in tmp_path.rglob("*.csv")} == shipped
    for path in shipped:
        assert (tmp_path / path).read_bytes() == (ROOT / "sample" / "data" / path).read_bytes()


def test_fitness_is_in_pairs_of_sites_and_in_nothing_else() -> None:
    """Else the demonstration's curve would show what needs no pre-training."""
    (texts, labels), (test_texts, test_labels) = (variants(part) for part in ("train", "test"))
    for encode in (one_hot, lambda texts: one_hot(texts).reshape(len(texts), -1, 20).sum(1)):
        features, mean = encode(texts), labels.mean()
        gram = features.T @ features + 10 * np.eye(features.shape[1])
        slopes = np.linalg.solve(gram, features.T @ (labels - mean))
        assert abs(spearmanr(encode(test_texts) @ slopes, test_labels)[0]) < 0.15
    assert spearmanr([contacts(text) for text in test_texts], test_labels)[0] > 0.9
    members = tables.read(ROOT / "sample/data/family/test", "x000", ["sequence"]).columns["sequence"]
    assert np.mean([contacts(text) for text in members]) > 11  # of 12: what there is to learn from them


def variants(part: str) -> tuple[list[str], npt.NDArray[np.float64]]:
    columns = tables.read(ROOT / "sample/data/variants" / part, "x000", ["sequence", "fitness"]).columns
    return list(columns["sequence"]), np.array(columns["fitness"], dtype=float)


def one_hot(texts: list[str]) -> npt.NDArray[np.float64]:
    """Shape (n, 40 * 20)."""
    letters = np.array(list("ACDEFGHIKLMNPQRSTVWY"))
    matrix = np.array([list(text) for text in texts])
    return np.asarray((matrix[..., None] == letters).reshape(len(texts), -1), dtype=np.float64)


def contacts(text: str) -> int:
    """The pairs four apart of opposite charge, or of a large and a small side chain, where a helix has them."""
    kinds = ("KR", "DE"), ("FWY", "AGS"), ("KR", "DE")
    places = [(start + site, kind) for start in range(0, 40, 10) for site, kind in enumerate(kinds)]
    return sum((text[site] in kind[0]) != (text[site + 4] in kind[0]) for site, kind in places)


def test_the_checkpoint_is_small() -> None:
    assert sum(path.stat().st_size for path in CHECKPOINT.iterdir()) < 2_000_000


def test_the_default_configuration_beats_a_constant_guess(tmp_path: Path) -> None:
    config = read_config("configs/default.yaml")
    encoder = open_encoder(str(CHECKPOINT))
    scores = {one.task_name: one for one in validate(encoder, config.tasks, Store(tmp_path))}
    assert list(scores) == ["fitness", "secondary_structure", "exposure", "location"]
    for one in scores.values():
        assert not [verdict for verdict in one.verdicts if "collapsed" in verdict.short]
        for name, floor in one.constant.items():
            better = (
                one.metrics[name] - floor
                if name.endswith(("accuracy", "f1", "precision"))
                else floor - one.metrics[name]
            )
            assert better > 0, name
    assert scores["secondary_structure"].metrics["secondary_structure/test_3state_accuracy"] > 0.55
    fitness = scores["fitness"]
    for name in ("fitness/test_fitness_spearman", "fitness/test_fitness_probe_spearman"):
        assert fitness.metrics[f"{name}_ci_low"] > fitness.baselines[name] + 0.3


@pytest.mark.parametrize("name", ["token_classification", "token_regression", "sequence_classification"])
def test_the_configurations_of_one_kind_run(tmp_path: Path, name: str) -> None:
    config = read_config(f"configs/{name}.yaml", "dataset.num_epochs=1")
    (scores,) = validate(open_encoder(str(CHECKPOINT)), config.tasks, Store(tmp_path))
    assert [metric for metric in scores.metrics if metric.startswith("test_")]
    assert all("/" not in metric for metric in scores.metrics)


def test_conda_and_constraints_pin_the_same_versions() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if "==" in line)
    conda = yaml.safe_load((ROOT / "conda.yaml").read_text())["dependencies"][-1]["pip"]
    assert {name: pins[name] for name, _ in (line.split("==") for line in conda)} == dict(
        line.split("==") for line in conda
    )
    project = (ROOT / "pyproject.toml").read_text()
    wanted = re.findall(r"\n(?:dependencies|hydra|train) = \[(.*?)\n\]", project, re.DOTALL)
    assert len(wanted) == 3
    names = {re.split(r"[<>=]", name)[0] for name in re.findall(r'"([^"]+)"', "".join(wanted))}
    assert names == {line.split("==")[0] for line in conda}


def test_the_oldest_environment_is_what_the_project_allows() -> None:
    """torch is the exception: older builds were never run."""
    lines = (ROOT / "constraints-oldest.txt").read_text().splitlines()
    pins = {name.lower().replace("_", "-"): pin for name, pin in (line.split("==") for line in lines if "==" in line)}
    project = (ROOT / "pyproject.toml").read_text()
    parts = re.findall(r"\n(?:dependencies|hydra|train) = \[(.*?)\n\]", project, re.DOTALL)
    lowest = dict(re.findall(r'"([\w-]+)>=([\d.]+)', "".join(parts)))
    assert lowest.pop("torch") != pins["torch"]
    assert {name: pins[name][: len(version)] for name, version in lowest.items()} == lowest


def test_the_version_is_the_same_everywhere() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert pipeline.__version__ == project["version"] == cited["version"]
    assert cited["license"] == project["license"]["text"]
