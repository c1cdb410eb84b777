"""What cannot be done under tensor parallelism is refused on every rank, with the values and the way out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.fabric import Fabric
from tests.ranks.tensor_support import Net, loader, strategy, trainer
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils.data import DataLoader

from meshbolt import ConfigError, MeshStrategy, TensorParallel, TopologyError, Zero
from meshbolt.demos import ByteGPT
from meshbolt.fabric import MeshStrategy as FabricStrategy
from meshbolt.testing import run_ranks, run_ranks_expecting

pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step`")


def fit(arguments: dict[str, Any], loop: str) -> None:
    if loop == "trainer":
        trainer(MeshStrategy(**arguments)).fit(Net(), loader(8))
        return
    fabric = Fabric(accelerator="cpu", devices=dist.get_world_size(), strategy=FabricStrategy(**arguments))
    fabric.launch()


SHAPES: dict[str, tuple[int, dict[str, Any], str]] = {
    "does not divide the ranks": (
        4,
        {"tensor_parallel": 3},
        r"tensor_parallel=3 .* 4 ranks cannot be divided by 3. Use one of tensor_parallel=\[1, 2, 4\]",
    ),
    "more than there are": (
        2,
        {"tensor_parallel": TensorParallel(4)},
        r"tensor_parallel=4 .* 2 ranks cannot be divided by 4. Use one of tensor_parallel=\[1, 2\]",
    ),
    "one device": (
        1,
        {"tensor_parallel": TensorParallel(size=2)},
        r"tensor_parallel=2 asks for 2 ranks to share each layer, but 1 rank cannot be divided .*a multiple of 2",
    ),
    "together with replicate": (
        4,
        {"zero": Zero(2, replicate=4), "tensor_parallel": 2},
        r"replicate=4\) asks for 4 copies .* 2 groups of 2 that share layers .* replicate=\[1, 2\], .* \(a multiple of 8\)",
    ),
}


@pytest.mark.parametrize("loop", ["trainer", "fabric"])
@pytest.mark.parametrize("case", SHAPES)
def test_sizes_that_do_not_fit_the_ranks_are_refused(case: str, loop: str) -> None:
    ranks, arguments, words = SHAPES[case]
    run_ranks_expecting(fit, ranks, arguments, loop, error=TopologyError, match=words)


class Parallelised(Net):
    """Does by itself what the plan is for, as Lightning's ModelParallelStrategy has it."""

    def configure_model(self) -> None:
        mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
        for block in self.blocks:
            parallelize_module(block, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})


def parallelised(size: int) -> None:
    trainer(strategy(size=size)).fit(Parallelised(), loader(8))


@pytest.mark.parametrize("size", [1, 2])
def test_a_module_that_parallelises_itself_is_told_how_to_hand_over_its_plan(size: int) -> None:
    words = r"'blocks.0.up.weight' of Parallelised is a DTensor already.*without parallelize_module.*plan="
    run_ranks_expecting(parallelised, 2, size, error=ConfigError, match=words)


def different(by_rank: list[Any]) -> None:
    fit({"tensor_parallel": by_rank[dist.get_rank()]}, "trainer")


def test_ranks_with_different_settings_are_told_which() -> None:
    plans: list[Any] = [TensorParallel(2, plan={"blocks.*.up": style}) for style in ("colwise", "colwise_gather")]
    run_ranks_expecting(different, 2, plans, error=TopologyError, match="tensor_parallel.plan is .*colwise_gather")
    run_ranks_expecting(different, 2, [1, 2], error=TopologyError, match="tensor_parallel.size is .1, 2.")


def preset(loop: str) -> tuple[Any, ...]:
    if loop == "trainer":
        owner = trainer("tensor_parallel")
        module: Any = ByteGPT(dim=16, num_layers=1, num_heads=4, max_length=8)
        tokens = torch.arange(9) % 7
        owner.fit(module, DataLoader([(tokens[:-1], tokens[1:])]))
        plan = owner.strategy.plan
    else:
        fabric = Fabric(accelerator="cpu", devices=dist.get_world_size(), strategy="tensor_parallel")
        fabric.launch()
        plan = fabric.strategy.plan
    return plan.mesh.sizes(), plan.settings.zero.stage


@pytest.mark.parametrize("loop", ["trainer", "fabric"])
def test_the_preset_divides_layers_among_the_ranks_of_a_machine(loop: str) -> None:
    assert run_ranks(preset, 2, loop) == [({"dp_replicate": 1, "dp_shard": 1, "tp": 2}, 0)] * 2
    assert run_ranks(preset, 1, loop) == [({"dp_replicate": 1, "dp_shard": 1}, 0)]
