"""Setting a key of the schema changes what it should change: one test per key, and none is left out."""

from __future__ import annotations

import dataclasses
import importlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.checkpoints.opening import open_encoder
from pipeline.config.background import Background
from pipeline.config.class_paths import import_class
from pipeline.config.documentation import markdown
from pipeline.config.engine import Ray
from pipeline.config.schema import Config
from pipeline.config.task import Files, MaxRows, Task
from pipeline.config.trackers import Logging
from pipeline.config.yaml_file import config_from, read_config
from pipeline.embed import embed
from pipeline.encoders.code_digest import code_digest
from pipeline.encoders.live import LiveModel
from pipeline.encoders.options import EncoderOptions
from pipeline.errors import CheckpointError, ConfigError
from pipeline.heads.architectures import Head
from pipeline.heads.fit import fit
from pipeline.heads.loss import loss_of
from pipeline.load import load
from pipeline.score import Scores
from pipeline.store.embedding_table import Store
from pipeline.train_head import make_head, train_head
from pipeline.validation import validate
from tests.support.data import make_task, planted, planted_task, proteins, write_csv
from tests.support.encoders import FakeEncoder
from tests.support.programs import ROOT

SCHEMAS = (Config, Background, Ray, Logging, Task, Files)
# Where a key that has no test below is tested.
ELSEWHERE = {
    "enabled": "test_lightning.py: test_a_disabled_section_gives_no_callback",
    "model_factory": "test_own_models.py",
    "every_n_validations": "test_monitors.py: test_every_second_validation",
    "compile": "test_packing.py: test_compiled_layers_give_the_same",
    "weights": "test_bare.py: test_an_average_is_taken_by_name_alone",
    "trust_remote_code": "test_remote_code.py",
    "baseline": "test_random_init.py: test_table_report_and_run_say_it",
    "mode": "test_sharded.py: test_the_metrics_of_two_ranks_are_those_of_one_process",
    "background": "test_background.py",
    "worker_device": "test_background.py: test_keys_that_are_wrong",
    "worker_threads": "test_background.py: test_the_threads_of_the_worker",
    "worker_command": "test_background.py: test_a_command_of_the_user_s",
    "max_pending": "test_background.py: test_where_the_worker_is_busy",
    "when_busy": "test_background.py: test_where_the_worker_is_busy",
    "drain_timeout": "test_background.py: test_what_is_left_is_said_and_measured_by_the_command_line_or_later",
    "keep_best": "test_background.py: test_the_best_are_kept_and_ties_are_said",
    "keep_best_metric": "test_background.py: test_the_best_are_kept_and_ties_are_said",
    "on_start": "test_lightning.py: test_the_untrained_and_the_final_weights",
    "on_end": "test_lightning.py: test_the_untrained_and_the_final_weights",
    "on_error": "test_untouched.py",
    "save": "test_lightning.py: test_a_checkpoint_for_each_measurement",
    "child_runs": "test_lightning.py: test_child_runs",
    "keep_embeddings": "test_lightning.py: test_embeddings_of_live_weights_go_unless_they_are_kept",
    "timeout": "test_ranks.py: test_a_rank_that_does_not_come_is_named",
    "engine": "test_ray.py: test_tables_and_scores_are_those_of_one_process",
    "ray": "test_ray.py: test_what_a_worker_takes",
    "workers": "test_ray.py: test_what_a_worker_takes",
    "threads": "test_ray.py: test_what_a_worker_takes",
    "gpus": "test_ray.py: test_what_a_worker_takes",
    "logging": "test_mirrors.py: test_the_section_logging",
    "wandb": "test_mirrors.py: test_mirrors_of_a_measurement",
    "project": "test_mirrors.py: test_mirrors_of_a_measurement",
    "entity": "test_mirrors.py: test_mirrors_of_a_measurement",
    "tags": "test_mirrors.py: test_mirrors_of_a_measurement",
    "tensorboard": "test_mirrors.py: test_mirrors_of_a_measurement",
    "figures": "test_figures.py",
    "log_model": "test_serving.py",
    "register_model": "test_serving.py: test_an_alias_follows_the_best_of_several_checkpoints",
    "journal": "test_journal.py",
    "architecture": "test_encoders.py: test_a_lightning_checkpoint_that_describes_itself",
    "pooling": "test_decoders.py: test_pooling_of_an_encoder",
    "num_seeds": "test_seeds.py: test_key_num_seeds",
    "standardize": "test_seeds.py: test_key_standardize",
    "max_seq_length": "test_load.py: test_long_sequences_go_out_whole_and_are_counted",
    "dataset_path": "every test",
    "target_column": "test_validation.py: test_several_heads_with_a_mask_for_one_of_them",
    "mask_column": "test_validation.py: test_a_moved_mask_changes_exactly_what_is_counted",
    "num_classes": "test_load.py: test_a_label_of_the_test_part_alone_takes_room_that_was_declared",
    "dataset": "test_load.py: test_several_files_in_order_and_a_val_part",
    "probe": "test_validation.py: test_the_probe_s_metrics_are_those_of_its_predictions",
    "baselines": "test_baselines.py: test_no_baseline_where_none_is_wanted",
    "probe_window": "test_probe.py: test_folds_are_repeated_fits_without_their_sequences",
    "test": "test_load.py",
    "train": "test_load.py",
}


