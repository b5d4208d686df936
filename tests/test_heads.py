"""The heads against torch's own layers, and what padding, neighbours and random states may not do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from pipeline.config.task import Task
from pipeline.data.parts import Target
from pipeline.embed import embed
from pipeline.heads import optimizers as optim
from pipeline.heads.architectures import MLP, ConvNet, Dropout, Head
from pipeline.heads.batches import Batch
from pipeline.heads.fit import fit
from pipeline.heads.loss import loss_of
from pipeline.heads.stack import Stack
from pipeline.load import load
from pipeline.store.embedding_table import Store
from pipeline.train_head import make_head
from tests.support.data import make_task, proteins
from tests.support.encoders import FakeEncoder


def rows_of(counts: list[int], width: int = 5, seed: int = 0) -> Tensor:
    return torch.randn(sum(counts), width, generator=torch.Generator().manual_seed(seed))


def plain_convnet(net: ConvNet, rows: Tensor) -> list[Tensor]:
    """One sequence, shape (tokens, hidden_size), through torch's Conv2d as the design writes it down."""
    image = rows.T[None, :, :, None]
    hidden = functional.relu(net.body(image))
    return [head(hidden)[0, :, :, 0].T for head in net.heads]


@settings(max_examples=60, deadline=None)
@given(counts=st.lists(st.integers(1, 20), min_size=1, max_size=6), outputs=st.lists(st.integers(1, 4), min_size=1))
def test_the_convnet_is_conv2d_on_each_sequence_alone(counts: list[int], outputs: list[int]) -> None:
    net = ConvNet(5, outputs).double()
    net.reset(7)
    net.eval()
    rows = rows_of(counts).double()
    packed = net(rows, torch.tensor(counts))
    for sequence, part in enumerate(rows.split(counts)):
        for target, expected in enumerate(plain_convnet(net, part)):
            torch.testing.assert_close(packed[target].split(counts)[sequence], expected, atol=1e-12, rtol=0)


def test_gradients_are_those_of_conv2d() -> None:
    counts, net = [4, 9, 1], ConvNet(5, [3, 2]).double()
    net.reset(1)
    net.eval()
    rows = rows_of(counts).double()
    packed = sum((output**2).sum() for output in net(rows, torch.tensor(counts)))
    assert isinstance(packed, Tensor)
    ours = torch.autograd.grad(packed, list(net.parameters()))
    alone = [plain_convnet(net, part) for part in rows.split(counts)]
    plain = torch.stack([(output**2).sum() for outputs in alone for output in outputs]).sum()
    for one, other in zip(ours, torch.autograd.grad(plain, list(net.parameters())), strict=True):
        torch.testing.assert_close(one, other, atol=1e-10, rtol=0)


def test_shapes_are_those_of_the_design() -> None:
    mlp = {name: tuple(value.shape) for name, value in MLP(320, 10).named_parameters()}
    assert list(mlp.values()) == [(320, 320), (320,), (256, 320), (256,), (128, 256), (128,), (10, 128), (10,)]
    net = {name: tuple(value.shape) for name, value in ConvNet(320, [3, 8]).named_parameters()}
    expected = [(32, 320, 7, 1), (32,), (3, 32, 7, 1), (3,), (8, 32, 7, 1), (8,)]
    assert list(net.values()) == expected
    assert [layer.p for layer in MLP(320, 1).modules() if isinstance(layer, Dropout)] == [0.1] * 3
    assert ConvNet(320, [1]).dropout.p == 0.25


def test_the_mlp_is_torchs_linear_relu_chain() -> None:
    head = MLP(6, 2)
    head.reset(3)
    head.eval()
    rows = rows_of([8], width=6)
    hidden = rows
    linears = [layer for layer in head.modules() if isinstance(layer, nn.Linear)]
    for layer in linears[:-1]:
        hidden = functional.relu(functional.linear(hidden, layer.weight, layer.bias))
    torch.testing.assert_close(head(rows, torch.ones(8))[0], linears[-1](hidden))


def test_initial_weights_have_torchs_distribution() -> None:
    torch.manual_seed(0)
    mlp, net = MLP(64, 2), ConvNet(64, [2])
    for head, fresh, theirs in ((mlp, mlp.layers[0], nn.Linear(64, 64)), (net, net.body, nn.Conv2d(64, 32, (7, 1)))):
        head.reset(0)
        for one, other in zip(fresh.parameters(), theirs.parameters(), strict=True):
            assert one.abs().max().item() == pytest.approx(other.abs().max().item(), rel=0.1)
            assert one.std().item() == pytest.approx(other.std().item(), rel=0.25)


