"""The names of optimisers and schedules, so that a wrong one is found without importing torch."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from pipeline.errors import ConfigError, nearest

# NeMo's policies.
POLICIES = """
WarmupPolicy WarmupHoldPolicy SquareAnnealing CosineAnnealing NoamAnnealing NoamHoldAnnealing WarmupAnnealing
InverseSquareRootAnnealing T5InverseSquareRootAnnealing SquareRootAnnealing PolynomialDecayAnnealing
PolynomialHoldDecayAnnealing
""".split()
# Adam in kernels of their own, with weight decay apart from the gradient: AdamW does the same arithmetic.
FUSED = ("fused_adam", "megatron_fused_adam", "distributed_fused_adam", "mcore_distributed_optim")
# The first that one thinks of.
USUAL = "sgd adam adamw adadelta adamax adagrad rmsprop rprop novograd adafactor adan lamb".split()
# Of torch 2.13.0.
TORCH_OPTIMIZERS = """
adadelta adafactor adagrad adam adamax adamw asgd lbfgs muon nadam radam rmsprop rprop sgd sparseadam
""".split()
TORCH_SCHEDULES = """
ConstantLR CosineAnnealingLR CosineAnnealingWarmRestarts CyclicLR ExponentialLR LinearLR MultiStepLR OneCycleLR
PolynomialLR ReduceLROnPlateau StepLR
""".split()
# Of pytorch_optimizer 4.1.0; schedule-free ones keep the weights to be scored apart from those that they train.
OTHER_OPTIMIZERS = """
a2grad accsgd adabelief adabound adadelta adafactor adagc adago adahessian adai adalite adalomo adam adamax adamc
adamg adammini adamod adamp adams adamuon adamw adamwsn adan adanorm adapnm adashift adasmooth adatam ademamix adopt
aggmo aida alice alig amos ano apollo apollodqn asgd avagrad bcos bsam came conda dadaptadagrad dadaptadam dadaptadan
dadaptlion dadaptsgd dash demo diffgrad distributedmuon dualadam emofact emolynx emonavi exadam fadam fira flashadamw
focus fromage ftrl galore grams gravity grokfastadamw kate kron lamb laprop lars lbfgs lion lomo lorarite madgrad
magma mars msvag muon muonclip nadam nero normuon novograd padam pid pnm prodigy qhadam qhm racs radam ranger ranger21
rmsprop rose sara scalableshampoo scion scionlight sgd sgdp sgdsai sgdw shampoo signsgd simplifiedademamix sm3 soap
sophiah spam spectralsphere splus srmm stableadamw stablespam swats tam tiger vsgd yogi
""".split()
LISTED = {"torch": "2.13.0", "pytorch_optimizer": "4.1.0"}


def check_names(optim_config: Mapping[str, Any]) -> None:
    """Raises ConfigError where the optimiser's or the schedule's name is not known.

    Another release of the libraries may know other names: then `optim.check` has the last word.
    """
    if not all(_installed(package) == listed for package, listed in LISTED.items()):
        return
    name, sched = str(optim_config.get("name", "adam")), optim_config.get("sched")
    known = [*TORCH_OPTIMIZERS, *FUSED, *OTHER_OPTIMIZERS]
    if name.lower() not in known:
        raise ConfigError(unknown_optimizer(name, known))
    schedule = str(sched["name"]) if isinstance(sched, Mapping) and "name" in sched else None
    if schedule is not None and schedule not in POLICIES + TORCH_SCHEDULES:
        raise ConfigError(unknown_schedule(schedule))


def unknown_optimizer(name: str, known: list[str]) -> str:
    """What to say of a name that is none, with the nearest of those known, or of the usual ones."""
    close = nearest(name.lower(), known)
    return f"optim.name: unknown optimiser '{name}'{close if '?' in close else nearest(name.lower(), [*USUAL, *FUSED])}"


def unknown_schedule(name: str) -> str:
    """What to say of a name that is none."""
    usual = ["StepLR", "ExponentialLR", "ReduceLROnPlateau", "CyclicLR", "OneCycleLR"]
    return f"optim.sched.name: unknown schedule '{name}'{nearest(name, [*POLICIES, *usual])}"


def _installed(package: str) -> str:
    try:
        return version(package).split("+")[0]
    except PackageNotFoundError:
        return ""
