"""Models that are served: over HTTP and in Python they answer what the predictions of the measurement say."""

from __future__ import annotations

import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, chdir
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from mlflow import MlflowClient
from mlflow.artifacts import download_artifacts
from mlflow.entities import LoggedModel
from mlflow.models import Model

from pipeline import EncoderOptions, Scores, Store, Task, open_encoder, read_config, validate
from pipeline.__main__ import main
from pipeline.config.schema import Config
from pipeline.config.trackers import Logging
from pipeline.encoders.protocol import Encoder
from pipeline.errors import ConfigError, DataError
from pipeline.heads.architectures import MLP
from pipeline.load import load
from pipeline.serving.models import log_models
from pipeline.serving.predictor import Predictor
from pipeline.store.temporary import link_folder
from pipeline.tracking.journal import Journal
from pipeline.tracking.journal_run import JournalRun
from pipeline.tracking.mlflow import MlflowSink
from pipeline.tracking.protocol import NullTracker, Served
from pipeline.tracking.sender import flush
from pipeline.training.worker import Worker
from tests.support import nemo
from tests.support.background import loop_of, place_of
from tests.support.data import make_task, planted_task, proteins
from tests.support.encoders import FakeEncoder
from tests.support.lab import STATE, VALUE, Lab, every_metric, furnished, newest_run, own_signals, write_checkpoint
from tests.support.servers import ModelServer, running

CLOSE = 1e-5
SMILES = ["CCO", "c1ccccc1", "CC(=O)O", "CBr", "CCN", "OCC", "CNC", "COC"]


