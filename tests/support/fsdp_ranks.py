"""One rank of two whose weights are in parts (FSDP2): trains and measures, and writes what it saw. See test_fsdp.py."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from pytorch_lightning.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.utils.rnn import pad_sequence
from transformers import EsmForMaskedLM, EsmTokenizer
from transformers.modeling_outputs import MaskedLMOutput

from pipeline import Downstream
from pipeline.encoders import embedding_pass
from pipeline.encoders.live import LiveModel
from pipeline.errors import DataError
from tests.support.data import make_task, planted_task, proteins
from tests.support.fsdp import Validated, finish
from tests.support.loops import digest
from tests.support.sharded import IDS, shard
from tests.support.training import section

RANK = int(os.environ["RANK"])
TEXTS = ["MKVLAW", "ACDEFGHIKL", "GG"]
Measure = Callable[[nn.Module, int], Any]


class Own(nn.Module):
    """Gives hidden states itself, by a layer that is in the outermost part too; fails on one rank if it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.inner, self.out = nn.Embedding(128, 8), nn.Linear(8, 8), nn.Linear(8, 1)
        self.fails = False

    def forward(self, input_ids: Tensor, labels: Any = None) -> Any:
        states = self.inner(self.embedding(input_ids))
        return MaskedLMOutput(loss=self.out(states).square().mean())

    def hidden_states(self, sequences: Sequence[str]) -> list[Tensor]:
        if self.fails and RANK == 1 and "M" in sequences[0]:
            raise DataError("injected")
        ids = [torch.tensor([ord(letter) for letter in text]) for text in sequences]
        states = self.inner(self.embedding(pad_sequence(ids, batch_first=True)))
        return [one[: len(text)] for one, text in zip(states, sequences, strict=True)]


class OneByOne(Own):
    """Calls a layer for each sequence: ranks with unlike batches would wait for one another in vain."""

    def hidden_states(self, sequences: Sequence[str]) -> list[Tensor]:
        return [super(OneByOne, self).hidden_states([text])[0] for text in sequences]


class Module(Validated):
    """The model under Lightning's strategy, which it shards itself."""

    def configure_model(self) -> None:
        shard(self.model)


def loop(model: nn.Module, measure: Measure = lambda *_: None) -> list[str]:
    """A digest of the weights and this rank's random state at each step; it measures before each, and within."""
    torch.manual_seed(3)
    optimizer, seen = torch.optim.AdamW(model.parameters(), lr=1e-2), []
    for step in range(3):
        measure(model, step)
        model.train()
        optimizer.zero_grad()
        model(input_ids=IDS, labels=IDS).loss.backward()
        measure(model, step + 10)  # with gradients
        optimizer.step()
        whole = [one.full_tensor() if hasattr(one, "full_tensor") else one for one in model.parameters()]
        seen.append(digest([[one.detach() for one in whole], torch.get_rng_state()]))
    return seen


def plain_shard(model: Any) -> Any:
    fully_shard(model.inner)
    return fully_shard(model)


def main(folder: Path, model: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    numbers = [{"sequence": text, "y": text.count("W") / len(text)} for text in proteins(40, 5)]
    tasks = [
        make_task(folder / f"numbers-{RANK}", numbers, numbers[:21], num_epochs=2, task_name="numbers"),
        planted_task(folder / f"planted-{RANK}", num_epochs=1, task_name="planted"),
    ]
    config = section(folder, tasks, max_batch_tokens=300, on_start=True, on_error="raise", timeout=60.0)
    tokenizer = EsmTokenizer.from_pretrained(model)

    def load() -> Any:
        return EsmForMaskedLM.from_pretrained(model)

    whole, parts = LiveModel(load().eval(), tokenizer=tokenizer), LiveModel(shard(load()).eval(), tokenizer=tokenizer)
    with torch.no_grad():
        sharded = shard(load())
        pairs = zip(
            whole.encoder(load()).hidden_states(TEXTS), parts.encoder(sharded).hidden_states(TEXTS), strict=True
        )
        found: dict[str, Any] = {"difference": max(float((one - other).abs().max()) for one, other in pairs)}
    found["without"] = loop(shard(load()))
    with Downstream(config, tokenizer) as downstream:
        found["with"] = loop(shard(load()), downstream)
        found["curve"] = downstream.curve
    with Downstream(config, tokenizer) as downstream:
        compiled: Any = torch.compile(shard(load()), backend="eager")
        found["compiled"] = loop(compiled, downstream)
        found["compiled curve"] = downstream.curve
    with Downstream(config, tokenizer) as downstream:
        found["whole"] = downstream(load(), 1)
    torch.manual_seed(0)
    state = Own().state_dict()

    def own() -> Own:
        made = Own()
        made.load_state_dict(state)
        return made

    found["own without"] = loop(plain_shard(own()))
    with Downstream(config) as downstream:
        found["own with"] = loop(plain_shard(own()), downstream)
        found["own curve"] = downstream.curve
    with Downstream(config) as downstream:
        found["own whole"] = downstream(own(), 1)
    config.on_error = "warn"
    failing = own()
    with Downstream(config) as downstream:
        failing.fails = True
        config.on_start = False
        found["failing"] = loop(plain_shard(failing), downstream)
        found["failing curve"] = downstream.curve
    real: Any = embedding_pass._add

    def fail(batch: Any, writers: Any) -> None:
        if len(batch.unknown) > 4:  # not when it is only tried out
            raise DataError("injected")
        real(batch, writers)

    setattr(embedding_pass, "_add", fail if RANK == 1 else real)  # noqa: B010
    with Downstream(config) as downstream:
        found["full"] = loop(plain_shard(own()), downstream)
        found["full curve"] = downstream.curve
    setattr(embedding_pass, "_add", real)  # noqa: B010
    with Downstream(config) as downstream:
        mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard"))
        copies: Any = fully_shard(own(), mesh=mesh)
        found["copies whole"] = downstream(copies, 1)
    refused = [("blocking", plain_shard(own()), {"mode": "blocking"})]
    refused.append(("one by one", plain_shard(OneByOne()), {"on_error": "raise"}))
    for name, one, options in refused:
        try:
            Downstream(section(folder, tasks, **options))(one, 1)
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"
    config.on_start, config.on_error = True, "raise"
    finish(folder, found, config, lambda: Module(model), lambda: ModelParallelStrategy(2, 1))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
