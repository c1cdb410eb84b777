"""If these fail, the faster collectives corrupt gradients or weights silently."""

import functools
from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
from tests.ranks.engine_support import backward, batch, engine_of, loss_of, made, trained, whole
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from meshbolt import compat
from meshbolt.collectives import DeferredReductions, Prefetch
from meshbolt.collectives import prefetch as prefetch_module
from meshbolt.collectives import reduce_scatter as reduce_scatter_module
from meshbolt.environment import Environment
from meshbolt.testing import run_ranks


def model(dtype=torch.float32):
    torch.manual_seed(0)
    block = lambda: nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 5))  # noqa: E731
    return nn.Sequential(*(block() for _ in range(4))).to(dtype)


def shard(net, *, reshard):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in net:
        fully_shard(block, mesh=mesh, reshard_after_forward=reshard)
    fully_shard(net, mesh=mesh, reshard_after_forward=False)
    return [*net, net]


def train(net, *, reductions=None, prefetch=None, dtype=torch.float32):
    """Two windows of three batches with plain SGD on the shards."""
    parameters = list(net.parameters())
    for step in range(2):
        for index in range(3):
            torch.manual_seed(100 * step + 10 * index + dist.get_rank())
            if prefetch is not None:
                prefetch.enter_step()
            loss = net(torch.randn(2, 5, dtype=dtype)).square().sum()
            if prefetch is not None:
                prefetch.end_forward()
            if reductions is not None:
                reductions.before_backward()
            loss.backward()
            if reductions is not None:
                reductions.after_backward()
        for unit in [*net, net]:
            compat.drop_pending_gather(unit)
            compat.reshard(unit)
        with torch.no_grad():
            for parameter in parameters:
                parameter -= 0.1 * parameter.grad
                parameter.grad = None
    return [parameter.full_tensor() for parameter in parameters]


def plain_and_fast(reshard, dtype, limit_bytes):
    reduce_scatter_module.IN_FLIGHT_BYTES = prefetch_module.AHEAD_BYTES = limit_bytes
    plain, fast = model(dtype), model(dtype)
    shard(plain, reshard=reshard)
    units = shard(fast, reshard=reshard)
    prefetch = Prefetch({str(index): unit for index, unit in enumerate(fast)}, keeps_gathered=not reshard)
    ours = train(fast, reductions=DeferredReductions(units), prefetch=prefetch, dtype=dtype)
    theirs = train(plain, dtype=dtype)
    return max(float((a - b).detach().abs().max()) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("reshard", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("limit_bytes", [0, 600, 2**24])
def test_windows_give_what_torchs_own_path_gives(reshard, dtype, limit_bytes):
    # float64 takes the branch that may not be deferred, and small limits the one that finishes transfers early.
    assert run_ranks(plain_and_fast, 2, reshard, dtype, limit_bytes) == [0.0, 0.0]


def test_three_ranks_sum_in_another_order_and_agree_to_rounding():
    # gloo sums along a ring, we sum by rank: the last bit of float32 may differ.
    assert max(run_ranks(plain_and_fast, 3, False, torch.float32, 2**24)) < 1e-6


def deferred(stage, dtype):
    engine = engine_of(made(dtype=dtype), stage)
    reductions, seen = engine._fast._reductions, []
    launch = reductions.launch
    reductions.launch = lambda transfer, *, defer: (seen.append(defer), launch(transfer, defer=defer))
    trained(engine, torch.optim.SGD(engine.module.parameters(), lr=0.1), window=2)
    return seen


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_reductions_of_float32_are_deferred_and_those_that_torch_divides_are_not(stage):
    assert set(run_ranks(deferred, 2, stage, torch.float32)[0]) == {True}
    assert set(run_ranks(deferred, 2, stage, torch.float64)[0]) == {False}


def trained_in_windows(stage, *, fast):
    module = made(dtype=torch.float32)
    engine = engine_of(module, stage, environment=Environment(fast_path=fast))
    entered = []
    for unit in engine._all_units:
        for group in compat.units.groups_of(unit):
            group.pre_forward = functools.partial(counted, group.pre_forward, entered)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    for index in range(9):
        last = index % 3 == 2
        with nullcontext() if last else engine.accumulate(covers_forward=True):
            loss = engine.call(loss_of, module, batch(index, dist.get_rank(), torch.float32))
            if index % 2:
                engine.settle()  # as a hook that saves or reads whole parameters does
            with engine.backward(loss) as prepared:
                prepared.backward()
        if last:
            engine.step(optimizer)
            optimizer.zero_grad()
    engine.settle()
    return len(entered) / len(engine._all_units), [whole(parameter) for parameter in module.parameters()]


def counted(function, calls, *args):
    calls.append(1)
    return function(*args)


def quiet_and_loud(stage):
    (few, ours), (all_of_them, theirs) = (trained_in_windows(stage, fast=fast) for fast in (True, False))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    return few, all_of_them


def test_hooks_rest_in_batches_that_communicate_no_gradients():
    # Of nine batches in windows of three: the last of each, and the very first, in which torch sets itself up.
    assert run_ranks(quiet_and_loud, 2, 1) == [(4, 9)] * 2
    assert run_ranks(quiet_and_loud, 2, 2) == [(9, 9)] * 2


def labels_in_a_profile():
    engine = engine_of(made(dtype=torch.float32), 2)
    backward(engine, 0, dtype=torch.float32)
    with torch.profiler.profile() as profile:
        backward(engine, 1, dtype=torch.float32)
    return {event.key.split(" ")[0] for event in profile.key_averages()}


def test_a_profiler_sees_torchs_labels_still():
    labels = {"FSDP::all_gather", "FSDP::pre_forward", "FSDP::post_forward", "FSDP::post_backward_reduce"}
    assert labels <= run_ranks(labels_in_a_profile, 2)[0]


def edited_shards_are_gathered():
    net = model()
    units = shard(net, reshard=False)
    prefetch = Prefetch({str(index): unit for index, unit in enumerate(net)}, keeps_gathered=True)
    train(net, reductions=DeferredReductions(units), prefetch=prefetch)
    for parameter in net.parameters():
        parameter.data.zero_()
    prefetch.enter_step()
    return float(net(torch.ones(1, 5)).detach().abs().sum())


def test_shards_edited_between_steps_are_what_the_next_forward_uses():
    assert run_ranks(edited_shards_are_gathered, 2) == [0.0, 0.0]


def reset_after_an_error():
    net = model()
    units = shard(net, reshard=False)
    reductions = DeferredReductions(units)
    train(net, reductions=reductions)
    loss = net(torch.randn(2, 5)).square().sum()
    reductions.before_backward()
    handle = net[0][0].weight.register_hook(lambda _: (_ for _ in ()).throw(RuntimeError("stop")))
    with pytest.raises(RuntimeError, match="stop"):
        loss.backward()
    handle.remove()
    reductions.reset()
    compat.reset_after_error(net)
    for parameter in net.parameters():
        parameter.grad = None
    train(net, reductions=reductions)
    return all(bool(torch.isfinite(p.full_tensor()).all()) for p in net.parameters())


def test_after_an_exception_in_backward_training_goes_on():
    assert run_ranks(reset_after_an_error, 2) == [True, True]
