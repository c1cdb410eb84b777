"""Loops in Fabric, against the same loops in one process in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from lightning.fabric import Fabric
from tests.ranks.engine_support import (
    Block,
    Net,
    batch,
    largest_difference,
    loss_of,
    made,
    pair,
    reference_backward,
    whole,
)
from tests.rows import full
from torch import Tensor, nn

import meshbolt
from meshbolt.fabric import MeshStrategy
from meshbolt.plugins import MixedPrecision
from meshbolt.testing import run_ranks, run_ranks_expecting

STAGES = (0, 1, 2, 3)


def fabric_of(stage: int, *, replicate: int = 1, **arguments: Any) -> Fabric:
    strategy = MeshStrategy(zero=meshbolt.Zero(stage=stage, replicate=replicate))
    fabric = Fabric(accelerator="cpu", devices=dist.get_world_size(), strategy=strategy, **arguments)
    fabric.launch()
    return fabric


def adamw(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(module.parameters(), lr=1e-2)


def fit(fabric: Fabric, model: Any, optimizer: Any, *, window: int, clip: dict[str, float]) -> list[Tensor]:
    """Take 3 steps, and return the norms that clipping gave."""
    norms = []
    for index in range(3 * window):
        last = (index + 1) % window == 0
        with fabric.no_backward_sync(model, enabled=not last):
            fabric.backward(loss_of(model, batch(index, fabric.global_rank)) / window)
        if last:
            if clip:
                norms.append(fabric.clip_gradients(model, optimizer, **clip))
            optimizer.step()
            optimizer.zero_grad()
    return [norm for norm in norms if norm is not None]


def reference_fit(
    module: nn.Module, optimizer: torch.optim.Optimizer, *, window: int, clip: dict[str, float]
) -> list[Tensor]:
    norms = []
    for index in range(3 * window):
        reference_backward(module, index, window=window)
        if (index + 1) % window == 0:
            if "max_norm" in clip:
                norms.append(nn.utils.clip_grad_norm_(module.parameters(), **clip))
            elif clip:
                nn.utils.clip_grad_value_(module.parameters(), clip["clip_val"])
            optimizer.step()
            optimizer.zero_grad()
    return norms


CLIPS: list[dict[str, float]] = [{}, {"max_norm": 0.2}, {"max_norm": 0.5, "norm_type": 1.0}, {"clip_val": 0.02}]


def loops_agree(replicate: int) -> None:
    for stage in STAGES if replicate == 1 else STAGES[1:]:
        for window, clip in ((1, CLIPS[1]), (3, CLIPS[0]), (2, CLIPS[2]), (2, CLIPS[3])):
            module, reference = pair()
            fabric = fabric_of(stage, replicate=replicate)
            if window == 2:
                model, optimizer = fabric.setup(module, adamw(module))
            else:
                model = fabric.setup_module(module)
                optimizer = fabric.setup_optimizers(adamw(model))
            norms = fit(fabric, model, optimizer, window=window, clip=clip)
            expected = reference_fit(reference, adamw(reference), window=window, clip=clip)
            torch.testing.assert_close([norm.double() for norm in norms], expected, rtol=0, atol=1e-12)
            assert largest_difference(module, reference) < 1e-12, (stage, window, clip)


@pytest.mark.parametrize(("ranks", "replicate"), [(2, 1), full(4, 2)])
def test_windows_and_clipping_in_a_fabric_loop_are_those_of_one_process(ranks: int, replicate: int) -> None:
    run_ranks(loops_agree, ranks, replicate, timeout=60)


class Generator(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(Block(), Block(), nn.Linear(10, 6))


def adversarial(
    modules: tuple[Any, Any], optimizers: tuple[Any, Any], data: list[Tensor], backward: Callable[[Tensor], None]
) -> None:
    """Train a generator and a discriminator in turn; the generator's loss goes through both."""
    generator, discriminator = modules
    for real in data:
        noise = torch.cat([real, real[:, :4]], dim=1)
        fake = generator(noise)
        optimizers[1].zero_grad()
        backward(F.softplus(-discriminator(real)).mean() + F.softplus(discriminator(fake.detach())).mean())
        optimizers[1].step()
        optimizers[0].zero_grad()
        backward(F.softplus(-discriminator(fake)).mean())
        optimizers[0].step()


