"""Optimisers and schedules: torch's own classes, and a head that each of them trains."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pipeline.config import documentation
from pipeline.config.task import Task
from pipeline.errors import ConfigError
from pipeline.heads import optimizers as optim
from pipeline.heads.schedules import POLICIES, PolicyLR
from pipeline.store.embedding_table import Store
from pipeline.validation import validate
from tests.support.data import planted_task
from tests.support.encoders import FakeEncoder
from tests.support.programs import ROOT

TORCH_SCHEDULES: dict[str, dict[str, Any]] = {
    "StepLR": {"step_size": 20},
    "MultiStepLR": {"milestones": [10, 20]},
    "ConstantLR": {},
    "LinearLR": {},
    "ExponentialLR": {"gamma": 0.9},
    "ReduceLROnPlateau": {"patience": 1},
    "CyclicLR": {},
    "OneCycleLR": {},
    "CosineAnnealingLR": {},
    "CosineAnnealingWarmRestarts": {},
    "PolynomialLR": {},
}


def parameters() -> list[nn.Parameter]:
    return [nn.Parameter(torch.ones(3, 3))]


@pytest.mark.parametrize("name", list(TORCH_SCHEDULES))
def test_torchs_schedules_are_torchs(name: str) -> None:
    config = {"lr": 0.1, "sched": {"name": name, **TORCH_SCHEDULES[name]}}
    _, scheduler = optim.build(parameters(), config, 30)
    assert scheduler is not None
    assert type(scheduler) is getattr(torch.optim.lr_scheduler, name)
    assert optim.needs_metric(config) == (name == "ReduceLROnPlateau")


@pytest.mark.parametrize("name", list(TORCH_SCHEDULES))
def test_a_schedule_goes_on_with_every_step_but_for_two_that_go_by_epochs(name: str) -> None:
    options = {**TORCH_SCHEDULES[name], **({"patience": 0} if name == "ReduceLROnPlateau" else {})}
    (parameter,) = parameters()
    parameter.grad = torch.zeros_like(parameter)
    scheduled = optim.ScheduledOptimizer(
        [parameter], {"name": "sgd", "lr": 0.1, "sched": {"name": name, **options}}, 30
    )

    def rates(act: Callable[[], None]) -> set[float]:
        found = set()
        for _ in range(25):
            act()
            found.add(scheduled.optimizer.param_groups[0]["lr"])
        return found

    by_epochs = name in ("ExponentialLR", "ReduceLROnPlateau")
    assert (len(rates(scheduled.step)) > 1) != by_epochs
    assert (len(rates(lambda: scheduled.end_epoch(1.0))) > 1) == by_epochs


def test_max_steps_left_out_means_the_steps_of_the_fit() -> None:
    for given, expected in ({}, 30), ({"max_steps": None}, 30), ({"max_steps": 7}, 7):
        _, scheduler = optim.build(parameters(), {"sched": {"name": "CosineAnnealing", **given}}, 30)
        assert isinstance(scheduler, PolicyLR)
        assert scheduler.policy.max_steps == expected
    assert optim.build(parameters(), {"lr": 1}, 30)[1] is None


@pytest.mark.parametrize("name", optim.FUSED)
def test_fused_adams_are_adamw_and_say_so(name: str, caplog: pytest.LogCaptureFixture) -> None:
    options = {"lr": 0.1, "betas": [0.9, 0.98], "weight_decay": 0.01, "bucket_cap_mb": 125}
    with caplog.at_level("INFO"):
        optimizer, _ = optim.build(parameters(), {"name": name, **options}, 30)
    assert type(optimizer) is torch.optim.AdamW
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.98)
    assert f"{name} is a fused kernel" in caplog.text
    assert "without bucket_cap_mb" in caplog.text
    assert optim.build(parameters(), {"name": name}, 30)[0].param_groups[0]["weight_decay"] == 0


def test_the_library_is_the_first_that_takes_the_options() -> None:
    assert type(optim.build(parameters(), {"name": "Adafactor", "lr": 0.1}, 30)[0]) is torch.optim.Adafactor
    neimo = {"name": "adafactor", "lr": 0.1, "scale_parameter": False, "relative_step": False}
    assert "pytorch_optimizer" in type(optim.build(parameters(), neimo, 30)[0]).__module__


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"name": "adan2"}, "unknown optimiser 'adan2'; did you mean 'adan'"),
        ({"name": "Adamx"}, "unknown optimiser 'Adamx'; did you mean 'adam"),
        ({"name": "best"}, "unknown optimiser 'best'; known: sgd, adam, adamw"),
        ({"name": "adam", "learning_rate": 1}, "adam has no option 'learning_rate'"),
        ({"name": "adam", "lr": -1}, "adam cannot be built"),
        ({"name": "adam", "lr": "fast"}, "adam cannot be built"),
        ({"name": "sam"}, "sam"),
        ({"name": "adahessian", "lr": 0.1}, "cannot train a head"),
        ({"sched": "cosine"}, "expected a mapping with a name, found 'cosine'"),
        ({"sched": {"name": "CosineAnealing"}}, "unknown schedule 'CosineAnealing'; did you mean 'CosineAnnealing'"),
        ({"sched": {"name": "LambdaLR"}}, "unknown schedule 'LambdaLR'"),
        ({"sched": {"name": "StepLR"}}, "StepLR cannot be built"),
        ({"sched": {"name": "StepLR", "size": 3}}, "StepLR has no option 'size'"),
        (
            {"sched": {"name": "CosineAnnealing", "warm_steps": 3}},
            "no option 'warm_steps'; did you mean 'warmup_steps'",
        ),
        ({"sched": {"name": "CosineAnnealing", "warmup_steps": 3, "warmup_ratio": 0.1}}, "not both"),
        ({"sched": {"name": "CosineAnnealing", "warmup_ratio": 3}}, "expected a share between 0 and 1"),
        ({"sched": {"name": "CosineAnnealing", "min_lr": "low"}}, "CosineAnnealing cannot be built"),
        ({"sched": {"name": "NoamAnnealing"}}, "NoamAnnealing needs d_model"),
        ({"sched": {"name": "NoamAnnealing", "d_model": 64, "min_lr": 1}}, "needs an lr above min_lr"),
        ({"sched": {"name": "CosineAnnealing", "warmup_steps": 0, "warmup_ratio": 0.1}}, "not both"),
        ({"sched": {"name": "CosineAnnealing", "warmup_steps": 10, "min_lr": 1}}, "needs an lr above min_lr"),
        ({"sched": {"name": "CosineAnnealing", "constant_steps": 5, "min_lr": 1e-3}}, "needs an lr above min_lr"),
        ({"sched": {"name": "CosineAnnealing", "constant_ratio": 1.0}}, "no step to decay in"),
        ({"sched": {"name": "CosineAnnealing", "hold_steps": 5}}, "CosineAnnealing has no option 'hold_steps'"),
        ({"sched": {"name": "WarmupPolicy", "constant_ratio": 0.1}}, "WarmupPolicy has no option 'constant_ratio'"),
        ({"sched": {"name": "NoamHoldAnnealing", "hold_steps": 5}}, "NoamHoldAnnealing needs a warm-up"),
        ({"sched": {"name": "NoamHoldAnnealing", "warmup_ratio": 0.001}}, "NoamHoldAnnealing needs a warm-up"),
        ({"sched": {"name": "T5InverseSquareRootAnnealing"}}, "T5InverseSquareRootAnnealing needs constant_steps"),
        ({"sched": {"name": "WarmupAnnealing", "max_steps": 0}}, "max_steps is 0, expected at least 1"),
        ({"sched": {"name": "WarmupAnnealing", "max_steps": -1}}, "max_steps is -1, expected at least 1"),
        ({"sched": {"name": "WarmupAnnealing", "warmup_steps": -1}}, "warmup_steps is -1, expected at least 0"),
        ({"sched": {"name": "WarmupAnnealing", "min_lr": float("nan")}}, "min_lr is nan, expected at least 0"),
        ({"sched": {"name": "WarmupAnnealing", "last_epoch": 3}}, "last_epoch is 3, expected -1"),
        ({"sched": {"name": "PolynomialDecayAnnealing", "power": -1}}, "power is -1, expected at least 0"),
        ({"sched": {"name": "PolynomialDecayAnnealing", "cycle": 1}}, "cycle is 1, expected true or false"),
    ],
)
def test_what_cannot_be_built_is_said_in_one_line(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        optim.check(config)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_unknown_optimiser_is_found_before_anything_is_embedded(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    with pytest.raises(ConfigError, match="unknown optimiser 'adan2'; did you mean 'adan'"):
        validate(FakeEncoder(), planted_task(tmp_path, optim={"name": "adan2"}), store)
    assert not store.root.exists()


def losses(task: Task, folder: Path) -> list[float]:
    (scores,) = validate(FakeEncoder(), task, Store(folder / "store"))
    return scores.losses


@pytest.mark.parametrize("name", [*optim.USUAL_OPTIMIZERS, *optim.FUSED, "nadam", "lion", "lbfgs"])
def test_every_optimiser_trains_a_head(tmp_path: Path, name: str) -> None:
    lr = {"sgd": 1.0, "adadelta": 5.0, "adafactor": 0.1, "lbfgs": 0.1, "lion": 1e-3, "novograd": 0.05}.get(name, 0.01)
    whole = {"batch_size": 1000} if name == "lbfgs" else {}  # it remembers the gradients of other steps
    found = losses(planted_task(tmp_path, num_epochs=5, optim={"name": name, "lr": lr}, **whole), tmp_path)
    assert min(found[1:]) < 0.9 * found[0]


@pytest.mark.parametrize("name", [*POLICIES, *TORCH_SCHEDULES])
def test_every_schedule_trains_a_head(tmp_path: Path, name: str) -> None:
    own = {"NoamAnnealing": {"d_model": 24, "warmup_steps": 5}, "NoamHoldAnnealing": {"warmup_steps": 5}}
    options = {**own, **TORCH_SCHEDULES}.get(name, {})
    adam = {"name": "adam", "lr": 0.1 if name == "NoamAnnealing" else 0.01, "sched": {"name": name, **options}}
    if name == "T5InverseSquareRootAnnealing":
        adam["sched"] = {"name": name, "constant_steps": 1000}
    found = losses(planted_task(tmp_path, num_epochs=5, optim=adam), tmp_path)
    assert min(found[1:]) < 0.95 * found[0]


def test_the_documented_policies_are_those_there_are() -> None:
    assert set(documentation.POLICIES) == set(POLICIES)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("dataset.num_epochs=many", "num_epochs"),
        ("dataset.batchsize=3", "did you mean 'batch_size'"),
        ("precision=fp8", "expected one of auto, fp32"),
        ("dataset.class=tokens", "did you mean 'token'"),
    ],
)
def test_an_error_of_the_configuration_answers_without_torch(override: str, message: str) -> None:
    script = f"""
import sys
from pipeline.__main__ import main
code = main(["main", "--ckpt", "x", "--overrides", {override!r}])
sys.exit(code if not {{"torch", "transformers", "mlflow"}} & set(sys.modules) else 1)
"""
    run = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 2, run.stderr
    assert message in run.stderr
    assert len(run.stderr.strip().splitlines()) == 1
