"""Whatever is wrong with the input: one line that says so, exit code 2, nothing half-written.

What can be found before anything is embedded is found before a run is begun; the rest leaves a run that is FAILED.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from mlflow import MlflowClient
from mlflow.entities import ViewType
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, EsmForMaskedLM

from pipeline.__main__ import main
from pipeline.encoders.description import DESCRIPTION, describe
from tests.support.data import write_csv
from tests.support.lab import ALONE
from tests.support.programs import ROOT

Change = Callable[[Path], object]
STAGES = ["load", "embed", "train_head", "score"]
BEFORE = ["config", "ckpt", "load"]
NUMBER = {"class": "sequence", "task_type": "regression", "target_column": "value"}
PLACE = {"class": "sequence", "task_type": "classification", "target_column": "place", "num_classes": 2}
STATE = {"class": "token", "task_type": "classification", "target_column": "state", "target_sizes": 2}
MASKED = {**STATE, "mask_column": "seen"}
PROFILE = {"class": "token", "task_type": "regression", "target_column": "profile"}
ALIKE = {**STATE, "target_column": ["x_balanced", "x"], "target_sizes": [2, 2]}
TWO_TARGETS = {**STATE, "target_column": ["a/b", "a_b"], "target_sizes": [2, 2]}
ROWS = [
    {
        "note": "two\nlines" if index == 0 else "",
        "sequence": sequence,
        "value": str(index / 2),
        "place": ("inner", "outer")[index % 2],
        "state": "HHCCHHCC",
        "a/b": "HHCCHHCC",
        "a_b": "HHCCHHCC",
        "seen": "11111111",
        "profile": "[0.1, null, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8]",
    }
    for index, sequence in enumerate(["MKTAYIAK", "GVLSEDWR", "PLAGNQTC", "AAGGVVLL"])
]


class Job:
    """A measurement that works (`test_the_job_works_unspoilt`), to be spoilt in one place."""

    def __init__(self, folder: Path, model_folder: Callable[..., Path], tracking: str) -> None:
        self.folder, self.model_folder, self.client = folder, model_folder, MlflowClient(tracking)
        self.ckpt = str(model_folder("esm"))
        self.config = folder / "config.yaml"
        self.arguments: list[str] = []
        self.task: dict[str, Any] = {"num_epochs": 1, **ALONE, "dataset_path": str(folder / "data"), **NUMBER}
        self.section: dict[str, Any] = {"store": str(folder / "store"), "device": "cpu"}
        for part in ("train", "test"):
            self.write(part, ROWS)

    def csv(self, part: str) -> Path:
        return self.folder / "data" / part / "x000.csv"

    def write(self, part: str, rows: list[dict[str, str]]) -> None:
        """Row 0 stands on lines 2 and 3, row 1 on line 4, then a blank line, row 2 on line 6, row 3 on line 7."""
        lines = write_csv(self.csv(part), rows).read_text().split("\n")
        self.csv(part).write_text("\n".join([*lines[:4], "", *lines[4:]]))

    def set(self, **keys: Any) -> None:
        """Sets keys of the task; they come first, so that they stand on line 4 of the configuration."""
        self.task = {**keys, **{key: value for key, value in self.task.items() if key not in keys}}

    def weights(self, kind: str = "esm") -> Path:
        """A copy of a model, to be damaged."""
        self.ckpt = str(shutil.copytree(self.model_folder(kind), self.folder / "weights"))
        return self.folder / "weights"

    def command(self) -> list[str]:
        if not self.config.exists():
            section = {"dataset": self.task, **self.section}
            self.config.write_text(yaml.safe_dump({"model": {"dwnstr_task_validation": section}}, sort_keys=False))
        return ["main", f"--ckpt={self.ckpt}", f"--config={self.config}", *self.arguments]

    def assert_failed(self, stage: str, message: str) -> None:
        """The run is FAILED and says why, as does the nested run of `stage`; nothing is half-written.

        `stage` may also be `config`, `ckpt` or `load`, before there is a run, or `given`: it is of `mlflow run`.
        """
        runs = self.client.search_runs(["0"], run_view_type=ViewType.ALL)
        nested = {run.info.run_name: run for run in runs if "mlflow.parentRunId" in run.data.tags}
        failed = [run for run in runs if run.info.status == "FAILED"]
        assert len(runs) - len(nested) == (stage not in BEFORE)
        begun = STAGES[: STAGES.index(stage) + 1] if stage in STAGES and stage not in BEFORE else []
        assert {name: run.info.status for name, run in nested.items()} == {
            name: "FAILED" if name == stage else "FINISHED" for name in begun
        }
        assert len(failed) == (0 if stage in BEFORE else 1 if stage == "given" else 2)
        assert all(message in run.data.tags["mlflow.note.content"] for run in failed)
        left = [path.name for path in (self.folder / "store").rglob("*") if path.is_file() and path.name != "lock"]
        finished = ["embeddings"] if stage in ("train_head", "score") else []
        assert bool([name for name in left if name.startswith(("manifest", "shard"))]) == bool(finished)
        assert not [name for name in left if name.endswith(".tmp")]
        assert any(name.endswith(".safetensors") for name in left) == (stage == "score")


@pytest.fixture
def job(
    tmp_path: Path, model_folder: Callable[..., Path], tracking: str, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Job]:
    """The job, with a database of its own; `main` takes over signals, which are given back."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # as the variable does, read at import
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield Job(tmp_path, model_folder, tracking)
    for number, handler in before.items():
        signal.signal(number, handler)


