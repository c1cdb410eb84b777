"""One overflow anywhere skips the step everywhere, and nothing but the scale moves."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from meshbolt.compat import local_tensor
from meshbolt.precision.loss_scale import LossScaler
from meshbolt.precision.policy import precision_policy
from meshbolt.testing import run_ranks

INIT_SCALE = 1024.0


def model_and_optimizer(axes: tuple[int, ...]) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Return a model under the fp16 policy, whose parameters are uneven shards, and one whole parameter beside it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    policy = precision_policy("16-mixed")
    mesh = init_device_mesh("cpu", axes, mesh_dim_names=("replicate", "shard")[-len(axes) :])
    fully_shard(model[0], mesh=mesh, mp_policy=policy.unit_policy())
    fully_shard(model, mesh=mesh, mp_policy=policy.root_policy())
    model.register_parameter("temperature", nn.Parameter(torch.ones(())))
    return model, torch.optim.AdamW(model.parameters(), lr=0.1)


def gradients_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]


def backward(model: nn.Module, scaler: LossScaler) -> None:
    data = torch.randn(4, 6, generator=torch.Generator().manual_seed(dist.get_rank()))
    with torch.autocast("cpu", dtype=torch.float16):
        loss = (model(data) * model.temperature).square().mean()
    scaler.scale(loss).backward()
    dist.all_reduce(model.temperature.grad)  # what a parameter that is not sharded needs to stay equal on all ranks


def local_state(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Return this rank's part of all parameters and of all optimizer state, copied."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    moments = [value for p in params for _, value in sorted(optimizer.state[p].items())]
    return [local_tensor(tensor.detach()).clone() for tensor in [*params, *moments]]


def step(optimizer: torch.optim.Optimizer, scaler: LossScaler) -> bool:
    scaler.unscale_(gradients_of(optimizer))
    taken = scaler.decide()
    if taken:
        optimizer.step()
    scaler.update()
    optimizer.zero_grad()
    return taken


def overflow_in_one_place(axes: tuple[int, ...], bad_rank: int, bad: float) -> dict[str, object]:
    """Take a clean step, then one with a bad number in one rank's shard, then a clean one."""
    model, optimizer = model_and_optimizer(axes)
    scaler = LossScaler(init_scale=INIT_SCALE)
    backward(model, scaler)
    taken = [step(optimizer, scaler)]
    before = local_state(optimizer)
    backward(model, scaler)
    if dist.get_rank() == bad_rank:
        largest = max(map(local_tensor, gradients_of(optimizer)), key=torch.numel)
        largest.view(-1)[-1] = bad
    taken.append(step(optimizer, scaler))
    same = all(map(torch.equal, local_state(optimizer), before))
    scales = [scaler.current_scale]
    backward(model, scaler)
    taken.append(step(optimizer, scaler))
    moved = not all(map(torch.equal, local_state(optimizer), before))
    return {"taken": taken, "same": same, "scales": [*scales, scaler.current_scale], "moved": moved}


@pytest.mark.parametrize("bad", [math.inf, math.nan])
@pytest.mark.parametrize(("axes", "bad_rank"), [((2,), 0), ((2,), 1), ((3,), 2), ((2, 2), 0), ((2, 2), 3), ((2, 1), 1)])
def test_a_bad_number_in_one_shard_skips_the_step_on_every_rank(
    axes: tuple[int, ...], bad_rank: int, bad: float
) -> None:
    """With a decision per sharding group, the other replicas of a hybrid mesh would step."""
    for outcome in run_ranks(overflow_in_one_place, math.prod(axes), axes, bad_rank, bad):
        assert outcome == {
            "taken": [True, False, True],
            "same": True,
            "scales": [INIT_SCALE / 2, INIT_SCALE / 2],
            "moved": True,
        }


def clean_gradients_scaled_and_not(axes: tuple[int, ...]) -> None:
    """Compare divided gradients of a scaled loss with those of a loss that was not scaled; in float32."""
    results = []
    for scale in (1.0, 2.0**15):
        torch.manual_seed(0)
        model = nn.Linear(6, 5)
        fully_shard(model, mesh=init_device_mesh("cpu", axes))
        scaler = LossScaler(init_scale=scale)
        scaler.scale(model(torch.ones(3, 6)).square().mean()).backward()
        gradients = [param.grad for param in model.parameters() if param.grad is not None]
        scaler.unscale_(gradients)
        assert scaler.decide()
        results.append(gradients)
    for plain, scaled in zip(*results, strict=True):
        assert isinstance(scaled, DTensor)
        assert torch.equal(plain.to_local(), scaled.to_local())


@pytest.mark.parametrize("world", [1, 2, 3])
def test_sharded_gradients_are_divided_in_place_and_exactly(world: int) -> None:
    run_ranks(clean_gradients_scaled_and_not, world, (world,))


def mixed_kinds(bad_rank: int) -> tuple[bool, list[float]]:
    """Divide gradients of two meshes and plain ones together; some ranks hold no element of some."""
    both = init_device_mesh("cpu", (2, 2), mesh_dim_names=("rows", "columns"))
    gradients = [
        distribute_tensor(torch.full((3,), 8.0), both["columns"], [Shard(0)]),
        distribute_tensor(torch.full((1, 2), 8.0), both, [Shard(0), Shard(1)]),
        torch.tensor([8.0, math.inf if dist.get_rank() == bad_rank else 8.0]),
    ]
    scaler = LossScaler(init_scale=4)
    scaler.unscale_(gradients)
    return scaler.decide(), [number for gradient in gradients for number in local_tensor(gradient).flatten().tolist()]


def test_plain_and_sharded_gradients_of_several_meshes_share_one_decision() -> None:
    assert all(taken and set(numbers) == {2.0} for taken, numbers in run_ranks(mixed_kinds, 4, -1))
    assert not any(taken for taken, _ in run_ranks(mixed_kinds, 4, 2))


def rank_zero_has_nothing(bad: float) -> bool:
    scaler = LossScaler()
    scaler.unscale_([] if dist.get_rank() == 0 else [torch.tensor(bad)])
    return scaler.decide()


def test_a_rank_without_gradients_decides_with_the_others() -> None:
    assert run_ranks(rank_zero_has_nothing, 3, 1.0) == [True, True, True]
    assert run_ranks(rank_zero_has_nothing, 3, math.nan) == [False, False, False]


def two_optimizers() -> tuple[list[bool], float]:
    """Rank 0 overflows in one optimizer's gradients, rank 1 in those of another; a third is clean."""
    scaler = LossScaler(init_scale=INIT_SCALE)
    for number, owner in enumerate("abc"):
        scaler.unscale_([torch.tensor(math.inf if dist.get_rank() == number else 1.0)], owner=owner)
    taken = [scaler.decide(owner=owner) for owner in "abc"]
    scaler.update()
    return taken, scaler.current_scale


def test_each_optimizer_is_skipped_on_all_ranks_or_on_none() -> None:
    assert run_ranks(two_optimizers, 2) == [([False, False, True], INIT_SCALE / 2)] * 2


def decide_in_halves() -> bool:
    halves = init_device_mesh("cpu", (2, 2), mesh_dim_names=("half", "member"))
    scaler = LossScaler()
    scaler.unscale_([torch.tensor(math.inf if dist.get_rank() == 3 else 1.0)])
    return scaler.decide(halves.get_group("member"))


def test_a_given_group_decides_for_its_own_ranks() -> None:
    assert run_ranks(decide_in_halves, 4) == [True, True, False, False]