def two_modules() -> None:
    for stage in STAGES:
        torch.manual_seed(3)
        modules = (Generator().double(), Net().double())
        references = copy.deepcopy(modules)
        fabric = fabric_of(stage)
        pairs = [fabric.setup(module, torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.5)) for module in modules]
        mine = [batch(index, fabric.global_rank)[0] for index in range(3)]
        adversarial((pairs[0][0], pairs[1][0]), (pairs[0][1], pairs[1][1]), mine, fabric.backward)
        together = [torch.cat([batch(index, rank)[0] for rank in range(fabric.world_size)]) for index in range(3)]
        optimizers = [torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.5) for module in references]
        adversarial(references, (optimizers[0], optimizers[1]), together, Tensor.backward)
        for module, reference in zip(modules, references, strict=True):
            assert largest_difference(module, reference) < 1e-12, stage


def test_two_modules_with_two_optimizers_train_in_fabric_as_in_one_process() -> None:
    run_ranks(two_modules, 2, timeout=60)


def norms_of_two_modules() -> None:
    for stage in STAGES:
        torch.manual_seed(3)
        modules = (Generator().double(), Net().double())
        fabric = fabric_of(stage)
        expected = []
        for module, width in zip(modules, (10, 6), strict=True):
            reference = copy.deepcopy(module)
            model, _ = fabric.setup(module, torch.optim.SGD(module.parameters(), lr=0.1))
            together = torch.cat([batch(0, rank)[0].repeat(1, 2)[:, :width] for rank in range(fabric.world_size)])
            reference(together).square().mean().backward()
            mine = together.chunk(fabric.world_size)[fabric.global_rank]
            fabric.backward(model(mine).square().mean())
            expected.append(nn.utils.clip_grad_norm_(reference.parameters(), 1e9))
        for module, norm in zip(modules, expected, strict=True):
            assert abs(float(fabric.strategy.grad_norm(module) - norm)) < 1e-12, stage
        both = torch.linalg.vector_norm(torch.stack(expected))
        assert abs(float(fabric.strategy.grad_norm() - both)) < 1e-12, stage


def test_the_norm_of_gradients_is_of_the_module_asked_for_or_of_all() -> None:
    run_ranks(norms_of_two_modules, 2, timeout=60)


def changed_and_dropped() -> None:
    for stage in STAGES:
        module, reference = pair()
        fabric = fabric_of(stage)
        model, optimizer = fabric.setup(module, torch.optim.SGD(module.parameters(), lr=0.1))
        theirs = torch.optim.SGD(reference.parameters(), lr=0.1)
        for step in range(3):
            for one in (module, reference):
                one.blocks[1].up.weight.data.mul_(0.5)
                one.into.weight.data.clamp_(-0.2, 0.2)
            with fabric.no_backward_sync(model):
                fabric.backward(loss_of(model, batch(7, fabric.global_rank)))
            optimizer.zero_grad()  # the probe above does not count
            fabric.backward(loss_of(model, batch(step, fabric.global_rank)))
            model(batch(9, 0)[0])  # neither does a forward without backward
            optimizer.step()
            optimizer.zero_grad()
            reference_backward(reference, step)
            theirs.step()
            theirs.zero_grad()
        assert largest_difference(module, reference) < 1e-12, stage


def test_edits_probes_and_lone_forwards_in_a_fabric_loop_count_as_in_one_process() -> None:
    run_ranks(changed_and_dropped, 2)