Refused = Callable[..., None]


@pytest.fixture
def refused(job: Job, capsys: pytest.CaptureFixture[str]) -> Refused:
    """Runs the job and makes sure that it is refused, in `stage`, with a line that holds all of `expected`."""

    def check(stage: str, *expected: str) -> None:
        code = main(job.command())
        message = error_line(capsys.readouterr().err)
        assert code == 2
        for text in expected:
            assert text in message + "\n"  # with "\n" a text says that nothing follows
        job.assert_failed(stage, message)

    return check


def error_line(stderr: str) -> str:
    """The one error in what was printed, without the word: a line, or one for each of several defects below it."""
    lines = re.findall(r"^error: (.*(?:\n  .*)*)", stderr, re.MULTILINE)
    assert len(lines) == 1, stderr
    assert "Traceback" not in stderr
    return str(lines[0])


def test_the_job_works_unspoilt(job: Job) -> None:
    tasks: list[dict[str, Any]] = [NUMBER, PLACE, STATE, MASKED, PROFILE]
    job.section["dataset"] = [{**job.task, **task, "task_name": str(index)} for index, task in enumerate(tasks)]
    assert main(job.command()) == 0


NUMBERS = "a JSON list of 8 numbers or nulls, found"
CELLS = [
    (NUMBER, "train", 6, "value", "many", "a number, found 'many'"),
    (NUMBER, "train", 2, "value", "nan", "a number, found 'nan'"),
    (NUMBER, "train", 7, "value", "-inf", "a number, found '-inf'"),
    (NUMBER, "test", 4, "value", "", "a number, found ''"),
    (NUMBER, "train", 6, "sequence", "", "a sequence, found ''"),
    (PLACE, "train", 7, "place", "", "a class name, found ''"),
    (PLACE, "test", 7, "place", "nowhere", "one of the 2 classes inner, outer, found 'nowhere'"),
    (STATE, "train", 6, "state", "HHCCHHC", "8 characters, one per residue, found '7: HHCCHHC'"),
    (STATE, "train", 6, "state", "HHCCHHCCC", "8 characters, one per residue, found '9: HHCCHHCCC'"),
    (STATE, "test", 7, "state", "HHCCHHCX", "one of the 2 classes C, H, found 'X'"),
    (MASKED, "train", 6, "seen", "11112111", "a mask of 0 and 1, found '2'"),
    (MASKED, "test", 2, "seen", "1111111", "8 characters, one per residue, found '7: 1111111'"),
    (PROFILE, "train", 6, "profile", "[1, 2, 3, 4, 5, 6, 7]", f"{NUMBERS} 'a list of 7'"),
    (PROFILE, "train", 6, "profile", '[1, 2, 3, 4, 5, 6, 7, "x"]', f"{NUMBERS} 'x'"),
    (PROFILE, "train", 6, "profile", "[1, 2, 3, 4, 5, 6, 7, true]", f"{NUMBERS} 'True'"),
    (PROFILE, "train", 6, "profile", "[1, 2, 3, 4, 5, 6, 7, NaN]", f"{NUMBERS} 'nan'"),
    (PROFILE, "train", 6, "profile", f"[1, 2, 3, 4, 5, 6, 7, 1{400 * '0'}]", NUMBERS),
    (PROFILE, "train", 6, "profile", 100_000 * "[", NUMBERS),
    (PROFILE, "test", 4, "profile", "0.1 0.2", f"{NUMBERS} '0.1 0.2'"),
]


