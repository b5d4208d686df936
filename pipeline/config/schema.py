"""The typed configuration: what may stand in the section `model.dwnstr_task_validation` of a YAML file.

`yaml_file.py` makes these from a file. Python users build them directly.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

from pipeline.config.classes import ENCODERS, refuse_reference
from pipeline.errors import ConfigError, nearest
from pipeline.statistics.metrics import LOSS, OF_KIND, Metric, metric_name

LEVELS = ("sequence", "token")
KINDS = ("classification", "regression")
MAX_NAME = 100  # of a task's or a column's name: metric names hold both, and MLflow takes 250 characters
INF = float("inf")
# The range of each number of a task; null is none.
RANGES: dict[str, tuple[float, float]] = {
    "emb_batch_size": (1, INF),
    "batch_size": (1, INF),
    "num_epochs": (0, INF),
    "max_seq_length": (1, INF),
    "patience": (1, INF),
    "random_seed": (0, 2**63 - 1),
    "val_fraction": (1e-9, 0.999),
    "gradient_clip_val": (1e-12, INF),
}
ON_ERROR = ("warn", "raise")
DEVICES = ("auto", "cpu", "cuda", "mps")
PRECISIONS = ("auto", "fp32", "bf16", "fp16")
STORED_DTYPES = ("float32", "float16")
WANDB_MODES = ("online", "offline", "disabled")
BOOLEANS = ("True", "False")  # what YAML makes of on, yes and true, and of off, no and false, as text
BYTE_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def _key(text: str, default: Any = None, **extra: Any) -> Any:
    """A field with the line of explanation that `python -m pipeline config --schema` prints."""
    factory = default if callable(default) else lambda: default
    return field(default_factory=factory, metadata={"help": text, **extra})


@dataclass
class Files:
    """File names within a part's folder: `x000`, or a range such as `x[000..049]`, with or without `.csv`."""

    train: str = _key("file or range of files in `<dataset_path>/train`", "x000")
    test: str = _key("file or range of files in `<dataset_path>/test`", "x000")
    val: str | None = _key("file or range of files in `<dataset_path>/val`, if there is one")


@dataclass
class MaxRows:
    """How many sequences of a part are used at most: a fixed, seeded subsample, in the order of the files."""

    train: int | None = _key("most sequences of the train part; null: all")
    test: int | None = _key("most sequences of the test part; null: all")
    val: int | None = _key("most sequences of the val part; null: all")


@dataclass
class Task:
    """One downstream task: the data, the head and how it is trained.

    `head` is the path of a user's own head class, which `class` may name; it says the level.
    """

    level: str = _key(
        "`sequence`, `token`, the reference's dotted path, or the path of a head of your own", "sequence", key="class"
    )
    task_type: str = _key("`classification` or `regression` (`token-level-...` as well)", "regression")
    task_name: str = _key("name of the task, in tables and metric names", "downstream")
    infer_target: str = _key("`auto`, `esm`, `prott5`, `megamolbart`, or the path of an encoder class", "auto")
    dataset_path: str = _key("folder that holds train/ and test/ (and val/)", "")
    dataset: Files = _key("which files of train/, test/ and val/", Files)
    sequence_column: str = _key("column with the sequences", "sequence")
    target_column: list[str] = _key("column with the labels, or a list: one head each", list)
    target_sizes: list[int] | None = _key("number of classes of each target")
    num_classes: int | None = _key("number of classes of a single target")
    mask_column: list[str | None] | None = _key("columns of 0/1 masks, one per target; null for none")
    max_seq_length: int | None = _key("longer sequences are left out; null: as long as the encoder takes")
    max_rows: MaxRows = _key("most sequences of each part, a subsample drawn with `random_seed`", MaxRows)
    emb_batch_size: int = _key("most sequences in an embedding batch", 128)
    batch_size: int = _key("sequences in a batch of the head's training", 128)
    num_epochs: int = _key("epochs of the head's training", 10)
    shuffle: bool = _key("shuffle the training examples at each epoch", True)
    random_seed: int = _key("seed of the head's weights, dropout and shuffling, and of `max_rows`", 1234)
    class_weights: Any = _key("`balanced`, or a weight per class (a list of such for several targets)")
    gradient_clip_val: float | None = _key("largest norm of a gradient; null: not clipped")
    patience: int | None = _key("epochs without improvement on val before the training stops; null: all epochs")
    val_fraction: float = _key("with patience, the share of train held out where there is no val part", 0.1)
    optim: dict[str, Any] = _key(
        "optimiser `name`, `lr` and its options, and its schedule `sched`", lambda: {"name": "adam", "lr": 1e-4}
    )
    head: str | None = field(default=None, metadata={"hidden": True})

    @property
    def masks(self) -> list[str | None]:
        """The mask column of each target."""
        return self.mask_column or [None] * len(self.target_column)

    @property
    def sizes(self) -> list[int | None]:
        """The declared number of classes of each target; None where it is not declared."""
        return [*self.target_sizes] if self.target_sizes else [self.num_classes] * len(self.target_column)

    def check(self, with_files: bool = True) -> None:
        """Raises ConfigError where a value is out of range, fields contradict one another, or say of no files."""
        where = f"task '{self.task_name}'"
        named = self.task_name.strip(" .") and len(self.task_name.encode()) <= MAX_NAME
        _need(bool(named), f"task_name: expected 1 to {MAX_NAME} characters, found '{self.task_name[:200]}'")
        _choice(f"{where}: class", self.level, LEVELS)
        _choice(f"{where}: task_type", self.task_type, KINDS)
        _need(
            bool(self.dataset_path) or not with_files,
            f"{where}: dataset_path is missing; give the folder of train/ and test/",
        )
        self._check_targets(where)
        for key, (least, most) in RANGES.items():
            value = getattr(self, key)
            _need(
                value is None or least <= value <= most,
                f"{where}: {key} is {value}, expected at least {least}"
                + (f" and at most {most}" if most < INF else ""),
            )
        for part, rows in vars(self.max_rows).items():
            _need(rows is None or rows >= 1, f"{where}: max_rows.{part} is {rows}, expected at least 1")

    def _check_targets(self, where: str) -> None:
        """The columns of labels, and what is declared of each."""
        _need(bool(self.target_column), f"{where}: target_column is missing; name the column of the labels")
        targets = len(self.target_column)
        for key, values in (("target_sizes", self.target_sizes), ("mask_column", self.mask_column)):
            fits = values is None or len(values) == targets
            found = 0 if values is None else len(values)
            _need(fits, f"{where}: {key} has {found} entries for {targets} target columns; give one for each")
        for first, second in combinations(self.target_column, 2):
            name = metric_name(second)
            remedy = f"both become '{name}' in metric names; rename one"
            _need(metric_name(first) != name, f"{where}: target_column: {first} and {second} {remedy}")
        one = self.level == "token" or targets == 1
        _need(one, f"{where}: a sequence-level task has one target_column, found {targets}; make it several tasks")
        counts = self.num_classes is None or (self.target_sizes or [self.num_classes]) == [self.num_classes] * targets
        _need(counts, f"{where}: num_classes {self.num_classes} contradicts target_sizes {self.target_sizes}")
        unmasked = self.level == "token" or self.mask_column is None
        _need(unmasked, f"{where}: mask_column is for token-level tasks; leave it out")
        classes = self.task_type == "classification"
        _need(classes or self.class_weights is None, f"{where}: class_weights are for classification; leave them out")
        for size in self.sizes if classes else []:
            _need(size is None or size >= 2, f"{where}: a target of {size} classes, expected at least 2")