def measured(task: Task, folder: Path, **store: Any) -> Scores:
    (scores,) = validate(FakeEncoder(), task, Store(folder / "store", **store))
    return scores


@pytest.fixture
def task(tmp_path: Path) -> Task:
    return planted_task(tmp_path, num_epochs=3)


def test_no_key_is_without_a_test() -> None:
    keys = {one.metadata.get("key", one.name) for schema in SCHEMAS for one in dataclasses.fields(schema)}
    hidden = {one.name for schema in SCHEMAS for one in dataclasses.fields(schema) if one.metadata.get("hidden")}
    tested = {name.removeprefix("test_key_") for name in globals() if name.startswith("test_key_")}
    assert keys - hidden == tested | set(FIT) | set(ELSEWHERE)
    assert not tested & set(ELSEWHERE)
    for place in set(ELSEWHERE.values()) - {"every test"}:
        file, _, function = place.partition(": ")
        assert f"def {function or 'test_'}" in (ROOT / "tests" / file).read_text(), place


def test_the_documentation_is_what_the_schema_prints() -> None:
    assert (ROOT / "docs" / "configuration.md").read_text() == markdown() + "\n"


@pytest.mark.parametrize("kind", ["esm", "prott5", "smiles_bart", "protbert"])
def test_key_layer(model_folder: Callable[..., Path], kind: str) -> None:
    """The hidden states that transformers calls by that number; only the layers that they take are kept."""
    folder, text = str(model_folder(kind)), "CCONC"
    last: Any = open_encoder(folder)
    ids = torch.tensor([[*last.tokens.before, *last.tokens.ids(text), *last.tokens.after]])
    with torch.no_grad():
        states = last.model(input_ids=ids, output_hidden_states=True).hidden_states
    inner = slice(len(last.tokens.before), ids.shape[1] - len(last.tokens.after))
    count = len(states) - 1
    for layer in range(-count - 1, count + 1):
        encoder: Any = open_encoder(folder, EncoderOptions(layer=layer))
        for state in encoder.hidden_states([text, "CC", text])[::2]:
            torch.testing.assert_close(state, states[layer][0, inner], atol=1e-5, rtol=0)
        assert (encoder.digest == last.digest) == (layer in (-1, count))
    lowest: Any = open_encoder(folder, EncoderOptions(layer=0))
    sizes = [sum(one.numel() for one in encoder.model.parameters()) for encoder in (lowest, last)]
    assert sizes[0] < sizes[1]
    assert len({open_encoder(folder, EncoderOptions(layer=layer)).digest for layer in range(count + 1)}) == count + 1
    with pytest.raises(ConfigError, match=rf"layer: expected {-count - 1} to {count} for a model of {count} layers"):
        open_encoder(folder, EncoderOptions(layer=count + 1))
    with pytest.raises(ConfigError, match="gives the hidden states itself"):
        open_encoder(folder, EncoderOptions("tests.support.encoders.FakeEncoder", layer=1))


