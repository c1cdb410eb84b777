"""Parameters that do not simply train: frozen, added, unused, tied, shared, recomputed; against one process in float64."""

from __future__ import annotations

import functools
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch._dynamo
from lightning.pytorch.callbacks import BaseFinetuning
from tests.ranks.trainer.optimisation_support import (
    SHARDED,
    STAGES,
    Batch,
    Block,
    Net,
    assert_fits_as_alone,
    fitted,
    made,
)
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import meshbolt
from meshbolt.testing import run_ranks


class Frozen(Net):
    """A frozen layer of the root, a frozen block, and a block of which one layer is frozen."""

    def __init__(self) -> None:
        super().__init__()
        for part in (self.into, self.blocks[0], self.blocks[1].up, self.scale):
            part.requires_grad_(False)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)


class Adapted(nn.Module):
    """A frozen layer with a trained one of low rank beside it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.a = nn.Parameter(torch.randn(2, base.in_features) / 4)
        self.b = nn.Parameter(torch.zeros(base.out_features, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.a.t() @ self.b.t()


class Adapters(Net):
    """Everything is frozen but adapters inside the blocks; the optimizer is given all parameters all the same."""

    def __init__(self) -> None:
        super().__init__()
        self.requires_grad_(False)
        for block in self.blocks:
            block.up, block.down = Adapted(block.up), Adapted(block.down)


class Unused(Net):
    """A layer of the root, a block, a part of a block and a number that no batch uses."""

    def __init__(self) -> None:
        super().__init__()
        self.spare, self.spare_scale = nn.Linear(10, 3), nn.Parameter(torch.tensor(2.0))
        self.blocks.append(Block())
        self.blocks[1].spare = nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.into(x)
        for block in self.blocks[:3]:
            x = block(x)
        return self.out(x) * self.scale + self.shift.sum()


class TwiceTied(Block):
    """A block in which two layers have one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.again = nn.Linear(10, 13)
        self.again.weight = self.up.weight

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + torch.tanh(self.again(x))[:, :10])


class Tied(Net):
    """One weight in two layers of a block, one in two blocks, and one at both ends of the model."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Linear(10, 10), nn.Linear(10, 10)
        self.narrow.weight = self.wide.weight
        self.blocks[2].up.weight = self.blocks[0].up.weight
        self.blocks.extend(TwiceTied() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.wide(self.into(x))
        for block in self.blocks:
            x = block(x)
        return self.out(self.narrow(x)) * self.scale + self.shift.sum()


class Shared(Net):
    """One block at two places in the list, and a layer of the root that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks.append(self.blocks[0])
        self.twice = nn.Linear(10, 10)
        self.again = self.twice

    def forward(self, x: Tensor) -> Tensor:
        x = self.twice(self.into(x))
        for block in self.blocks:
            x = block(x)
        return self.out(self.again(x)) * self.scale + self.shift.sum()


@pytest.mark.parametrize("kind", [Frozen, Adapters, Unused, Tied, Shared])
def test_parameters_of_every_kind_train_as_in_one_process(kind: type[Net]) -> None:
    run_ranks(in_windows_and_not, 2, kind, timeout=60)


def in_windows_and_not(kind: type[Net]) -> None:
    assert_fits_as_alone(kind, STAGES, count=3, max_epochs=1, accumulate_grad_batches=2)
    assert_fits_as_alone(kind, ("zero3",), count=3, max_epochs=1)


class Flipping(Net):
    """Freezes and unfreezes parts between steps, by hand."""

    def on_train_batch_start(self, batch: Batch, index: int) -> None:
        self.blocks[index % 3].requires_grad_(index % 2 == 0)
        self.into.requires_grad_(index % 2 == 1)
        self.scale.requires_grad_(index % 2 == 1)

    def training_step(self, batch: Batch, index: int) -> Tensor:
        self.seen.append([p.requires_grad for p in self.parameters()])
        return super().training_step(batch, index)


def test_parameters_can_be_frozen_and_unfrozen_between_steps() -> None:
    run_ranks(flipped, 2, timeout=60)


def flipped() -> None:
    assert_fits_as_alone(Flipping)
    assert_fits_as_alone(Flipping, ("zero1", "zero2"), accumulate_grad_batches=2)


class UnfreezeLater(BaseFinetuning):
    """Lightning's own way: the blocks join the optimizer in the second epoch."""

    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze(pl_module.blocks)

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.blocks, optimizer, lr=1e-3)


