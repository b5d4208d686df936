"""Trainings in a Hugging Face `Trainer` and in loops of one's own, and what records whether they are disturbed.

Run as a program it is one rank of two, see test_huggingface.py and test_loop.py.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import random
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed

from pipeline import Downstream, DownstreamTrainerCallback, sharing
from pipeline.config.background import Background
from pipeline.errors import ConfigError, DataError
from tests.support.data import planted_task_at
from tests.support.models import RESIDUES
from tests.support.own_model import OwnForMaskedLM, OwnTokenizer, make_config
from tests.support.training import plain, section

BEST = "test_label_probe_accuracy"


class Scaler(nn.Module):
    """Stands for a TransformerEngine layer: each forward pass rolls a history, and counts in an object of its own."""

    history: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("history", torch.zeros(4))
        self.meta = Meta()

    def forward(self, states: Tensor) -> Tensor:
        self.history.copy_(self.history.roll(1))
        self.history[0] = states.detach().abs().max()
        self.meta.count += 1
        self.meta.content += bytes([self.meta.count % 256])
        return states

    def get_extra_state(self) -> Any:
        return {"count": self.meta.count, "content": self.meta.content}

    def set_extra_state(self, state: Any) -> None:
        self.meta = Meta()
        self.meta.count, self.meta.content = state["count"], state["content"]


class Meta:
    """What a layer keeps beside its buffers."""

    def __init__(self) -> None:
        self.count, self.content = 0, b""


class Net(OwnForMaskedLM):
    """Code of its own: a gate behind the encoder, and a buffer that every forward pass writes to."""

    amax: Tensor

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.register_buffer("amax", torch.zeros(4))

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Any = None, **_: Any) -> Any:
        output = super().forward(input_ids, attention_mask=attention_mask)
        self.amax.copy_(self.amax.roll(1))
        self.amax[0] = output.logits.detach().abs().max()
        if labels is not None:
            noise = random.random() + float(np.random.rand())
            loss = nn.functional.cross_entropy(output.logits.flatten(0, 1), labels.flatten())
            output["loss"] = loss * (1 + noise)  # as an attribute, earlier releases do not count it among the outputs
        return output


def make_model(seed: int = 0, kind: type[Any] = Net) -> Any:
    set_seed(seed)
    model = kind(make_config())
    for parameter in model.parameters():  # away from the initial near-zero weights
        parameter.data.normal_(0, 0.2) if parameter.dim() > 1 else None
    return model


def examples(number: int = 16) -> list[dict[str, Any]]:
    """Sequences of one length."""
    source = random.Random(3)
    tokenizer = OwnTokenizer()
    ids = [tokenizer("".join(source.choices(RESIDUES, k=12)))["input_ids"] for _ in range(number)]
    return [{"input_ids": one, "attention_mask": [1] * len(one), "labels": one} for one in ids]


def digest(value: Any) -> str:
    return hashlib.sha256(pickle.dumps(plain(value))).hexdigest()


def snapshot(model: nn.Module, optimizer: Any) -> dict[str, str]:
    """A digest of everything that a measurement might disturb."""
    what = {
        "weights": dict(model.state_dict()),
        "optimizer": optimizer.state_dict()["state"],
        "gradients": [parameter.grad for parameter in model.parameters()],
        "random": (random.getstate(), np.random.get_state(), torch.get_rng_state()),
        "requires_grad": [parameter.requires_grad for parameter in model.parameters()],
        "modes": [part.training for part in model.modules()],
        "forwards": ["forward" in vars(part) for part in model.modules()],
        "torch": (torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), torch.get_default_dtype()),
        "hooks": [len(part._forward_hooks) for part in model.modules()],
    }
    return {name: digest(value) for name, value in what.items()}


class Recorder(TrainerCallback):
    """The state of everything at the beginning of each step, and at the end."""

    def __init__(self, stop: int = 0) -> None:
        self.states: list[tuple[int, dict[str, str]]] = []
        self.stop = stop

    def on_step_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        self.states.append((state.global_step, snapshot(given["model"], given["optimizer"])))

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        if state.global_step == self.stop:
            control.should_training_stop = True


def train(folder: Path, callbacks: Sequence[Any] = (), stop: int = 0, resume: Any = None, **options: Any) -> Any:
    """A training of 8 steps with the Trainer. Gives the trainer, with what was seen of it in `trainer.seen`."""
    recorder = Recorder(stop)
    given: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": 8,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_steps": 2,
        "logging_steps": 2,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 8,
        "learning_rate": 1e-2,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 11,
        "dataloader_pin_memory": False,
    }
    trainer: Any = Trainer(
        model=make_model(),
        args=TrainingArguments(**{**given, **options}),
        train_dataset=examples(),
        eval_dataset=examples(4),
        processing_class=OwnTokenizer(),
        callbacks=[*callbacks, recorder],
    )
    trainer.train(resume_from_checkpoint=resume)
    trainer.seen = [*recorder.states, (trainer.state.global_step, snapshot(trainer.model, trainer.optimizer))]
    return trainer


def loop(
    measure: Callable[[nn.Module, int], Any],
    prepare: Callable[[Any, Any], tuple[Any, Any]] = lambda model, optimizer: (model, optimizer),
    first: int = 0,
    last: int = 4,
    model: Any = None,
    optimizer: Any = None,
    backward: Callable[[Tensor], Any] | None = None,
    around: Callable[[], Any] = nullcontext,
) -> dict[str, Any]:
    """A loop of one's own, which calls `measure` before each step and at the end."""
    bare = make_model() if model is None else model
    optimizer = optimizer or torch.optim.AdamW(bare.parameters(), lr=1e-2)
    wrapped, optimizer = prepare(bare, optimizer)
    data, seen = examples(), []
    for step in range(first, last + 1):
        measure(wrapped, step)
        seen.append(snapshot(bare, optimizer))
        if step == last:
            break
        batch = [data[index] for index in torch.randint(len(data), (4,)).tolist()]
        tokens = {name: torch.tensor([one[name] for one in batch]) for name in batch[0]}
        wrapped.train()
        with around():
            loss = wrapped(**tokens).loss
        optimizer.zero_grad()
        backward(loss) if backward else loss.backward()
        optimizer.step()
    return {"seen": seen, "model": bare, "optimizer": optimizer, "wrapped": wrapped}