class Kept(NullTracker):
    """A tracker that keeps the folders of models, and notes."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.models, self.notes = folder, dict[str, Served](), list[str]()

    def served(self, folder: Path, model: Served, step: int = 0) -> None:
        link_folder(folder, self.folder / model.task)
        self.models[model.task] = model


def units(answer: dict[str, Any], target: str) -> list[tuple[Any, tuple[float, ...]]]:
    """The prediction and the probabilities of each unit of an answer: of the sequence, or of each of its tokens."""
    predicted, shares = answer[f"{target}_prediction"], answer.get(f"{target}_probabilities", {})
    if not isinstance(predicted, list):
        predicted, shares = [predicted], {label: [share] for label, share in shares.items()}
    by_unit = zip(*shares.values(), strict=True) if shares else [()] * len(predicted)
    return list(zip(predicted, by_unit, strict=True))


def check_same(answers: list[dict[str, Any]], table: pa.Table, targets: list[str]) -> float:
    """Labels are those of the first seed; returns by how much numbers differ, as batches of other lengths make them."""
    table = table.filter(pa.compute.equal(table["seed"], table["seed"][0]))
    largest = [0.0]
    for target in targets:
        known = table[f"{target}_prediction"].to_pylist()
        shares = table[f"{target}_probabilities"].to_pylist() if isinstance(known[0], str) else [()] * len(known)
        found = [unit for answer in answers for unit in units(answer, target)]
        assert len(found) == len(known) > 0
        for (predicted, probabilities), label, share in zip(found, known, shares, strict=True):
            if isinstance(label, str):
                assert predicted == label
            else:
                largest.append(abs(predicted - label) / max(1.0, abs(label)))
            largest += [abs(one - other) for one, other in zip(probabilities, share, strict=True)]
    assert max(largest) < CLOSE
    return max(largest)


def measured(encoder: Encoder, task: Task, folder: Path, **store: Any) -> tuple[Scores, Kept, list[str]]:
    """The scores, the model that a tracker is given, and why there is none."""
    kept, place = Kept(folder / "models"), Store(folder / "store", **store)
    kept.folder.mkdir(parents=True)
    scores = validate(encoder, task, place)
    return scores[0], kept, log_models(encoder, scores, place, kept)


def answers_of(predictor: Predictor, sequences: list[str]) -> list[dict[str, Any]]:
    columns = predictor.predict(sequences)
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


@dataclass
class Measured:
    """A measurement of two tasks whose models were logged and registered, and a server for each."""

    lab: Lab
    run_id: str
    servers: dict[str, ModelServer] = field(default_factory=dict)

    def predictions(self, task: str) -> pa.Table:
        name = f"predictions_{task}.parquet"
        return pq.read_table(download_artifacts(run_id=self.run_id, artifact_path=name, tracking_uri=self.lab.uri))


@pytest.fixture(scope="module")
def served(
    tmp_path_factory: pytest.TempPathFactory, model_folder: Callable[..., Path], empty_database: Path
) -> Iterator[Measured]:
    folder = tmp_path_factory.mktemp("served")
    lab = furnished(folder / "lab", model_folder, f"sqlite:///{shutil.copy(empty_database, folder / 'mlflow.db')}")
    before = mlflow.get_tracking_uri()
    command = lab.command(VALUE, STATE, logging={"figures": False, "log_model": True, "register_model": "sample"})
    with own_signals(), ExitStack() as stack:
        stack.callback(mlflow.set_tracking_uri, before)
        assert main([*command, f"--tracking-uri={lab.uri}"]) == 0
        found = Measured(lab, lab.parents()[0].info.run_id)
        for task, model in (("value", f"runs:/{found.run_id}/model-value"), ("state", "models:/sample@best-state")):
            found.servers[task] = ModelServer(model, folder, lab.uri)
            stack.callback(found.servers[task].kill)
        yield found


@pytest.mark.parametrize("task", ["value", "state"])
def test_mlflow_models_serve_answers_with_the_predictions(task: str, served: Measured) -> None:
    server = served.servers[task]
    server.wait()
    sequences = [row["sequence"] for row in pd.read_csv(served.lab.folder / "test" / "x000.csv").to_dict("records")]
    sequences = [text for text in sequences if len(text) <= 30]
    status, answer = server.answer({"dataframe_split": {"columns": ["sequence"], "data": [[one] for one in sequences]}})
    assert status == 200, answer
    check_same(answer["predictions"], served.predictions(task), [task])
    alone = [server.answer({"inputs": {"sequence": [one]}})[1]["predictions"][0] for one in sequences]
    check_same(alone, served.predictions(task), [task])
    if task == "state":
        assert set(alone[3]["state_prediction"]) <= {"H", "C"}
        assert len(alone[3]["state_probabilities"]["H"]) == len(sequences[3])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "row 1: column 'sequence': expected a text that is not empty, found ''; leave the row out"),
        (None, "row 1: column 'sequence': expected a text that is not empty, found nothing; leave the row out"),
        ("A" * 31, "row 1: column 'sequence': expected at most 30 characters, as in the measurement, found 31; cut it"),
        ("11", "row 1: column 'sequence': expected a sequence with characters the encoder knows, found '11'"),
    ],
)
def test_a_sequence_that_is_not_valid_is_a_bad_request(text: str | None, message: str, served: Measured) -> None:
    server = served.servers["state"]
    server.wait()
    status, answer = server.answer({"dataframe_records": [{"sequence": "MKV"}, {"sequence": text}]})
    assert status == 400
    assert message in answer["message"]
    status, answer = server.answer({"dataframe_records": [{"text": "MKV"}]})
    assert (status, "missing inputs ['sequence']" in answer["message"]) == (400, True)


LOADED = """
import sys
from pathlib import Path
place, others = Path(sys.argv[1]), sys.argv[2:]
sys.modules |= dict.fromkeys(others)  # None: they cannot be imported
sys.path.insert(0, str(place / "code"))
from pipeline.serving.predictor import Predictor
print(Predictor.read(place / "served", device="cpu").predict(["MKV"]))
for name in others: del sys.modules[name]
del sys.path[0]

