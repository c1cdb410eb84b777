"""What the tests of `initialize` share: a small model, samples of each rank, and the same training in one plain process."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from meshbolt import deepspeed
from meshbolt.deepspeed import WarmupLR

SAMPLES = 3


class Net(nn.Module):
    """Layers of uneven sizes, a parameter of its own, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.layers = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 13), nn.Tanh(), nn.Linear(13, 1))
        self.scale = nn.Parameter(torch.tensor([1.5]))
        self.register_buffer("shift", torch.tensor([0.25]))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x) * self.scale + self.shift.to(x.dtype)


def config(stage: int, *, window: int = 1, clip: float = 0.3, ranks: int = 2, **others: Any) -> dict[str, Any]:
    return {
        "train_batch_size": SAMPLES * window * ranks,
        "gradient_accumulation_steps": window,
        "gradient_clipping": clip,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "weight_decay": 0.1}},
        "scheduler": {
            "type": "WarmupLR",
            "params": {"warmup_max_lr": 2e-2, "warmup_num_steps": 4, "warmup_min_lr": 1e-3},
        },
        "zero_optimization": {"stage": stage},
        **others,
    }


def made(model: nn.Module, **arguments: Any) -> Any:
    """Return the engine of a model, without the receipt on the output."""
    with contextlib.redirect_stdout(io.StringIO()):
        return deepspeed.initialize(model=model, **arguments)[0]


def batch(index: int, rank: int, *, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(1000 * rank + index)
    x, y = torch.randn(SAMPLES, 6, generator=draw), 3 * torch.randn(SAMPLES, 1, generator=draw)
    return x.to(dtype), y.to(dtype)


def train(engine: Any, batches: range, *, dtype: torch.dtype = torch.float32) -> list[float]:
    """Train as a script does, and return the losses."""
    losses = []
    for index in batches:
        x, y = batch(index, dist.get_rank(), dtype=dtype)
        loss = F.mse_loss(engine(x), y)
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


class Reference:
    """The same training in one process, which takes the batches of all ranks."""

    def __init__(
        self, *, window: int, ranks: int = 2, clip: float = 0.3, dtype: torch.dtype = torch.float32, scale: float = 1.0
    ) -> None:
        self.module, self.window, self.ranks, self.clip = Net(), window, ranks, clip
        self.dtype, self.scale = dtype, scale
        self.optimizer = torch.optim.AdamW(self.module.parameters(), lr=1e-2, weight_decay=0.1)
        self.scheduler = WarmupLR(self.optimizer, warmup_max_lr=2e-2, warmup_num_steps=4, warmup_min_lr=1e-3)
        self.norms: list[float] = []

    def train(self, batches: range) -> list[list[float]]:
        """Return the losses of each rank."""
        losses: list[list[float]] = [[] for _ in range(self.ranks)]
        for index in batches:
            for rank in range(self.ranks):
                x, y = batch(index, rank, dtype=self.dtype)
                rounded = {name: p.to(self.dtype) for name, p in self.module.named_parameters()}
                loss = F.mse_loss(functional_call(self.module, rounded, (x,)), y)
                losses[rank].append(loss.item())
                (loss.float() / self.window * self.scale / self.ranks).backward()
            if (index + 1) % self.window == 0:
                self.step()
        return losses

    def step(self) -> None:
        for parameter in self.module.parameters():
            parameter.grad /= self.scale
        norm = nn.utils.clip_grad_norm_(self.module.parameters(), self.clip or float("inf"))
        self.norms.append(float(norm))
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.scheduler.step()


def whole(engine: Any) -> dict[str, Tensor]:
    """Return all parameters of an engine, whole."""
    with deepspeed.zero.GatheredParameters(engine.module):
        return {name: parameter.detach().clone() for name, parameter in engine.module.named_parameters()}


def assert_equal(engine: Any, reference: nn.Module, *, rtol: float = 1e-5, atol: float = 1e-6) -> None:
    expected = {name: parameter.detach() for name, parameter in reference.named_parameters()}
    torch.testing.assert_close(whole(engine), expected, rtol=rtol, atol=atol)


@contextlib.contextmanager
def said() -> Iterator[io.StringIO]:
    """Collect what is printed."""
    with contextlib.redirect_stdout(io.StringIO()) as output:
        yield output
