"""One rank of two under the FSDP of accelerate and of the Hugging Face Trainer. Started by test_fsdp1.py.

Both take FSDP for GPUs alone: accelerate is told that it is on GPUs, whose device is the CPU.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin  # type: ignore[import-untyped]
from accelerate.state import AcceleratorState, PartialState  # type: ignore[import-untyped]
from accelerate.utils import DistributedType  # type: ignore[import-untyped]
from transformers import EsmForMaskedLM, EsmTokenizer, Trainer, TrainerCallback, TrainingArguments, set_seed

from pipeline import Downstream, DownstreamTrainerCallback
from tests.support.data import planted_task
from tests.support.fsdp_ranks import loop
from tests.support.loops import digest
from tests.support.sharded import IDS
from tests.support.training import section

RANK = int(os.environ["RANK"])
POLICY = {"auto_wrap_policy": "transformer_based_wrap", "transformer_cls_names_to_wrap": ["EsmLayer"]}


def on_gpus() -> None:
    """Has accelerate take FSDP."""
    AcceleratorState._reset_state()
    PartialState._shared_state |= {"distributed_type": DistributedType.MULTI_GPU, "device": torch.device("cpu")}


class Recorder(TrainerCallback):
    """A digest of this rank's weights, optimizer and random state at each step."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        own = [getattr(one, "full_tensor", lambda one=one: one)().detach() for one in given["model"].parameters()]
        self.seen.append(digest([own, torch.get_rng_state()]))


def with_trainer(folder: Path, source: str, version: int, callbacks: list[Any]) -> dict[str, Any]:
    """What the Hugging Face Trainer does in four steps, with an evaluation at every second."""
    fsdp = {"version": version, "transformer_layer_cls_to_wrap": ["EsmLayer"], "reshard_after_forward": True}
    fsdp |= {"cpu_ram_efficient_loading": False, "sync_module_states": False}
    given: dict[str, Any] = {"max_steps": 4, "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "no"}
    given |= {"per_device_train_batch_size": 1, "learning_rate": 1e-2, "report_to": [], "disable_tqdm": True}
    if version == 1:
        fsdp |= {"reshard_after_forward": "full_shard"}
    args = TrainingArguments(
        str(folder), use_cpu=True, ddp_backend="gloo", seed=11, fsdp="full_shard auto_wrap", fsdp_config=fsdp, **given
    )
    args.device  # noqa: B018  # which finds the CPU
    on_gpus()
    set_seed(3)
    rows = [{"input_ids": row.tolist(), "labels": row.tolist()} for row in IDS.repeat(6, 1)]
    recorder = Recorder()
    trainer: Any = Trainer(
        model=EsmForMaskedLM.from_pretrained(source),
        args=args,
        train_dataset=rows,
        eval_dataset=rows[:4],
        processing_class=EsmTokenizer.from_pretrained(source),
        callbacks=[*callbacks, recorder],
    )
    trainer.train()
    kind = type(trainer.model_wrapped).__name__
    curve = callbacks[0].session.curve if callbacks else []
    return {"kind": kind, "seen": recorder.seen, "curve": curve, "history": [*trainer.state.log_history[-2]]}


def with_accelerate(source: str, version: int, measure: Any = lambda *_: None) -> list[str]:
    """A loop whose model accelerate prepares."""
    on_gpus()
    plugin: Any = FullyShardedDataParallelPlugin(
        fsdp_version=version, cpu_ram_efficient_loading=False, use_orig_params=True if version == 1 else None, **POLICY
    )
    accelerator: Any = Accelerator(fsdp_plugin=plugin)
    accelerator.state.fsdp_plugin = plugin
    model: Any = EsmForMaskedLM.from_pretrained(source)
    model, _ = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-2))
    return loop(model, measure)


def main(folder: Path, source: str) -> None:
    torch.set_num_threads(1)
    Accelerator(cpu=True)
    task = planted_task(folder / f"planted-{RANK}", num_epochs=1)
    config = section(folder, task, max_batch_tokens=300, on_start=True, on_error="raise", timeout=60.0)
    found: dict[str, Any] = {}
    for version in (1, 2):
        found[f"accelerate {version} without"] = with_accelerate(source, version)
        with Downstream(config, EsmTokenizer.from_pretrained(source)) as downstream:
            found[f"accelerate {version} with"] = with_accelerate(source, version, downstream)
            found[f"accelerate {version} curve"] = downstream.curve
    for version in (1, 2):
        name = f"trainer {version}"
        without = with_trainer(folder / "out", source, version, [])
        ours = with_trainer(folder / "out", source, version, [DownstreamTrainerCallback(config)])
        found |= {f"{name} without": without["seen"], f"{name} with": ours["seen"], f"{name} curve": ours["curve"]}
        found |= {f"{name} kind": ours["kind"], f"{name} history": ours["history"]}
    (folder / f"rank-{RANK}.json").write_text(json.dumps(found))
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
