"""The engine without Lightning: a module on ranks, beside the same module whole in each process."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from meshbolt import Zero
from meshbolt.config import Settings, resolve
from meshbolt.engine import Engine
from meshbolt.environment import Environment
from meshbolt.mesh import MeshShape, build_mesh
from meshbolt.precision import precision_policy

CPU = torch.device("cpu")
BATCH = 3  # samples of one batch on one rank
MakeOptimizer = Callable[[Iterator[nn.Parameter]], Optimizer]


class Block(nn.Module):
    """A residual block, in sizes that no number of ranks divides."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(10, 13), nn.Linear(13, 10)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(x)))


class Net(nn.Module):
    """Blocks between layers of the root, and a parameter without dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(6, 10), nn.Linear(10, 1)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.scale = nn.Parameter(torch.tensor(1.25))

    def forward(self, x: Tensor) -> Tensor:
        x = self.into(x)
        for block in self.blocks:
            x = block(x)
        return self.out(x) * self.scale


def made(kind: Callable[[], nn.Module] = Net, dtype: torch.dtype = torch.float64) -> nn.Module:
    """Make a module with the same weights every time."""
    torch.manual_seed(7)
    return kind().to(dtype)


def engine_of(
    module: nn.Module,
    stage: int,
    *,
    replicate: int = 1,
    precision: str = "32-true",
    autocast: bool = False,
    environment: Environment | None = None,
    **settings: Any,
) -> Engine:
    """Shard a module over all ranks."""
    plan = resolve(
        Settings(zero=Zero(stage=stage, replicate=replicate), **settings),
        world_size=dist.get_world_size(),
        precision=precision_policy(precision, autocast=autocast),
        device_type="cpu",
        environment=environment or Environment(),
    )
    return Engine(module, plan=plan, mesh=mesh_of(plan.mesh), device=CPU)


@functools.cache
def mesh_of(shape: MeshShape) -> DeviceMesh:
    """Build a mesh once for each process and shape: every new one costs process groups."""
    return build_mesh(shape, device_type="cpu")


def batch(index: int, rank: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Return a rank's batch of that number."""
    generator = torch.Generator().manual_seed(1000 * index + rank)
    x = torch.randn(BATCH, 6, dtype=torch.float64, generator=generator)
    return x.to(dtype), torch.sin(x.sum(dim=1, keepdim=True)).to(dtype)


def loss_of(module: nn.Module, data: tuple[Tensor, Tensor]) -> Tensor:
    """Return the mean squared error."""
    return F.mse_loss(module(data[0]), data[1])


def backward(engine: Engine, index: int, *, window: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    """Run forward and backward of one batch; it is the window's last where `index + 1` divides by `window`."""
    last = (index + 1) % window == 0
    with nullcontext() if last else engine.accumulate():
        loss = engine.call(loss_of, engine.module, batch(index, dist.get_rank(), dtype)) / window
        with engine.backward(loss) as prepared:
            prepared.backward()
    return loss.detach()


def reference_backward(module: nn.Module, index: int, *, window: int = 1, dtype: torch.dtype = torch.float64) -> None:
    """Run the same for all ranks on a whole module."""
    for rank in range(dist.get_world_size()):
        (loss_of(module, batch(index, rank, dtype)) / window / dist.get_world_size()).backward()


def trained(engine: Engine, optimizer: Optimizer, *, first: int = 0, steps: int = 3, window: int = 1) -> None:
    """Take optimizer steps."""
    dtype = engine.plan.precision.param_dtype or next(engine.module.parameters()).dtype
    for index in range(first * window, (first + steps) * window):
        backward(engine, index, window=window, dtype=dtype)
        if (index + 1) % window == 0:
            engine.step(optimizer)
            optimizer.zero_grad()
    engine.settle()


def reference_trained(
    module: nn.Module, optimizer: Optimizer, *, first: int = 0, steps: int = 3, window: int = 1
) -> None:
    """Take the same steps on a whole module."""
    dtype = next(module.parameters()).dtype
    for index in range(first * window, (first + steps) * window):
        reference_backward(module, index, window=window, dtype=dtype)
        if (index + 1) % window == 0:
            optimizer.step()
            optimizer.zero_grad()


def whole(value: Any) -> Any:
    """Return a tensor of its own, whole on every rank; anything else as it is."""
    if isinstance(value, DTensor):
        return value.detach().full_tensor().clone()
    return value.detach().clone() if isinstance(value, Tensor) else value


def largest_difference(module: nn.Module, reference: nn.Module) -> float:
    """Return the largest difference of two modules' parameters."""
    pairs = zip(module.parameters(), reference.parameters(), strict=True)
    return max(float((whole(a).double() - whole(b).double()).abs().max()) for a, b in pairs)


def pair(kind: Callable[[], nn.Module] = Net, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, nn.Module]:
    """Return a module twice."""
    module = made(kind, dtype)
    return module, copy.deepcopy(module)
