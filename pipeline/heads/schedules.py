"""NeMo's learning-rate policies: the learning rate as a function of the step; step 0 is the first optimizer step.

All but Noam's and T5's have the same stages, of which the first that fits holds (NeMo 1.23, nemo.core.optim):

    warm-up, step <= warmup_steps (if > 0)      lr = base_lr (step + 1) / (warmup_steps + 1)
    hold, step < warmup_steps + hold_steps      lr = base_lr
    end, step > max_steps                       lr = min_lr
    else                                        the policy's own formula
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from pipeline.errors import ConfigError, nearest


@dataclass(frozen=True)
class Policy:
    """The settings of a policy. Steps need not be whole numbers: a file may have worked them out as shares.

    Attributes:
        max_steps: the last step of the decay.
        hold_end: the step at which a held learning rate begins to decay; 0 where no hold is set.
        d_model: the model's width; 0 where it is not set.
    """

    max_steps: float
    warmup_steps: float = 0
    hold_end: float = 0
    constant_steps: float = 0
    min_lr: float = 0.0
    d_model: float = 0
    decay_rate: float = 0.5
    power: float = 1.0
    cycle: bool = False


def constant(_step: int, base_lr: float, _policy: Policy) -> float:
    """Lr = base_lr."""
    return base_lr


def square(step: int, base_lr: float, policy: Policy) -> float:
    """Lr = max(min_lr, base_lr ((max_steps - step) / (max_steps - warmup_steps))^2)."""
    share = (policy.max_steps - step) / (policy.max_steps - policy.warmup_steps)
    return max(policy.min_lr, base_lr * share**2)


def square_root(step: int, base_lr: float, policy: Policy) -> float:
    """Lr = max(min_lr, base_lr ((max_steps - step) / max_steps)^(1/2))."""
    return max(policy.min_lr, float(base_lr * ((policy.max_steps - step) / policy.max_steps) ** 0.5))


def cosine(step: int, base_lr: float, policy: Policy) -> float:
    """Lr = min_lr + (base_lr - min_lr) (1 + cos(pi t)) / 2, t from 0 at the warm-up's end to 1 at the decay's.

    The decay ends `constant_steps` before `max_steps`; from there on lr = min_lr. With `constant_steps` the warm-up is
    Megatron's, lr = base_lr step / warmup_steps.
    """
    decay = policy.max_steps - policy.warmup_steps - policy.constant_steps
    if step > policy.warmup_steps + decay:
        return policy.min_lr
    share = (step - policy.warmup_steps) / decay
    return policy.min_lr + (base_lr - policy.min_lr) * 0.5 * (1 + math.cos(math.pi * share))


def noam(step: int, base_lr: float, policy: Policy) -> float:
    """Lr = base_lr d_model^(-1/2) min(s^(-1/2), s warmup_steps^(-3/2)), s = max(1, step), without an end.

    Vaswani et al. 2017. After the warm-up at least min_lr.
    """
    step = max(1, step)
    if step > policy.warmup_steps:
        return max(policy.min_lr, float(base_lr * policy.d_model**-0.5 * step**-0.5))
    return float(base_lr * policy.d_model**-0.5 * step * policy.warmup_steps**-1.5)


def noam_hold(step: int, base_lr: float, policy: Policy) -> float:
    """Lr = max(min_lr, base_lr max(1, warmup_steps^decay_rate) / max(1, (step - hold_steps)^decay_rate)).

    Kim et al., Squeezeformer, 2022.
    """
    hold_steps = max(0, policy.hold_end - policy.warmup_steps)
    reached = max(1, policy.warmup_steps**policy.decay_rate)
    return max(policy.min_lr, float(base_lr * reached / max(1, (step - hold_steps) ** policy.decay_rate)))


def inverse_square_root(step: int, base_lr: float, policy: Policy) -> float:
    """Lr = base_lr ((warmup_steps + 1) / (step + 1))^(1/2)."""
    return float(base_lr * ((policy.warmup_steps + 1) / (step + 1)) ** 0.5)


def t5_inverse_square_root(step: int, _base_lr: float, policy: Policy) -> float:
    """Lr = 1 / max(step, constant_steps)^(1/2), whatever base_lr is, min_lr after max_steps; Raffel et al. 2020."""
    if policy.constant_steps < step > policy.max_steps:
        return policy.min_lr
    return float(max(step, policy.constant_steps) ** -0.5)


def polynomial(step: int, base_lr: float, policy: Policy) -> float:
    """Lr = min_lr + (base_lr - min_lr) (1 - t)^power, t = (step - warmup_steps) / (max_steps - warmup_steps)."""
    return _polynomial(step - policy.warmup_steps, policy.max_steps - policy.warmup_steps, base_lr, policy)


def polynomial_hold(step: int, base_lr: float, policy: Policy) -> float:
    """As `polynomial` after a hold, t = (step - h) / (max_steps - h), h = warmup_steps + hold_steps.

    Without a hold the warm-up counts as steps of the decay: t = min(1, step / (max_steps - warmup_steps)).
    """
    steps = policy.max_steps - max(policy.warmup_steps, policy.hold_end)
    return _polynomial(step - policy.hold_end, steps, base_lr, policy)


def _polynomial(step: float, steps: float, base_lr: float, policy: Policy) -> float:
    """With `cycle`, the decay starts again, over a whole multiple of `steps`."""
    if steps <= 0:  # the hold lasts to the end
        return base_lr
    if policy.cycle:
        steps *= max(1, math.ceil(step / steps))
    share = min(step, steps) / steps
    return float(policy.min_lr + (base_lr - policy.min_lr) * (1 - share) ** policy.power)


Function = Callable[[int, float, Policy], float]
WARMUP = ("warmup_steps", "warmup_ratio")
HOLD = (*WARMUP, "hold_steps", "hold_ratio")
CONSTANT = ("constant_steps", "constant_ratio")
# The formula of each, and its options beside max_steps and min_lr.
POLICIES: dict[str, tuple[Function, tuple[str, ...]]] = {
    "WarmupPolicy": (constant, WARMUP),
    "WarmupHoldPolicy": (constant, HOLD),
    "SquareAnnealing": (square, WARMUP),
    "SquareRootAnnealing": (square_root, WARMUP),
    "CosineAnnealing": (cosine, (*WARMUP, *CONSTANT)),
    "NoamAnnealing": (noam, (*WARMUP, "d_model")),
    "NoamHoldAnnealing": (noam_hold, (*HOLD, "decay_rate")),
    "WarmupAnnealing": (polynomial, WARMUP),  # of power 1
    "InverseSquareRootAnnealing": (inverse_square_root, WARMUP),
    "T5InverseSquareRootAnnealing": (t5_inverse_square_root, CONSTANT),
    "PolynomialDecayAnnealing": (polynomial, (*WARMUP, "power", "cycle")),
    "PolynomialHoldDecayAnnealing": (polynomial_hold, (*HOLD, "power", "cycle")),
}
MIN_LR = {"SquareAnnealing": 1e-5}  # where it is not given; 0 for the others
OWN_STAGES = (noam, t5_inverse_square_root)
LEAST = {"max_steps": 1, "d_model": 1}  # 0 for the others


class PolicyLR(LRScheduler):
    """A scheduler of a policy, which makes a step at each optimizer step."""

    def __init__(self, optimizer: Optimizer, name: str, last_epoch: int = -1, **options: Any) -> None:
        """Takes the options of NeMo's policy `name`; None counts as not given.

        Raises:
            ConfigError: the policy has no such option, or it has a wrong value, or options contradict one another.
        """
        if last_epoch != -1:
            raise ConfigError(f"optim.sched: last_epoch is {last_epoch}, expected -1: a head begins at the first step")
        self.function = POLICIES[name][0]
        self.policy = make_policy(name, options)
        for group in optimizer.param_groups:
            _check_base_lr(name, float(group["lr"]), self.policy)
        super().__init__(optimizer)

    def get_lr(self) -> list[float]:  # type: ignore[override]
        """The learning rate of each parameter group."""
        return [policy_lr(self.function, self.last_epoch, float(base), self.policy) for base in self.base_lrs]


def policy_lr(function: Function, step: int, base_lr: float, policy: Policy) -> float:
    """The learning rate at a step: warm-up, hold, end, or the policy's own formula."""
    if function in OWN_STAGES:
        return function(step, base_lr, policy)
    if 0 < policy.warmup_steps >= step:
        megatrons = policy.constant_steps > 0
        return base_lr * (step / policy.warmup_steps if megatrons else (step + 1) / (policy.warmup_steps + 1))
    if step < policy.hold_end:
        return base_lr
    if step > policy.max_steps:
        return policy.min_lr
    return function(step, base_lr, policy)