import mlflow, pandas as pd
model = mlflow.pyfunc.load_model(str(place))
print(model.predict(pd.DataFrame({"sequence": ["MKV"]})).to_dict(orient="list"))
import pipeline
print(pipeline.__file__)
"""
OTHERS = (
    "braceexpand jinja2 matplotlib omegaconf pyarrow pytorch_optimizer rich sklearn threadpoolctl wandb xxhash".split()
)


def test_a_model_brings_its_code_and_names_what_else_it_needs(served: Measured, tmp_path: Path) -> None:
    """Other requirements of this project are not there when a prediction is made. Nothing in it is pickled."""
    uri = f"runs:/{served.run_id}/model-value"
    place = download_artifacts(uri, tracking_uri=served.lab.uri, dst_path=str(tmp_path))
    files = [path for path in Path(place).rglob("*") if path.is_file()]
    assert not [path for path in files if path.suffix in (".pkl", ".pickle", ".pt", ".bin", ".ckpt")]
    ran = subprocess.run([sys.executable, "-c", LOADED, place, *OTHERS], cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    alone, loaded, package = ran.stdout.splitlines()[-3:]
    assert alone == loaded
    assert "value_prediction" in alone
    assert Path(package).is_relative_to(place)
    required = {line.partition("==")[0] for line in (Path(place) / "requirements.txt").read_text().splitlines()}
    assert {"mlflow", "torch", "transformers"} < required
    assert not required & {*OTHERS}


def test_what_mlflow_shows_of_a_model(served: Measured) -> None:
    """A signature, an example, requirements, all metrics of its task, and beside it the checkpoint."""
    logged: dict[str, LoggedModel] = {one.name: one for one in served.lab.client.search_logged_models(["0"])}
    assert set(logged) == {"model-value", "model-state", served.lab.ckpt.name}
    model = Model.load(f"models:/{logged['model-state'].model_id}")
    assert model.signature is not None
    assert [str(one) for one in model.signature.inputs] == ["'sequence': string (required)"]
    types = {one.name: str(one.type) for one in model.signature.outputs}
    assert types == {"state_prediction": "Array(string)", "state_probabilities": "Map(str -> Array(double))"}
    assert model.saved_input_example_info["artifact_path"] == "input_example.json"  # type: ignore[index]
    assert (model.model_id, model.run_id) == (logged["model-state"].model_id, served.run_id)
    run = served.lab.client.get_run(served.run_id)
    everything = every_metric(run)
    assert len(everything) > len(run.data.metrics)
    for task in ("value", "state"):
        own = {one.key: one.value for one in logged[f"model-{task}"].metrics or []}
        assert own == {name: value for name, value in everything.items() if name.startswith(f"{task}/")}
        assert len(served.lab.client.get_metric_history(served.run_id, next(iter(own)))) == 1
    aliases = served.lab.client.get_registered_model("sample").aliases
    assert {"best-value", "best-state"} == set(aliases)


def test_a_logged_model_is_a_checkpoint_too(served: Measured) -> None:
    """Its encoder can be measured on other tasks, by the name in the registry."""
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(served.lab.uri)
    try:
        again, known = (
            open_encoder(one, EncoderOptions(device="cpu"))
            for one in ("models:/sample@best-value", str(served.lab.ckpt))
        )
    finally:
        mlflow.set_tracking_uri(before)
    assert again.digest == known.digest


def class_task(folder: Path, texts: list[str], **options: Any) -> Task:
    """Classes of sequences, one of which the test part alone has."""
    rows = [{"sequence": text, "kind": "ab"[len(text) % 2]} for text in texts]
    more = {"task_type": "classification", "task_name": "kind", "num_epochs": 2, "num_classes": 3, **options}
    return make_task(folder / "kind", rows, [*rows, {"sequence": texts[0] * 2, "kind": "c"}], **more)


@pytest.mark.parametrize("kind", ["esm", "prott5", "smiles_bart", "protbert"])
def test_encoders_of_each_family(kind: str, model_folder: Callable[..., Path], tmp_path: Path) -> None:
    encoder = open_encoder(str(model_folder(kind)), EncoderOptions(device="cpu"))
    texts = SMILES if kind == "smiles_bart" else proteins(12, 3, longest=20)
    scores, kept, why = measured(encoder, class_task(tmp_path, texts, num_seeds=2), tmp_path)
    assert not why
    predictor = Predictor.read(kept.folder / "kind" / "served", device="cpu")
    check_same(answers_of(predictor, scores.examples.test.sequences), scores.table, ["kind"])


@pytest.mark.parametrize("kind", ["esm1nv", "prott5nv", "megamolbart"])
@pytest.mark.parametrize("layer", [None, 1])
def test_archives_of_the_reference(kind: str, layer: int | None, tmp_path: Path) -> None:
    nemo.write(tmp_path / "x.nemo", kind)
    texts = SMILES if kind == "megamolbart" else proteins(12, 3, longest=20)
    encoder = nemo.opened(tmp_path / "x.nemo", layer=layer)
    scores, kept, why = measured(encoder, class_task(tmp_path, texts), tmp_path)
    assert not why
    predictor = Predictor.read(kept.folder / "kind" / "served", device="cpu")
    check_same(answers_of(predictor, scores.examples.test.sequences), scores.table, ["kind"])


@pytest.mark.parametrize("options", [{"layer": 1}, {"pooling": "cls"}, {"pooling": "last"}, {"layer": 0}])
def test_options_of_the_encoder(options: dict[str, Any], model_folder: Callable[..., Path], tmp_path: Path) -> None:
    encoder = open_encoder(str(model_folder("esm")), EncoderOptions(device="cpu", **options))
    scores, kept, _ = measured(encoder, class_task(tmp_path, proteins(12, 3)), tmp_path)
    predictor = Predictor.read(kept.folder / "kind" / "served", device="cpu")
    check_same(answers_of(predictor, scores.examples.test.sequences), scores.table, ["kind"])


def test_several_targets_of_tokens_with_half_precision(model_folder: Callable[..., Path], tmp_path: Path) -> None:
    """Embeddings are rounded as those in the store were, on which the head was trained."""
    encoder = open_encoder(str(model_folder("esm")), EncoderOptions(device="cpu"))
    two = {"target_column": ["label", "seen"], "mask_column": ["seen", None], "task_name": "two"}
    scores, kept, _ = measured(encoder, planted_task(tmp_path, num_epochs=2, **two), tmp_path, dtype="float16")
    predictor = Predictor.read(kept.folder / "two" / "served", device="cpu")
    sequences = scores.examples.test.sequences
    check_same(answers_of(predictor, sequences), scores.table, ["label", "seen"])
    exact = replace(predictor, dtype="float32")
    with pytest.raises(AssertionError):
        check_same(answers_of(exact, sequences), scores.table, ["label", "seen"])


def test_numbers_of_tokens_are_in_their_own_units(model_folder: Callable[..., Path], tmp_path: Path) -> None:
    encoder = open_encoder(str(model_folder("esm")), EncoderOptions(device="cpu"))
    options = {"task_type": "regression", "target_column": ["number"], "mask_column": None, "task_name": "number"}
    scores, kept, _ = measured(encoder, planted_task(tmp_path, num_epochs=2, **options), tmp_path)
    predictor = Predictor.read(kept.folder / "number" / "served", device="cpu")
    check_same(answers_of(predictor, scores.examples.test.sequences), scores.table, ["number"])
    assert predictor.predict([]) == {"number_prediction": []}


def test_a_tokenizer_that_gives_no_token_per_character_is_refused(
    model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    encoder = open_encoder(str(model_folder("smiles_bart")), EncoderOptions(device="cpu"))
    _, kept, _ = measured(encoder, class_task(tmp_path, SMILES), tmp_path)
    predictor = replace(Predictor.read(kept.folder / "kind" / "served", device="cpu"), level="token")
    with pytest.raises(DataError, match="row 1: token-level tasks need one token per character, found 2 tokens for"):
        predictor.predict(["CC", "CBr"])


class OwnHead(MLP):
    """A head of a user's own."""

    level = "sequence"

    def __init__(self, hidden_size: int, outputs: list[int]) -> None:
        super().__init__(hidden_size, outputs[0])


