"""What the tests of optimisation stand on: a small module, and the same fit on ranks and in one plain process.

The batches of one process are those of all ranks together, in the same order, so that with losses that are means over
samples a sharded fit must give the same numbers. Everything is float64: what differs by more than 1e-12 is a mistake.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
import torch.nn.functional as F
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, TensorDataset

import meshbolt

STAGES = ("zero0", "zero1", "zero2", "zero3")
SHARDED = STAGES[1:]
BATCH = 3  # samples of one batch on one rank
Batch = tuple[Tensor, Tensor]
Strategy = str | Callable[[], Any]


def hsdp(stage: int) -> Callable[[], meshbolt.MeshStrategy]:
    """Two copies of the sharded state."""
    return lambda: meshbolt.MeshStrategy(zero=meshbolt.Zero(stage=stage, replicate=2))


class Block(nn.Module):
    """A residual block, in sizes that no number of ranks divides."""

    def __init__(self, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(10, 13, dtype=dtype), nn.Linear(13, 10, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(x)))


class Net(pl.LightningModule):
    """Blocks between layers of the root, a parameter without dimensions, and one that stands on the module itself.

    `seen` collects what a test wants to compare: anything that can be compared by value.
    """

    def __init__(self) -> None:
        super().__init__()
        self.into = nn.Linear(6, 10)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.out = nn.Linear(10, 1)
        self.scale = nn.Parameter(torch.tensor(1.25))
        self.shift = nn.Parameter(torch.tensor([0.5, -0.25, 0.125]))
        self.seen: list[Any] = []

    def forward(self, x: Tensor) -> Tensor:
        x = self.into(x)
        for block in self.blocks:
            x = block(x)
        return self.out(x) * self.scale + self.shift.sum()

    def loss(self, batch: Batch) -> Tensor:
        return F.mse_loss(self(batch[0]), batch[1])

    def training_step(self, batch: Batch, _index: int) -> Tensor:
        loss = self.loss(batch)
        self.log("loss", loss, on_step=False, on_epoch=True, sync_dist=True)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def made(kind: Callable[[], pl.LightningModule]) -> pl.LightningModule:
    """Make a module in float64, with the same weights every time."""
    torch.manual_seed(7)
    return kind().double()


def batches(count: int, *, alone: bool) -> DataLoader[Any]:
    """Return `count` batches: this rank's, or for one process each with the samples of all ranks."""
    world = dist.get_world_size()
    x = torch.randn(count * world * BATCH, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    y = torch.sin(x.sum(dim=1, keepdim=True)) + 0.5
    if alone:
        return DataLoader(TensorDataset(x, y), batch_size=BATCH * world)
    mine = torch.arange(len(x)).view(count, world, BATCH)[:, dist.get_rank()].flatten()
    return DataLoader(TensorDataset(x[mine], y[mine]), batch_size=BATCH)


def fitted(module: pl.LightningModule, strategy: Strategy | None, *, count: int = 4, **trainer: Any) -> pl.Trainer:
    """Fit a module: under a strategy, or in this process alone on the batches of all ranks."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    alone = strategy is None
    if callable(strategy):
        strategy = strategy()
    arguments = {"max_epochs": 2, **trainer}
    fit = pl.Trainer(
        accelerator="cpu",
        devices=1 if alone else dist.get_world_size(),
        strategy=SingleDeviceStrategy(device="cpu") if strategy is None else strategy,
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **arguments,
    )
    with warnings.catch_warnings():
        if alone:  # Lightning sees the process group, and that this strategy does not use it
            warnings.filterwarnings("ignore", message="It is recommended to use `self.log")
        fit.fit(module, batches(count, alone=alone))
    return fit


def whole(value: Any) -> Any:
    """Return a tensor of its own, whole on every rank; anything else as it is."""
    if isinstance(value, DTensor):
        return value.detach().full_tensor().clone()
    return value.detach().clone() if isinstance(value, Tensor) else value


def results(trainer: pl.Trainer, module: Any) -> dict[str, Any]:
    """Return everything that a fit leaves: parameters, optimizer state by parameter, metrics, what the module has seen."""
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    kept: dict[str, Any] = {name: whole(parameter) for name, parameter in module.named_parameters()}
    for index, optimizer in enumerate(trainer.optimizers):
        state = trainer.strategy.optimizer_state(optimizer)
        for key, values in state["state"].items():
            # A plain process numbers parameters where the strategy names them.
            name = key if isinstance(key, str) else names[id(_parameter(optimizer, key))]
            kept.update({f"{name} {index} {item}": whole(value) for item, value in values.items()})
        options = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
        kept[f"options {index}"] = options
    kept.update({f"metric {name}": value for name, value in trainer.callback_metrics.items()})
    kept.update({f"seen {number}": whole(value) for number, value in enumerate(module.seen)})
    return kept


def _parameter(optimizer: Any, number: int) -> nn.Parameter:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]][number]


def assert_same(found: dict[str, Any], expected: dict[str, Any], *, label: Any = "", atol: float = 1e-12) -> None:
    """Compare two results, number by number."""
    assert found.keys() == expected.keys(), (label, sorted(found.keys() ^ expected.keys()))
    for name, value in expected.items():
        if not isinstance(value, Tensor):
            assert found[name] == value, (label, name, found[name], value)
            continue
        torch.testing.assert_close(
            found[name].double(),
            value.double(),
            rtol=0,
            atol=atol,
            msg=lambda text, name=name: f"{label}, {name}: {text}",
        )


def assert_fits_as_alone(
    kind: Callable[[], pl.LightningModule], strategies: Sequence[Strategy] = STAGES, **options: Any
) -> dict[str, Any]:
    """Fit a module under each strategy and in this process alone, compare, and return the results of the latter."""
    start = made(kind).state_dict()
    module = made(kind)
    expected = results(fitted(module, None, **options), module)
    assert any(not torch.equal(value, expected[name]) for name, value in start.items() if name in expected)
    for strategy in strategies:
        module = made(kind)
        trainer = fitted(module, strategy, **options)
        assert trainer.global_step == expected.setdefault("steps", trainer.global_step)
        found = {**results(trainer, module), "steps": trainer.global_step}
        if "metric grad_norm" not in expected:  # logged where gradients are clipped by norm
            found.pop("metric grad_norm", None)
        assert_same(found, expected, label=strategy)
    return expected