FIT: dict[str, Any] = {
    "batch_size": 5,
    "num_epochs": 2,
    "shuffle": False,
    "random_seed": 9,
    "optim": {"name": "sgd", "lr": 0.1},
}


@pytest.mark.parametrize("key", list(FIT))
def test_keys_of_the_fit(task: Task, tmp_path: Path, key: str) -> None:
    assert measured(replace(task, **{key: FIT[key]}), tmp_path).losses != measured(task, tmp_path).losses


def test_the_order_of_the_sequences_is_drawn_from_the_seed_too(task: Task, tmp_path: Path) -> None:
    """Of two heads with the same first weights."""
    (embeddings,) = embed([load(task)], FakeEncoder(), Store(tmp_path))
    cpu, losses = torch.device("cpu"), []
    for seed in (0, 9):
        head = make_head(task, 24, embeddings.examples.targets, cpu)
        losses += fit([head], [seed], embeddings, cpu)
    assert losses[0] != losses[1]


def test_key_gradient_clip_val(task: Task, tmp_path: Path) -> None:
    """With a clip of next to nothing, plain gradient descent does not move."""
    plain = replace(task, optim={"name": "sgd", "lr": 1.0}, shuffle=False)
    clipped = measured(replace(plain, gradient_clip_val=1e-9), tmp_path).losses
    assert max(clipped) - min(clipped) < 0.05
    assert min(measured(plain, tmp_path).losses) < 0.9 * clipped[0]


def test_key_class_weights(tmp_path: Path) -> None:
    """Balanced weights by hand, and the loss that torch's own criterion gives with them."""
    rows = [{"sequence": "MK", "y": letter} for letter in "aaab"]
    task = make_task(tmp_path, rows, task_type="classification", class_weights="balanced")
    (target,) = load(task).targets
    assert target.weights == (4 / (2 * 3), 4 / (2 * 1))
    logits, values = torch.randn(4, 2), torch.tensor([0, 0, 0, 1])
    expected = torch.nn.CrossEntropyLoss(torch.tensor(target.weights))(logits, values)
    masks = [torch.ones(4, dtype=torch.bool)]
    assert loss_of([logits], [values], masks, (target,), weighted=True) == pytest.approx(expected.item())
    assert load(replace(task, class_weights=[1, 5])).targets[0].weights == (1.0, 5.0)
    with pytest.raises(ConfigError, match="expected 'balanced', or a weight for each of a, b, found"):
        load(replace(task, class_weights=[1, 2, 3]))
    assert measured(task, tmp_path).losses != measured(replace(task, class_weights=None), tmp_path).losses


def test_key_patience(tmp_path: Path) -> None:
    """On labels that cannot be learnt, training stops early and the best head on the held-out part is kept."""
    noise = [{**row, "label": str(row["label"])[::-1]} for row in planted(proteins(40, 7))]
    options: dict[str, Any] = {"level": "token", "task_type": "classification", "target_column": ["label"]}
    options["batch_size"] = 4
    task = make_task(tmp_path, noise, **options, num_epochs=100, patience=3, optim={"lr": 0.05})
    (embeddings,) = embed([load(task)], FakeEncoder(), Store(tmp_path))
    fitted = train_head(embeddings, Store(tmp_path), torch.device("cpu"))
    best = fitted.val_losses.index(min(fitted.val_losses))
    assert len(fitted.losses) == best + 1 + 3
    shorter = replace(task, num_epochs=best + 1)
    (embeddings,) = embed([load(shorter)], FakeEncoder(), Store(tmp_path))
    again = train_head(embeddings, Store(tmp_path), torch.device("cpu"))
    for one, other in zip(fitted.head.parameters(), again.head.parameters(), strict=True):
        assert torch.equal(one, other)


def test_key_val_fraction(task: Task, tmp_path: Path) -> None:
    few, many = (replace(task, patience=2, val_fraction=share) for share in (0.05, 0.5))
    assert measured(few, tmp_path).losses != measured(many, tmp_path).losses


