"""Optimizers and schedules by NeMo's names, and by those of torch and pytorch_optimizer."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer, lr_scheduler
from torch.optim.lr_scheduler import ExponentialLR, LRScheduler, ReduceLROnPlateau

from pipeline.errors import ConfigError, nearest
from pipeline.heads.schedules import POLICIES, PolicyLR, check_options

logger = logging.getLogger(__name__)

# NeMo's names of Adam as a fused kernel, with weight decay apart from the gradient: AdamW is the same arithmetic.
FUSED = ("fused_adam", "megatron_fused_adam", "distributed_fused_adam", "mcore_distributed_optim")
# Torch's by lower-case name, and what stands for NeMo's.
TORCH: dict[str, type[Optimizer]] = {
    key.lower(): value for key, value in vars(torch.optim).items() if isinstance(value, type) and value is not Optimizer
}
TORCH |= dict.fromkeys(FUSED, torch.optim.AdamW)
# Shown where no known name resembles the given.
USUAL_OPTIMIZERS = "sgd adam adamw adadelta adamax adagrad rmsprop rprop novograd adafactor adan lamb".split()
USUAL_SCHEDULES = ("StepLR", "ExponentialLR", "ReduceLROnPlateau", "CyclicLR", "OneCycleLR")
# Torch's optimizers that need the gradients alone and change each weight by itself.
PLAIN = ("sgd", "adam", "adamw", "adamax", "adagrad", "adadelta", "nadam", "radam", "rmsprop", "rprop", *FUSED)
HAVE_FUSED = (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD)  # one kernel for a whole step
# Keys of NeMo's section that are for Lightning, or for NeMo's own count of steps.
UNUSED_SCHED = """
monitor reduce_on_plateau iters_per_batch t_max_epochs t_num_workers t_accumulate_grad_batches t_limit_train_batches
""".split()
NEEDS_FUNCTIONS = ("LambdaLR", "MultiplicativeLR", "SequentialLR", "ChainedScheduler", "LRScheduler")
SCHEDULERS = (LRScheduler, ReduceLROnPlateau)
PER_EPOCH = (ExponentialLR, ReduceLROnPlateau)  # as in NeMo


def build(
    parameters: Iterable[nn.Parameter], optim_config: Mapping[str, Any], steps: int
) -> tuple[Optimizer, LRScheduler | ReduceLROnPlateau | None]:
    """The optimizer and the scheduler that the mapping `optim` of a task describes.

    Args:
        parameters: what to optimise.
        optim_config: `name`, the optimizer's own options, and perhaps `sched` with its `name` and options.
        steps: the number of optimizer steps to come, which `sched.max_steps` is where it is left out.

    Returns:
        The scheduler is None without `sched`.

    Raises:
        ConfigError: a name or an option is not known, or an option has a wrong value.
    """
    options = {key: value for key, value in optim_config.items() if key not in ("name", "sched")}
    optimizer = _optimizer(list(parameters), str(optim_config.get("name", "adam")), options)
    sched = optim_config.get("sched")
    if not sched:
        return optimizer, None
    if not isinstance(sched, Mapping) or "name" not in sched:
        raise ConfigError(f"optim.sched: expected a mapping with a name, found {sched!r}")
    options = {key: value for key, value in sched.items() if key not in ("name", *UNUSED_SCHED)}
    if options.get("max_steps") is None:
        options["max_steps"] = max(1, steps)
    return optimizer, _scheduler(optimizer, str(sched["name"]), options)


class ScheduledOptimizer:
    """An optimizer and the schedule of its learning rate.

    Attributes:
        optimizer: torch's.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], optim_config: Mapping[str, Any], steps: int) -> None:
        """See `build`."""
        self.optimizer, self._scheduler = build(parameters, optim_config, steps)
        self._per_epoch = isinstance(self._scheduler, PER_EPOCH)

    def step(self, closure: Callable[[], Any] | None = None) -> None:
        """Makes an optimizer step, and one of the schedule unless it counts epochs; `closure` as torch takes it."""
        self.optimizer.step(closure)
        if self._scheduler is not None and not self._per_epoch:
            self._scheduler.step()

    def end_epoch(self, loss: float) -> None:
        """Makes a step of a schedule that counts epochs, see `PER_EPOCH`; `ReduceLROnPlateau` needs the loss."""
        if isinstance(self._scheduler, ReduceLROnPlateau):
            self._scheduler.step(loss)
        elif self._scheduler is not None and self._per_epoch:
            self._scheduler.step()


def is_plain(optim_config: Mapping[str, Any]) -> bool:
    """Whether the optimizer needs the gradients alone: it does not evaluate the loss again."""
    return str(optim_config.get("name", "adam")).lower() in PLAIN


def needs_metric(optim_config: Mapping[str, Any]) -> bool:
    """Whether the schedule depends on the loss."""
    sched = optim_config.get("sched")
    return isinstance(sched, Mapping) and sched.get("name") == ReduceLROnPlateau.__name__


