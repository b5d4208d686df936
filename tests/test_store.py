"""The store: what is embedded, what is not embedded again, and what a kill or a damaged file does."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.config.task import Task
from pipeline.embed import Embeddings, embed
from pipeline.encoders.forward import batches
from pipeline.errors import CacheError
from pipeline.load import load
from pipeline.store import shards as shards_module
from pipeline.store import writing as writing_module
from pipeline.store.embedding_table import EmbeddingTable, Store, sequence_key
from pipeline.store.reading import Rows
from pipeline.store.shards import DamagedShardsError
from tests.support.data import TEXTS, make_task, token_task
from tests.support.encoders import FakeEncoder
from tests.support.programs import ROOT


def sequence_task(folder: Path, texts: list[str] = TEXTS) -> Task:
    rows = [{"sequence": text, "y": index} for index, text in enumerate(texts)]
    return make_task(folder / "numbers", rows, task_name="numbers")


def embedded(task: Task, encoder: FakeEncoder, store: Store) -> Embeddings:
    return embed([load(task)], encoder, store)[0]


def numbers(embeddings: Embeddings) -> dict[str, float]:
    """What the pass took, but for its speed."""
    found = dict(embeddings.metrics)
    assert found.pop("tokens_per_second") > 0
    return found


def counts(embeddings: Embeddings) -> tuple[float, float]:
    """How many sequences were embedded, and how many were stored before."""
    return embeddings.metrics["embedded"], embeddings.metrics["cached"]


def all_rows(embeddings: Embeddings, part: str = "train") -> torch.Tensor:
    rows = embeddings.rows(part)
    return rows.gather(np.arange(len(embeddings.entries[part])))


@pytest.mark.parametrize("memory", [10**9, 0])
def test_rows_are_the_encoders_in_the_order_of_the_examples(tmp_path: Path, fake: FakeEncoder, memory: int) -> None:
    store = Store(tmp_path, memory_bytes=memory)
    both = embed([load(token_task(tmp_path)), load(sequence_task(tmp_path))], fake, store)
    assert torch.equal(all_rows(both[0]), torch.cat([fake.state(text) for text in TEXTS]))
    assert torch.equal(all_rows(both[1]), torch.stack([fake.state(text).mean(0) for text in TEXTS]))
    rows = both[0].rows("train")
    assert rows.in_memory == bool(memory)
    some = rows.gather(np.array([3, 0, 3]))
    assert torch.equal(some, torch.cat([fake.state(TEXTS[index]) for index in (3, 0, 3)]))


def test_each_distinct_sequence_goes_through_once(tmp_path: Path, fake: FakeEncoder, store: Store) -> None:
    tasks = [token_task(tmp_path, TEXTS + TEXTS), sequence_task(tmp_path, [*TEXTS, "KKK"])]
    both = embed([load(task) for task in tasks], fake, store)
    assert sorted(fake.seen) == sorted([*TEXTS, "KKK"])
    assert both[0].metrics == both[1].metrics
    assert numbers(both[0]) == {"embedded": 7, "cached": 0, "tokens": sum(map(len, fake.seen)), "cache_hits": 0.0}


def test_what_is_stored_is_not_embedded_again(tmp_path: Path, fake: FakeEncoder, store: Store) -> None:
    first = all_rows(embedded(token_task(tmp_path), fake, store))
    fake.seen.clear()
    again = embedded(token_task(tmp_path), fake, store)
    assert fake.seen == []
    assert again.metrics == {"embedded": 0, "cached": 6, "tokens": 0, "cache_hits": 1.0}
    assert torch.equal(all_rows(again), first)
    more = embedded(token_task(tmp_path, [*TEXTS, "YYYY", "CC"]), fake, store)
    assert sorted(fake.seen) == ["CC", "YYYY"]
    assert numbers(more) == {"embedded": 2, "cached": 6, "tokens": 6, "cache_hits": 0.75}


def test_another_encoder_pooling_or_dtype_has_its_own_table(tmp_path: Path, fake: FakeEncoder) -> None:
    store, half = Store(tmp_path), Store(tmp_path, dtype="float16")
    keys = {
        embedded(token_task(tmp_path), fake, store).key,
        embedded(sequence_task(tmp_path), fake, store).key,
        embedded(token_task(tmp_path), FakeEncoder(name="other"), store).key,
        embedded(token_task(tmp_path), fake, half).key,
    }
    assert len(keys) == 4
    stored = all_rows(embedded(token_task(tmp_path), fake, half))
    torch.testing.assert_close(stored, torch.cat([fake.state(text) for text in TEXTS]), atol=1e-3, rtol=1e-3)
    assert stored.dtype == torch.float32


def test_anyone_can_read_a_shard(tmp_path: Path, fake: FakeEncoder, store: Store) -> None:
    table = embedded(token_task(tmp_path, ["MKV"]), fake, store).table
    (path,) = table.folder.glob("*.parquet")
    columns = pq.read_table(path)
    assert columns["key"].to_pylist() == [sequence_key("MKV")] * 3
    vectors = np.array([np.frombuffer(cell, "<f4") for cell in columns["hidden"].to_pylist()])
    assert np.array_equal(vectors, fake.state("MKV").numpy())
    made_with = json.loads((table.folder / "manifest.json").read_text())["shards"][0]["made_with"]
    assert made_with["max_batch_tokens"] == 2048
    assert {"device", "threads", "emb_batch_size"} <= set(made_with)


def flip(embeddings: Embeddings, fake: FakeEncoder, text: str) -> Path:
    """Changes a bit of a sequence's stored rows; returns the shard's path."""
    (path,) = embeddings.table.folder.glob("*.parquet")
    content = bytearray(path.read_bytes())
    state = fake.state(text) if embeddings.examples.task.level == "token" else fake.state(text).mean(0)
    content[content.index(state.numpy().tobytes()) + 5] ^= 1
    path.write_bytes(content)
    return path


def groups_of(table: EmbeddingTable, shard: shards_module.Shard) -> list[int]:
    """The first row of each row group."""
    return [group.first for group in shards_module.row_groups(table.path(shard), shard, table.row_bytes)]


@pytest.mark.parametrize("damage", ["truncate", "flip", "remove"])
def test_a_damaged_shard_is_embedded_again_and_never_read(
    tmp_path: Path, fake: FakeEncoder, store: Store, damage: str
) -> None:
    before = embedded(token_task(tmp_path), fake, store)
    expected = all_rows(before)
    (path,) = before.table.folder.glob("*.parquet")
    if damage == "truncate":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif damage == "remove":
        path.unlink()
    else:
        flip(before, fake, "MKV")
        with pytest.raises(DamagedShardsError, match=path.name):
            Rows(before.table, before.entries["train"], 0)
    fake.seen.clear()
    after = embedded(token_task(tmp_path), fake, store)
    assert sorted(fake.seen) == sorted(TEXTS)
    assert torch.equal(all_rows(after), expected)


def test_damage_to_one_table_leaves_the_other(tmp_path: Path, fake: FakeEncoder, store: Store) -> None:
    tasks = [token_task(tmp_path), sequence_task(tmp_path)]
    first, pooled = embed([load(task) for task in tasks], fake, store)
    flip(pooled, fake, "MKV")
    assert first.table.folder != pooled.table.folder  # their shards have the same names
    again = embed([load(task) for task in tasks], fake, store)
    assert torch.equal(all_rows(again[0]), all_rows(first))
    assert torch.equal(all_rows(again[1]), all_rows(pooled))
    assert counts(again[0]) == (6, 0)


def test_damage_beside_new_sequences_takes_one_pass(tmp_path: Path, fake: FakeEncoder, store: Store) -> None:
    before = embedded(token_task(tmp_path), fake, store)
    flip(before, fake, "MKV")
    fake.seen.clear()
    after = embedded(token_task(tmp_path, [*TEXTS, "YYYY"]), fake, store)
    assert sorted(fake.seen) == sorted([*TEXTS, "YYYY"])
    assert counts(after) == (7, 0)
    assert torch.equal(all_rows(after)[: -len("YYYY")], all_rows(before))


def test_a_shard_that_reads_back_damaged_is_an_error(
    tmp_path: Path, fake: FakeEncoder, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is at fault, and embedding again and again would not help; another run begins anew."""
    finish = shards_module.ShardFile.finish

    def damaged(file: shards_module.ShardFile) -> shards_module.Shard:
        shard = finish(file)
        content = file.path.read_bytes()
        file.path.write_bytes(content.replace(fake.state("MKV").numpy().tobytes(), bytes(3 * 4 * 24)))
        return shard

    monkeypatch.setattr(shards_module.ShardFile, "finish", damaged)
    with pytest.raises(CacheError, match=r"damaged shards: shard-00000\.parquet .*; run again"):
        embedded(token_task(tmp_path), fake, store)
    assert sorted(fake.seen) == sorted(TEXTS)
    monkeypatch.undo()
    assert counts(embedded(token_task(tmp_path), fake, store)) == (6, 0)