def test_key_val(task: Task, tmp_path: Path) -> None:
    write_csv(tmp_path / "val" / "x000.csv", planted(proteins(10, 8)))
    own = replace(task, patience=2, dataset=Files(val="x000"))
    assert load(own).val is not None
    (embeddings,) = embed([load(own)], FakeEncoder(), Store(tmp_path))
    held = train_head(embeddings, Store(tmp_path), torch.device("cpu")).val_losses
    assert len(held) == 3
    (other,) = embed([load(replace(task, patience=2))], FakeEncoder(), Store(tmp_path))
    assert train_head(other, Store(tmp_path), torch.device("cpu")).val_losses != held


def test_key_emb_batch_size(task: Task, tmp_path: Path) -> None:
    class Counting(FakeEncoder):
        largest = 0

        def hidden_states(self, sequences: Any) -> list[Tensor]:
            self.largest = max(self.largest, len(sequences))
            return super().hidden_states(sequences)

    encoder = Counting()
    validate(encoder, replace(task, emb_batch_size=3), Store(tmp_path), until="embed")
    assert encoder.largest == 3


def store_of(folder: Path, **keys: Any) -> Store:
    """The store of a configuration with these keys."""
    section = {"store": str(folder), "dataset": {"dataset_path": "d", "target_column": "y"}, **keys}
    return Store.from_config(config_from(section))


def test_key_max_batch_tokens(task: Task, tmp_path: Path) -> None:
    (embeddings,) = embed([load(task)], FakeEncoder(), store_of(tmp_path, max_batch_tokens=77))
    assert embeddings.table.shards()[0].made_with["max_batch_tokens"] == 77


def test_key_memory_budget(task: Task, tmp_path: Path) -> None:
    for text, in_memory in (("1GB", True), ("1KB", False)):
        (embeddings,) = embed([load(task)], FakeEncoder(), store_of(tmp_path, memory_budget=text))
        assert embeddings.rows("train").in_memory == in_memory


def test_key_embedding_dtype(task: Task, tmp_path: Path) -> None:
    (embeddings,) = embed([load(task)], FakeEncoder(), store_of(tmp_path, embedding_dtype="float16"))
    assert embeddings.table.dtype.itemsize == 2


def test_key_store(task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    validate(FakeEncoder(), task, store_of(tmp_path / "elsewhere"))
    assert {path.name for path in (tmp_path / "elsewhere").iterdir()} == {"embeddings", "heads"}
    assert store_of(tmp_path / "elsewhere", embedding_dtype="float16").root == tmp_path / "elsewhere"
    config = config_from({"store": "elsewhere", "dataset": {"dataset_path": "d", "target_column": "y"}})
    assert Store.from_config(config, tmp_path / "other").root == tmp_path / "other"


def test_key_sequence_column(tmp_path: Path) -> None:
    rows = [{"sequence": "MK", "protein": "VVV", "y": 1}]
    task = make_task(tmp_path, rows, sequence_column="protein")
    assert load(task).train.sequences == ["VVV"]


def test_key_target_sizes(tmp_path: Path) -> None:
    task = planted_task(tmp_path, target_sizes=[5])
    assert load(task).targets[0].outputs == 5
    assert load(replace(task, target_sizes=None)).targets[0].outputs == 2


def test_key_task_name(task: Task, tmp_path: Path) -> None:
    (scores,) = validate(FakeEncoder(), [replace(task, task_name="my task")], Store(tmp_path))
    assert all(name.startswith("my task/") for name in scores.metrics)


def test_key_task_type(tmp_path: Path) -> None:
    rows = [{"sequence": "MK", "y": 1}, {"sequence": "MV", "y": 2}]
    assert load(make_task(tmp_path, rows, task_type="classification")).targets[0].classes == ("1", "2")
    assert load(make_task(tmp_path, rows, task_type="regression")).targets[0].classes is None


class LinearHead(Head):
    """A user's own head: one linear layer per target."""

    level = "token"

    def __init__(self, hidden_size: int, outputs: list[int]) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(hidden_size, out) for out in outputs)

    def forward(self, rows: Tensor, _counts: Tensor) -> list[Tensor]:
        return [layer(rows) for layer in self.layers]


def test_key_class(task: Task, tmp_path: Path) -> None:
    own = config_from(
        {"dataset": {"class": "tests.test_schema_keys.LinearHead", "dataset_path": "d", "target_column": "y"}}
    ).dataset[0]
    assert (own.level, own.head) == ("token", "tests.test_schema_keys.LinearHead")
    linear = measured(replace(task, head=own.head), tmp_path)
    assert linear.losses != measured(task, tmp_path).losses


