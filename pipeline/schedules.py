"""NeMo's learning-rate policies: each a function of the step, of the form `f(step, base_lr, policy)`.

Step 0 is the first optimiser step. All but T5's begin with a warm-up (`warmup_steps` > 0):

    lr = base_lr (step + 1) / (warmup_steps + 1)        for step <= warmup_steps

and all but Noam's are at `min_lr` after `max_steps`. Formulas agree with NeMo 1.23 (nemo.core.optim.lr_scheduler).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from pipeline.errors import ConfigError, nearest


@dataclass(frozen=True)
class Policy:
    """The settings of a policy, in steps. Ratios are shares of `max_steps`."""

    max_steps: int
    warmup_steps: int = 0
    warmup_ratio: float | None = None
    hold_steps: int = 0
    hold_ratio: float | None = None
    constant_steps: int = 0
    constant_ratio: float | None = None
    min_lr: float = 0.0
    d_model: int | None = None
    decay_rate: float = 0.5
    power: float = 1.0
    cycle: bool = False

    def in_steps(self) -> Policy:
        """The same with every ratio turned into steps. Raises ConfigError where both are given."""
        steps: dict[str, int | None] = {}
        for name in ("warmup", "hold", "constant"):
            ratio = getattr(self, f"{name}_ratio")
            if ratio is None:
                continue
            if getattr(self, f"{name}_steps"):
                raise ConfigError(f"optim.sched: give {name}_steps or {name}_ratio, not both")
            if not 0 <= ratio <= 1:
                raise ConfigError(f"optim.sched: {name}_ratio is {ratio}, expected a share between 0 and 1")
            steps |= {f"{name}_steps": int(ratio * self.max_steps), f"{name}_ratio": None}
        return dataclasses.replace(self, **steps)  # type: ignore[arg-type]

    @property
    def hold_end(self) -> int:
        """The step after which a held learning rate decays."""
        return self.warmup_steps + self.hold_steps


def constant(_step: int, base_lr: float, _policy: Policy) -> float:
    """Lr = base_lr."""
    return base_lr


def square(step: int, base_lr: float, policy: Policy) -> float:
    """Lr = max(min_lr, base_lr ((max_steps - step) / (max_steps - warmup_steps))^2)."""
    share = (policy.max_steps - step) / max(1, policy.max_steps - policy.warmup_steps)
    return max(policy.min_lr, base_lr * share**2)


def square_root(step: int, base_lr: float, policy: Policy) -> float:
    """Lr = max(min_lr, base_lr ((max_steps - step) / max_steps)^(1/2))."""
    return max(policy.min_lr, float(base_lr * ((policy.max_steps - step) / policy.max_steps) ** 0.5))


def cosine(step: int, base_lr: float, policy: Policy) -> float:
    """Lr = min_lr + (base_lr - min_lr) (1 + cos(pi t)) / 2, t from 0 at the warm-up's end to 1 at the decay's.

    The decay ends `constant_steps` before `max_steps`; from there on lr = min_lr.
    """
    decay = policy.max_steps - policy.warmup_steps - policy.constant_steps
    share = (step - policy.warmup_steps) / max(1, decay)
    if share > 1:
        return policy.min_lr
    return policy.min_lr + (base_lr - policy.min_lr) * 0.5 * (1 + math.cos(math.pi * share))


def noam(step: int, base_lr: float, policy: Policy) -> float:
    """Lr = base_lr d_model^(-1/2) min(s^(-1/2), s warmup_steps^(-3/2)), s = max(1, step); Vaswani et al. 2017."""
    if policy.d_model is None:
        raise ConfigError("optim.sched: NoamAnnealing needs d_model")
    step = max(1, step)
    if step > policy.warmup_steps:
        return max(policy.min_lr, float(base_lr * policy.d_model**-0.5 * step**-0.5))
    return float(base_lr * policy.d_model**-0.5 * step * policy.warmup_steps**-1.5)


def noam_hold(step: int, base_lr: float, policy: Policy) -> float:
    """Lr = max(min_lr, base_lr (w / (step - hold_steps))^decay_rate), w = max(1, warmup_steps), after the hold.

    Kim et al., Squeezeformer, 2022.
    """
    if step < policy.hold_end:
        return base_lr
    reached = max(1, policy.warmup_steps**policy.decay_rate)
    return max(policy.min_lr, float(base_lr * reached / max(1, (step - policy.hold_steps) ** policy.decay_rate)))


def linear(step: int, base_lr: float, policy: Policy) -> float:
    """Lr = max(min_lr, base_lr (1 - (step - warmup_steps) / max_steps))."""
    return max(policy.min_lr, base_lr * (1 - (step - policy.warmup_steps) / policy.max_steps))


def inverse_square_root(step: int, base_lr: float, policy: Policy) -> float:
    """Lr = base_lr ((warmup_steps + 1) / (step + 1))^(1/2)."""
    return float(base_lr * ((policy.warmup_steps + 1) / (step + 1)) ** 0.5)


def t5_inverse_square_root(step: int, _base_lr: float, policy: Policy) -> float:
    """Lr = 1 / max(step, constant_steps)^(1/2), whatever base_lr is; Raffel et al. 2020."""
    return float(max(1, step, policy.constant_steps) ** -0.5)


def polynomial(step: int, base_lr: float, policy: Policy) -> float:
    """Lr = min_lr + (base_lr - min_lr) (1 - t)^power, t = (step - warmup_steps) / (max_steps - warmup_steps)."""
    return _polynomial(step - policy.warmup_steps, policy.max_steps - policy.warmup_steps, base_lr, policy)


def polynomial_hold(step: int, base_lr: float, policy: Policy) -> float:
    """As `polynomial` after the hold, t = (step - h) / (max_steps - h), h = warmup_steps + hold_steps."""
    if step < policy.hold_end:
        return base_lr
    return _polynomial(step - policy.hold_end, policy.max_steps - policy.hold_end, base_lr, policy)


def _polynomial(step: int, steps: int, base_lr: float, policy: Policy) -> float:
    """With `cycle`, the decay starts again, over a whole multiple of `steps`."""
    if policy.cycle:
        steps *= max(1, math.ceil(step / max(1, steps)))
    share = min(step, steps) / max(1, steps)
    return float(policy.min_lr + (base_lr - policy.min_lr) * (1 - share) ** policy.power)


Function = Callable[[int, float, Policy], float]
POLICIES: dict[str, tuple[Function, dict[str, Any]]] = {
    "WarmupPolicy": (constant, {}),
    "WarmupHoldPolicy": (constant, {}),
    "SquareAnnealing": (square, {"min_lr": 1e-5}),
    "SquareRootAnnealing": (square_root, {}),
    "CosineAnnealing": (cosine, {}),
    "NoamAnnealing": (noam, {}),
    "NoamHoldAnnealing": (noam_hold, {}),
    "WarmupAnnealing": (linear, {}),
    "InverseSquareRootAnnealing": (inverse_square_root, {}),
    "T5InverseSquareRootAnnealing": (t5_inverse_square_root, {}),
    "PolynomialDecayAnnealing": (polynomial, {}),
    "PolynomialHoldDecayAnnealing": (polynomial_hold, {}),
}
NO_WARMUP = (noam, t5_inverse_square_root)  # Noam has a warm-up in its formula, T5 has none
NO_END = (noam,)


class PolicyLR(LRScheduler):
    """A scheduler over a policy, one step per optimiser step."""

    def __init__(self, optimizer: Optimizer, name: str, last_epoch: int = -1, **options: Any) -> None:
        """Raises ConfigError if an option is not known to policies or has the wrong value."""
        function, defaults = POLICIES[name]
        known = [field.name for field in dataclasses.fields(Policy)]
        for option in options:
            if option not in known:
                raise ConfigError(f"optim.sched: {name} has no option '{option}'{nearest(option, known)}")
        self.policy = Policy(**{**defaults, **options}).in_steps()
        self.function = function
        super().__init__(optimizer, last_epoch)

    def get_lr(self) -> list[float]:  # type: ignore[override]
        """The learning rate of each parameter group."""
        return [policy_lr(self.function, self.last_epoch, float(base), self.policy) for base in self.base_lrs]


def policy_lr(function: Function, step: int, base_lr: float, policy: Policy) -> float:
    """The learning rate at a step: warm-up, the policy's own formula, and `min_lr` after the end."""
    if function not in NO_WARMUP and 0 < policy.warmup_steps >= step:
        return base_lr * (step + 1) / (policy.warmup_steps + 1)
    if function not in NO_END and step > policy.max_steps:
        return policy.min_lr
    return function(step, base_lr, policy)