@pytest.mark.parametrize(("task", "part", "line", "column", "text", "expected"), CELLS)
def test_a_bad_cell(
    task: dict[str, Any], part: str, line: int, column: str, text: str, expected: str, job: Job, refused: Refused
) -> None:
    row = {2: 0, 4: 1, 6: 2, 7: 3}[line]
    job.set(**task)
    job.write(part, [{**values, column: text} if index == row else values for index, values in enumerate(ROWS)])
    refused("load", f"{job.csv(part)}:{line}: column '{column}': expected {expected}")


def test_only_unknown_tokens(job: Job, refused: Refused) -> None:
    job.csv("train").write_text(job.csv("train").read_text().replace("PLAGNQTC", "11111111"))
    expected = "expected a sequence with characters the encoder knows, found '11111111'"
    refused("embed", f"{job.csv('train')}:6: column 'sequence': {expected}")


def replace(old: str, new: str) -> Change:
    """Changes the first place where `old` stands in a file; characters up to ÿ are written as single bytes."""
    return lambda path: path.write_bytes(path.read_bytes().replace(old.encode(), new.encode("latin-1"), 1))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


LONG = 20_000 * "L"
FILES: list[tuple[dict[str, Any], Change, str]] = [
    (
        NUMBER,
        Path.unlink,
        "expected a CSV file at {path}, found none (No such file or directory); the files of a part lie in",
    ),
    (NUMBER, lambda path: path.write_text(""), "{path}: expected a header row, found an empty file\n"),
    (NUMBER, lambda path: path.write_text("sequence,value\n"), "{path}: expected rows below the header, found none\n"),
    (
        NUMBER,
        replace("value", "valu"),
        "{path}:1: expected a column 'value', found no such column; did you mean 'valu'",
    ),
    (NUMBER, replace("note", "value"), "{path}:1: expected a column 'value', found it twice\n"),
    (NUMBER, replace(",1.0,", ",1,0,"), "{path}:6: expected 9 fields as in the header, found 10\n"),
    (NUMBER, replace("PLAG", '"PLAG'), "{path}:6: "),
    (NUMBER, replace("note", "nÄte"), "{path}:1: not a CSV file in UTF-8"),
    (NUMBER, replace("PLAG", "PLÄG"), "{path}:6: not a CSV file in UTF-8"),
    (NUMBER, replace("PLAG", LONG + "Ä"), "{path}:6: not a CSV file in UTF-8"),
    (NUMBER, replace(",PLAGNQTC,1.0", LONG + "Ä,PLAGNQTC,many"), "{path}:6: "),
    (PLACE, replace("inner", "a"), "{path}: column 'place': expected at most 2 classes, found 3: a, inner, outer\n"),
    (STATE, replace("CC,", "EE,"), "{path}: column 'state': expected at most 2 classes, found 3: C, E, H\n"),
    (MASKED, lambda path: [replace("1111", "0000")(path) for _ in range(8)], "every position of train is masked out\n"),
    ({"max_seq_length": 3}, Path.stat, "{path}: expected sequences of at most 3 in train, the shortest of 4 has 8"),
]


@pytest.mark.parametrize(("task", "change", "expected"), FILES)
def test_a_bad_file(task: dict[str, Any], change: Change, expected: str, job: Job, refused: Refused) -> None:
    job.set(**task)
    change(job.csv("train"))
    refused("load", str(job.csv("train")), expected.format(path=job.csv("train")))


def test_the_second_file_of_a_range_is_named(job: Job, refused: Refused) -> None:
    job.set(dataset={"train": "x[000..001]", "test": "x000"})
    second = job.csv("train").with_name("x001.csv")
    second.write_text(job.csv("train").read_text().replace("1.5", "many"))
    refused("load", f"{second}:7: column 'value': expected a number, found 'many'; correct or remove the row\n")