def make_policy(name: str, options: Mapping[str, Any]) -> Policy:
    """The settings of policy `name`, ratios turned into steps. Raises ConfigError, see `PolicyLR`."""
    check_options(name, options, ("max_steps", "min_lr", *POLICIES[name][1]))
    given = {option: value for option, value in options.items() if value is not None}
    for option, value in given.items():
        _check_value(name, option, value)
    maximum = given["max_steps"]
    warmup, hold, constant_steps = (_steps(stage, given, maximum) for stage in ("warmup", "hold", "constant"))
    own = {option: given[option] for option in ("d_model", "decay_rate", "power", "cycle") if option in given}
    policy = Policy(
        maximum,
        warmup_steps=warmup or 0,
        hold_end=0 if hold is None else (warmup or 0) + hold,
        constant_steps=constant_steps or 0,
        min_lr=given.get("min_lr", MIN_LR.get(name, 0.0)),
        **own,
    )
    _check_stages(name, policy)
    return policy


def check_options(name: str, options: Iterable[str], known: Sequence[str]) -> None:
    """Raises ConfigError where the schedule `name` has no such option."""
    for option in options:
        if option not in known:
            raise ConfigError(f"optim.sched: {name} has no option '{option}'{nearest(option, known)}")


def _steps(stage: str, given: Mapping[str, Any], max_steps: float) -> float | None:
    """The steps of a stage; None where neither they nor the ratio are given."""
    steps, ratio = given.get(f"{stage}_steps"), given.get(f"{stage}_ratio")
    if ratio is None:
        return steps
    if steps is not None:
        raise ConfigError(f"optim.sched: give {stage}_steps or {stage}_ratio, not both")
    if ratio > 1:
        raise ConfigError(f"optim.sched: {stage}_ratio is {ratio}, expected a share between 0 and 1")
    return int(ratio * max_steps)