def test_a_head_neither_reads_nor_changes_the_global_random_state() -> None:
    def outputs(seed: int) -> Tensor:
        torch.manual_seed(seed)
        head = make_head(Task(level="token", random_seed=9), 5, (Target("y", None, 1),), torch.device("cpu"))
        before = torch.random.get_rng_state()
        result: Tensor = head.train()(rows_of([6]), torch.tensor([6]))[0]
        assert torch.equal(torch.random.get_rng_state(), before)
        return result

    assert torch.equal(outputs(1), outputs(2))


def test_dropout_keeps_the_mean_and_drops_its_share() -> None:
    layer = Dropout(0.25)
    layer.generator = torch.Generator().manual_seed(0)
    values = layer(torch.ones(100_000))
    assert values.unique().tolist() == pytest.approx([0, 1 / 0.75])
    assert (values == 0).float().mean() == pytest.approx(0.25, abs=0.01)
    assert torch.equal(layer.eval()(torch.ones(9)), torch.ones(9))


def test_the_loss_by_hand() -> None:
    """Two targets: cross-entropy over the units a mask leaves, plus squared error over others."""
    targets = (Target("a", ("x", "y"), 2), Target("b", None, 1))
    logits = torch.tensor([[0.0, 0.0], [2.0, 1.0], [5.0, 5.0]])
    numbers = torch.tensor([[1.0], [2.0], [3.0]])
    masks = [torch.tensor([True, True, False]), torch.tensor([False, True, True])]
    values = [torch.tensor([0, 1, -1]), torch.tensor([9.0, 0.0, 1.0], dtype=torch.float64)]
    entropy = (torch.log(torch.tensor(2.0)) + torch.log(1 + torch.exp(torch.tensor(1.0)))) / 2
    assert loss_of([logits, numbers], values, masks, targets).item() == pytest.approx(entropy.item() + (4 + 4) / 2)


def test_a_target_without_a_label_in_the_batch_adds_nothing() -> None:
    targets = (Target("a", ("x", "y"), 2),)
    logits = torch.ones(2, 2, requires_grad=True)
    loss = loss_of([logits], [torch.tensor([-1, -1])], [torch.tensor([False, False])], targets)
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(logits.grad, torch.zeros(2, 2)) if logits.grad is not None else False


def test_dropout_masks_of_two_layers_differ() -> None:
    head = MLP(256, 1)
    head.reset(5)
    masks = [layer.train()(torch.ones(4, 256)) for layer in head.modules() if isinstance(layer, Dropout)]
    assert not torch.equal(masks[0], masks[1])
    weights = head.layers[0].weight
    assert isinstance(weights, Tensor)
    assert not torch.equal(masks[0][0] > 0, weights[0] > 0)


def fresh_mlps(seeds: Sequence[int], outputs: int) -> list[MLP]:
    heads = [MLP(6, outputs).double() for _ in seeds]
    for head, seed in zip(heads, seeds, strict=True):
        head.reset(seed)
    return heads


def units(rows: Tensor, values: Tensor) -> Batch:
    return Batch(rows, torch.ones(len(rows), dtype=torch.long), [values], [None])


@pytest.mark.parametrize("classes", [("x", "y", "z"), None])
def test_stacked_heads_have_the_gradients_of_torchs_layers(classes: tuple[str, ...] | None) -> None:
    target, source = Target("y", classes, 3 if classes else 1), torch.Generator().manual_seed(0)
    rows = torch.randn(4 * 9, 6, generator=source, dtype=torch.float64)
    values = torch.randint(3, (4 * 9,), generator=source) if classes else torch.randn(4 * 9, generator=source)
    stacked, alone = fresh_mlps([1, 2, 3, 4], target.outputs), fresh_mlps([1, 2, 3, 4], target.outputs)
    stack = Stack(stacked, classes is not None)
    losses = stack.backward(units(rows, values))
    for place, head in enumerate(alone):
        batch = units(rows[9 * place : 9 * place + 9], values[9 * place : 9 * place + 9])
        loss = loss_of(head(batch.rows, batch.counts), batch.values, batch.masks, (target,))
        loss.backward()
        torch.testing.assert_close(losses[place], loss.detach(), atol=1e-10, rtol=0)
        for one, other in zip(stacked[place].parameters(), head.parameters(), strict=True):
            assert one.grad is not None
            torch.testing.assert_close(one.grad, other.grad, atol=1e-10, rtol=0)
            assert torch.equal(one, other)
    stack.release()
    assert len({parameter.untyped_storage().data_ptr() for head in stacked for parameter in head.parameters()}) == 32