@pytest.mark.parametrize("memory", [10**9, 0])
def test_stored_rows_are_read_and_verified_once(
    tmp_path: Path, fake: FakeEncoder, memory: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards_module, "ROW_GROUP", 7)
    store = Store(tmp_path, memory_bytes=memory)
    tasks = [load(token_task(tmp_path)), load(sequence_task(tmp_path))]
    embed(tasks, fake, store)
    read, seen = shards_module.read_group, list[tuple[Path, int]]()

    def counting(file: Any, group: shards_module.RowGroup, out: Any) -> bool:
        seen.append((Path(file.name), group.first))
        return read(file, group, out)

    monkeypatch.setattr(shards_module, "read_group", counting)
    tables = [one.table for one in embed(tasks, fake, store)]
    expected = [
        (table.folder / shard.file, group)
        for table in tables
        for shard in table.shards()
        for group in groups_of(table, shard)
    ]
    assert len(expected) > 3
    assert sorted(seen) == sorted(expected)


@pytest.mark.parametrize("digit", [b"0", b"z", b"\xff"])
def test_a_damaged_index_is_damage(tmp_path: Path, fake: FakeEncoder, store: Store, digit: bytes) -> None:
    table = embedded(token_task(tmp_path), fake, store).table
    (path,) = table.folder.glob("*.parquet")
    content = bytearray(path.read_bytes())
    place = content.find(sequence_key("MKV").hex().encode())
    content[place] = digit[0] if content[place] != digit[0] else ord("1")
    path.write_bytes(content)
    assert counts(embedded(token_task(tmp_path), fake, store)) == (6, 0)


