"""Norms and clipping of sharded gradients against torch's on one process that holds them whole."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from meshbolt.engine.clip import clip_norm_, clip_value_, global_norm
from meshbolt.testing import run_ranks, run_ranks_expecting

# float64, where only the order of a few hundred additions differs: some units in the last place.
RTOL = 2e-15
# Dimensions above, at and below the number of ranks, so that some ranks hold less than others, or nothing.
SHAPES = [(5, 3), (4,), (1,), (2, 2, 2), (7,), (3, 1), (0, 3)]
NORMS = [1.0, 2.0, math.inf]

Layout = Callable[[int], list[tuple[DeviceMesh, list[Placement]] | None]]


def whole_gradients() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES]


def with_gradient(gradient: Tensor) -> nn.Parameter:
    param = nn.Parameter(torch.zeros_like(gradient))
    param.grad = gradient
    return param


def expected(max_norm: float, norm_type: float) -> tuple[Tensor, list[Tensor]]:
    """Return the norm and the clipped gradients of torch, on whole gradients that all have elements."""
    params = [with_gradient(gradient) for gradient in whole_gradients() if gradient.numel()]
    norm = nn.utils.clip_grad_norm_(params, max_norm, norm_type)
    return norm, [param.grad for param in params if param.grad is not None]


def whole(param: nn.Parameter) -> Tensor:
    assert param.grad is not None
    return param.grad.full_tensor() if isinstance(param.grad, DTensor) else param.grad


def sharded_on_one_axis(world: int) -> list[tuple[DeviceMesh, list[Placement]] | None]:
    mesh = init_device_mesh("cpu", (world,))
    return [(mesh, [Shard(0)])] * len(SHAPES)


def hybrid(world: int) -> list[tuple[DeviceMesh, list[Placement]] | None]:
    mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("replicate", "shard"))
    return [(mesh, [Replicate(), Shard(0)])] * len(SHAPES)


def replicated(world: int) -> list[tuple[DeviceMesh, list[Placement]] | None]:
    mesh = init_device_mesh("cpu", (world,))
    return [(mesh, [Replicate()])] * len(SHAPES)


def everything_at_once(world: int) -> list[tuple[DeviceMesh, list[Placement]] | None]:
    """Two meshes and plain tensors: sharded over both axes, over either, over none, over all ranks, not a DTensor."""
    both = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("rows", "columns"))
    line = init_device_mesh("cpu", (world,))
    return [
        (both, [Shard(0), Shard(1)]),
        (both, [Replicate(), Replicate()]),
        None,
        (line, [Shard(1)]),
        (both, [Shard(0), Replicate()]),
        (both["columns"], [Shard(0)]),
        (line, [Shard(0)]),
    ]


def clipped_like_torch(layout: Layout, norm_type: float) -> float:
    """Clip gradients that lie as the layout says, compare with torch's, and return the norm."""
    places = layout(dist.get_world_size())
    params = [
        with_gradient(gradient if place is None else distribute_tensor(gradient, place[0], place[1]))
        for gradient, place in zip(whole_gradients(), places, strict=True)
    ]
    params.append(nn.Parameter(torch.zeros(3)))  # without a gradient, on every rank
    max_norm = global_norm(params, norm_type=norm_type).item() / 4
    norm = clip_norm_(params, max_norm, norm_type=norm_type)
    expected_norm, expected_gradients = expected(max_norm, norm_type)
    assert type(norm) is Tensor
    torch.testing.assert_close(norm, expected_norm, rtol=RTOL, atol=0)
    ours = [whole(param) for param in params if param.grad is not None and param.grad.numel()]
    torch.testing.assert_close(ours, expected_gradients, rtol=RTOL, atol=0)
    return norm.item()


@pytest.mark.parametrize("norm_type", NORMS)
@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("layout", [sharded_on_one_axis, replicated])
def test_one_axis_clips_as_one_process(layout: Layout, world: int, norm_type: float) -> None:
    norms = run_ranks(clipped_like_torch, world, layout, norm_type)
    assert len(set(norms)) == 1, "every rank has to come to the same bits"


@pytest.mark.parametrize("norm_type", NORMS)
@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("layout", [hybrid, everything_at_once])
def test_several_axes_and_meshes_clip_as_one_process(layout: Layout, world: int, norm_type: float) -> None:
    norms = run_ranks(clipped_like_torch, world, layout, norm_type)
    assert len(set(norms)) == 1, "every rank has to come to the same bits"


