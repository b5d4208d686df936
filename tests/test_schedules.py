"""NeMo's learning-rate policies: curves measured from NeMo, and settings drawn at random against a second writing."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from pipeline.heads import optimizers as optim
from pipeline.heads.schedules import POLICIES


def parameters() -> list[nn.Parameter]:
    return [nn.Parameter(torch.ones(3, 3))]


def curve(sched: dict[str, Any], steps: int, lr: float = 1e-3) -> list[float]:
    """The learning rate in force at each step."""
    optimizer, scheduler = optim.build(parameters(), {"name": "sgd", "lr": lr, "sched": sched}, 30)
    rates = []
    for _ in range(steps):
        rates.append(float(optimizer.param_groups[0]["lr"]))
        optimizer.step()
        assert scheduler is not None
        scheduler.step()
    return rates


@pytest.mark.parametrize("name", list(POLICIES))
def test_a_policy_has_the_curves_that_were_measured_from_nemo(shared_data: Path, name: str) -> None:
    curves = json.loads((shared_data.parent / "golden" / "nemo_lr_curves.json").read_text())["curves"]
    measured = [one for one in curves if one["name"] == name]
    assert measured
    for golden in measured:
        found = curve({"name": name, **golden["params"]}, max(golden["steps"]) + 1, golden["base_lr"])
        assert [found[step] for step in golden["steps"]] == pytest.approx(golden["lr"], abs=1e-9, rel=0), golden


def test_curves_by_hand() -> None:
    warmup = curve({"name": "WarmupAnnealing", "warmup_ratio": 0.2, "max_steps": 10, "min_lr": 6e-4}, 13)
    assert warmup[:3] == pytest.approx([1e-3 / 3, 2e-3 / 3, 1e-3])
    assert warmup[3:] == pytest.approx([9.5e-4, 9e-4, 8.5e-4, 8e-4, 7.5e-4, 7e-4, 6.5e-4, 6e-4, 6e-4, 6e-4])
    megatron = curve({"name": "CosineAnnealing", "max_steps": 8, "warmup_steps": 4, "constant_steps": 2}, 8)
    assert megatron == pytest.approx([0, 2.5e-4, 5e-4, 7.5e-4, 1e-3, 5e-4, 0, 0])
    held = curve({"name": "WarmupHoldPolicy", "max_steps": 3, "warmup_steps": 1, "hold_steps": 4, "min_lr": 1e-5}, 7)
    assert held == pytest.approx([5e-4, 1e-3, 1e-3, 1e-3, 1e-3, 1e-5, 1e-5])
    no_hold = {"name": "PolynomialHoldDecayAnnealing", "max_steps": 6, "warmup_steps": 2}
    assert curve(no_hold, 7) == pytest.approx([1e-3 / 3, 2e-3 / 3, 1e-3, 2.5e-4, 0, 0, 0])
    assert curve({**no_hold, "hold_steps": 0}, 7) == pytest.approx([1e-3 / 3, 2e-3 / 3, 1e-3, 7.5e-4, 5e-4, 2.5e-4, 0])
    cosine = curve({"name": "CosineAnnealing", "max_steps": 10, "constant_steps": 4, "min_lr": 1e-4}, 12)
    assert cosine[0] == pytest.approx(1e-3)
    assert cosine[3] == pytest.approx(1e-4 + 9e-4 / 2)
    assert cosine[6:] == pytest.approx([1e-4] * 6)
    cycle = curve({"name": "PolynomialDecayAnnealing", "max_steps": 4, "power": 1, "cycle": True}, 5)
    assert cycle == pytest.approx([1e-3, 7.5e-4, 5e-4, 2.5e-4, 0])


def test_last_epoch_is_where_a_policy_begins() -> None:
    sched = {"name": "CosineAnnealing", "max_steps": 10}
    config = {"name": "sgd", "lr": 1e-3, "sched": {**sched, "last_epoch": -1}}
    assert optim.build(parameters(), config, 30)[0].param_groups[0]["lr"] == pytest.approx(1e-3)


def test_options_of_a_policy_that_are_null_are_not_given() -> None:
    """NeMo's own template of a section has them so; the last two belong to its arithmetic of steps."""
    given = {"name": "CosineAnnealing", "max_steps": 10, "warmup_ratio": 0.2}
    null = dict.fromkeys(("warmup_steps", "constant_steps", "constant_ratio", "min_lr"))
    unused = {"t_accumulate_grad_batches": 1, "t_limit_train_batches": 1.0}
    assert curve({**given, **null, **unused}, 12) == curve(given, 12)


@dataclass
class Drawn:
    """A policy with the options of a user's file, and what they come to in steps."""

    name: str
    options: dict[str, Any]
    lr: float

    def steps(self, stage: str) -> int | None:
        """The steps of a stage, or its share of `max_steps` rounded down; None without either."""
        steps, ratio = self.options.get(f"{stage}_steps"), self.options.get(f"{stage}_ratio")
        return steps if ratio is None else math.floor(ratio * self.last)

    def __post_init__(self) -> None:
        self.last = self.options["max_steps"]
        self.low = self.options.get("min_lr", 1e-5 if self.name == "SquareAnnealing" else 0)
        self.warmup, self.hold, self.flat = ((self.steps(stage) or 0) for stage in ("warmup", "hold", "constant"))


