"""One rank of four, on a mesh of two dimensions: copies of parts (HSDP), tensor parallelism. Started by test_meshes.py.

Ranks 0 and 1 divide the layers between them in tensor parallelism, and so do 2 and 3: each pair must embed the same.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from pytorch_lightning.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from transformers import EsmForMaskedLM, EsmTokenizer
from transformers.models.esm.modeling_esm import EsmLayer

from pipeline import Downstream
from pipeline.encoders import embedding_pass
from pipeline.errors import DataError
from tests.support.data import planted_task
from tests.support.fsdp import Validated, finish
from tests.support.fsdp_ranks import loop
from tests.support.loops import digest
from tests.support.training import section

RANK = int(os.environ["RANK"])
CPU = torch.device("cpu")


def divided(model: Any, mesh: DeviceMesh) -> Any:
    """Each layer of the model is divided among the ranks of a mesh."""
    columns = ["attention.self.query", "attention.self.key", "attention.self.value", "intermediate.dense"]
    plan: dict[str, Any] = {name: ColwiseParallel() for name in columns}
    plan |= {name: RowwiseParallel() for name in ("attention.output.dense", "output.dense")}
    for layer in model.esm.encoder.layer:
        parallelize_module(layer, mesh, plan)
    return model


def gathered(model: Any, mesh: DeviceMesh) -> Any:
    for layer in model.esm.encoder.layer:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


class Divided(Validated):
    """The model under Lightning's strategy, on its mesh."""

    def configure_model(self) -> None:
        mesh: Any = self.device_mesh
        gathered(divided(self.model, mesh["tensor_parallel"]), mesh["data_parallel"])


def embedded(model: nn.Module) -> list[str]:
    """Filled with what each later forward pass of a model is given."""
    found: list[str] = []
    model.register_forward_pre_hook(
        lambda _, args, kwargs: found.append(digest(kwargs.get("input_ids", args and args[0]))), with_kwargs=True
    )
    return found


def full(_batch: Any, _writers: Any) -> None:
    raise DataError("injected")


def main(folder: Path, model: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    task = planted_task(folder / f"planted-{RANK}", num_epochs=1)
    config = section(folder, task, max_batch_tokens=200, on_start=True, on_error="raise", timeout=60.0)
    tokenizer = EsmTokenizer.from_pretrained(model)
    hybrid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))

    def load() -> Any:
        return EsmForMaskedLM.from_pretrained(model)

    def wrapped() -> Any:
        options: dict[str, Any] = {"sharding_strategy": ShardingStrategy.HYBRID_SHARD, "device_mesh": hybrid}
        policy = ModuleWrapPolicy({EsmLayer})
        return FullyShardedDataParallel(load(), device_id=CPU, auto_wrap_policy=policy, **options)

    kinds: dict[str, Callable[[], Any]] = {
        "fsdp2": lambda: gathered(load(), hybrid),
        "fsdp1": wrapped,
        "tensors": lambda: divided(load(), mesh["tp"]),
        "both": lambda: gathered(divided(load(), mesh["tp"]), mesh["dp"]),
    }
    found: dict[str, Any] = {}
    for name, make in kinds.items():
        found[f"{name} without"] = loop(make())
        with Downstream(config, tokenizer) as downstream:
            ours = make()
            batches = embedded(ours)
            found[f"{name} with"] = loop(ours, downstream)
            found |= {f"{name} curve": downstream.curve, f"{name} batches": batches}
    with Downstream(config, tokenizer) as downstream:
        found["whole"] = downstream(load(), 1)
    config.on_error, config.on_start = "warn", False
    real: Any = embedding_pass._add
    for name in ("tensors", "both"):
        with Downstream(config, tokenizer) as downstream:
            ours = kinds[name]()
            downstream(ours, 0)
            setattr(embedding_pass, "_add", full if RANK == 2 else real)  # noqa: B010
            found[f"{name} full"] = loop(ours, lambda one, step: downstream(one, step + 1))
            found[f"{name} full curve"] = downstream.curve
        setattr(embedding_pass, "_add", real)  # noqa: B010
    config.on_start, config.on_error = True, "raise"
    finish(folder, found, config, lambda: Divided(model), lambda: ModelParallelStrategy(2, 2))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