class Net(nn.Module):
    """Odd sizes, a weight used twice, a frozen one and an unused one."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 5)
        self.norm = nn.LayerNorm(5)
        self.second = nn.Linear(5, 6, bias=False)
        self.frozen = nn.Linear(6, 6).requires_grad_(False)
        self.unused = nn.Linear(3, 3)
        self.again = nn.Linear(5, 6, bias=False)
        self.again.weight = self.second.weight

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.norm(self.first(x))
        return self.frozen(self.second(hidden) + self.again(hidden))


def net() -> Net:
    torch.manual_seed(3)
    return Net().double()


def trained_like_torch(axes: tuple[int, ...]) -> None:
    """Clip what a real backward through `fully_shard` leaves, on the same data on every rank."""
    data = torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    reference, model = net(), net()
    reference(data).square().sum().backward()
    mesh = init_device_mesh("cpu", axes, mesh_dim_names=("replicate", "shard")[-len(axes) :])
    for unit in (model.first, model.norm, model):
        fully_shard(unit, mesh=mesh)
    model(data).square().sum().backward()
    expected_norm = nn.utils.clip_grad_norm_(reference.parameters(), 0.1)
    norm = clip_norm_([param for module in model.modules() for param in module.parameters()], 0.1)
    # Here backward differs as well, by the mean over ranks.
    torch.testing.assert_close(norm, expected_norm, rtol=1e-13, atol=0)
    for (name, ours), theirs in zip(model.named_parameters(), reference.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None), name
        if theirs.grad is not None:
            torch.testing.assert_close(whole(ours), theirs.grad, rtol=1e-12, atol=1e-15, msg=name)


@pytest.mark.parametrize("axes", [(1,), (2,), (3,), (4,), (2, 2), (2, 1)], ids=str)
def test_a_model_under_fully_shard_clips_as_one_process(axes: tuple[int, ...]) -> None:
    run_ranks(trained_like_torch, math.prod(axes), axes)


def two_layers() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 6), nn.Tanh()).double()


def tensor_parallel_like_torch() -> None:
    """Shard a tensor-parallel model once more: torch calls what comes out strided shards."""
    data = torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    reference, model = two_layers(), two_layers()
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("shard", "tp"))
    parallelize_module(model, mesh["tp"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
    fully_shard(model, mesh=mesh["shard"])
    reference(data).square().sum().backward()
    model(data).square().sum().backward()
    placements = {str(placement) for param in model.parameters() for placement in param.grad.placements}
    assert any("_S(" in placement or "Strided" in placement for placement in placements), placements
    expected_norm = nn.utils.clip_grad_norm_(reference.parameters(), 0.1)
    torch.testing.assert_close(clip_norm_(model.parameters(), 0.1), expected_norm, rtol=1e-13, atol=0)
    for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(whole(ours), theirs.grad, rtol=1e-12, atol=1e-15)


def test_a_tensor_parallel_model_under_fully_shard_clips_as_one_process() -> None:
    run_ranks(tensor_parallel_like_torch, 4)


def communication_of_a_clip() -> dict[str, int]:
    places = everything_at_once(dist.get_world_size())
    params = [
        with_gradient(gradient if place is None else distribute_tensor(gradient, place[0], place[1]))
        for gradient, place in zip(whole_gradients() * 3, places * 3, strict=True)
    ]
    with CommDebugMode() as counted:
        clip_norm_(params, 1.0)
        clip_value_(params, 1.0)
    return {str(kind).rpartition(".")[2].removesuffix("_"): count for kind, count in counted.comm_counts.items()}


def test_a_clip_sends_one_number_for_each_sharding_and_gathers_nothing() -> None:
    """Shardings here: rows and columns (one number over each), rows, columns, all ranks; for 21 gradients."""
    for counts in run_ranks(communication_of_a_clip, 4):
        assert counts == {"allreduce": 5}


def clamped_like_torch() -> None:
    places = everything_at_once(dist.get_world_size())
    ours, theirs = [], [with_gradient(gradient) for gradient in whole_gradients()]
    for gradient, place in zip(whole_gradients(), places, strict=True):
        ours.append(with_gradient(gradient if place is None else distribute_tensor(gradient, place[0], place[1])))
    clip_value_(ours, 0.25)
    nn.utils.clip_grad_value_(theirs, 0.25)
    assert all(torch.equal(whole(a), whole(b)) for a, b in zip(ours, theirs, strict=True))


def test_values_are_clamped_as_on_one_process_bit_for_bit() -> None:
    run_ranks(clamped_like_torch, 4)


def norm_with_a_bad_number_on_the_last_rank(bad: float, norm_type: float) -> float:
    gradient = torch.zeros(8)
    gradient[7] = bad
    param = with_gradient(distribute_tensor(gradient, init_device_mesh("cpu", (dist.get_world_size(),)), [Shard(0)]))
    return global_norm([param], norm_type=norm_type).item()


@pytest.mark.parametrize("norm_type", NORMS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_every_rank_sees_a_bad_number_that_one_rank_holds(bad: float, norm_type: float) -> None:
    assert {str(norm) for norm in run_ranks(norm_with_a_bad_number_on_the_last_rank, 4, bad, norm_type)} == {str(bad)}


def clip_a_bad_number_on_the_last_rank() -> None:
    gradient = torch.tensor([1.0, math.nan])
    param = with_gradient(distribute_tensor(gradient, init_device_mesh("cpu", (2,)), [Shard(0)]))
    clip_norm_([param], 1.0, error_if_nonfinite=True)


def test_a_norm_that_is_not_finite_raises_on_every_rank() -> None:
    run_ranks_expecting(clip_a_bad_number_on_the_last_rank, 2, error=RuntimeError, match="norm .* of nan")


def clip_before_the_reduction() -> None:
    mesh = init_device_mesh("cpu", (2,))
    param = nn.Parameter(DTensor.from_local(torch.zeros(3), mesh, [Partial()]))
    param.grad = DTensor.from_local(torch.ones(3), mesh, [Partial()])
    clip_norm_([param], 1.0)


def test_gradients_that_were_not_reduced_are_our_own_mistake_on_every_rank() -> None:
    run_ranks_expecting(clip_before_the_reduction, 2, error=AssertionError, match="before it was reduced")
