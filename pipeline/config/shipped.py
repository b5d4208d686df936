"""What comes with the package, wherever it is installed: sample data, a checkpoint, and configurations."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig

PACKAGE = Path(__file__).resolve().parents[1]
# A wheel has `sample` and `configs` within the package (setup.py), a clone beside it.
ROOT = PACKAGE / "shipped" if (PACKAGE / "shipped").is_dir() else PACKAGE.parent
CONFIG = "configs/default.yaml"
CKPT = "sample/checkpoint"


def shipped_path(name: str) -> str:
    """The path of a file or folder that comes with the package: `name` itself in the folder of a clone.

    Args:
        name: `sample/checkpoint`, `sample/data/variants`, `configs/default.yaml` and so on.
    """
    return name if Path.cwd() == ROOT else str(ROOT / name)


def anchor(section: DictConfig, source: str | Path | Mapping[Any, Any]) -> None:
    """Makes `sample/...` in a configuration that comes with the package the folder that comes with it.

    A relative path in any other file, or in an override, begins at the current folder.
    """
    if isinstance(source, Mapping) or Path(source).resolve().parent != ROOT / "configs" or Path.cwd() == ROOT:
        return
    found = section.get("dataset")
    for task in found if isinstance(found, ListConfig) else [found]:
        folder = task.get("dataset_path", "") if isinstance(task, DictConfig) else ""
        if str(folder).startswith("sample/"):
            task.dataset_path = str(ROOT / folder)