@dataclass
class Logging:
    """Where results go beside MLflow, and what is made of them."""

    wandb: str = _key("W&B run of a measurement on the command line: `online`, `offline` or `disabled`", "disabled")
    project: str = _key("W&B project of that run", "downstream-validation")
    entity: str | None = _key("W&B user or team; null: the account's default")
    tags: list[str] = _key("tags of the W&B run", list)
    tensorboard: str | None = _key("folder for TensorBoard's files, from the command line; null: none")
    figures: bool = _key("make pictures, and `report.html`", True)
    journal: str | None = _key(
        "folder where what MLflow is sent is written first, and stays; null: `<store>/journal`, until all has arrived"
    )

    def check(self) -> None:
        """Raises ConfigError where a value is not one that W&B or a file system takes."""
        if self.wandb in BOOLEANS:
            why = f"'{self.wandb.lower()}', which YAML reads for on, off, yes and no; for off, write disabled"
            raise ConfigError(f"logging.wandb: expected one of {', '.join(WANDB_MODES)}, found {why}")
        _choice("logging.wandb", self.wandb, WANDB_MODES)
        for key in ("tensorboard", "journal"):
            folder = getattr(self, key)
            named = folder is None or (folder.strip() and folder not in BOOLEANS)
            _need(bool(named), f"logging.{key}: expected a folder, or null, found '{folder}'")
        project = "expected 1 to 128 characters without / \\ # ? % :"
        fits = 0 < len(self.project) <= 128 and not re.search(r"[/\\#?%:]", self.project)
        _need(fits, f"logging.project: {project}, found '{self.project[:200]}'")
        for tag in self.tags:
            _need(0 < len(tag) <= 64, f"logging.tags: expected 1 to 64 characters in a tag, found '{tag[:100]}'")


