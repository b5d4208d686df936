"""One rank of two, or the only one: measures in each scenario, and writes what it saw. Started by test_sharded.py."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import EsmForMaskedLM, EsmTokenizer

from pipeline import Downstream, Store, validate
from pipeline.config.task import Task
from pipeline.encoders.live import LiveModel
from pipeline.engines.workers import Workers
from pipeline.training.ranks import Ranks
from tests.support.data import make_task, planted, planted_task, proteins
from tests.support.training import section

RANK = int(os.environ.get("RANK", "0"))


class Normed(nn.Module):
    """A model of one's own whose states go through a batch norm, which is another on each rank."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(128, 8)
        self.norm = nn.BatchNorm1d(8)

    def hidden_states(self, sequences: Sequence[str]) -> list[Tensor]:
        ids = [torch.tensor([ord(letter) for letter in text]) for text in sequences]
        states = self.embedding(pad_sequence(ids, batch_first=True))
        states = self.norm(states.transpose(1, 2)).transpose(1, 2)
        return [one[: len(text)] for one, text in zip(states, sequences, strict=True)]


def tasks(folder: Path) -> list[Task]:
    """Heads that are trained at once, and others; a number of sequences that two ranks cannot halve; both levels."""
    numbers = [{"sequence": text, "y": text.count("W") / len(text)} for text in proteins(61, 5)]
    first = make_task(folder / f"numbers-{RANK}", numbers, numbers[:21], num_epochs=3, num_seeds=3, batch_size=16)
    first.task_name, first.baselines = "numbers", True
    second = planted_task(folder / f"planted-{RANK}", num_epochs=2, num_seeds=2, task_name="planted", baselines=True)
    third = make_task(folder / f"letters-{RANK}", planted(proteins(33, 6)), level="token", num_epochs=2)
    third.task_name, third.target_column, third.task_type = "letters", ["label"], "classification"
    return [first, second, third]


def live(folder: Path, model: Any, tokenizer: Any = None, **options: Any) -> Any:
    """What a call in a training gives."""
    config = section(folder, tasks(folder / "data"), max_batch_tokens=200, on_error="raise", timeout=60.0, **options)
    with Downstream(config, tokenizer) as downstream:
        return downstream(model, 1)


def apart(folder: Path, encoder: Any, workers: Workers) -> Any:
    """Workers without a file system in common."""
    store = Store(folder / f"store-{RANK}", max_batch_tokens=200, shared=False)
    scores = validate(encoder, tasks(folder / "data"), store, workers=workers)
    again = validate(encoder, tasks(folder / "data"), store, workers=workers)  # everything is stored
    assert [one.metrics for one in again] == [one.metrics for one in scores]
    tables = [hashlib.sha256(one.table.to_pandas().to_json().encode()).hexdigest() for one in scores]
    return {"tables": tables, "metrics": {name: value for one in scores for name, value in one.metrics.items()}}


def rows(folder: Path) -> Any:
    """A digest of the embedding of each sequence that is kept."""
    found: dict[str, str] = {}
    for shard in sorted(folder.rglob("shard-*.parquet")):
        import pyarrow.parquet as pq

        table = pq.read_table(shard)
        for key, hidden in zip(table["key"].to_pylist(), table["hidden"].to_pylist(), strict=True):
            place = f"{shard.parent.name} {key.hex()}"
            found[place] = hashlib.sha256(found.get(place, "").encode() + hidden).hexdigest()
    return found


def main(folder: Path, model_folder: Path) -> None:
    torch.set_num_threads(1)
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group("gloo")
    model, tokenizer = EsmForMaskedLM.from_pretrained(model_folder), EsmTokenizer.from_pretrained(model_folder)
    found = {"esm": live(folder / "esm", model, tokenizer, keep_embeddings=True)}
    found["rows"] = rows(folder / "esm") if RANK == 0 else None
    torch.manual_seed(0)
    own = Normed()
    mean: Any = own.norm.running_mean
    mean += RANK
    found["own"] = live(folder / "own", own)
    found["buffer"] = mean.tolist()
    ranks = Ranks(60.0)
    ranks.open()
    found["apart"] = apart(folder / "apart", LiveModel(model, tokenizer=tokenizer).encoder(model.eval()), ranks)
    found["blocking"] = live(folder / "blocking", model, tokenizer, mode="blocking")
    (folder / f"rank-{RANK}.json").write_text(json.dumps(found))
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