@pytest.mark.parametrize("name", optim.PLAIN)
def test_one_optimiser_for_all_weights_does_what_one_for_each_head_does(name: str) -> None:
    source = torch.Generator().manual_seed(0)
    together, alone = fresh_mlps([1, 2], 1), fresh_mlps([1, 2], 1)
    stacks = Stack(together, classes=False), Stack(alone, classes=False)
    config = {"name": name, "lr": 0.01, "weight_decay": 0.1} if name != "rprop" else {"name": name, "lr": 0.01}
    shared = optim.ScheduledOptimizer([stacks[0].weights], config, 5)
    each = [optim.ScheduledOptimizer(head.parameters(), config, 5) for head in alone]
    before = stacks[0].weights.detach().clone()
    for _ in range(5):
        rows = torch.randn(2 * 9, 6, generator=source, dtype=torch.float64)
        for stack in stacks:
            stack.backward(units(rows, rows[:, 0]))
        for optimizer in (shared, *each):
            optimizer.step()
    assert not torch.allclose(stacks[0].weights, before)
    for head, other in zip(together, alone, strict=True):
        for its, expected in zip(head.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(its, expected, atol=1e-12, rtol=0)


SEEDS = [5, 6, 7]
LION = {"name": "lion", "lr": 1e-3}
PLATEAU = {"name": "adam", "lr": 0.01, "sched": {"name": "ReduceLROnPlateau", "patience": 0, "factor": 0.3}}


@pytest.mark.parametrize("memory_bytes", [10**9, 0])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"patience": 1, "num_epochs": 30, "optim": {"name": "adam", "lr": 0.03}},
        {"gradient_clip_val": 0.05},
        {"shuffle": False},
        {"optim": LION},
        {"optim": PLATEAU},
        {"class_weights": "balanced"},
    ],
    ids=str,
)
@pytest.mark.parametrize("level", ["sequence", "token"])
def test_several_seeds_at_once_are_each_trained_as_alone(
    tmp_path: Path, level: str, options: dict[str, Any], memory_bytes: int
) -> None:
    """Batches, dropout and early stopping of each head are its own."""
    rows = [{"sequence": text, "label": text if level == "token" else text[0]} for text in proteins(45, 3)]
    options = {"num_epochs": 3, "optim": {"name": "adam", "lr": 0.01}, **options, "level": level}
    task = make_task(tmp_path, rows, task_type="classification", target_column=["label"], batch_size=8, **options)
    (embeddings,) = embed([load(task)], FakeEncoder(), Store(tmp_path / "store", memory_bytes=memory_bytes))
    targets, cpu = embeddings.examples.targets, torch.device("cpu")

    def fresh(seed: int) -> Head:
        return make_head(replace(task, random_seed=seed), embeddings.table.hidden_size, targets, cpu)

    together = [fresh(seed) for seed in SEEDS]
    found = fit(together, SEEDS, embeddings, cpu)
    assert len({tuple(losses) for losses, _ in found}) == len(SEEDS)
    for seed, head, losses in zip(SEEDS, together, found, strict=True):
        alone = fresh(seed)
        (expected,) = fit([alone], [seed], embeddings, cpu)
        assert [len(one) for one in losses] == [len(one) for one in expected]
        assert losses[0] == pytest.approx(expected[0], rel=1e-4)
        assert losses[1] == pytest.approx(expected[1], rel=1e-4)
        for one, other in zip(head.parameters(), alone.parameters(), strict=True):
            torch.testing.assert_close(one, other, atol=2e-3, rtol=1e-3)


def test_dropout_meets_its_share() -> None:
    """16 random bits a value: each layer's own, and none of the 65,536 values is out of place."""
    layers = [Dropout(0.1), Dropout(0.1)]
    for seed, layer in enumerate(layers):
        layer.generator = torch.Generator().manual_seed(seed)
    masks = Dropout.kept(layers, torch.empty(2, 1_000_003))
    assert (masks == 0).double().mean(1).tolist() == pytest.approx([0.1, 0.1], abs=0.001)
    assert layers[0].scale == pytest.approx(1 / 0.9, rel=1e-4)
    assert ((masks[0] == 0) & (masks[1] == 0)).double().mean().item() == pytest.approx(0.01, abs=0.001)
    layers[1].generator = torch.Generator().manual_seed(1)
    assert torch.equal(layers[1](torch.ones(1_000_003)) > 0, masks[1])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_head_on_a_gpu_begins_with_the_weights_it_has_on_the_cpu() -> None:
    task, targets = Task(level="token"), (Target("y", None, 1),)
    cpu, gpu = (make_head(task, 5, targets, torch.device(name)) for name in ("cpu", "cuda"))
    for one, other in zip(cpu.parameters(), gpu.parameters(), strict=True):
        assert torch.equal(one, other.cpu())
    gpu.train()(rows_of([6]).cuda(), torch.tensor([6]).cuda())