@settings(max_examples=40, deadline=None)
@given(
    counts=st.lists(st.integers(1, 30), min_size=1, max_size=40),
    group=st.integers(1, 40),
    shard=st.integers(1, 2_000),
    dtype=st.sampled_from(["float32", "float16"]),
    in_thread=st.booleans(),
    data=st.data(),
)
def test_any_rows_of_any_shards_are_read_back(
    counts: list[int], group: int, shard: int, dtype: str, in_thread: bool, data: st.DataObject
) -> None:
    """Whichever sequences are wanted, in whatever order, from however many shards and row groups."""
    rows = np.random.default_rng(0).standard_normal((sum(counts), 3)).astype(dtype)
    pieces = np.split(rows, np.cumsum(counts)[:-1])
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards_module, "ROW_GROUP", group)
        patch.setattr(shards_module, "GROUP_BYTES", data.draw(st.integers(1, 400)))
        patch.setattr(writing_module, "SHARD_BYTES", shard)
        table = Store(Path(folder), dtype).table("any", "none", 3)
        with table.lock(), table.writer({}, in_thread) as writer:
            for number, piece in enumerate(pieces):
                writer.add([sequence_key(str(number))], [0], [len(piece)], piece)
                if writer.is_full:
                    writer.flush()
        wanted = data.draw(st.lists(st.integers(0, len(counts) - 1), min_size=1))
        index = table.index()
        entries = [index[sequence_key(str(number))] for number in wanted]
        expected = torch.from_numpy(np.concatenate([pieces[number] for number in wanted])).float()
        for memory in (10**9, 0):
            found = Rows(table, entries, memory)
            assert torch.equal(found.gather(np.arange(len(wanted))), expected)
        assert [path.suffix for path in table.folder.glob("shard-*")] == [".parquet"] * len(table.shards())


def test_an_unreadable_manifest_is_no_manifest(tmp_path: Path, fake: FakeEncoder, store: Store) -> None:
    table = embedded(token_task(tmp_path), fake, store).table
    (table.folder / "manifest.json").write_text('{"shards": [')
    assert counts(embedded(token_task(tmp_path), fake, store)) == (6, 0)


KILLED = """
import os, signal, sys, time
from pathlib import Path
import pipeline.store.writing
from pipeline.embed import embed
from pipeline.load import load
from pipeline.store.embedding_table import Store
from tests.support.encoders import FakeEncoder
from tests.support.data import token_task
pipeline.store.writing.SHARD_TOKENS = 8
class Dying(FakeEncoder):
    def hidden_states(self, sequences):
        if "WWW" in sequences:
            while not list(folder.rglob("manifest.json")):  # shards are written in a thread
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)
        return super().hidden_states(sequences)
folder = Path(sys.argv[1])
embed([load(token_task(folder))], Dying(), Store(folder / "store", max_batch_tokens=8))
"""