def test_code_of_the_user_s_own_is_not_copied(model_folder: Callable[..., Path], tmp_path: Path) -> None:
    task = class_task(tmp_path, proteins(12, 3))
    _, kept, why = measured(FakeEncoder(), task, tmp_path)
    assert (len(why), kept.models) == (1, {})
    assert why[0].startswith("no model is logged: a tests.support.encoders.FakeEncoder is code of your own")
    encoder = open_encoder(str(model_folder("esm")), EncoderOptions(device="cpu"))
    own = replace(task, head=f"{__name__}.OwnHead")
    _, kept, why = measured(encoder, own, tmp_path / "again")
    assert kept.models == {}
    assert why == [f"no model of kind is logged: the head {__name__}.OwnHead is code of your own, which is not copied"]


def test_an_alias_follows_the_best_of_several_checkpoints(lab: Lab) -> None:
    for step, noise in ((10, 0.0), (20, 0.05), (30, 3.0)):
        write_checkpoint(lab, step, noise)
    lab.ckpt = lab.folder / "run" / "*.ckpt"
    logging = {"figures": False, "log_model": True, "register_model": "mine"}
    assert main(lab.command(VALUE, logging=logging)) == 0
    client, metric = lab.client, "test_value_spearman"
    runs = {run.info.run_id: run.data.metrics[metric] for run in lab.runs() if metric in run.data.metrics}
    versions = client.search_model_versions("name = 'mine'")
    assert len(versions) == 3
    best = client.get_model_version_by_alias("mine", "best-value")
    assert runs[best.run_id or ""] == max(runs[one.run_id or ""] for one in versions)
    assert all(float(one.tags["downstream.value"]) == runs[one.run_id or ""] for one in versions)
    # a version of other test data is ranked apart
    lab.write("test", 20, 30)
    lab.ckpt = lab.folder / "run" / "step=30.ckpt"
    assert main(lab.command(VALUE, logging=logging)) == 0
    assert len(client.search_model_versions("name = 'mine'")) == 4
    assert (
        client.get_model_version_by_alias("mine", "best-value").tags["downstream.data"] != best.tags["downstream.data"]
    )


