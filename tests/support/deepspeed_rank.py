"""One rank of two that trains with DeepSpeed on the CPU and writes its checkpoint. See test_deepspeed.py."""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import deepspeed
import deepspeed.comm.torch as backend
import torch
import torch.distributed as dist
from transformers import EsmForMaskedLM, EsmTokenizer

from pipeline import Downstream
from pipeline.errors import ConfigError
from tests.support.data import planted_task_at
from tests.support.training import section


def measure(engine: Any, source: str, folder: Path) -> dict[str, float]:
    """The metrics of the weights in training; of ZeRO 3 the error instead."""
    config = section(folder, planted_task_at(folder / "data"), on_error="raise", timeout=120.0)
    config.dataset[0].num_epochs = 1
    with Downstream(config, EsmTokenizer.from_pretrained(source)) as downstream:
        try:
            return downstream(engine, 3)
        except ConfigError as error:
            return {str(error): 0.0}


def run(source: str, folder: Path, stage: int) -> None:
    """Three steps; `written` gets the checkpoint, `live.pt` the module's weights."""
    backend.build_shm_op = lambda: None  # takes minutes to compile
    deepspeed.init_distributed("gloo")
    model = EsmForMaskedLM.from_pretrained(source)
    model.esm.embeddings.word_embeddings.weight.requires_grad_(False)
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    groups = [[weight for weight in trained if (weight.dim() > 1) == decayed] for decayed in (True, False)]
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": stage, "sub_group_size": 2000, "stage3_param_persistence_threshold": 100},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
    }
    parameters = [{"params": group} for group in groups]
    engine: Any = deepspeed.initialize(model=model, model_parameters=parameters, config=config)[0]
    chance = torch.Generator().manual_seed(dist.get_rank())
    for _ in range(3):
        ids = torch.randint(4, 24, (2, 17), generator=chance)
        engine.backward(engine(input_ids=ids, labels=ids).loss)
        engine.step()
    measured = measure(engine, source, folder) if (folder / "data").is_dir() else {}
    (folder / f"rank-{dist.get_rank()}.json").write_text(json.dumps(measured))
    engine.save_checkpoint(str(folder / "written"))
    gathered = deepspeed.zero.GatheredParameters(list(engine.module.parameters())) if stage == 3 else nullcontext()
    with gathered:
        if dist.get_rank() == 0:
            state = {name: value.detach().clone() for name, value in engine.module.state_dict().items()}
            torch.save(state, folder / "live.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    run(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