def trainer_on_two_ranks(folder: Path) -> dict[str, Any]:
    """With and without the measurement, stopped and resumed, the best checkpoint chosen by the probe."""
    options: dict[str, Any] = {"ddp_backend": "gloo", "metric_for_best_model": f"eval_{BEST}"}
    options |= {"greater_is_better": True, "load_best_model_at_end": True}
    config = section(folder, planted_task_at(folder / "data"), on_start=True, on_error="raise", timeout=60.0)
    config.dataset[0].num_epochs = 1
    found: dict[str, Any] = {
        "without": train(
            folder / "without",
            ddp_backend="gloo",
        ).seen
    }
    callback = DownstreamTrainerCallback(config)
    trainer = train(folder / "with", [callback], **options)
    found |= {"with": trainer.seen, "curve": callback.session.curve, "best": trainer.state.best_metric}
    found["history"] = trainer.state.log_history
    train(folder / "stopped", [DownstreamTrainerCallback(config)], stop=4, **options)
    dist.barrier()
    resumed = DownstreamTrainerCallback(config)
    found["resumed"] = train(folder / "stopped", [resumed], resume=str(folder / "stopped/checkpoint-4"), **options).seen
    found["points"] = resumed.session.state()["points"]
    return found


def ddp(model: Any, optimizer: Any) -> tuple[Any, Any]:
    return DistributedDataParallel(model, find_unused_parameters=True), optimizer


def loop_on_two_ranks(folder: Path) -> dict[str, Any]:
    """A raw loop under DDP, with and without; a measurement that fails, in both ways."""
    dist.init_process_group("gloo")
    config = section(folder, planted_task_at(folder / "data"), on_start=True, on_error="warn", timeout=60.0)
    config.dataset[0].num_epochs = 1

    found: dict[str, Any] = {"without": loop(lambda *_: None, ddp)["seen"]}
    with Downstream(config) as downstream:
        downstream.tokenizer = OwnTokenizer()
        found["with"] = loop(downstream, ddp)["seen"]
    found["curve"] = downstream.curve
    stages: Any = sharing
    real = stages.score

    def fail(*_: Any, **__: Any) -> Any:
        raise DataError("injected")

    if dist.get_rank() == 0:
        stages.score = fail
    with Downstream(config, OwnTokenizer()) as failing:
        found["failing"] = loop(failing, ddp)["seen"]
    found["failing curve"] = failing.curve
    config.on_error = "raise"
    try:
        Downstream(config, OwnTokenizer())(make_model(), 1)
    except Exception as error:
        found["error"] = f"{type(error).__name__}: {error}"
    stages.score = real
    return found


def late_on_two_ranks(folder: Path) -> dict[str, Any]:
    """A raw loop under DDP, measured in the background."""
    dist.init_process_group("gloo")
    found: dict[str, Any] = {"without": loop(lambda *_: None, ddp)["seen"]}
    for mode in ("blocking", "background"):
        with Downstream(late_section(folder, mode), OwnTokenizer(), folder=folder / "out") as downstream:
            found[mode] = loop(downstream, ddp)["seen"]
        found[f"{mode} curve"] = downstream.curve
    config = late_section(folder)
    config.background.when_busy = "wait"
    try:
        Downstream(config, OwnTokenizer(), folder=folder / "out")(make_model(), 1)
    except ConfigError as error:
        found["refused"] = str(error)
    return found


def late_section(folder: Path, mode: str = "background", **options: Any) -> Any:
    """A configuration whose model is made again by its class."""
    given: dict[str, Any] = {"on_start": True, "model_factory": "tests.support.loops.Net", **options}
    config = section(folder, planted_task_at(folder / "data"), mode=mode, background=Background(max_pending=9), **given)
    config.dataset[0].num_epochs = 1
    return config


if __name__ == "__main__":
    torch.set_num_threads(1)
    place = Path(sys.argv[2])
    seen = {"trainer": trainer_on_two_ranks, "loop": loop_on_two_ranks, "late": late_on_two_ranks}[sys.argv[1]](place)
    (place / f"rank-{os.environ['RANK']}.json").write_text(json.dumps(seen))
    os._exit(0)
