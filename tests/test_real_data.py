"""The main job on real data sets, tracked in a real database; every logged metric computed again from the artifact."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from mlflow import MlflowClient
from mlflow.entities import Run
from scipy.stats import pearsonr, spearmanr
from sklearn import metrics as sk

from pipeline.__main__ import main
from tests.support.lab import every_metric

TOKENS = {"class": "token", "max_seq_length": 600, "batch_size": 32}
CASES: list[tuple[str, tuple[str, dict[str, Any]], dict[str, Any]]] = [
    (
        "ss3_flip",
        ("esm", {"width": 16, "layers": 1, "max_shard_size": "8KB"}),
        {
            **TOKENS,
            "task_type": "token-level-classification",
            "infer_target": "bionemo.model.protein.esm1nv.infer.ESM1nvInference",
            "dataset": {"train": "x[000..003]", "test": "x[000..001]"},
            "target_column": ["3state"],
            "target_sizes": [3],
            "mask_col": ["resolved"],
        },
    ),
    (
        "ss3_ss8",
        ("prott5", {"slow": True}),
        {
            **TOKENS,
            "task_type": "classification",
            "infer_target": "prott5",
            "target_column": ["3state", "8state"],
            "target_sizes": [3, 8],
            "mask_column": ["resolved", "eval_mask"],
        },
    ),
    (
        "scl10",
        ("esm", {"dtype": torch.float16}),
        {
            "class": "bionemo.model.core.dwnstr_task_callbacks.SingleValuePredictionCallback",
            "task_type": "classification",
            "max_seq_length": 400,
            "dataset": {"train": "x_OP_000..001_CL_", "test": "x000"},
            "target_column": "location",
            "num_classes": 10,
        },
    ),
    ("gb1_fitness", ("protbert", {"positions": 512}), {"task_type": "regression", "target_column": "target"}),
    ("gb1_fitness", ("prott5", {"slow": False}), {"task_type": "regression", "target_column": "target"}),
    ("conservation_score", ("esm", {}), {**TOKENS, "task_type": "token-level-regression", "target_column": ["score"]}),
    (
        "freesolv",
        ("smiles_bart", {"max_shard_size": "20KB"}),
        {
            "task_type": "regression",
            "infer_target": "bionemo.model.molecule.megamolbart.infer.MegaMolBARTInference",
            "sequence_column": "smiles",
            "target_column": "expt",
            "dataset": {"train": "x000", "test": "x000", "val": "x000"},
        },
    ),
]


def recomputed(table: dict[str, npt.NDArray[Any]], name: str, probe: str = "") -> dict[str, float]:
    """Every metric of a target that can be had from the predictions alone, by scikit-learn and scipy."""
    mask = table[f"{name}_mask"]
    true, predicted = table[f"{name}_target"][mask], table[f"{name}{probe}_prediction"][mask]
    groups = pd.Series(np.arange(len(true))).groupby(np.asarray(table["row"][mask])).indices.values()
    several = [rows for rows in groups if len(rows) > 1]
    if f"{name}_probabilities" not in table:
        true, predicted = true.astype(float), predicted.astype(float)
        mse = float(sk.mean_squared_error(true, predicted))
        values = {"mse": mse, "rmse": mse**0.5, "mae": sk.mean_absolute_error(true, predicted)}
        values |= {"r2": sk.r2_score(true, predicted), "pearson": pearsonr(true, predicted)[0]}
        ranked = [rows for rows in several if len(set(true[rows])) > 1]
        within = [spearmanr(true[rows], predicted[rows])[0] if np.ptp(predicted[rows]) else 0.0 for rows in ranked]
        values |= {"per_sequence_spearman": float(np.mean(within))} if ranked else {}
        return {**values, "spearman": spearmanr(true, predicted)[0]}
    probabilities = np.stack(list(table[f"{name}{probe}_probabilities"][mask]))
    classes = sorted(set(true))
    shares = probabilities[:, : len(classes)]
    precisions = [sk.average_precision_score(true == label, shares[:, index]) for index, label in enumerate(classes)]
    areas = [sk.roc_auc_score(true == label, shares[:, index]) for index, label in enumerate(classes)]
    return {
        "accuracy": float(sk.accuracy_score(true, predicted)),
        "balanced_accuracy": float(sk.balanced_accuracy_score(true, predicted)),
        "macro_f1": float(sk.f1_score(true, predicted, average="macro", zero_division=0)),
        "mcc": float(sk.matthews_corrcoef(true, predicted)),
        "auroc": float(np.mean(areas)),
        "average_precision": float(precisions[1] if len(classes) == 2 else np.mean(precisions)),
        **({"per_sequence_accuracy": np.mean([np.mean(true[i] == predicted[i]) for i in several])} if several else {}),
    }


def run_main(tracking: str, folder: Path, section: dict[str, Any], ckpt: Path) -> tuple[MlflowClient, Run]:
    """Runs the main job as the command line does, and gives its run."""
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump({"model": {"dwnstr_task_validation": section}}))
    overrides = f"store={folder / 'store'}"
    assert main(["main", f"--config={config}", f"--ckpt={ckpt}", f"--overrides={overrides}"]) == 0
    client = MlflowClient(tracking)
    (run,) = [run for run in client.search_runs(["0"]) if "mlflow.parentRunId" not in run.data.tags]
    assert run.info.status == "FINISHED"
    return client, run


@pytest.mark.parametrize(("name", "model", "task"), CASES, ids=[f"{case[0]}-{case[1][0]}" for case in CASES])
def test_the_main_job_on_real_data(
    shared_data: Path,
    model_folder: Callable[..., Path],
    tracking: str,
    tmp_path: Path,
    name: str,
    model: tuple[str, dict[str, Any]],
    task: dict[str, Any],
) -> None:
    ckpt = model_folder(model[0], **model[1])
    settings = {
        "dataset_path": str(shared_data / name),
        "task_name": name,
        "num_epochs": 2,
        "num_seeds": 1,
        "baselines": False,
        "max_seq_length": 300,
    }
    optim = {"name": "adam", "lr": 0.001}
    client, run = run_main(tracking, tmp_path, {"dataset": {**settings, "optim": optim, **task}}, ckpt)
    path = client.download_artifacts(run.info.run_id, f"predictions_{name}.parquet", str(tmp_path))
    frame = pq.read_table(path).to_pandas()
    table = {column: frame[column].to_numpy() for column in frame.columns}
    assert "collapsed" not in run.data.tags["mlflow.note.content"]
    logged = every_metric(run)
    assert logged.pop("dwnstr_task_val_loss") > 0
    targets = task["target_column"] if isinstance(task["target_column"], list) else [task["target_column"]]
    expected = {
        f"test_{target}{probe}_{metric}": value
        for target in targets
        for probe in ("", "_probe")
        for metric, value in recomputed(table, target, probe).items()
    }
    assert {logged.pop(f"embedding_{name}", 0) > 0 for name in ("rank_me", "mean_cosine")} == {True}
    assert 0 <= logged.pop("embedding_dead_dimensions") < 1
    ends = {name: logged.pop(name) for name in list(logged) if "_ci_" in name}
    assert set(logged) <= set(expected)
    assert len(logged) >= 6 * len(targets)
    assert {metric: expected[metric] for metric in logged} == pytest.approx(logged, abs=1e-6)
    for metric in {name.rpartition("_ci_")[0] for name in ends}:
        assert ends[f"{metric}_ci_low"] < logged[metric] < ends[f"{metric}_ci_high"]
    assert ends


def test_a_list_of_real_tasks_goes_through_the_encoder_once(
    shared_data: Path, model_folder: Callable[..., Path], tracking: str, tmp_path: Path
) -> None:
    """`scl10` and `membrane_soluble` share proteins: each is embedded once, and both scores are prefixed."""
    common = {"task_type": "classification", "max_seq_length": 250, "num_epochs": 1}
    tasks = [
        {**common, "task_name": "scl", "target_column": "location", "dataset_path": str(shared_data / "scl10")},
        {
            **common,
            "task_name": "mem",
            "target_column": "membrane",
            "dataset_path": str(shared_data / "membrane_soluble"),
        },
    ]
    ckpt = model_folder("esm", width=16, layers=1)
    client, run = run_main(tracking, tmp_path, {"dataset": tasks}, ckpt)
    assert {"scl/test_location_accuracy", "mem/test_membrane_accuracy"} <= set(run.data.metrics)
    (embed,) = [child for child in client.search_runs(["0"]) if child.info.run_name == "embed"]
    sequences = set()
    for task in tasks:
        for path in Path(str(task["dataset_path"])).glob("*/x000.csv"):
            sequences |= set(pq_sequences(path))
    assert embed.data.metrics["embedded"] == len({text for text in sequences if len(text) <= 250})


def pq_sequences(path: Path) -> list[str]:
    return list(pd.read_csv(path, dtype=str, keep_default_na=False)["sequence"])