def test_several_defects_are_one_error(job: Job, refused: Refused, capsys: pytest.CaptureFixture[str]) -> None:
    """Of several tasks, on a line each: in the terminal, in MLflow (see `assert_failed`), in JSON and for `doctor`."""
    tasks: list[dict[str, Any]] = [NUMBER, STATE]
    job.section["dataset"] = [{**job.task, **task, "task_name": str(index)} for index, task in enumerate(tasks)]
    job.write("train", [{**ROWS[0], "value": "many", "sequence": ""}, *ROWS[1:]])
    job.write("test", [*ROWS[:3], {**ROWS[3], "state": "HH"}])
    places = [f"{job.csv('train')}:2: column 'sequence'", f"{job.csv('train')}:2: column 'value'"]
    places.append(f"{job.csv('test')}:7: column 'state'")
    refused("load", "3 defects in the data:\n", *[f"\n  {number}. {place}: " for number, place in enumerate(places, 1)])
    assert main([*job.command(), "--json"]) == 2
    printed = capsys.readouterr()
    assert json.loads(printed.out) == {"error": error_line(printed.err)}
    assert main(["doctor", *job.command()[1:]]) == 2
    said = capsys.readouterr().out
    assert [f"data          PROBLEM: {place}: " in said for place in places] == [True] * 3


TWINS = [{**NUMBER, "dataset_path": "data", "task_name": name} for name in ("a/b", "a_b")]
SETTINGS: list[tuple[str, Any, str, str]] = [
    ("task", {"num_epoch": 3}, "config", "{path}:4: unknown key 'num_epoch'; did you mean 'num_epochs'?\n"),
    ("task", {"num_epochs": "many"}, "config", "{path}:4: num_epochs: Value 'many'"),
    ("task", {"num_epochs": -1}, "config", "task 'downstream': num_epochs is -1, expected at least 0\n"),
    ("task", {"task_name": ""}, "config", "task_name"),
    ("task", {"task_name": ".."}, "config", "task_name"),
    ("task", {"task_name": 300 * "x"}, "config", "task_name"),
    ("task", {"random_seed": 10**30}, "config", "random_seed"),
    ("task", {**PLACE, "num_classes": 1}, "config", "task 'downstream': a target of 1 classes, expected at least 2\n"),
    ("task", {**MASKED, "mask_column": ["seen", None]}, "config", "mask_column has 2 entries for 1 target columns"),
    ("task", {"optim": {"name": "adom"}}, "ckpt", "optim.name: unknown optimiser 'adom'"),
    ("task", {"optim": {"momentum": 1}}, "ckpt", "'momentum'"),
    ("task", TWO_TARGETS, "config", "target_column: a/b and a_b both become 'a_b' in metric names; rename one\n"),
    ("task", ALIKE, "config", "x_balanced and x both have a metric test_x_balanced_accuracy; rename one\n"),
    ("section", {"dataset": TWINS}, "config", "a/b"),
    ("section", {"dataset": None}, "config", "dataset: expected a task or a list of tasks, found None\n"),
    ("section", {"dataset": []}, "config", "dataset is missing; give a task, or a list of tasks\n"),
    ("section", {"devise": "cpu"}, "config", "unknown key 'devise'; did you mean 'device'?\n"),
    ("section", {"device": "gpu"}, "config", "device: expected one of auto, cpu, cuda, mps, found 'gpu'"),
    ("section", {"device": "${nowhere}"}, "config", "Interpolation key 'nowhere' not found"),
    ("section", {"memory_budget": "much"}, "config", "memory_budget: expected a size such as 500MB or 2GB, found 'm"),
    ("section", {"store": "/dev/null/store"}, "config", "store: '/dev/null/store' cannot be written"),
    ("text", "model:\n  dwnstr_task_validation: [\n", "config", "line 3, column 1"),
    ("text", "model: {}\nmodel: {}\n", "config", "found duplicate key model"),
    ("text", "model: {}\n", "config", "{path}: expected a mapping model.dwnstr_task_validation, found none"),
    ("arguments", ["--config=x.yaml"], "config", "expected a YAML file, found 'x.yaml' (No such file or directory)\n"),
    ("arguments", ["--overrides=device"], "config", "overrides: expected key=value, found 'device'\n"),
    ("arguments", ["--overrides=device='cpu"], "config", "overrides: No closing quotation"),
    ("arguments", ["--overrides=dataset.num_epoch=1"], "config", "overrides: unknown key 'num_epoch'"),
    ("arguments", ["--chekpoint=x"], "config", "unrecognized arguments: --chekpoint=x"),
    ("arguments", ["--tracking-uri=nowhere://x"], "config", "MLflow at 'nowhere://x' cannot be used"),
    ("ckpt", "", "ckpt", "ckpt: "),
    ("ckpt", "/nowhere/esm", "ckpt", "ckpt: '/nowhere/esm' does not exist"),
    ("ckpt", "sample/chekpoint", "ckpt", "ckpt: 'sample/chekpoint' does not exist"),
    ("ckpt", "esm1nv.nemo", "ckpt", "ckpt: 'esm1nv.nemo' does not exist"),
    ("ckpt", "data/train/x000.csv", "ckpt", "ckpt: expected a model folder or a file of weights, found the file "),
    ("ckpt", "runs:/0123/model", "ckpt", "ckpt: 'runs:/0123/model' cannot be downloaded"),
    ("task", {"infer_target": "prott5"}, "ckpt", "infer_target 'prott5' is for t5 or mt5, but '{ckpt}' is esm"),
    ("task", {"infer_target": "nowhere.Model"}, "ckpt", "infer_target: 'nowhere.Model' is neither a short name nor"),
    ("task", {"infer_target": "pathlib.Model"}, "ckpt", "module 'pathlib' has no attribute 'Model'"),
]