@pytest.fixture
def lab(tmp_path: Path, model_folder: Callable[..., Path], tracking: str) -> Iterator[Lab]:
    with own_signals():
        yield furnished(tmp_path / "lab", model_folder, tracking)


def test_a_model_that_is_sent_twice_is_there_once(lab: Lab) -> None:
    journals = lab.folder / "journals"
    logging = {"figures": False, "log_model": True, "register_model": "mine", "journal": str(journals)}
    assert main(lab.command(VALUE, logging=logging)) == 0
    (path,) = journals.glob("*.jsonl")
    journal = Journal(path, write=False)
    sink = MlflowSink(lab.uri, journal)
    records = [record for record, _ in journal.read() if record["op"] == "served"]
    assert len(records) == 1
    sink.apply(records)
    assert [one.name for one in lab.client.search_logged_models(["0"], "name = 'model-value'")] == ["model-value"]
    assert len(lab.client.search_model_versions("name = 'mine'")) == 1


@pytest.mark.parametrize("mode", ["sharded", "background"])
def test_a_training_has_a_model_for_each_measurement(
    mode: str, model_folder: Callable[..., Path], tmp_path: Path, tracking: str
) -> None:
    """Of the weights of the moment; a worker in the background hands its models over. `runs:/` names the last."""
    task = planted_task(tmp_path / "data", num_epochs=1, task_name="planted")
    logging = Logging(figures=False, log_model=True, register_model="mine")
    options = {"mode": mode, "logging": logging, "child_runs": mode == "sharded"}  # they have no model of their own
    downstream, model = loop_of(tmp_path, task, model_folder("esm"), options=options)
    for step in (0, 1):
        states = random.getstate(), torch.get_rng_state()
        downstream(model, step)
        assert (random.getstate(), torch.get_rng_state().tolist()) == (states[0], states[1].tolist())
        if mode == "background":
            with chdir(tmp_path):
                Worker(place_of(tmp_path)).run()
        with torch.no_grad():
            model.esm.encoder.layer[0].attention.self.value.weight.mul_(3)
    downstream.close()
    flush()
    client, run = MlflowClient(), newest_run()
    models = [one for one in client.search_logged_models(["0"]) if one.name == "model-planted"]
    assert sorted(one.params["global_step"] for one in models) == ["0", "1"]
    assert len(client.search_model_versions("name = 'mine'")) == 2
    for one in models:
        history = client.get_metric_history(run.info.run_id, "test_label_accuracy")
        (value,) = (point.value for point in history if str(point.step) == one.params["global_step"])
        assert {metric.key: metric.value for metric in one.metrics or []}["test_label_accuracy"] == value
    place = download_artifacts(f"runs:/{run.info.run_id}/model-planted", dst_path=str(tmp_path))
    table = pq.read_table(
        download_artifacts(run_id=run.info.run_id, artifact_path="downstream/step=1/predictions_planted.parquet")
    )
    texts = load(task).test.sequences
    check_same(answers_of(Predictor.read(Path(place) / "served", device="cpu"), texts), table, ["label"])


