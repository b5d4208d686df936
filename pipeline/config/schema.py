"""The typed configuration: the keys of the section `model.dwnstr_task_validation`, their defaults and their checks.

`yaml_file.py` makes these classes from a file. Python users build them directly. Tasks are in `task.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from pipeline.config.background import Background
from pipeline.config.class_paths import ENCODERS, refuse_reference
from pipeline.config.engine import ENGINES, Ray, check_device
from pipeline.config.fields import DEVICES, check_choice, check_values, key, parse_bytes, require
from pipeline.config.task import Task, check_names
from pipeline.config.trackers import Logging
from pipeline.statistics.metrics import LOSS, Metric, metrics_of_kind

ON_ERROR = ("warn", "raise")
MODES = ("sharded", "blocking", "background")
PRECISIONS = ("auto", "fp32", "bf16", "fp16")
STORED_DTYPES = ("float32", "float16")
POOLINGS = ("mean", "cls", "last")


@dataclass
class Config:
    """The whole section: the tasks, and how embeddings are made and kept.

    `notes` has a line for each key of the file that was renamed or ignored.
    """

    enabled: bool = key("the callback measures; the command line always does", True)
    dataset: list[Task] = key("the task, or a list of tasks", list)
    device: str = key("`auto`, `cpu`, `cuda`, `cuda:1` or `mps`", "auto")
    precision: str = key(
        "`auto` (bf16 where a GPU has it, else fp32), `fp32`, `bf16` or `fp16`", "auto", choices=PRECISIONS
    )
    layer: int | None = key("hidden states to take: 0 the token embeddings, -2 the last layer but one; null: the last")
    pooling: str = key(
        "the embedding of a sequence: `mean` of its tokens' hidden states, `cls`, that of the special token before it, "
        "or `last`, that of its last token, which alone has seen all of it in a causal model",
        "mean",
        choices=POOLINGS,
    )
    compile: bool = key(
        "compile the layers of a Hugging Face model, which pays on a GPU for millions of tokens; in a training, and "
        "for a model of a class of your own, compile the model itself",
        False,
    )
    max_batch_tokens: int | None = key("token budget of an embedding batch; null: by kind of device", least=1)
    embedding_dtype: str = key("how embeddings are stored: `float32` or `float16`", "float32", choices=STORED_DTYPES)
    store: str = key("folder of stored embeddings and heads", "~/.cache/downstream-validation")
    memory_budget: str = key("embeddings beyond this are read from disk as they are used", "1GB")
    architecture: str | None = key("Hugging Face folder or id of a `.ckpt` that does not describe itself")
    baseline: str | None = key(
        "on the command line: `random_init` measures beside a checkpoint the same model with random weights, drawn "
        "from the first task's `random_seed`"
    )
    model_factory: str | None = key(
        "`my_package.OwnModel`: the class, or a function, that makes a model that is no class of transformers; "
        "called with the stored configuration"
    )
    weights: str | None = key(
        "the set of weights to take where a file holds several: its name, or `ema` for the average"
    )
    trust_remote_code: bool = key(
        "run the code that a model folder or hub id brings for a model of its own class", False
    )
    trust_pickle: bool = key("unpickle a `.ckpt` as it is, with the code that it names", False)
    every_n_validations: int = key("the callback measures at the first validation and then at every n-th", 1, least=1)
    mode: str = key(
        "how a training is measured: `sharded` shares a measurement out over its ranks, `blocking` leaves it to rank "
        "0, for which the others wait; with `background` a worker measures snapshots while training goes on",
        "sharded",
        choices=MODES,
    )
    background: Background = key("the worker of `mode: background`, and what it measures", Background)
    on_start: bool = key("the callback measures before the first training step too, at step 0", True)
    on_end: bool = key("the callback measures at the end of training, unless the last validation just did", False)
    on_error: str = key(
        "when a measurement of the callback fails: `warn` and train on, or `raise`", "warn", choices=ON_ERROR
    )
    save: bool = key("the callback writes a `.ckpt` for each measurement, and measures that", False)
    child_runs: bool = key("each measurement of the callback has an MLflow run of its own too, as a child", False)
    keep_embeddings: bool = key("the callback keeps embeddings of live weights in `store`", False)
    timeout: float = key("seconds that the ranks of a training wait for one another in the callback", 7200.0)
    engine: str = key(
        "on the command line and in `measure`: `local`, this process, or `ray`, which embeds with a pool of encoders "
        "on this machine or a cluster, and measures several checkpoints and tasks at once",
        "local",
        choices=ENGINES,
    )
    ray: Ray = key("the worker processes of `engine: ray`", Ray)
    logging: Logging = key("where results go beside MLflow, and what is made of them", Logging)
    is_list: bool = field(default=False, metadata={"hidden": True})
    notes: list[str] = field(default_factory=list, metadata={"hidden": True}, compare=False)

    @property
    def tasks(self) -> Task | list[Task]:
        """The tasks as `validate` takes them: the metric names of a list begin with the task's name."""
        return self.dataset if self.is_list else self.dataset[0]

    @property
    def title(self) -> str:
        """The tasks' names, or how many there are."""
        names = [task.task_name for task in self.dataset]
        return ", ".join(names) if len(names) <= 2 else f"{len(names)} tasks"

    @property
    def metrics(self) -> list[Metric]:
        """The metrics that a measurement may give, without values: for each task the loss, then its targets' own.

        Those of a target's probe follow its head's.
        """
        found = []
        for task in self.dataset:
            name = task.task_name if self.is_list else ""
            found += [Metric(name, "", LOSS)]
            for column in task.target_column:
                for probe in (False, True) if task.probe != "none" else (False,):
                    kinds = metrics_of_kind(task.task_type, task.level)
                    found += [Metric(name, column, kind, probe=probe) for kind in kinds]
        return found

    def has_metric(self, name: str) -> bool:
        """Whether the metric that is logged as `name` is a downstream metric."""
        return any(name.startswith(metric.stem) for metric in self.metrics)

    @property
    def headlines(self) -> list[str]:
        """The names of the metrics to show where there is room for one of each target: the head's and the probe's."""
        return [metric.key for metric in self.metrics if metric.is_headline]

    @property
    def memory_bytes(self) -> int:
        """`memory_budget` in bytes."""
        return parse_bytes(self.memory_budget)

    def check(self, with_files: bool = True) -> None:
        """Raises ConfigError where a value is out of range, or two tasks contradict one another.

        `with_files` requires the folders of the CSV files too.
        """
        check_choice("device", self.device.split(":")[0], DEVICES)
        check_values(self)
        known = self.baseline in (None, "random_init")
        require(known, f"baseline: expected random_init or null, found '{self.baseline}'")
        require(0 < self.timeout < 10**7, f"timeout is {self.timeout}, expected more than 0 and less than 10 million")
        parse_bytes(self.memory_budget)
        self.logging.check([task.task_name for task in self.dataset])
        self.ray.check()
        if self.engine == "ray":
            check_device(self.device)
            why = "engine ray has the encoder in other processes, which log no model; set engine: local"
            require(not self.logging.log_model, f"logging.log_model: {why}, or leave log_model out")
        both = self.mode == "background" and self.save
        require(not both, "save: mode background writes snapshots itself; leave save out, and set background.keep_best")
        for task in self.dataset:
            task.check(with_files)
        check_names(self.dataset)
        self.background.check(metric.key for metric in self.metrics)
        targets = sorted({task.infer_target for task in self.dataset})
        differs = f"infer_target differs between tasks ({', '.join(targets)})"
        require(len(targets) <= 1, f"{differs}; a checkpoint has one architecture, give it in every task")
        if self.enabled:  # a file for a model that is not supported may have the section, switched off
            refuse_reference(targets[0], "infer_target", ENCODERS)