def test_key_infer_target(model_folder: Callable[..., Path]) -> None:
    folder = str(model_folder("esm"))
    assert open_encoder(folder, EncoderOptions("esm")).digest == open_encoder(folder, EncoderOptions("auto")).digest
    with pytest.raises(CheckpointError, match=r"infer_target 'prott5' is for t5 or mt5, but .* is esm"):
        open_encoder(folder, EncoderOptions("prott5"))


def test_key_device(model_folder: Callable[..., Path]) -> None:
    assert open_encoder(str(model_folder("esm")), EncoderOptions(device="cpu")).device == torch.device("cpu")
    with pytest.raises(ConfigError, match="'cuda:99' is not on this machine"):
        open_encoder(str(model_folder("esm")), EncoderOptions(device="cuda:99"))


def test_key_precision(model_folder: Callable[..., Path]) -> None:
    folder = str(model_folder("esm"))
    exact = open_encoder(folder, EncoderOptions(precision="fp32", device="cpu")).hidden_states(["MKV"])[0]
    rounded = open_encoder(folder, EncoderOptions(precision="bf16", device="cpu")).hidden_states(["MKV"])[0]
    assert 0 < (exact - rounded).abs().max() < 0.2
    assert rounded.dtype == torch.float32


class Zeros:
    """A weight whose pickle names a function that is not read."""

    def __reduce__(self) -> Any:
        return torch.nn.init.ones_, (torch.empty(32),)


def test_key_trust_pickle(tmp_path: Path, model_folder: Callable[..., Path]) -> None:
    from transformers import EsmForMaskedLM

    state = dict(EsmForMaskedLM.from_pretrained(model_folder("esm")).state_dict())
    state["esm.encoder.emb_layer_norm_after.bias"] = Zeros()
    torch.save({"state_dict": state, "hyper_parameters": Path("x")}, tmp_path / "a.ckpt")
    settings: dict[str, Any] = {"architecture": str(model_folder("esm"))}
    with pytest.raises(
        CheckpointError, match=r"expected a tensor, found a torch.nn.init.ones_, which is not read; set"
    ):
        open_encoder(str(tmp_path / "a.ckpt"), EncoderOptions(**settings))
    assert open_encoder(str(tmp_path / "a.ckpt"), EncoderOptions(trust_pickle=True, **settings)).hidden_size == 32


def test_shipped_configurations_have_no_surprises() -> None:
    paths = list((ROOT / "configs").glob("*.yaml"))
    assert len(paths) > 3
    for path in paths:
        assert read_config(path).notes == []


def test_key_max_rows(task: Task) -> None:
    """The same rows each time, in order, others with another seed; the vocabulary is that of all rows."""
    whole = load(task)
    task.max_rows = MaxRows(train=5, test=2)
    some = load(task)
    assert (len(some.train), len(some.test)) == (5, 2)
    assert some.train.sequences == load(task).train.sequences
    order = [whole.train.rows.index(row) for row in some.train.rows]
    assert order == sorted(order)
    assert some.targets == whole.targets
    assert any("max_rows takes 5 of" in note for note in some.notes)
    task.random_seed += 1
    assert load(task).train.rows != some.train.rows
    task.max_rows = MaxRows(train=10**6)
    assert load(task).train.rows == whole.train.rows


OWN = {
    "__init__.py": "",
    "encoder.py": """
import torch

from . import sizes
from .base import Base


class Own(Base):
    hidden_size = sizes.WIDTH

    @classmethod
    def from_checkpoint(cls, path):
        return cls()

    @classmethod
    def from_module(cls, module):
        return cls()

    def hidden_states(self, sequences):
        from own_package.late import scale

        return [torch.full((len(text), self.hidden_size), scale(text)) for text in sequences]
""",
    "base.py": "from __future__ import annotations\n\n\nclass Base:\n    max_seq_length = None\n",
    "sizes.py": "WIDTH = 4\n",
    "late.py": "import own_package.encoder  # a cycle\nimport beside\n\n\ndef scale(text):\n    return beside.FACTOR\n",
    "../beside.py": "FACTOR = 2.0\n",
    "../space/unit.py": "ONE = 1.0\n",
    "apart.py": "# nobody imports this\n",
    "heads.py": """
from pipeline.heads.architectures import Head
from own_package.head_parts import Middle


class OwnHead(Middle):
    pass
""",
    "head_parts.py": """
import torch

from pipeline.heads.architectures import Head


class Middle(Head):
    level = "token"

    def __init__(self, hidden_size, outputs):
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(hidden_size, out) for out in outputs)

    def forward(self, rows, counts):
        return [layer(rows) for layer in self.layers]
""",
}