@pytest.mark.parametrize(("what", "value", "stage", "expected"), SETTINGS)
def test_a_bad_setting(what: str, value: Any, stage: str, expected: str, job: Job, refused: Refused) -> None:
    shutil.copytree(job.ckpt, "a model that nobody asked for")
    if what == "task":
        job.set(**value)
    elif what == "section":
        job.section.update(value)
    elif what == "text":
        job.config.write_text(value)
    else:
        setattr(job, what, value)
    refused(stage, expected.replace("{path}", str(job.config)).replace("{ckpt}", job.ckpt))


class Custom:
    """What `weights_only=True` does not unpickle."""


def tensor(value: torch.Tensor | None) -> Change:
    """Sets one of the encoder's weights, or takes it away."""

    def change(path: Path) -> None:
        state = load_file(path)
        name = next(name for name in state if name.endswith("layer.1.attention.self.query.weight"))
        rest = {key: kept for key, kept in state.items() if key != name}
        save_file(rest if value is None else {**rest, name: value}, path, metadata={"format": "pt"})

    return change


def stored(content: object) -> Change:
    return lambda path: torch.save(content, path)


WEIGHTS: list[tuple[str, Change, str]] = [
    ("model.safetensors", truncate, "model.safetensors' is damaged (Error while des"),
    ("model.safetensors", Path.unlink, "no file named model.safetensors"),
    ("model.safetensors", tensor(None), "lacks weights of the encoder"),
    ("model.safetensors", tensor(None), "layer.1.attention.self.query.weight"),
    ("model.safetensors", tensor(torch.zeros(3, 3)), "layer.1.attention.self.query.weight"),
    ("config.json", truncate, "config.json"),
    ("config.json", Path.unlink, "expected one checkpoint in '{ckpt}', found none\n"),
    ("vocab.txt", Path.unlink, "tokenizer"),
    ("epoch=3.ckpt", stored({"state_dict": {}}), "'{ckpt}' does not say what model it holds"),
    ("epoch=3.ckpt", stored({"state_dict": {}, "hyper_parameters": Custom()}), "does not say what model it holds"),
    ("epoch=3.ckpt", stored([1]), "'{ckpt}': expected a Lightning .ckpt, found a list"),
    ("epoch=3.ckpt", lambda path: [do(path) for do in (stored({}), truncate)], "'{ckpt}' is damaged"),
    ("epoch=3.ckpt", Path.touch, "'{ckpt}' is damaged"),
]


@pytest.mark.parametrize(("name", "change", "expected"), WEIGHTS)
def test_bad_weights(name: str, change: Change, expected: str, job: Job, refused: Refused) -> None:
    folder = job.weights()
    change(folder / name)
    job.ckpt = str(folder / name if name.endswith(".ckpt") else folder)
    refused("ckpt", "ckpt: ", expected.replace("{ckpt}", job.ckpt))


def write(content: str | bytes) -> Change:
    return lambda path: path.write_bytes(content if isinstance(content, bytes) else content.encode("latin-1"))


