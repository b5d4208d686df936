"""One rank of two, whose weights, disk or passes are another matter than the other's. Started by test_in_step.py."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.utils.rnn import pad_sequence
from transformers import EsmForMaskedLM, EsmTokenizer

from pipeline.embed import embed
from pipeline.encoders.custom import CustomEncoder
from pipeline.encoders.in_step import InStep
from pipeline.encoders.live import LiveModel
from pipeline.encoders.options import EncoderOptions
from pipeline.encoders.parts import at_rest
from pipeline.errors import DataError
from pipeline.load import load
from pipeline.store.embedding_table import Store
from pipeline.tracking.recording import Recording
from pipeline.training.ranks import Ranks
from pipeline.training.sharing import check_same, measuring_store
from pipeline.validation import dry_run, validate
from tests.support.data import planted_task
from tests.support.training import section

RANK = int(os.environ["RANK"])


class Own(nn.Module):
    """Gives hidden states by a layer that is a part of its own; the next call on rank 1 fails where it is told so."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.inner, self.other = nn.Embedding(128, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.fails = False

    def forward(self, ids: Tensor) -> Tensor:
        if self.fails and RANK == 1:
            self.fails = False
            raise DataError("injected")
        states: Tensor = self.inner(self.embedding(ids))
        return states

    def hidden_states(self, sequences: Sequence[str]) -> list[Tensor]:
        ids = [torch.tensor([ord(letter) for letter in text]) for text in sequences]
        states = Own.forward(self, pad_sequence(ids, batch_first=True))
        return [one[: len(text)] for one, text in zip(states, sequences, strict=True)]


def made(*names: str) -> Any:
    """The model in parts, some of them called by name."""
    torch.manual_seed(0)
    model = Own()
    for name in names:
        fully_shard(getattr(model, name))
    return fully_shard(model)


def seen(work: Callable[[], Any]) -> Any:
    try:
        return work()
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def apart(folder: Path, ranks: Ranks) -> list[Any]:
    """A batch fails on one rank, of ranks without a file system in common; then none does."""
    model = made("inner", "other")
    encoder = LiveModel(model).encoder(model, probe="MK")
    store = Store(folder / f"store-{RANK}", max_batch_tokens=200, shared=False)
    examples = [load(planted_task(folder / f"planted-{RANK}", num_epochs=1))]

    def embedded() -> float:
        return embed(examples, encoder, store, ranks)[0].metrics["embedded"]

    model.fails = True
    found = [seen(embedded)]
    here, encoder.device = encoder.device, torch.device("meta")  # for all that is not a CPU, a batch is made ahead
    model.fails = True
    found += [seen(embedded), seen(embedded)]
    encoder.device = here
    recording = Recording(folder)
    validate(encoder, examples[0].task, store, recording, examples=examples, workers=ranks)
    return [*found, [name for kind, name, *_ in recording.calls if kind == "stage"]]


