"""The section `logging` of the configuration: where results go beside MLflow, and what is made of them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.config.fields import check_choice, key, require
from pipeline.errors import ConfigError

WANDB_MODES = ("online", "offline", "disabled")
BOOLEANS = ("True", "False")  # what YAML makes of on, yes and true, and of off, no and false, as text


@dataclass
class Logging:
    """Where results go beside MLflow, and whether pictures are drawn."""

    wandb: str = key("W&B run of a measurement on the command line: `online`, `offline` or `disabled`", "disabled")
    project: str = key("W&B project of that run", "downstream-validation")
    entity: str | None = key("W&B user or team; null: the account's default")
    tags: list[str] = key("tags of the W&B run", list)
    tensorboard: str | None = key("folder for TensorBoard's files, from the command line; null: none")
    figures: bool = key("make pictures, and `report.html`", True)
    log_model: bool = key(
        "store the encoder and the head of each task as a model that `mlflow models serve` answers with", False
    )
    register_model: str | None = key(
        "with `log_model`, the name under which each such model becomes a version in MLflow's model registry; the "
        "alias `best-<task>` names the best one"
    )
    journal: str | None = key(
        "folder where what MLflow is sent is written first, and stays; null: `<store>/journal`, until all has arrived"
    )

    def check(self, tasks: Sequence[str] = ()) -> None:
        """Raises ConfigError for a value that a tracker or a file system does not take; `tasks` are their names."""
        if self.wandb in BOOLEANS:
            why = f"'{self.wandb.lower()}', which YAML reads for on, off, yes and no; for off, write disabled"
            raise ConfigError(f"logging.wandb: expected one of {', '.join(WANDB_MODES)}, found {why}")
        check_choice("logging.wandb", self.wandb, WANDB_MODES)
        for name in ("tensorboard", "journal"):
            folder = getattr(self, name)
            named = folder is None or (folder.strip() and folder not in BOOLEANS)
            require(bool(named), f"logging.{name}: expected a folder, or null, found '{folder}'")
        registered = self.register_model
        fits = registered is None or (bool(registered.strip(" .")) and not {*"/:'"} & {*registered})
        fits = fits and registered not in BOOLEANS
        require(fits, f"logging.register_model: expected a name without / : ', or null, found '{registered}'")
        logged = registered is None or self.log_model
        require(logged, "logging.register_model: expected log_model: true beside it; without that there is no model")
        names = [model_name(task) for task in tasks] if self.log_model else []
        double = next((name for name in names if names.count(name) > 1), "")
        require(not double, f"logging.log_model: two tasks become '{double}' in the names of their models; rename one")
        project = "expected 1 to 128 characters without / \\ # ? % :"
        fits = 0 < len(self.project) <= 128 and not re.search(r"[/\\#?%:]", self.project)
        require(fits, f"logging.project: {project}, found '{self.project[:200]}'")
        for tag in self.tags:
            require(0 < len(tag) <= 64, f"logging.tags: expected 1 to 64 characters in a tag, found '{tag[:100]}'")


def model_name(task: str) -> str:
    """The name of a task in those of its models and their aliases.

    >>> model_name("log P (octanol/water)")
    'log_P__octanol_water_'
    """
    return re.sub(r"[^\w-]", "_", task)