@dataclass
class Config:
    """The whole section: the tasks, and how embeddings are made and kept.

    `notes` says what unusual keys of the file were taken for.
    """

    enabled: bool = _key("the callback measures; the command line always does", True)
    dataset: list[Task] = _key("the task, or a list of tasks", list)
    device: str = _key("`auto`, `cpu`, `cuda`, `cuda:1` or `mps`", "auto")
    precision: str = _key("`auto` (bf16 where a GPU has it, else fp32), `fp32`, `bf16` or `fp16`", "auto")
    layer: int | None = _key("hidden states to take: 0 the token embeddings, -2 the last layer but one; null: the last")
    max_batch_tokens: int | None = _key("token budget of an embedding batch; null: by kind of device")
    embedding_dtype: str = _key("how embeddings are stored: `float32` or `float16`", "float32")
    store: str = _key("folder of stored embeddings and heads", "~/.cache/downstream-validation")
    memory_budget: str = _key("embeddings beyond this are read from disk as they are used", "1GB")
    architecture: str | None = _key("Hugging Face folder or id of a `.ckpt` that does not describe itself")
    model_factory: str | None = _key(
        "`my_package.OwnModel`: the class, or a function, that makes a model that is no class of transformers; "
        "called with the stored configuration"
    )
    trust_pickle: bool = _key("unpickle a `.ckpt` as it is, with the code that it names", False)
    every_n_validations: int = _key("the callback measures at the first validation and then at every n-th", 1)
    on_start: bool = _key("the callback measures before the first training step too, at step 0", False)
    on_end: bool = _key("the callback measures at the end of training, unless the last validation just did", False)
    on_error: str = _key("when a measurement of the callback fails: `warn` and train on, or `raise`", "warn")
    save: bool = _key("the callback writes a `.ckpt` for each measurement, and measures that", False)
    child_runs: bool = _key("each measurement of the callback has an MLflow run of its own too, as a child", False)
    keep_embeddings: bool = _key("the callback keeps embeddings of live weights in `store`", False)
    timeout: float = _key("seconds that the ranks of a training wait for one another in the callback", 7200.0)
    logging: Logging = _key("where results go beside MLflow, and what is made of them", Logging)
    is_list: bool = field(default=False, metadata={"hidden": True})
    notes: list[str] = field(default_factory=list, metadata={"hidden": True}, compare=False)

    @property
    def tasks(self) -> Task | list[Task]:
        """What `validate` takes: a task alone has plain metric names, in a list they carry its name."""
        return self.dataset if self.is_list else self.dataset[0]

    @property
    def title(self) -> str:
        """The tasks' names, or how many there are."""
        names = [task.task_name for task in self.dataset]
        return ", ".join(names) if len(names) <= 2 else f"{len(names)} tasks"

    @property
    def metrics(self) -> list[Metric]:
        """What a measurement may give: of each task the loss, then every metric of each target; without values."""
        found = []
        for task in self.dataset:
            name = task.task_name if self.is_list else ""
            found += [Metric(name, "", LOSS)]
            found += [Metric(name, column, kind) for column in task.target_column for kind in OF_KIND[task.task_type]]
        return found

    @property
    def headlines(self) -> list[str]:
        """The names of the metrics to show where there is room for one of each target."""
        return [metric.key for metric in self.metrics if metric.is_headline]

    @property
    def memory_bytes(self) -> int:
        """`memory_budget` in bytes."""
        return parse_bytes(self.memory_budget)

    def check(self) -> None:
        """Raises ConfigError where a value is out of range, or two tasks contradict one another."""
        _choice("device", self.device.split(":")[0], DEVICES)
        _choice("precision", self.precision, PRECISIONS)
        _choice("embedding_dtype", self.embedding_dtype, STORED_DTYPES)
        _choice("on_error", self.on_error, ON_ERROR)
        every = self.every_n_validations
        _need(every >= 1, f"every_n_validations is {every}, expected at least 1")
        _need(0 < self.timeout < 10**7, f"timeout is {self.timeout}, expected more than 0 and less than 10 million")
        budget = self.max_batch_tokens
        _need(budget is None or budget >= 1, f"max_batch_tokens is {budget}, expected at least 1")
        parse_bytes(self.memory_budget)
        self.logging.check()
        for task in self.dataset:
            task.check()
        check_names(self.dataset)
        targets = sorted({task.infer_target for task in self.dataset})
        _need(
            len(targets) <= 1,
            f"infer_target differs between tasks ({', '.join(targets)}); one checkpoint has one",
        )
        if self.enabled:  # a file for a model that is not here may have the section, switched off
            refuse_reference(targets[0], "infer_target", ENCODERS)


def check_names(tasks: Sequence[Task]) -> None:
    """Raises ConfigError where there is no task, or two have one name in metric names."""
    _need(bool(tasks), "dataset is missing; give a task, or a list of tasks")
    names = [task.task_name for task in tasks]
    double = sorted({name for name in names if names.count(name) > 1})
    _need(not double, f"task_name '{(double or [''])[0]}' is used twice; give each task a name of its own")
    for first, second in combinations(names, 2):
        same = metric_name(first) == metric_name(second)
        _need(not same, f"task_name: '{first}' and '{second}' become one in metric names; rename one")


def parse_bytes(text: str) -> int:
    """Bytes in `500MB`, `2GB`, `1.5GiB` or a plain number. Raises ConfigError for anything else."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]?I?B?)\s*", text.upper())
    if not match or match[2] not in BYTE_UNITS:
        raise ConfigError(f"memory_budget: expected a size such as 500MB or 2GB, found '{text}'")
    return int(float(match[1]) * BYTE_UNITS[match[2]])


def _choice(key: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ConfigError(f"{key}: expected one of {', '.join(known)}, found '{value}'{nearest(value, known)}")


def _need(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)