def tried_out(folder: Path, model_folder: str, ranks: Ranks) -> list[Any]:
    """The first pass fails on one rank, as an encoder is made, of two kinds; then there is no folder to try it in."""
    own, esm = made("inner"), EsmForMaskedLM.from_pretrained(model_folder)
    fully_shard(esm.esm.encoder.layer[0])
    fully_shard(esm)
    of_own, of_esm = LiveModel(own), LiveModel(esm, tokenizer=EsmTokenizer.from_pretrained(model_folder))
    own.fails, cls = True, EncoderOptions(pooling="cls")
    found = [seen(lambda: ranks.together(lambda: bool(of_own.encoder(own, probe="MK"))))]
    fails = esm.esm.embeddings.register_forward_pre_hook(lambda *_: 1 // (1 - RANK) and None)
    found.append(seen(lambda: ranks.together(lambda: bool(of_esm.encoder(esm, cls)))))
    fails.remove()
    encoder, examples = of_esm.encoder(esm, cls), [load(planted_task(folder / f"tried-{RANK}"))]
    before, tempfile.tempdir = tempfile.gettempdir(), str(folder / f"none-{RANK}")
    (folder / "none-0").mkdir(exist_ok=True)
    found.append(seen(lambda: ranks.together(lambda: dry_run(encoder, examples, ranks))))
    tempfile.tempdir = before
    return [*found, seen(lambda: dry_run(encoder, examples, ranks))]


def outermost() -> list[Any]:
    """The called part is the outermost one, and fails on one rank; no forward pass may seem to go on then."""
    model, ids = made("inner", "other"), torch.tensor([[1, 2, 3]])
    in_step = InStep(model, model)
    before = in_step(model, ids)
    model.fails = True
    failed = seen(lambda: in_step(model, ids).tolist())
    idle = model._get_fsdp_state()._state_ctx.iter_forward_root is None
    return [failed == before.tolist() or failed, idle, torch.equal(in_step(model, ids), before)]


def a_part() -> list[Any]:
    """The first pass of a part fails on one rank; the part that the code never calls is not gathered."""
    model = made("inner", "other")
    in_step, given = InStep(model, model.inner), torch.ones(1, 8)
    model.fails = True

    def code() -> Any:
        if RANK == 1:
            raise DataError("injected")
        return model.inner(given).shape

    failed = seen(lambda: list(in_step(code)))
    return [failed, list(in_step(model.inner, given).shape)]


class Layer(nn.Linear):
    """Fails within its forward pass, once, where it is told so."""

    fails = False

    def forward(self, given: Tensor) -> Tensor:
        if self.fails and RANK == 1:
            self.fails = False
            raise DataError("injected")
        return super().forward(given)


def passed(in_step: InStep, model: Any, given: Tensor) -> Any:
    return in_step(model, given).tolist()


def a_layer(shard: Callable[[nn.Module], Any]) -> list[Any]:
    """A layer fails within, on one rank; afterwards a training, and a pass, are what they are without."""
    given, seen_here = torch.ones(2, 8), []
    for fails in (False, True):
        torch.manual_seed(0)
        layer = Layer(8, 8)
        model = shard(nn.Sequential(layer, nn.Linear(8, 8)))
        in_step = InStep(model)
        layer.fails = fails
        with torch.no_grad(), at_rest(model):
            seen_here.append(seen(partial(passed, in_step, model, given)))
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        for _ in range(2):
            model(given).square().mean().backward()
            optimizer.step()
        with torch.no_grad(), at_rest(model):
            seen_here.append(passed(in_step, model, given))
    whole, after, failed, again = seen_here
    return [failed == whole or failed, after == again, whole == after]


def roots(model: Any) -> Any:
    """Each layer is an outermost part of its own."""
    for layer in model:
        fully_shard(layer)
    return model


def nested(model: Any) -> Any:
    return fully_shard(roots(model))


def wrapped(model: Any) -> Any:
    """FSDP1."""
    policy = ModuleWrapPolicy({Layer, nn.Linear})
    return FullyShardedDataParallel(model, device_id=torch.device("cpu"), auto_wrap_policy=policy)


def tensors(folder: Path, ranks: Ranks) -> list[Any]:
    """Tensor parallelism: both ranks embed all batches, and the first keeps them; hidden states may be in parts."""
    mesh, found = init_device_mesh("cpu", (2,)), []
    examples = [load(planted_task(folder / f"tensors-{RANK}", num_epochs=1))]
    for local in (None, True, False):
        torch.manual_seed(0)
        model: Any = Own()
        if local is not None:
            plan = {"embedding": ColwiseParallel(), "inner": RowwiseParallel(use_local_output=local)}
            parallelize_module(model, mesh, plan)
        passes: list[int] = []
        model.embedding.register_forward_pre_hook(lambda _, given, passes=passes: passes.append(len(given[0])))
        encoder = LiveModel(model).encoder(model, probe="MK")
        store = Store(folder / f"tensors-{RANK}-{local}", max_batch_tokens=200, shared=False)
        metrics = validate(encoder, examples[0].task, store, examples=examples, workers=ranks)[0].metrics
        found.append([metrics, passes])
    return found


def unknown_code(ranks: Ranks, module: Any) -> Any:
    """What becomes of weights whose encoder has no digest."""
    return seen(lambda: check_same(CustomEncoder(Own(), None, torch.device("cpu"), probe="MK"), module, ranks))


def drifted() -> Own:
    torch.manual_seed(RANK)
    return Own()


def own_disks(folder: Path, ranks: Ranks) -> list[str]:
    """The folder of a measurement whose embeddings are kept, on each rank's own disk."""
    config = section(Path(), planted_task(folder / f"disk-{RANK}"), keep_embeddings=True)
    os.chdir(folder / f"disk-{RANK}")  # relative to which the store is
    with measuring_store(config, ranks) as store:
        return list(store.root.parts[:2])


def main(folder: Path, model_folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    ranks = Ranks(30.0)
    ranks.open()
    with torch.no_grad():
        found = {"outermost": outermost(), "a part": a_part(), "apart": apart(folder, ranks)}
    torch.manual_seed(0)
    alike = Own()
    found["weights"] = [unknown_code(ranks, one) for one in (drifted(), made("inner", "other"), alike)]
    shards = {"roots": roots, "nested": nested, "wrapped": wrapped}
    layers: Any = {name: a_layer(shard) for name, shard in shards.items()}
    found["layers"], found["tensors"] = layers, tensors(folder, ranks)
    found["tried out"] = tried_out(folder, model_folder, ranks)
    found["disks"] = own_disks(folder, ranks)
    (folder / f"rank-{RANK}.json").write_text(json.dumps(found))
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