@torch.inference_mode(False)
@torch.enable_grad()
@torch.random.fork_rng(devices=[])
def check(optim_config: Mapping[str, Any]) -> None:
    """Tries an optimizer step. Raises ConfigError as `build` does, or where the step fails."""
    parameter = nn.Parameter(torch.ones(2, 2))
    optimizer, _ = build([parameter], optim_config, steps=100)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = (parameter**2).sum()
        loss.backward()
        return loss

    try:
        optimizer.step(closure)  # type: ignore[arg-type]
    except Exception as error:  # some optimizers need a second gradient, or hooks of their own
        raise ConfigError(f"optim.name: {optim_config.get('name')} cannot train a head: {error}") from error


def _optimizer(parameters: list[nn.Parameter], name: str, options: dict[str, Any]) -> Optimizer:
    options = {key: tuple(value) if isinstance(value, list) else value for key, value in options.items()}
    candidates = [TORCH[name.lower()]] if name.lower() in TORCH else []
    if name.lower() in FUSED:
        known = _accepted(torch.optim.AdamW)
        dropped = ", ".join(sorted(set(options) - set(known)))
        text = "optim: %s is a fused kernel of Adam with decoupled weight decay; torch's AdamW is used%s"
        logger.info(text, name, f", without {dropped}" if dropped else "")
        options = {"weight_decay": 0.0} | {key: value for key, value in options.items() if key in known}  # as theirs
    accepting = [kind for kind in candidates if not set(options) - set(_accepted(kind))]
    if not accepting:
        candidates += _other_classes(name)
        accepting = [kind for kind in candidates if not set(options) - set(_accepted(kind))]
    if not accepting:
        known = _accepted(candidates[0])
        wrong = next(option for option in options if option not in known)
        raise ConfigError(f"optim: {name} has no option '{wrong}'{nearest(wrong, known)}")
    if accepting[0] in HAVE_FUSED and parameters[0].device.type in ("cpu", "cuda") and "foreach" not in options:
        options.setdefault("fused", True)
    try:
        return accepting[0](parameters, **options)
    except Exception as error:  # each library has errors of its own for a value out of range
        raise ConfigError(f"optim: {name} cannot be built from {options}: {error}") from error


def _other_classes(name: str) -> list[type[Optimizer]]:
    """The class of that name in pytorch_optimizer, if there is any; to import the library takes a second."""
    try:
        import pytorch_optimizer
    except ImportError as error:
        remedy = "install pytorch_optimizer, or take one of torch's"
        raise ConfigError(f"optim.name: torch has no optimiser '{name}' with these options; {remedy}") from error
    # Schedule-free optimizers keep the weights to be scored apart from those that they train.
    names = [known for known in pytorch_optimizer.get_supported_optimizers() if not known.startswith("schedulefree")]
    if name.lower() in names:
        return [pytorch_optimizer.load_optimizer(name.lower())]
    if name.lower() not in TORCH:
        close = nearest(name.lower(), [*TORCH, *names])
        remedy = close if "?" in close else nearest(name.lower(), [*USUAL_OPTIMIZERS, *FUSED])
        raise ConfigError(f"optim.name: unknown optimiser '{name}'{remedy}")
    return []


def _accepted(kind: type[Any]) -> list[str]:
    """The named options of an optimizer or scheduler."""
    variadic = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    named = [key for key, parameter in inspect.signature(kind).parameters.items() if parameter.kind not in variadic]
    return named[1:]  # the first are the parameters, or the optimiser


def _scheduler(optimizer: Optimizer, name: str, options: dict[str, Any]) -> LRScheduler | ReduceLROnPlateau:
    try:
        if name in POLICIES:
            return PolicyLR(optimizer, name, **options)
        kind: Any = vars(lr_scheduler).get(name)
        if not inspect.isclass(kind) or not issubclass(kind, SCHEDULERS) or name in NEEDS_FUNCTIONS:
            remedy = nearest(name, [*POLICIES, *USUAL_SCHEDULES])
            raise ConfigError(f"optim.sched.name: unknown schedule '{name}'{remedy}")
        built: LRScheduler | ReduceLROnPlateau = kind(optimizer, **_torch_options(kind, name, options, optimizer))
        return built
    except (TypeError, ValueError, KeyError, ZeroDivisionError) as error:
        raise ConfigError(f"optim.sched: {name} cannot be built from {options}: {error}") from error


def _torch_options(kind: type[Any], name: str, options: dict[str, Any], optimizer: Optimizer) -> dict[str, Any]:
    """The options under torch's names; `max_steps` has another name there."""
    steps = options.pop("max_steps")
    learning_rate = optimizer.param_groups[0]["lr"]
    own = {
        "OneCycleLR": {"total_steps": steps + 1, "max_lr": learning_rate},
        "CosineAnnealingLR": {"T_max": steps},
        "PolynomialLR": {"total_iters": steps},
        "CyclicLR": {"base_lr": learning_rate / 10, "max_lr": learning_rate},
        "CosineAnnealingWarmRestarts": {"T_0": steps},
    }.get(name, {})
    check_options(name, options, _accepted(kind))
    if name == "OneCycleLR" and {"epochs", "steps_per_epoch"} & set(options):
        own.pop("total_steps")
    return {**own, **options}