STEPS: list[tuple[str | bytes, str]] = [
    ("", "expected a JSON object, found no JSON"),
    ("{", "expected a JSON object, found no JSON"),
    (b"\xff\xfe\x00", "expected a JSON object, found no JSON"),
    (100_000 * "[", "expected a JSON object, found no JSON"),
    ("[]", "expected a JSON object, found []"),
    ("null", "expected a JSON object, found null"),
    ("{}", "global_step: expected a whole number from 0 on, found None"),
    ('{"global_step": "many"}', "global_step: expected a whole number from 0 on, found 'many'"),
    ('{"global_step": [3]}', "global_step: expected a whole number from 0 on, found [3]"),
    ('{"global_step": 1.5}', "global_step: expected a whole number from 0 on, found 1.5"),
    ('{"global_step": 1e999}', "global_step: expected a whole number from 0 on, found inf"),
    ('{"global_step": true}', "global_step: expected a whole number from 0 on, found True"),
    ('{"global_step": -3}', "global_step: expected a whole number from 0 on, found -3"),
    (f'{{"global_step": 1{30 * "0"}}}', "global_step: expected a whole number from 0 on, found 1000"),
]


@pytest.mark.parametrize(("content", "expected"), STEPS)
def test_a_trainer_state_without_a_step(content: str | bytes, expected: str, job: Job, refused: Refused) -> None:
    """The trainer writes it last: where it is broken the weights may be too, and the step on the curve is unknown."""
    path = job.weights() / "trainer_state.json"
    write(content)(path)
    refused("ckpt", f"ckpt: '{path}'", expected, "; take another checkpoint, or delete the file")


def setting(**values: Any) -> Change:
    return lambda path: path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def regular_expression(path: Path) -> None:
    """One that takes more steps than the library allows on twenty letters."""
    content = json.loads(path.read_text())
    content["pre_tokenizer"]["pattern"] = {"Regex": r"((.|.)+)+[^\x00-\xff]"}
    path.write_text(json.dumps(content))


MALFORMED: list[tuple[str, str, Change, tuple[str, ...]]] = [
    *[
        (kind, name, write(content), (f"{name}': expected a JSON object, found ",))
        for kind, name in (("esm", "config.json"), ("esm", "tokenizer_config.json"), ("smiles_bart", "tokenizer.json"))
        for content in ("", "[]", "null", b"\xff\xfe\x00", '{"a": ')
    ],
    ("smiles_bart", "special_tokens_map.json", write("[]"), ("special_tokens_map.json': expected a JSON object",)),
    ("smiles_bart", "tokenizer.json", regular_expression, ("tokenizer ", "cannot be made tokens (Onig: Regex search")),
    ("esm", "config.json", write("{}"), ("model_type",)),
    *[
        ("esm", "config.json", setting(**{key: value}), (key, f"found {value}", "written with the model"))
        for key, value in (("num_hidden_layers", 10**9), ("num_hidden_layers", -1), ("num_labels", 10**9))
    ],
    ("prott5", "config.json", setting(num_layers=10**9), ("num_layers: expected 0 to 100, found 1000000000",)),
    ("smiles_bart", "config.json", setting(decoder_layers=10**9), ("decoder_layers: expected 0 to 100",)),
    *[
        (
            "esm",
            "config.json",
            setting(**{key: value}),
            ("the configuration describes a model of more than", str(value)),
        )
        for key in ("hidden_size", "intermediate_size", "vocab_size")
        for value in (10**6, 10**12)
    ],
    ("esm", "config.json", setting(max_position_embeddings=10**10), ("'position_ids' of shape (1, 10000000000)",)),
    ("esm", "config.json", setting(vocab_size=-1), ("cannot be loaded",)),
    ("esm", "config.json", setting(hidden_size="wide"), ("cannot be loaded",)),
    ("esm", "tokenizer_config.json", setting(model_max_length="far"), ("cannot be made tokens",)),
    ("esm", "vocab.txt", write(""), ("tokenizer EsmTokenizer: 'A' cannot be made tokens",)),
    ("esm", "vocab.txt", write(b"\xff\xfe\x00"), ("the tokenizer in '{ckpt}' cannot be loaded",)),
]


