"""One rank of two under FSDP1: trains and measures, in loops, accelerate and Lightning. Started by test_fsdp1.py.

torch has it on the CPU; what accelerate and Lightning have against that is told otherwise, see `tests/support/fsdp.py`.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision, ShardingStrategy
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from transformers import EsmForMaskedLM, EsmTokenizer
from transformers.models.esm.modeling_esm import EsmLayer

from pipeline import Downstream
from pipeline.encoders.live import LiveModel
from tests.support.data import make_task, planted_task, proteins
from tests.support.fsdp import OnCPU, Validated, finish
from tests.support.fsdp_ranks import TEXTS, Measure, Own, loop
from tests.support.loops import digest
from tests.support.sharded import IDS
from tests.support.training import section

RANK = int(os.environ["RANK"])
CPU = torch.device("cpu")


def wrapped(model: nn.Module, parts: set[type[nn.Module]], **options: Any) -> Any:
    return FullyShardedDataParallel(model, device_id=CPU, auto_wrap_policy=ModuleWrapPolicy(parts), **options)


def accumulating(model: Any, measure: Measure = lambda *_: None) -> list[str]:
    """A step of two passes, whose gradients add up; it measures after the first, and before the second goes back."""
    torch.manual_seed(3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with model.no_sync():
        model(input_ids=IDS, labels=IDS).loss.backward()
    measure(model, 1)
    loss = model(input_ids=IDS, labels=IDS).loss
    measure(model, 2)
    loss.backward()
    optimizer.step()
    return [digest([one.detach() for one in model.parameters()])]


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

    def esm(**options: Any) -> Any:
        return wrapped(load(), {EsmLayer}, **options)

    found: dict[str, Any] = {}
    with torch.no_grad():
        whole, parts = load().eval(), esm().eval()
        states = [LiveModel(one, tokenizer=tokenizer).encoder(one).hidden_states(TEXTS) for one in (whole, parts)]
        found["difference"] = max(float((one - other).abs().max()) for one, other in zip(*states, strict=True))
    kinds: dict[str, dict[str, Any]] = {
        "full": {"use_orig_params": True},
        "flat": {},
        "grad op": {"sharding_strategy": ShardingStrategy.SHARD_GRAD_OP, "use_orig_params": True},
    }
    kinds["grad op"]["forward_prefetch"] = True
    half = torch.bfloat16
    kinds["half"] = {"mixed_precision": MixedPrecision(param_dtype=half, reduce_dtype=half, buffer_dtype=half)}
    for name, options in kinds.items():
        found[f"{name} without"] = loop(esm(**options))
        with Downstream(config, tokenizer) as downstream:
            found[f"{name} with"] = loop(esm(**options), downstream)
            found[f"{name} curve"] = downstream.curve
    found["anywhere without"] = accumulating(esm(use_orig_params=True))
    with Downstream(config, tokenizer) as downstream:
        compiled: Any = torch.compile(esm(use_orig_params=True), backend="eager")
        found["compiled with"] = loop(compiled, downstream)
    with Downstream(config, tokenizer) as downstream:
        found["anywhere with"] = accumulating(esm(use_orig_params=True), downstream)
    with Downstream(config, tokenizer) as downstream:
        found["whole"] = downstream(load(), 1)
    torch.manual_seed(0)
    state = Own().state_dict()

    def own() -> Any:
        made = Own()
        made.load_state_dict(state)
        return made

    def parted(made: Any) -> Any:
        return wrapped(made, {nn.Linear}, use_orig_params=True)

    found["own without"] = loop(parted(own()))
    with Downstream(config) as downstream:
        found["own with"] = loop(parted(own()), downstream)
        found["own curve"] = downstream.curve
    with Downstream(config) as downstream:
        found["own whole"] = downstream(own(), 1)
    config.on_error = "warn"
    failing = own()
    with Downstream(config) as downstream:
        failing.fails = True
        config.on_start = False
        found["failing"] = loop(parted(failing), downstream)
        found["failing curve"] = downstream.curve
    config.on_start, config.on_error = True, "raise"
    try:
        Downstream(config, tokenizer)(esm().module, 1)
    except Exception as error:
        found["within"] = f"{type(error).__name__}: {error}"
    finish(folder, found, config, lambda: Validated(model), lambda: OnCPU(use_orig_params=True))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