def worked_by_hand(one: Drawn, step: int) -> float:
    """The stages in their order."""
    if one.name == "NoamAnnealing":
        return noam(one, max(1, step))
    if one.name == "T5InverseSquareRootAnnealing":
        late = one.low if step > one.last else 1 / math.sqrt(max(1, step))
        return 1 / math.sqrt(one.flat) if step <= one.flat else late
    if one.warmup and step <= one.warmup:
        return one.lr * (step / one.warmup if one.flat else (step + 1) / (one.warmup + 1))
    if one.hold and step < one.warmup + one.hold:
        return one.lr
    return one.low if step > one.last else DECAYS[one.name](one, step)


def noam(one: Drawn, step: int) -> float:
    """It goes on beyond `max_steps`, and only then heeds `min_lr`."""
    peak = one.lr / math.sqrt(one.options["d_model"])
    return peak * step / math.sqrt(one.warmup) ** 3 if step <= one.warmup else max(one.low, peak / math.sqrt(step))


def gone(one: Drawn, step: int) -> float:
    """The share of the decay that lies behind."""
    first, end = one.warmup + one.hold, one.last - one.flat
    if one.name == "PolynomialHoldDecayAnnealing" and one.steps("hold") is None:
        first, end = 0, one.last - one.warmup  # the warm-up is a part of the decay, and it ends too early
    if step > end and not one.options.get("cycle"):
        return 1.0
    share = (step - first) / (end - first) if step > first else 0.0
    return share / max(1, math.ceil(share))


DECAYS: dict[str, Callable[[Drawn, int], float]] = {
    "WarmupPolicy": lambda one, _step: one.lr,
    "WarmupHoldPolicy": lambda one, _step: one.lr,
    "SquareAnnealing": lambda one, step: max(one.low, one.lr * (1 - gone(one, step)) ** 2),
    "SquareRootAnnealing": lambda one, step: max(one.low, one.lr * math.sqrt(1 - step / one.last)),
    "CosineAnnealing": lambda one, step: one.low + (one.lr - one.low) * math.cos(math.pi * gone(one, step) / 2) ** 2,
    "NoamHoldAnnealing": lambda one, step: max(
        one.low, one.lr * (one.warmup / (step - one.hold)) ** one.options.get("decay_rate", 0.5)
    ),
    "WarmupAnnealing": lambda one, step: one.lr * (1 - gone(one, step)) + one.low * gone(one, step),
    "InverseSquareRootAnnealing": lambda one, step: one.lr * math.sqrt(one.warmup + 1) / math.sqrt(step + 1),
    "PolynomialDecayAnnealing": lambda one, step: (
        one.low + (one.lr - one.low) * (1 - gone(one, step)) ** one.options.get("power", 1)
    ),
}
DECAYS["PolynomialHoldDecayAnnealing"] = DECAYS["PolynomialDecayAnnealing"]

OWN = {  # the options beside max_steps, of each policy as NeMo's constructors have them
    "WarmupHoldPolicy": ("warmup", "hold"),
    "CosineAnnealing": ("warmup", "constant"),
    "NoamHoldAnnealing": ("warmup", "hold", "decay_rate"),
    "T5InverseSquareRootAnnealing": ("constant",),
    "PolynomialDecayAnnealing": ("warmup", "power", "cycle"),
    "PolynomialHoldDecayAnnealing": ("warmup", "hold", "power", "cycle"),
}
SHARES: list[dict[str, Any]] = [{}, {"steps": None, "ratio": 0.0}, {"ratio": 0.01}, {"ratio": 0.1}, {"ratio": 0.3}]
STAGES = st.sampled_from(SHARES) | st.builds(lambda steps: {"steps": steps}, st.integers(0, 25))
VALUES: dict[str, list[Any]] = {
    "min_lr": [0, 1e-5, 1e-4],
    "power": [0.5, 1, 3.0],
    "cycle": [True, False],
    "decay_rate": [0.25, 0.5, 1.0],
}


@st.composite
def policies(draw: st.DrawFn) -> Drawn:
    """Of the options those that the policy has, each given or left out, and a learning rate."""
    name = draw(st.sampled_from(sorted(POLICIES)))
    own = ("min_lr", *OWN.get(name, ("warmup",)))
    options: dict[str, Any] = {"max_steps": draw(st.integers(1, 60))}
    for stage in ("warmup", "hold", "constant"):
        if stage in own:
            options |= {f"{stage}_{kind}": value for kind, value in draw(STAGES).items()}
    for option, values in VALUES.items():
        if option in own and draw(st.booleans()):
            options[option] = draw(st.sampled_from(values))
    if name == "NoamAnnealing":
        options["d_model"] = draw(st.sampled_from([64, 512]))
    one = Drawn(name, options, draw(st.sampled_from([3e-4, 1e-3, 0.02])))
    assume(one.warmup or name != "NoamHoldAnnealing")
    assume(one.flat or name != "T5InverseSquareRootAnnealing")
    assume(one.warmup or one.flat != one.last)
    return one


@settings(max_examples=600, deadline=None)
@given(one=policies())
def test_a_policy_with_any_settings_has_the_curve_that_is_worked_out_by_hand(one: Drawn) -> None:
    steps = one.last + 30
    expected = [worked_by_hand(one, step) for step in range(steps)]
    assert curve({"name": one.name, **one.options}, steps, one.lr) == pytest.approx(expected, abs=1e-12, rel=0)