def test_a_killed_run_goes_on_from_its_finished_shards(tmp_path: Path, fake: FakeEncoder) -> None:
    store = Store(tmp_path / "store", max_batch_tokens=8)
    script = [sys.executable, "-c", KILLED, str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    died = subprocess.run(script, cwd=ROOT, env=environment, check=False)
    assert died.returncode == -signal.SIGKILL
    (manifest,) = tmp_path.rglob("manifest.json")
    finished = sum(shard["sequences"] for shard in json.loads(manifest.read_text())["shards"])
    rest = embedded(token_task(tmp_path), fake, store)
    longest_first = sorted(TEXTS, key=len, reverse=True)
    assert finished in (1, 2)
    assert set(fake.seen) == set(longest_first[finished:])
    assert counts(rest) == (6 - finished, finished)
    assert torch.equal(all_rows(rest), torch.cat([fake.state(text) for text in TEXTS]))


def test_many_shards_and_row_groups_read_back_alike(
    tmp_path: Path, fake: FakeEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writing_module, "SHARD_TOKENS", 40)
    monkeypatch.setattr(shards_module, "ROW_GROUP", 7)
    texts = ["MKVLAAGIVG"[: 1 + index % 10] * (1 + index // 10) for index in range(40)]
    for memory in (10**9, 0):
        store = Store(tmp_path, memory_bytes=memory, max_batch_tokens=20)
        embeddings = embedded(token_task(tmp_path, texts), fake, store)
        assert torch.equal(all_rows(embeddings), torch.cat([fake.state(text) for text in texts]))
    assert len(embeddings.table.shards()) > 10


@given(
    lengths=st.lists(st.integers(1, 50), min_size=1, max_size=60),
    max_tokens=st.integers(1, 200),
    max_sequences=st.integers(1, 8),
    packed=st.booleans(),
    data=st.data(),
)
def test_the_batch_plan(
    lengths: list[int], max_tokens: int, max_sequences: int, packed: bool, data: st.DataObject
) -> None:
    sequences = {sequence_key(str(index)): "A" * length for index, length in enumerate(lengths)}
    limits = max_tokens, max_sequences, packed
    plan = list(batches(sequences, *limits))
    assert sorted(key for batch in plan for key in batch) == sorted(sequences)
    for batch in plan:
        assert len(batch) <= max_sequences
        each = [len(sequences[key]) for key in batch]
        assert packed or min(each) >= 0.8 * max(each)
        assert len(batch) == 1 or (sum(each) if packed else len(batch) * max(each)) <= max_tokens
    if packed:  # none that could have joined the batch before it
        for one, other in pairwise(plan):
            assert len(one) == max_sequences or sum(len(sequences[key]) for key in [*one, other[0]]) > max_tokens
    shuffled = dict(data.draw(st.permutations(list(sequences.items()))))
    assert list(batches(shuffled, *limits)) == plan
    done = data.draw(st.integers(0, len(plan)))
    rest = {key: text for key, text in sequences.items() if not any(key in batch for batch in plan[:done])}
    assert list(batches(rest, *limits)) == plan[done:]


TWO_AT_ONCE = """
import sys, time
from contextlib import contextmanager
from pathlib import Path
from filelock import FileLock, Timeout
from pipeline.embed import embed
from pipeline.load import load
from pipeline.store.embedding_table import EmbeddingTable, Store
from tests.support.encoders import FakeEncoder
from tests.support.data import token_task
folder, name, other = Path(sys.argv[1]), *sys.argv[2:4]

def wait_for(*events):
    for _ in range(6000):
        if any((folder / event).exists() for event in events):
            return
        time.sleep(0.01)
    raise AssertionError(f"none of {events} after a minute")

class Waiting(FakeEncoder):
    def hidden_states(self, sequences):
        (folder / f"{name} embeds").touch()
        wait_for(f"{other} embeds", f"{other} is locked out")
        return super().hidden_states(sequences)

lock = EmbeddingTable.lock

def lock_of(table):
    try:
        FileLock(table.folder / "lock", timeout=0).acquire().lock.release()
    except Timeout:
        (folder / f"{name} is locked out").touch()
    return lock(table)

task = token_task(folder / name)
if name == "second":
    EmbeddingTable.lock = lock_of
    wait_for("first embeds")
metrics = embed([load(task)], Waiting(), Store(folder / "store"))[0].metrics
print(metrics["embedded"], metrics["cached"])
"""


def test_two_processes_at_once_embed_each_sequence_once(tmp_path: Path) -> None:
    """The second begins while the first is embedding, and the first goes on once the second has met its lock."""
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", TWO_AT_ONCE, str(tmp_path), *names],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for names in (("first", "second"), ("second", "first"))
    ]
    assert [run.communicate()[0].strip() for run in runs] == ["6 0", "0 6"]
    assert (tmp_path / "second is locked out").exists()


def test_a_shard_ends_with_a_batch(tmp_path: Path, fake: FakeEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a run which was killed goes on with the batches of one that was not."""
    monkeypatch.setattr(writing_module, "SHARD_TOKENS", 1)  # a shard for each batch
    texts = ["MKVL"[: 1 + index % 4] + "ACDEFGHIKL"[: index % 7] for index in range(30)]
    table = embedded(token_task(tmp_path, texts), fake, Store(tmp_path, max_batch_tokens=30)).table
    plan = list(batches({sequence_key(text): text for text in texts}, 30, 128))
    index = table.index()
    for batch in plan:
        assert len({index[key].shard.file for key in batch}) == 1
    assert len(table.shards()) == len(plan)


def test_hidden_states_that_are_no_numbers_are_not_stored(tmp_path: Path, store: Store) -> None:
    class Broken(FakeEncoder):
        factor = float("nan")

        def state(self, sequence: str) -> torch.Tensor:
            return super().state(sequence) * self.factor

    encoder = Broken()
    with pytest.raises(CacheError, match="hold no finite numbers"):
        embedded(token_task(tmp_path), encoder, store)
    encoder.factor = 1e6
    with pytest.raises(CacheError, match="hold numbers beyond float16"):
        embedded(token_task(tmp_path), encoder, Store(tmp_path, dtype="float16"))
    assert not list(tmp_path.rglob("shard-*"))


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
from pipeline.embed import embed
from pipeline.errors import CacheError
from pipeline.load import load
from pipeline.store.embedding_table import Store
from tests.support.encoders import FakeEncoder
from tests.support.data import token_task
task = token_task(Path(sys.argv[1]), ["A" * n + "C" * 100 for n in range(1, 400)])
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (5_000_000, 5_000_000))  # the first row group fits
try:
    embed([load(task)], FakeEncoder(), Store(Path(sys.argv[1]) / "store"))
except CacheError as error:
    print(error)
print(len(list(Path(sys.argv[1]).rglob("shard-*"))))
"""


def test_a_full_disk_is_said_and_leaves_nothing_half_written(tmp_path: Path) -> None:
    script = [sys.executable, "-c", FULL_DISK, str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.run(script, cwd=ROOT, env=environment, check=True, capture_output=True, text=True)
    said, left = run.stdout.splitlines()
    assert "cannot be written" in said
    assert "set store to another folder" in said
    assert left == "0"


FEW_DESCRIPTORS = """
import resource, sys
import numpy as np
from pathlib import Path
import pipeline.store.writing
from pipeline.embed import embed
from pipeline.load import load
from pipeline.store.embedding_table import Store
from tests.support.encoders import FakeEncoder
from tests.support.data import token_task
pipeline.store.writing.SHARD_TOKENS = 1
texts = ["A" * n + tail for n in range(1, 31) for tail in ("C", "D", "E")]
task = token_task(Path(sys.argv[1]), texts)
store = Store(Path(sys.argv[1]), memory_bytes=0, max_batch_tokens=1)
resource.setrlimit(resource.RLIMIT_NOFILE, (48, 48))
one = embed([load(task)], FakeEncoder(), store)[0]
again = embed([load(task)], FakeEncoder(), store)[0]
again.rows("train").gather(np.arange(len(texts)))
print(len(again.table.shards()), again.metrics["embedded"])
"""


def test_more_shards_than_open_files_are_no_damage(tmp_path: Path) -> None:
    script = [sys.executable, "-c", FEW_DESCRIPTORS, str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.run(script, cwd=ROOT, env=environment, check=True, capture_output=True, text=True)
    assert run.stdout.split() == ["90", "0"]