class Finetuned(Net):
    def configure_callbacks(self) -> list[pl.Callback]:
        return [UnfreezeLater()]

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)


def test_lightnings_finetuning_callback_unfreezes_shards() -> None:
    run_ranks(assert_fits_as_alone, 2, Finetuned, timeout=60)


class Counting(Net):
    """Counts how often the blocks' forwards run."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = [0, 0, 0]
        for index, block in enumerate(self.blocks):
            block.forward = self.counted(block.forward, index)

    def counted(self, forward: Any, index: int) -> Any:
        def called(x: Tensor) -> Tensor:
            self.calls[index] += 1
            return forward(x)

        return called


def counted_with(mode: str, stage: int, every: int) -> list[int]:
    module = made(Counting)
    recompute = meshbolt.Recompute(mode=mode, every=every)
    fitted(module, meshbolt.MeshStrategy(zero=stage, recompute=recompute), count=2, max_epochs=1)
    return module.calls


def recomputed() -> None:
    for stage, mode in ((0, "full"), (1, "selective"), (2, "full"), (3, "full"), (3, "selective")):
        assert_fits_as_alone(Net, (lambda s=stage, m=mode: meshbolt.MeshStrategy(zero=s, recompute=m),), max_epochs=1)
    assert counted_with("none", 3, 1) == [2, 2, 2]
    assert counted_with("full", 3, 1) == counted_with("selective", 1, 1) == [4, 4, 4]
    assert counted_with("full", 2, 2) == [4, 2, 4]


def test_recomputed_blocks_train_as_kept_ones_and_really_recompute() -> None:
    run_ranks(recomputed, 2, timeout=60)


class LateNet(Net):
    """The layers are made in `configure_model`, where the strategy builds them on the meta device."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("into", "blocks", "out", "scale", "shift"):
            delattr(self, name)

    def configure_model(self) -> None:
        if hasattr(self, "into"):
            return
        self.into = nn.Linear(6, 10, dtype=torch.float64)
        self.blocks = nn.ModuleList(Block(torch.float64) for _ in range(3))
        self.out = nn.Linear(10, 1, dtype=torch.float64)
        self.seen.append(self.into.weight.is_meta)

    def forward(self, x: Tensor) -> Tensor:
        x = self.into(x)
        for block in self.blocks:
            x = block(x)
        return self.out(x)


def built_late() -> list[float]:
    trained = []
    for strategy in (None, *SHARDED):
        module = LateNet()
        torch.manual_seed(5)
        fitted(module, strategy, count=2, max_epochs=1)
        assert module.seen == [strategy is not None]
        values = [p.full_tensor() if isinstance(p, DTensor) else p for p in module.parameters()]
        trained.append([float(value.detach().double().sum()) for value in values])
    assert all(torch.allclose(torch.tensor(one), torch.tensor(trained[0]), rtol=0, atol=1e-12) for one in trained)
    return trained[0]


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_modules_built_on_meta_start_and_train_as_plain_ones(ranks: int) -> None:
    run_ranks(built_late, ranks, timeout=60)


def compiled(stages: dict[int, str]) -> None:
    for stage, recompute in stages.items():
        strategy = functools.partial(meshbolt.MeshStrategy, zero=stage, compile=True, recompute=recompute)
        assert_fits_as_alone(Net, (strategy,), max_epochs=1)
        # Blocks share one graph, and gathering them is no part of it.
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
        assert not torch._dynamo.utils.counters["graph_break"]
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()


def traced(stages: dict[int, str]) -> None:
    # The same graphs without a compiler behind them: seconds instead of a minute.
    nn.Module.compile = functools.partialmethod(nn.Module.compile, backend="aot_eager")
    compiled(stages)


# torch's compiler looks at the gradients of tensors that have none.
compiling = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")


@compiling
def test_compiled_blocks_are_one_graph_and_train_as_in_one_process() -> None:
    run_ranks(traced, 2, {2: "full", 3: "none"}, timeout=60)


# The compiler behind it warns of its own use of torch.
@pytest.mark.filterwarnings("ignore")
@pytest.mark.full
@pytest.mark.timeout(400)
def test_blocks_compiled_by_torchs_default_backend_train_as_in_one_process() -> None:
    run_ranks(compiled, 2, {0: "none", 1: "selective", 2: "none", 3: "full"}, timeout=300)