class OwnPackage:
    """A user's package beside which nothing of it is remembered: `digest` sees it as a new process would."""

    def __init__(self, root: Path) -> None:
        self.folder = root / "own_package"
        for name, text in OWN.items():
            self.write(name, text)

    def write(self, name: str, text: str) -> None:
        path = (self.folder / name).resolve()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def edit(self, name: str, old: str, new: str) -> None:
        text = (self.folder / name).read_text()
        assert old in text
        self.write(name, text.replace(old, new))

    def forget(self) -> None:
        for name in [name for name in sys.modules if name.partition(".")[0] in ("own_package", "beside", "space")]:
            del sys.modules[name]
        importlib.invalidate_caches()

    def digest(self, name: str = "encoder.Own") -> str | None:
        self.forget()
        return code_digest(import_class(f"own_package.{name}", "class", ()))


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[OwnPackage]:
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    own = OwnPackage(tmp_path)
    yield own
    own.forget()


EDITS = [
    ("encoder.py", "len(text)", "1 * len(text)"),
    ("base.py", "None", "5"),
    ("sizes.py", "4", "5"),
    ("late.py", "FACTOR", "FACTOR + 1"),
    ("../beside.py", "2.0", "3.0"),
    ("__init__.py", "", "DEBUG = True"),
]


@pytest.mark.parametrize(("name", "old", "new"), EDITS)
def test_an_edit_of_a_module_that_an_encoder_imports_gives_a_new_key(
    package: OwnPackage, name: str, old: str, new: str
) -> None:
    before = package.digest()
    assert before == package.digest() is not None
    package.edit("apart.py", "nobody", "still nobody")
    assert package.digest() == before
    package.edit(name, old, new)
    assert package.digest() not in (before, None)


def test_a_namespace_package_beside_is_followed(package: OwnPackage) -> None:
    package.edit("../beside.py", "FACTOR = 2.0", "def f():\n    from space.unit import ONE\nFACTOR = 2.0")
    before = package.digest()
    package.edit("../space/unit.py", "1.0", "2.0")
    assert package.digest() != before


def test_edited_code_is_measured_anew(package: OwnPackage, task: Task, tmp_path: Path) -> None:
    """From the store come the vectors of the present code, never those of an earlier one."""
    seen = []
    (tmp_path / "weights.ckpt").write_bytes(b"weights")
    for factor in ("2.0", "3.0", "3.0"):
        package.write("../beside.py", f"FACTOR = {factor}\n")
        package.forget()
        encoder = open_encoder(str(tmp_path / "weights.ckpt"), EncoderOptions("own_package.encoder.Own"))
        (embeddings,) = embed([load(task)], encoder, Store(tmp_path / "store"))
        rows = embeddings.rows("test").on(torch.device("cpu"))
        seen.append((float(rows.max()), embeddings.metrics["embedded"] > 0))
    assert seen == [(2.0, True), (3.0, True), (3.0, False)]


def test_the_classes_within_a_module_count(package: OwnPackage) -> None:
    """A module's own method runs the code of the modules in it, wherever they are from."""

    def digest() -> str:
        package.forget()
        module = Outer(import_class("own_package.head_parts.Middle", "class", ())(4, [2]))
        return LiveModel(module).encoder(module).digest

    before = digest()
    assert digest() == before
    package.edit("head_parts.py", "layer(rows)", "2 * layer(rows)")
    assert digest() != before


