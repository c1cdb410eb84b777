"""Norms and clipping where some gradients are divided over `tp` and shards, some over shards, and some are whole."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from lightning.fabric import Fabric
from tests.ranks.tensor_support import PLAN, WIDTH, Block, Net, trainer
from tests.rows import full
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from meshbolt import MeshStrategy, TensorParallel, Zero
from meshbolt.compat import whole_of
from meshbolt.demos import ByteGPT
from meshbolt.fabric import MeshStrategy as FabricStrategy
from meshbolt.testing import run_ranks

HSDP = Zero(stage=2, replicate=2)
FROZEN_PLAN = {**PLAN, "unused.*.up": "colwise", "unused.*.down": "rowwise"}


class Frozen(Net):
    """Divided layers that are frozen, or that no forward uses; and a parameter without dimensions, whole everywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks[0].up.requires_grad_(False)
        self.blocks[1].down.bias.requires_grad_(False)
        self.unused = nn.ModuleList([Block()])
        self.scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.scale


def _net() -> tuple[nn.Module, Any, Tensor]:
    x = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return Frozen(), {f"net.{name}": style for name, style in FROZEN_PLAN.items()}, x


def _gpt() -> tuple[nn.Module, Any, Tensor]:
    tokens = torch.randint(0, 256, (4, 8), generator=torch.Generator().manual_seed(1))
    return ByteGPT(dim=16, num_layers=2, num_heads=4, max_length=8), "auto", tokens


class WithLoss(nn.Module):
    """Returns the loss: what a module returns is rounded to float32 by Fabric, and its gradient is 1 then."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, batch: Tensor) -> Tensor:
        return 9 * self.net(batch).square().mean()


def _with_gradients(kind: Any, zero: Any, size: int) -> tuple[Fabric, nn.Module, nn.Module, Any]:
    """Return a module after a backward under tensor parallelism, and one after the backward of one process."""
    torch.manual_seed(3)
    net, plan, batch = kind()
    plain = WithLoss(net).double()
    module = copy.deepcopy(plain)
    plain(batch).backward()
    strategy = FabricStrategy(zero=zero, tensor_parallel=TensorParallel(size, plan=plan))
    fabric = Fabric(accelerator="cpu", devices=4, strategy=strategy, precision="64-true")
    fabric.launch()
    called, optimizer = fabric.setup(module, torch.optim.SGD(module.parameters(), lr=0.1))
    own = batch.chunk(strategy.data_parallel_size)[strategy.data_parallel_rank]
    fabric.backward(called(own))
    return fabric, plain, called, optimizer


def _assert_same_gradients(module: nn.Module, plain: nn.Module) -> None:
    theirs = {name: p.grad for name, p in plain.named_parameters()}
    for name, parameter in module.module.named_parameters():
        own = parameter.grad
        assert (own is None) == (theirs[name] is None), name
        if own is not None:
            own = whole_of(own) if isinstance(own, DTensor) else own
            torch.testing.assert_close(own, theirs[name], rtol=0, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}")


def by_norm(kind: Any, zero: Any, size: int, norm_type: float) -> None:
    fabric, plain, called, optimizer = _with_gradients(kind, zero, size)
    wanted = nn.utils.get_total_norm([p.grad for p in plain.parameters() if p.grad is not None], norm_type)
    torch.testing.assert_close(fabric.strategy.grad_norm(norm_type=norm_type), wanted, rtol=0, atol=1e-12)
    found = fabric.clip_gradients(called, optimizer, max_norm=float(wanted) / 2, norm_type=norm_type)
    nn.utils.clip_grad_norm_(plain.parameters(), float(wanted) / 2, norm_type=norm_type)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)
    _assert_same_gradients(called, plain)


@pytest.mark.parametrize("norm_type", [2.0, math.inf, full(3.0)])
@pytest.mark.parametrize("kind", [_net, _gpt])
@pytest.mark.parametrize("zero", [0, full(1), 2, full(3)])
def test_the_norm_counts_every_parameter_once_and_clipping_is_that_of_one_process(
    kind: Any, zero: Any, norm_type: float
) -> None:
    run_ranks(by_norm, 4, kind, zero, 2, norm_type)


@pytest.mark.parametrize(("zero", "size"), [(1, 4), full(HSDP, 2), full(0, 4)])
def test_on_other_meshes_too(zero: Any, size: int) -> None:
    run_ranks(by_norm, 4, _gpt, zero, size, 2.0)


def by_value(kind: Any, zero: Any) -> None:
    fabric, plain, called, optimizer = _with_gradients(kind, zero, 2)
    largest = nn.utils.get_total_norm([p.grad for p in plain.parameters() if p.grad is not None], math.inf)
    fabric.clip_gradients(called, optimizer, clip_val=float(largest) / 2)
    nn.utils.clip_grad_value_(plain.parameters(), float(largest) / 2)
    _assert_same_gradients(called, plain)


@pytest.mark.parametrize("kind", [_net, _gpt])
def test_clipping_by_value_is_that_of_one_process(kind: Any) -> None:
    run_ranks(by_value, 4, kind, 2)


def of_a_part() -> None:
    fabric, plain, called, _ = _with_gradients(_gpt, 2, 2)
    for name in ("net.blocks.0.attention", "net.blocks.1.widen", "net.tokens", "net.blocks.0.norm1"):
        theirs = [p.grad for p in plain.get_submodule(name).parameters() if p.grad is not None]
        found = fabric.strategy.grad_norm(called.module.get_submodule(name))
        torch.testing.assert_close(found, nn.utils.get_total_norm(theirs), rtol=0, atol=1e-12)


def test_the_norm_of_a_part_is_that_of_one_process() -> None:
    run_ranks(of_a_part, 4)


class Noting(Frozen):
    def training_step(self, batch: Any, index: int) -> Tensor:
        return 3 * super().training_step(batch, index)

    def on_train_batch_end(self, *_: Any) -> None:
        self.seen.append(float(self.trainer.callback_metrics["grad_norm"]))

    def train_dataloader(self) -> Any:
        data = TensorDataset(_net()[2].repeat(3, 1), torch.zeros(12))
        places = getattr(self.trainer.strategy, "distributed_sampler_kwargs", {"num_replicas": 1, "rank": 0})
        sampler = DistributedSampler(data, shuffle=False, **places)
        return DataLoader(data, batch_size=4 // places["num_replicas"], sampler=sampler)


class Norms(Noting):
    """Logs, in one process, what the strategy logs by itself."""

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        gradients = [p.grad for p in self.parameters() if p.grad is not None]
        self.log("grad_norm", nn.utils.get_total_norm(gradients).float())


def fit(zero: int | None) -> list[float]:
    torch.manual_seed(3)
    module = Norms() if zero is None else Noting()
    strategy = "auto" if zero is None else MeshStrategy(zero=zero, tensor_parallel=TensorParallel(2, plan=FROZEN_PLAN))
    trainer(strategy, gradient_clip_val=0.05, precision="64-true").fit(module)
    return module.seen


@pytest.mark.parametrize("zero", [1, full(0), full(3)])
def test_the_trainers_flag_clips_and_logs_the_norm(zero: int) -> None:
    (alone,) = run_ranks(fit, 1, None)
    for found in run_ranks(fit, 4, zero):
        assert found == pytest.approx(alone, rel=1e-6), "logged in float32"
        assert min(found) > 0.05, "clipping has nothing to do"