@pytest.mark.parametrize(("kind", "name", "change", "expected"), MALFORMED)
def test_a_malformed_file_beside_the_weights(
    kind: str, name: str, change: Change, expected: tuple[str, ...], job: Job, refused: Refused
) -> None:
    change(job.weights(kind) / name)
    refused("ckpt", "ckpt: ", *[text.replace("{ckpt}", job.ckpt) for text in expected])


def test_a_vocabulary_twice(job: Job, refused: Refused) -> None:
    path = job.weights() / "vocab.txt"
    path.write_text(2 * (path.read_text() + "\n"))
    refused("embed", "ckpt: the tokenizer: expected ids below 33, as the model has, found ")


def described(folder: Path, step: Any = 7, **config: Any) -> Path:
    """A `.ckpt` that describes itself, with changes."""
    model = EsmForMaskedLM.from_pretrained(folder)
    description = describe(model, AutoTokenizer.from_pretrained(folder), "")
    description["config"] = json.dumps({**json.loads(description["config"]), **config})
    content = {"state_dict": model.state_dict(), "global_step": step, DESCRIPTION: description}
    torch.save(content, folder / "epoch=3.ckpt")
    return folder / "epoch=3.ckpt"


DESCRIBED: list[tuple[dict[str, Any], str]] = [
    ({"num_hidden_layers": 10**9}, "'{ckpt}': num_hidden_layers: expected 0 to 100, found 1000000000"),
    ({"hidden_size": 10**6}, "'{ckpt}': the configuration describes a model of more than"),
    ({"step": "many"}, "'{ckpt}': global_step: expected a whole number from 0 on, found 'many'"),
    ({"step": 10**30}, "'{ckpt}': global_step: expected a whole number from 0 on, found 1000"),
]


@pytest.mark.parametrize(("changes", "expected"), DESCRIBED)
def test_a_ckpt_that_describes_what_it_is_not(
    changes: dict[str, Any], expected: str, job: Job, refused: Refused
) -> None:
    job.ckpt = str(described(job.weights(), **changes))
    refused("ckpt", "ckpt: ", expected.replace("{ckpt}", job.ckpt))


def test_a_tokenizer_that_lower_cases(job: Job, refused: Refused) -> None:
    """transformers' default for a BERT; the job works when that is done which the message says."""
    folder = job.weights("protbert")
    words = AutoTokenizer.from_pretrained(folder).get_vocab()
    for path in folder.glob("*token*"):
        path.unlink()
    (folder / "vocab.txt").write_text("\n".join(sorted(words, key=words.__getitem__)))
    remedy = (
        f"""write {{"do_lower_case": false}} to '{folder / "tokenizer_config.json"}'; 8 cells are like that, also """
    )
    refused("embed", "the tokenizer lower-cases sequences and the vocabulary has capitals", remedy)
    (folder / "tokenizer_config.json").write_text('{"do_lower_case": false}')
    assert main(job.command()) == 0


def test_tokens_that_are_not_characters(job: Job, refused: Refused) -> None:
    job.ckpt = str(job.model_folder("smiles_bart"))
    job.set(**STATE)
    for part in ("train", "test"):
        job.write(part, [{**values, "sequence": "CC(=O)Cl"} for values in ROWS])
    refused("embed", "one token per character, found 7 tokens for the 8 of 'CC(=O)Cl'")


@pytest.mark.parametrize("expected", ["x000.csv, found none", "expected key=value, found '-e'"])
def test_the_program(expected: str, job: Job) -> None:
    job.csv("train").unlink()
    job.arguments = ["--overrides=-e"] if "-e" in expected else []
    command = [sys.executable, "-m", "pipeline", *job.command()]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    message = error_line(ended.stderr)
    assert ended.returncode == 2
    assert expected in message
    job.assert_failed("config" if "-e" in expected else "load", message)


def test_mlflow_run(job: Job) -> None:
    """Under `mlflow run` there is a run before the program starts; the program says on it what was wrong."""
    job.command()
    parameters = {"ckpt": job.ckpt, "config": str(job.config), "overrides": "-e"}
    given = [argument for name, value in parameters.items() for argument in ("-P", f"{name}={value}")]
    command = [sys.executable, "-m", "mlflow", "run", ".", "--env-manager", "local", *given]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    ended = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PATH": path}, capture_output=True, text=True, check=False
    )
    assert ended.returncode != 0
    message = error_line(ended.stderr)
    assert message == "overrides: expected key=value, found '-e'"
    job.assert_failed("given", message)