class Outer(torch.nn.Module):
    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner
        torch.nn.init.zeros_(self.inner.layers[0].weight)  # type: ignore[index, union-attr]
        torch.nn.init.zeros_(self.inner.layers[0].bias)  # type: ignore[index, union-attr]

    def hidden_states(self, sequences: list[str]) -> list[Tensor]:
        return [torch.zeros(len(text), 3) for text in sequences]


def test_a_base_of_a_head_gives_it_a_new_key(package: OwnPackage, task: Task, tmp_path: Path) -> None:
    reused = []
    for edit in (False, False, True):
        if edit:
            package.edit("head_parts.py", "layer(rows)", "layer(2 * rows)")
        package.forget()
        own = replace(task, head="own_package.heads.OwnHead")
        (embeddings,) = embed([load(own)], FakeEncoder(), Store(tmp_path / "store"))
        reused.append(train_head(embeddings, Store(tmp_path / "store"), torch.device("cpu")).reused)
    assert reused == [False, True, False]


def test_a_file_that_was_edited_after_its_import_has_no_digest(package: OwnPackage) -> None:
    """What runs is the code of before, and must not be kept under the key of the code of now."""
    own = import_class("own_package.encoder.Own", "class", ())
    before = code_digest(own)
    own().hidden_states(["MK"])
    assert code_digest(own) == before is not None  # also with the lazy import done, and with code that has run
    package.edit("late.py", "beside.FACTOR", "beside.FACTOR + 1")
    assert code_digest(own) is None
    own.digest = "my version 2"
    assert code_digest(own) == "my version 2"


def test_a_digest_of_the_class_stands_for_its_code_alone(tmp_path: Path) -> None:
    """It cannot know of weights, so another checkpoint has another key."""
    keys = set()
    for content in (b"one", b"two"):
        (tmp_path / "weights.ckpt").write_bytes(content)
        keys.add(
            open_encoder(str(tmp_path / "weights.ckpt"), EncoderOptions("tests.test_schema_keys.WithDigest")).digest
        )
    assert len(keys) == 2
    assert all("version 1" in key for key in keys)


class WithDigest(FakeEncoder):
    digest = "version 1"

    def __init__(self) -> None:
        self.hidden_size = 24

    @classmethod
    def from_checkpoint(cls, path: str) -> WithDigest:
        return cls()


PROMPT = """
import logging, sys, torch
from pathlib import Path
from pipeline import Store, validate
from pipeline.config.task import Task
from pipeline.heads.architectures import Head
from pipeline.encoders.live import LiveModel
from pipeline.encoders.options import EncoderOptions

logging.basicConfig(stream=sys.stdout, format="%(message)s")

class Module(torch.nn.Module):
    def hidden_states(self, sequences):
        return [torch.ones(len(text), 8).cumsum(0) for text in sequences]

class TypedHead(Head):
    level = "token"

    def __init__(self, hidden_size, outputs):
        super().__init__()
        self.layer = torch.nn.Linear(hidden_size, outputs[0])

    def forward(self, rows, counts):
        return [self.layer(rows)]

DIGEST
module = Module()
for _ in range(2):
    task = Task(level="token", task_type="classification", dataset_path=sys.argv[1], target_column=["label"],
                num_epochs=1, num_seeds=1, baselines=False, head="__main__.TypedHead")
    (scores,) = validate(LiveModel(module).encoder(module), task, Store(Path(sys.argv[2])))
"""


@pytest.mark.parametrize("digest", [False, True])
def test_classes_typed_at_a_prompt(task: Task, tmp_path: Path, digest: bool) -> None:
    """They have no source: both measurements work, nothing is reused, and it is said what to do; that done, it is."""
    script = PROMPT.replace("DIGEST", 'Module.digest = TypedHead.digest = "1"' if digest else "")
    command = [sys.executable, "-c", script, task.dataset_path, str(tmp_path / "store")]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    said = [line for line in printed.splitlines() if "give the class a digest" in line]
    assert len(said) == (0 if digest else 4)
    assert any("encoder: Module: " in line for line in said) != digest
    assert any("TypedHead: " in line for line in said) != digest
    kept = [path.suffix for path in (tmp_path / "store").rglob("*") if path.is_file() and path.name != "lock"]
    assert sorted(kept) == ([".json", ".parquet", ".safetensors"] if digest else [])
