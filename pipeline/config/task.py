"""A downstream task in the configuration: its data, its head, and how it is trained, with the checks of each value."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

from pipeline.config.fields import check_values, key, require
from pipeline.statistics.metrics import BASELINE, PROBE, Metric, metric_name, metrics_of_kind

LEVELS = ("sequence", "token")
KINDS = ("classification", "regression")
MAX_NAME = 100  # of a task's or a column's name: metric names hold both, and MLflow takes 250 characters
PROBES = ("ridge", "logistic", "none")


@dataclass
class Files:
    """File names within a part's folder: `x000`, or a range such as `x[000..049]`, with or without `.csv`."""

    train: str = key("file or range of files in `<dataset_path>/train`", "x000")
    test: str = key("file or range of files in `<dataset_path>/test`", "x000")
    val: str | None = key("file or range of files in `<dataset_path>/val`, if there is one")


@dataclass
class MaxRows:
    """The most sequences to use of each part: a fixed, seeded subsample, in the order of the files."""

    train: int | None = key("most sequences of the train part; null: all", least=1)
    test: int | None = key("most sequences of the test part; null: all", least=1)
    val: int | None = key("most sequences of the val part; null: all", least=1)


@dataclass
class Task:
    """One downstream task: the data, the head and how it is trained.

    `head` is the path of a user's own head class, where `class` names one; then the class gives the level.
    """

    level: str = key(
        "`sequence`, `token`, the reference's dotted path, or the path of a head of your own",
        "sequence",
        key="class",
        choices=LEVELS,
    )
    task_type: str = key("`classification` or `regression` (`token-level-...` as well)", "regression", choices=KINDS)
    task_name: str = key("name of the task, in tables and metric names", "downstream")
    infer_target: str = key("`auto`, `esm`, `prott5`, `megamolbart`, or the path of an encoder class", "auto")
    dataset_path: str = key("folder that holds train/ and test/ (and val/)", "")
    dataset: Files = key("which files of train/, test/ and val/", Files)
    sequence_column: str = key("column with the sequences", "sequence")
    target_column: list[str] = key("column with the labels, or a list: one head each", list)
    target_sizes: list[int] | None = key("number of classes of each target")
    num_classes: int | None = key("number of classes of a single target")
    mask_column: list[str | None] | None = key("columns of 0/1 masks, one per target; null for none")
    max_seq_length: int | None = key("longer sequences are left out; null: as long as the encoder takes", least=1)
    max_rows: MaxRows = key("most sequences of each part, a subsample drawn with `random_seed`", MaxRows)
    emb_batch_size: int = key("most sequences in an embedding batch", 128, least=1)
    batch_size: int = key("sequences in a batch of the head's training", 128, least=1)
    num_epochs: int = key("epochs of the head's training", 10, least=0)
    shuffle: bool = key("shuffle the training examples at each epoch", True)
    random_seed: int = key(
        "seed of the first head's weights, dropout and shuffling, of what is held out, and of `max_rows`",
        1234,
        least=0,
        most=2**63 - 1,
    )
    num_seeds: int = key(
        "heads of the task, with seeds `random_seed`, `random_seed + 1` and so on; scores are the mean of theirs",
        3,
        least=1,
        most=1000,
    )
    standardize: bool = key(
        "train on numbers less their mean, divided by their deviation; losses and scores are in their own units", True
    )
    class_weights: Any = key("`balanced`, or a weight per class (a list of such for several targets)")
    gradient_clip_val: float | None = key("largest norm of a gradient; null: not clipped", least=1e-12)
    patience: int | None = key("epochs without improvement on val before the training stops; null: all epochs", least=1)
    val_fraction: float = key(
        "with patience, the share of train held out where there is no val part", 0.1, least=1e-9, most=0.999
    )
    probe: str = key(
        "beside the head: `ridge`, a ridge regression, or `logistic` (classes alone), with embeddings in memory; or "
        "`none`",
        "ridge",
        choices=PROBES,
    )
    probe_window: int = key("tokens around each that the probe sees, in token-level tasks; an odd number", 1, least=1)
    baselines: bool = key(
        "measure beside the checkpoint, once, what composition, or in token-level tasks one-hot windows, reaches", True
    )
    optim: dict[str, Any] = key(
        "optimiser `name`, `lr` and its options, and its schedule `sched`", lambda: {"name": "adam", "lr": 1e-4}
    )
    head: str | None = field(default=None, metadata={"hidden": True})

    @property
    def seeds(self) -> list[int]:
        """The seed of each head; as many as there are, they fit into 63 bits."""
        return [(self.random_seed + index) % 2**63 for index in range(self.num_seeds)]

    @property
    def masks(self) -> list[str | None]:
        """The mask column of each target."""
        return self.mask_column or [None] * len(self.target_column)

    @property
    def sizes(self) -> list[int | None]:
        """The declared number of classes of each target; None where it is not declared."""
        return [*self.target_sizes] if self.target_sizes else [self.num_classes] * len(self.target_column)

    def check(self, with_files: bool = True) -> None:
        """Raises ConfigError where a value is out of range or fields contradict one another.

        `with_files` requires the folder of the CSV files too.
        """
        where = f"task '{self.task_name}'"
        named = self.task_name.strip(" .") and len(self.task_name.encode()) <= MAX_NAME
        require(bool(named), f"task_name: expected 1 to {MAX_NAME} characters, found '{self.task_name[:200]}'")
        check_values(self, f"{where}: ")
        check_values(self.max_rows, f"{where}: max_rows.")
        found = bool(self.dataset_path) or not with_files
        require(found, f"{where}: dataset_path is missing; give the folder of train/ and test/")
        self._check_probe(where)
        self._check_targets(where)

    def _check_probe(self, where: str) -> None:
        """Checks that the probe fits the kind of task."""
        fits = self.probe != "logistic" or self.task_type == "classification"
        require(fits, f"{where}: probe: logistic is for classification; write ridge")
        odd, window = self.probe_window % 2 == 1, f"{where}: probe_window"
        require(odd, f"{window} is {self.probe_window}, expected an odd number, as many tokens before as behind")
        tokens = self.probe_window == 1 or self.level == "token"
        require(tokens, f"{window} is for token-level tasks; leave it out")

    def _names(self, column: str) -> set[str]:
        """The names of a target's metrics."""
        return {Metric("", column, kind).key for kind in metrics_of_kind(self.task_type, self.level)}

    def _check_targets(self, where: str) -> None:
        """Checks the columns of labels, and the declarations of each."""
        require(bool(self.target_column), f"{where}: target_column is missing; name the column of the labels")
        targets = len(self.target_column)
        for name, values in (("target_sizes", self.target_sizes), ("mask_column", self.mask_column)):
            found = targets if values is None else len(values)
            entries = f"{found} entries for {targets} target columns"
            require(found == targets, f"{where}: {name} has {entries}; give one for each")
        for first, second in combinations(self.target_column, 2):
            name = metric_name(second)
            remedy = f"both become '{name}' in metric names; rename one"
            require(metric_name(first) != name, f"{where}: target_column: {first} and {second} {remedy}")
            both = self._names(first) & self._names(second)
            remedy = f"both have a metric {', '.join(both)}; rename one"
            require(not both, f"{where}: target_column: {first} and {second} {remedy}")
        for what, suffix, used in (
            ("probe: none", PROBE, self.probe != "none"),
            ("baselines: false", BASELINE, self.baselines),
        ):
            taken = {metric_name(column) + suffix for column in self.target_column} if used else set()
            for column in self.target_column:
                remedy = f"is what the metrics of another target's {suffix[1:]} begin with; rename it, or write {what}"
                require(metric_name(column) not in taken, f"{where}: target_column: {column} {remedy}")
        fits = self.level == "token" or targets == 1
        require(fits, f"{where}: a sequence-level task has one target_column, found {targets}; make it several tasks")
        agree = self.num_classes is None or (self.target_sizes or [self.num_classes]) == [self.num_classes] * targets
        require(agree, f"{where}: num_classes {self.num_classes} contradicts target_sizes {self.target_sizes}")
        unmasked = self.level == "token" or self.mask_column is None
        require(unmasked, f"{where}: mask_column is for token-level tasks; leave it out")
        classes = self.task_type == "classification"
        require(classes or self.class_weights is None, f"{where}: class_weights are for classification; leave them out")
        for size in self.sizes if classes else []:
            require(size is None or size >= 2, f"{where}: a target of {size} classes, expected at least 2")


def check_names(tasks: Sequence[Task]) -> None:
    """Raises ConfigError where there is no task, or two have one name in metric names."""
    require(bool(tasks), "dataset is missing; give a task, or a list of tasks")
    names = [task.task_name for task in tasks]
    double = sorted({name for name in names if names.count(name) > 1})
    require(not double, f"task_name '{(double or [''])[0]}' is used twice; give each task a name of its own")
    for first, second in combinations(names, 2):
        same = metric_name(first) == metric_name(second)
        require(not same, f"task_name: '{first}' and '{second}' become one in metric names; rename one")