def overflows() -> list[float]:
    plugin = MixedPrecision("16-mixed", "cpu", init_scale=256.0)
    fabric = fabric_of(2, plugins=[plugin])
    module = made(dtype=torch.float32)
    model, optimizer = fabric.setup(module, adamw(module))
    history = []
    for index in range(4):
        x, y = batch(index, fabric.global_rank, torch.float32)
        factor = 1e38 if index == 2 and fabric.global_rank == 1 else 1.0
        before = [whole(parameter) for parameter in module.parameters()]
        fabric.backward(F.mse_loss(model(x), y) * factor)
        optimizer.step()
        optimizer.zero_grad()
        after = [whole(parameter) for parameter in module.parameters()]
        history.append(all(map(torch.equal, before, after)))
    assert history == [False, False, True, False]
    assert plugin.loss_scaler is not None
    assert plugin.loss_scaler.current_scale == 128.0
    return [float(value.sum()) for value in after]


def test_an_overflow_on_one_rank_skips_the_step_on_all_in_fabric() -> None:
    first, second = run_ranks(overflows, 2)
    assert first == second


class WithMethod(Net):
    """Has a second way in."""

    def embed(self, x: Tensor) -> Tensor:
        return self.blocks[0](self.into(x))


def second_entry() -> None:
    for stage in STAGES:
        module, reference = pair(WithMethod)
        fabric = fabric_of(stage)
        model, optimizer = fabric.setup(module, torch.optim.SGD(module.parameters(), lr=0.1))
        model.mark_forward_method("embed")
        fabric.backward(model.embed(batch(0, fabric.global_rank)[0]).square().mean())
        optimizer.step()
        for rank in range(2):
            (reference.embed(batch(0, rank)[0]).square().mean() / 2).backward()
        torch.optim.SGD(reference.parameters(), lr=0.1).step()
        assert largest_difference(module, reference) < 1e-12, stage


def test_methods_marked_as_forward_train_in_fabric() -> None:
    run_ranks(second_entry, 2)


def layers() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 10), nn.Linear(10, 1))


def late_module() -> None:
    for stage in STAGES:
        fabric = fabric_of(stage)
        with fabric.init_module(empty_init=True):
            module = layers()
        assert all(parameter.is_meta for parameter in module.parameters())
        torch.manual_seed(5)
        fabric.setup_module(module)
        torch.manual_seed(5)
        assert all(torch.equal(whole(a), b) for a, b in zip(module.parameters(), layers().parameters(), strict=True))


def test_modules_built_in_init_module_are_filled_when_they_are_set_up() -> None:
    run_ranks(late_module, 2)


def step_with_a_strangers_parameters() -> None:
    fabric = fabric_of(2)
    module = made()
    fabric.setup(module, adamw(made()))


def test_an_optimizer_of_another_module_is_refused_in_fabric() -> None:
    run_ranks_expecting(
        step_with_a_strangers_parameters, 2, error=meshbolt.ConfigError, match="AdamW holds a parameter"
    )


def refused_optimizer() -> None:
    fabric = fabric_of(2)
    module = made()
    fabric.setup(module, torch.optim.LBFGS(module.parameters()))


def test_optimizers_that_would_be_wrong_are_refused_in_fabric() -> None:
    run_ranks_expecting(refused_optimizer, 2, error=meshbolt.UnsupportedError, match="LBFGS")


def dtype_of_output(strategy: Any, precision: Any) -> torch.dtype:
    fabric = Fabric(accelerator="cpu", devices=2, strategy=strategy, precision=precision)
    fabric.launch()
    model = fabric.setup_module(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1)))
    return model(torch.ones(2, 3)).dtype


@pytest.mark.parametrize("precision", ["32-true", "64-true", "bf16-true", "bf16-mixed"])
def test_outputs_have_the_dtype_that_they_have_under_ddp(precision: str) -> None:
    ours = run_ranks(dtype_of_output, 2, "zero2", precision)

    assert ours == run_ranks(dtype_of_output, 2, "ddp", precision)