@pytest.mark.slow
def test_a_server_takes_a_model_and_gives_it_back(lab: Lab, tmp_path: Path) -> None:
    with running(tmp_path) as server:
        command = lab.command(VALUE, logging={"figures": False, "log_model": True, "register_model": "mine"})
        assert main([*command, f"--tracking-uri={server.uri}"]) == 0
        lab.uri = server.uri
        place = download_artifacts("models:/mine@best-value", tracking_uri=server.uri, dst_path=str(tmp_path))
        run_id = lab.parents()[0].info.run_id
        table = pq.read_table(
            download_artifacts(run_id=run_id, artifact_path="predictions_value.parquet", tracking_uri=server.uri)
        )
    predictor = Predictor.read(Path(place) / "served", device="cpu")
    texts = load(read_config(lab.folder / "config.yaml").dataset[0]).test.sequences
    check_same(answers_of(predictor, texts), table, ["value"])
    assert not [*(lab.folder / "store" / "journal").glob("*.jsonl")]
    assert not [*(lab.folder / "store" / "live").iterdir()]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"register_model": "x"}, "register_model: expected log_model: true beside it"),
        ({"register_model": "a/b", "log_model": True}, "expected a name without / : ', or null, found 'a/b'"),
        ({"register_model": " ", "log_model": True}, "expected a name without / : ', or null, found ' '"),
        ({"register_model": "it's", "log_model": True}, "expected a name without / : ', or null, found 'it's'"),
    ],
)
def test_keys_that_are_wrong(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Logging(**settings).check()


def test_on_ray_no_model_is_logged(tmp_path: Path) -> None:
    config = Config(dataset=[planted_task(tmp_path)], engine="ray", logging=Logging(log_model=True))
    with pytest.raises(ConfigError, match="engine ray has the encoder in other processes, which log no model; set"):
        config.check()


def test_a_model_that_is_logged_again_after_a_kill_is_the_same(tmp_path: Path) -> None:
    """A training may be killed after its results are logged, and before it has noted that."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "MLmodel").write_text("x")
    journal, one = Journal(tmp_path / "x.jsonl"), Served("a", [], "", None, False, "data")
    for step in (1, 1, 2):
        run = JournalRun.begin(journal, "run")
        run.checkpoint("x", f"digest {step}", "", step)
        run.served(folder, one, step)
    keys = [record["key"] for record, _ in journal.read() if record["op"] == "served"]
    assert len(keys) == 3
    assert keys[0] == keys[1] != keys[2]


def test_models_of_two_tasks_do_not_have_one_name() -> None:
    Logging().check(["a b", "a_b"])
    Logging(log_model=True).check(["a b", "a-b"])
    with pytest.raises(ConfigError, match="log_model: two tasks become 'a_b' in the names of their models; rename one"):
        Logging(log_model=True).check(["a b", "a_b"])
