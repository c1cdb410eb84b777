"""Modules built without their values: no rank ever holds them whole, and they train as those that were built with values."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from tests.ranks.trainer.loops_support import ADVICE, batches, difference, trainer, weights
from tests.ranks.trainer.test_loops_configure_model import MIB, MODEL_BYTES, growth
from torch import Tensor, nn

import meshbolt
from meshbolt import UnsupportedError
from meshbolt.engine.deferred import Deferred, attach
from meshbolt.testing import run_ranks, run_ranks_expecting

pytestmark = ADVICE
WIDTH = 40


class Wide(pl.LightningModule):
    """Large and small tensors, initialised by hand; tied ones, a norm and a buffer; changed by hooks before it is sharded."""

    def __init__(self, way: str = "", path: str = "") -> None:
        super().__init__()
        self.way = way
        self.inp = nn.Linear(7, WIDTH)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)) for _ in range(3))
        self.head = nn.Linear(WIDTH, WIDTH)
        self.head.weight = self.blocks[0][0].weight
        self.scale = nn.Parameter(torch.full((WIDTH, WIDTH), 0.01))
        self.register_buffer("offset", torch.randn(WIDTH, WIDTH))
        for block in self.blocks:
            nn.init.trunc_normal_(block[0].weight, std=0.1)
        self.blocks[1][0].weight.requires_grad_(False)
        if path:
            meshbolt.load_pretrained(self.blocks, path)
            self.blocks[2][0].weight.data.mul_(0.5)

    def setup(self, stage: str) -> None:
        if self.way == "setup":
            with torch.no_grad():
                self.blocks[2][0].weight.copy_(torch.eye(WIDTH))
                self.inp.weight.mul_(2)

    def configure_model(self) -> None:
        if self.way == "new parameter" and not hasattr(self, "late"):
            self.late = nn.Parameter(torch.zeros(WIDTH))

    def reset_parameters(self) -> None:
        """Fill what `configure_model` makes; what has values must not lose them by it."""
        for parameter in self.parameters(recurse=False):
            nn.init.ones_(parameter)

    def training_step(self, batch: Any, _index: int) -> Tensor:
        x = self.inp(batch[0])
        for block in self.blocks:
            x = x + block(x)
        return (self.head(x) @ (self.scale + self.offset)).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW((p for p in self.parameters() if p.requires_grad), lr=1e-3)


def fitted(make: Callable[[], Wide], later: bool, precision: str) -> dict[str, Tensor]:
    torch.manual_seed(3 + dist.get_rank())  # rank 0's values count
    deferred = Deferred()
    with deferred.building() if later else nullcontext():
        module = make()
    if later:
        assert any(deferred.knows(parameter) for parameter in module.parameters())
        attach(module, deferred)
    torch.rand(dist.get_rank() + 2)  # what is drawn in between is of no account
    trainer("zero3", max_epochs=1, precision=precision).fit(module, batches())
    return {**weights(module), "offset": module.offset}


def both(make: Callable[[], Wide], precision: str = "32-true") -> None:
    whole, later = (run_ranks(fitted, 2, make, each, precision) for each in (False, True))
    for rank in range(2):
        assert difference(later[rank], whole[rank]) == 0


@pytest.mark.parametrize("way", ["", "setup", "new parameter"])
def test_a_module_built_without_values_trains_as_one_built_with_them(way: str) -> None:
    if way != "new parameter":
        both(lambda: Wide(way))
        return
    for rank in run_ranks(fitted, 2, lambda: Wide(way), True, "32-true"):
        assert float(rank["late"][0]) == 1  # unused, so as it was filled
        assert float(rank["scale"].max()) < 0.1


def test_values_are_cast_after_they_were_drawn() -> None:
    both(Wide, "bf16-true")


def test_pretrained_weights_are_read_where_the_constructor_loads_them(tmp_path: Path) -> None:
    torch.manual_seed(9)
    save_file({name: torch.randn_like(p) for name, p in Wide().blocks.named_parameters()}, tmp_path / "w.safetensors")

    both(lambda: Wide(path=str(tmp_path / "w.safetensors")))


def test_reading_values_in_a_hook_before_there_are_any_is_refused_with_a_remedy() -> None:
    class Reads(Wide):
        def setup(self, stage: str) -> None:
            self.inp_array = self.blocks[0][0].weight.detach().numpy()

    run_ranks_expecting(fitted, 2, Reads, True, "32-true", error=UnsupportedError, match="--meta false")


def test_a_copy_of_the_weights_that_a_hook_keeps_is_refused() -> None:
    class Keeps(Wide):
        def setup(self, stage: str) -> None:
            self.before = [self.blocks[0][0].weight.detach().clone()]

    run_ranks_expecting(fitted, 2, Keeps, True, "32-true", error=UnsupportedError, match="outside the parameters")


def test_an_error_in_a_hook_leaves_nothing_watching() -> None:
    class Fails(Wide):
        def setup(self, stage: str) -> None:
            raise ValueError("on purpose")

    def after_the_error() -> bool:
        with pytest.raises(ValueError, match="on purpose"):
            fitted(Fails, True, "32-true")
        return torch.overrides._len_torch_function_stack() == 0

    assert run_ranks(after_the_error, 2) == [True, True]


@pytest.mark.skipif(sys.platform != "linux", reason="reads memory from /proc, and knows glibc's allocator")
def test_no_rank_ever_holds_a_whole_model_that_is_built_without_values() -> None:
    grown = run_ranks(growth, 4, True, True, timeout=60)

    assert max(grown) < 0.5 * MODEL_BYTES
    assert min(grown) > 0.2 * MODEL_BYTES
    assert MODEL_BYTES > 190 * MIB