def _check_value(name: str, option: str, value: Any) -> None:
    """Raises ConfigError where the value of an option is not of its kind, or out of its range."""
    kind: Any = bool if option == "cycle" else Real
    if not isinstance(value, kind) or (isinstance(value, bool) and option != "cycle"):
        expected = "true or false" if option == "cycle" else "a number"
        raise ConfigError(f"optim.sched: {name} cannot be built: {option} is {value!r}, expected {expected}")
    least = LEAST.get(option, 0)
    if not least <= value < math.inf:
        raise ConfigError(f"optim.sched: {name} cannot be built: {option} is {value}, expected at least {least}")


def _check_stages(name: str, policy: Policy) -> None:
    """Raises ConfigError where the divisor of a policy's formula is 0 or missing."""
    if name == "NoamAnnealing" and not policy.d_model:
        raise ConfigError("optim.sched: NoamAnnealing needs d_model, the width that it was made for")
    if name == "NoamHoldAnnealing" and not policy.warmup_steps:
        raise ConfigError("optim.sched: NoamHoldAnnealing needs a warm-up, found one of 0 steps; give warmup_steps")
    if name == "T5InverseSquareRootAnnealing" and not policy.constant_steps:
        raise ConfigError(f"optim.sched: {name} needs constant_steps, found 0; its learning rate is 1/sqrt of them")
    if name == "CosineAnnealing" and policy.constant_steps == policy.max_steps and not policy.warmup_steps:
        raise ConfigError(f"optim.sched: {name} has no step to decay in: constant_steps is as large as max_steps")


def _check_base_lr(name: str, base_lr: float, policy: Policy) -> None:
    """Raises ConfigError where a policy that decays from `base_lr` to `min_lr` would rise instead."""
    above = base_lr > policy.min_lr if policy.constant_steps else base_lr >= policy.min_lr
    if name in ("CosineAnnealing", "NoamAnnealing") and not above:
        found = f"found lr {base_lr} and min_lr {policy.min_lr}"
        raise ConfigError(f"optim.sched: {name} needs an lr above min_lr, {found}")
