"""What would go wrong without a word: each test fails when its guard in the engine is taken away."""

from __future__ import annotations

import functools
import os

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tests.ranks.engine_support import (
    CPU,
    Block,
    Net,
    backward,
    batch,
    engine_of,
    largest_difference,
    loss_of,
    made,
    pair,
    reference_backward,
    reference_trained,
    trained,
    whole,
)
from tests.rows import full
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import meshbolt
from meshbolt.engine import Engine
from meshbolt.environment import Environment, read_environment
from meshbolt.testing import run_ranks, run_ranks_expecting

STAGES = (0, 1, 2, 3)
# The same twice: once by torch's collectives, once by the faster ones.
PATHS = (Environment(fast_path=False), Environment(fast_path=True))


def sgd(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)


# Gathered copies that would outlive an update ---------------------------------------------------------------------------


def step_after_a_lone_forward() -> None:
    for stage in STAGES:
        module, reference = pair()
        engine = engine_of(module, stage)
        ours, theirs = sgd(module), sgd(reference)
        backward(engine, 0)
        reference_backward(reference, 0)
        engine.call(module, batch(9, 0)[0])  # gathers; no backward follows
        engine.step(ours)
        theirs.step()
        # The next forward has to see the step.
        found = engine.call(loss_of, module, batch(1, 0)).detach()
        torch.testing.assert_close(found, loss_of(reference, batch(1, 0)).detach(), rtol=0, atol=1e-12)


def test_a_step_after_a_forward_without_backward_is_seen_by_the_next_forward() -> None:
    run_ranks(step_after_a_lone_forward, 2)


def norms_after_a_lone_forward() -> None:
    for stage in STAGES:
        module, reference = pair()
        engine = engine_of(module, stage)
        backward(engine, 0)
        reference_backward(reference, 0)
        engine.call(module, batch(9, 0)[0])
        expected = nn.utils.clip_grad_norm_(reference.parameters(), 0.1)
        # What stands in the module now are whole copies, and the gradients are on the shards.
        for norm in (
            engine.grad_norm(),
            engine.grad_norm(module.parameters()),
            engine.grad_norm([*module.parameters()]),
        ):
            assert abs(float(norm - expected)) < 1e-12
        assert abs(float(engine.clip_norm(module.parameters(), 0.1) - expected)) < 1e-12
        engine.call(module, batch(9, 0)[0])
        engine.settle()
        for ours, theirs in zip(module.parameters(), reference.parameters(), strict=True):
            torch.testing.assert_close(whole(ours.grad), theirs.grad, rtol=0, atol=1e-12)


def test_norms_after_a_forward_without_backward_are_not_zero() -> None:
    run_ranks(norms_after_a_lone_forward, 2)


def evaluated_between_batches() -> None:
    for stage in STAGES:
        module, reference = pair()
        engine = engine_of(module, stage)
        optimizer = sgd(module)
        backward(engine, 0, window=2)
        with torch.no_grad():
            found = engine.call(loss_of, module, batch(5, 0))
            torch.testing.assert_close(found, loss_of(reference, batch(5, 0)), rtol=0, atol=1e-12)
        backward(engine, 1, window=2)
        engine.step(optimizer)
        engine.settle()
        reference_trained(reference, sgd(reference), steps=1, window=2)
        assert largest_difference(module, reference) < 1e-12, stage


def test_an_evaluation_inside_a_window_changes_nothing() -> None:
    run_ranks(evaluated_between_batches, 2)


def changed_by_hand(environment: Environment) -> None:
    for stage in STAGES:
        module, reference = pair()
        engine = engine_of(module, stage, environment=environment)
        ours, theirs = sgd(module), sgd(reference)
        for step in range(3):
            trained(engine, ours, first=step, steps=1)
            reference_trained(reference, theirs, first=step, steps=1)
            for one in (module, reference):
                one.blocks[1].up.weight.data.mul_(0.5)
                one.into.weight.data.clamp_(-0.2, 0.2)
                with torch.no_grad():
                    one.blocks[0].down.weight.add_(0.125)
        assert largest_difference(module, reference) < 1e-12, stage


@pytest.mark.parametrize("environment", PATHS, ids=["plain", "fast"])
def test_parameters_changed_between_steps_are_what_the_next_forward_uses(environment: Environment) -> None:
    run_ranks(changed_by_hand, 2, environment)


class Normalising(Net):
    """Changes parameters at the start of each forward, as codebooks and dictionaries are kept normalised."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.into.weight.copy_(F.normalize(self.into.weight, dim=1))
            self.blocks[1].up.weight.mul_(0.75)
            self.blocks[2].down.bias.data.add_(0.5)
        return super().forward(x)


def changed_inside(environment: Environment) -> None:
    for stage in STAGES:
        for window in (1, 2):
            module, reference = pair(Normalising)
            engine = engine_of(module, stage, environment=environment)
            trained(engine, sgd(module), window=window)
            reference_alternating(reference, window)
            assert largest_difference(module, reference) < 1e-12, (stage, window)


def reference_alternating(reference: nn.Module, window: int) -> None:
    """Take the steps of `trained` where each forward changes the module: all ranks share one forward."""
    optimizer = sgd(reference)
    for index in range(3 * window):
        parts = [batch(index, rank) for rank in range(dist.get_world_size())]
        together = tuple(torch.cat(tensors) for tensors in zip(*parts, strict=True))
        (loss_of(reference, together) / window).backward()
        if (index + 1) % window == 0:
            optimizer.step()
            optimizer.zero_grad()


@pytest.mark.parametrize("environment", PATHS, ids=["plain", "fast"])
def test_parameters_changed_at_the_start_of_a_forward_stay_changed(environment: Environment) -> None:
    run_ranks(changed_inside, 2, environment)


def kept_in_full_precision() -> None:
    module = made(dtype=torch.float32)
    before = {name: whole(parameter) for name, parameter in module.named_parameters()}
    engine = engine_of(module, 2, precision="bf16-mixed")

    def change_one_number() -> None:
        module.into.weight.data[0, 0] = 0.5

    backward(engine, 0, dtype=torch.bfloat16)
    engine.call(change_one_number)
    engine.call(module, batch(0, 0, torch.bfloat16)[0])
    engine.settle()
    assert before["into.weight"][0, 0] != 0.5
    before["into.weight"][0, 0] = 0.5
    for name, parameter in module.named_parameters():
        assert torch.equal(whole(parameter), before[name]), name


def test_what_nobody_changes_is_not_rounded_by_a_gather_in_16_bits() -> None:
    run_ranks(kept_in_full_precision, 2)


# Gradients that would be lost or counted twice --------------------------------------------------------------------------


def dropped_inside_a_window(replicate: int) -> None:
    for stage in STAGES if replicate == 1 else STAGES[1:]:
        for precision, stored, dtype in (
            ("32-true", torch.float64, torch.float64),
            ("bf16-mixed", torch.float32, torch.bfloat16),
            ("bf16-true", torch.bfloat16, torch.bfloat16),  # gradients are summed in another dtype than parameters have
        ):
            module, reference = pair(dtype=stored)
            engine = engine_of(module, stage, replicate=replicate, precision=precision)
            optimizer = sgd(module)
            engine.add_optimizer(optimizer)
            backward(engine, 0, window=2, dtype=dtype)
            optimizer.zero_grad()  # the first batch does not count any more
            backward(engine, 1, dtype=dtype)
            expected = engine_of(reference, stage, replicate=replicate, precision=precision)
            backward(expected, 1, dtype=dtype)
            for ours, theirs in zip(module.parameters(), reference.parameters(), strict=True):
                assert torch.equal(whole(ours.grad), whole(theirs.grad)), (stage, precision)


@pytest.mark.parametrize(("ranks", "replicate"), [(2, 1), full(4, 2)])
def test_gradients_dropped_inside_a_window_do_not_come_back(ranks: int, replicate: int) -> None:
    run_ranks(dropped_inside_a_window, ranks, replicate)


def dropped_by_one_of_two(replicate: int) -> None:
    """One optimizer drops its gradients inside a window, the other one goes on; they share the root and a block."""
    for stage in STAGES if replicate == 1 else STAGES[1:]:
        for set_to_none in (True, False):
            module, reference = pair()
            engine = engine_of(module, stage, replicate=replicate)
            backward(engine, 0, window=2)
            reference_backward(reference, 0, window=2)
            for parameters in (engine.parameters_by_name, dict(reference.named_parameters())):
                others = [
                    p for name, p in parameters.items() if name not in ("into.weight", "blocks.0.up.weight", "scale")
                ]
                torch.optim.SGD(others, lr=0.1).zero_grad(set_to_none=set_to_none)
            backward(engine, 1, window=2)
            reference_backward(reference, 1, window=2)
            for ours, theirs in zip(module.parameters(), reference.parameters(), strict=True):
                torch.testing.assert_close(whole(ours.grad), theirs.grad, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("ranks", "replicate"), [(2, 1), (4, 2)])
def test_gradients_dropped_by_one_of_two_optimizers_leave_the_others(ranks: int, replicate: int) -> None:
    run_ranks(dropped_by_one_of_two, ranks, replicate)


def seen_inside_a_window(replicate: int) -> None:
    for stage in STAGES if replicate == 1 else STAGES[1:]:
        module, reference = pair()
        engine = engine_of(module, stage, replicate=replicate)
        backward(engine, 0, window=2)
        reference_backward(reference, 0, window=2)
        for name, parameter in engine.parameters_by_name.items():
            if parameter.dim():
                torch.testing.assert_close(
                    whole(parameter.grad), reference.get_parameter(name).grad, rtol=0, atol=1e-12
                )
        optimizer = sgd(module)
        parameters = list(engine.parameters_by_name.values())
        # The number without dimensions is averaged at the window's end in every stage.
        for use, arguments in (
            (engine.step, (optimizer,)),
            (engine.grad_norm, ()),
            (engine.clip_norm, (parameters, 1.0)),
            (engine.clip_value, (parameters, 1.0)),
        ):
            with pytest.raises(meshbolt.UnsupportedError, match="inside a window"):
                use(*arguments)
        backward(engine, 1, window=2)
        engine.step(optimizer)


@pytest.mark.parametrize(("ranks", "replicate"), [(2, 1), (4, 2)])
def test_gradients_inside_a_window_are_shown_as_they_are_and_not_used(ranks: int, replicate: int) -> None:
    run_ranks(seen_inside_a_window, ranks, replicate)


class Alternating(Net):
    """Uses one of two layers of a shape in each block: in odd batches the other one."""

    odd = False

    def __init__(self) -> None:
        super().__init__()
        for block in self.blocks:
            block.other = nn.Linear(10, 13)
            block.forward = functools.partial(self.run_block, block)

    def run_block(self, block: nn.Module, x: Tensor) -> Tensor:
        return x + block.down(F.gelu((block.other if self.odd else block.up)(x)))


def alternate(stage: int, replicate: int) -> None:
    module, reference = made(Alternating), made(Alternating)
    engine = engine_of(module, stage, replicate=replicate)
    for index in range(2):
        module.odd = reference.odd = bool(index)
        backward(engine, index, window=2)
        reference_backward(reference, index, window=2)
    for ours, theirs in zip(module.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(whole(ours.grad), theirs.grad, rtol=0, atol=1e-12)


def test_batches_of_a_window_may_use_different_layers_unless_copies_of_shards_would_mix_them() -> None:
    """torch sums the shards of a window's batches by their place in a buffer, which here is that of another layer."""
    run_ranks(alternate_in_all_stages, 2)
    run_ranks(alternate, 4, 1, 2)
    for stage in (2, 3):
        run_ranks_expecting(alternate, 4, stage, 2, error=meshbolt.UnsupportedError, match="'blocks.0'.*every batch")


def alternate_in_all_stages() -> None:
    for stage in STAGES:
        alternate(stage, 1)


def zeroed_not_dropped(dtype: torch.dtype) -> None:
    for environment in PATHS:
        for stage in STAGES:
            module, reference = pair(dtype=dtype)
            engine = engine_of(module, stage, environment=environment)
            ours, theirs = sgd(module), sgd(reference)
            for index in range(6):
                backward(engine, index, window=2, dtype=dtype)
                reference_backward(reference, index, window=2, dtype=dtype)
                if index % 2:
                    engine.step(ours)
                    theirs.step()
                    ours.zero_grad(set_to_none=False)
                    theirs.zero_grad(set_to_none=False)
            engine.settle()
            assert largest_difference(module, reference) < (1e-12 if dtype == torch.float64 else 1e-5), (stage, dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_gradients_set_to_zero_are_added_to(dtype: torch.dtype) -> None:
    run_ranks(zeroed_not_dropped, 2, dtype)


def paths_agree(replicate: int) -> None:
    for stage in STAGES[1:]:
        for window, precision in ((1, "32-true"), (3, "32-true"), (2, "bf16-mixed")):
            ours = []
            for environment in PATHS:
                module = made(dtype=torch.float32)
                engine = engine_of(module, stage, replicate=replicate, precision=precision, environment=environment)
                trained(engine, torch.optim.AdamW(module.parameters(), lr=1e-2), window=window)
                ours.append([whole(parameter) for parameter in module.parameters()])
            assert all(map(torch.equal, *ours)), (stage, window, precision)


@pytest.mark.parametrize(("ranks", "replicate"), [(2, 1), full(4, 2)])
def test_the_fast_path_gives_the_bits_of_the_plain_one(ranks: int, replicate: int) -> None:
    run_ranks(paths_agree, ranks, replicate)


# Exceptions -------------------------------------------------------------------------------------------------------------


class StopError(Exception):
    """What goes wrong on all ranks."""


class Stopping(Net):
    """Stops where it is told to."""

    where = ""

    def forward(self, x: Tensor) -> Tensor:
        x = self.into(x)
        for block in self.blocks[:2]:
            x = block(x)
        if self.where == "forward":
            raise StopError
        if self.where == "backward":
            x.register_hook(self.stop)
        return self.out(self.blocks[2](x)) * self.scale

    @staticmethod
    def stop(_: Tensor) -> None:
        raise StopError


def goes_on_after(where: str) -> None:
    for environment in PATHS:
        for stage in STAGES:
            module, reference = pair(Stopping)
            engine = engine_of(module, stage, environment=environment)
            ours = sgd(module)
            engine.add_optimizer(ours)
            trained(engine, ours, steps=2, window=2)
            backward(engine, 4, window=2)
            module.where = where
            with pytest.raises(StopError):
                backward(engine, 5, window=2)
            module.where = ""
            if where == "forward":
                backward(engine, 5, window=2)  # the same batch again; the window's first has not been lost
                engine.step(ours)
                ours.zero_grad()
            else:
                ours.zero_grad()  # some gradients are there and some are not: the window starts again
                trained(engine, ours, first=2, steps=1, window=2)
            trained(engine, ours, first=3, steps=1, window=2)
            reference_trained(reference, sgd(reference), steps=4, window=2)
            assert largest_difference(module, reference) < 1e-12, (stage, environment)


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_training_goes_on_right_after_an_exception_on_all_ranks(where: str) -> None:
    run_ranks(goes_on_after, 2, where)


# Inference mode ---------------------------------------------------------------------------------------------------------


def evaluated_first(inference: bool) -> None:
    for stage in STAGES:
        for precision in ("32-true", "bf16-mixed"):
            dtype = torch.float64 if precision == "32-true" else torch.bfloat16
            module, reference = pair(dtype=torch.promote_types(dtype, torch.float32))
            engine = engine_of(module, stage, precision=precision)
            with torch.inference_mode(inference), torch.no_grad():
                engine.call(module, batch(0, 0, dtype)[0])
            trained(engine, sgd(module))
            if dtype == torch.float64:
                reference_trained(reference, sgd(reference))
                assert largest_difference(module, reference) < 1e-12
            with torch.inference_mode(inference), torch.no_grad():
                found = engine.call(module, batch(0, 0, dtype)[0])
            assert bool(torch.isfinite(found).all())


@pytest.mark.parametrize("inference", [True, False])
def test_a_forward_in_inference_mode_before_training_does_no_harm(inference: bool) -> None:
    run_ranks(evaluated_first, 2, inference)


# Parameters that torch cannot shard -------------------------------------------------------------------------------------


class MixedDtypes(Net):
    """A layer of another dtype in a block and at the root, and numbers without dimensions in both."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.linspace(-1, 1, 10))
        self.blocks[1].gain = nn.Parameter(torch.tensor(0.5))
        self.blocks[1].offset = nn.Parameter(torch.linspace(0, 1, 10))

    def forward(self, x: Tensor) -> Tensor:
        x = self.into(x) + self.table.to(x)
        for block in self.blocks:
            x = block(x)
        x = x * self.blocks[1].gain
        return self.out(x) * self.scale


class MixedBlock(Block):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(0.5))
        self.offset = nn.Parameter(torch.linspace(0, 1, 10))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.gain + self.offset.to(x)


def mixed() -> nn.Module:
    torch.manual_seed(3)
    module = Net().double()
    module.blocks[1] = MixedBlock().double()
    module.blocks[1].offset.data = module.blocks[1].offset.data.float()
    module.into.bias.data = module.into.bias.data.float()
    module.into.forward = lambda x: F.linear(x, module.into.weight) + module.into.bias.to(x)
    return module


def trains_mixed() -> None:
    for stage in STAGES:
        module, reference = mixed(), mixed()
        engine = engine_of(module, stage)
        trained(engine, sgd(module), window=2)
        reference_trained(reference, sgd(reference), window=2)
        dtypes = {parameter.dtype for parameter in module.parameters()}
        assert dtypes == {torch.float32, torch.float64}
        assert all(isinstance(p, DTensor) == (p.dim() > 0 and p.dtype == torch.float64) for p in module.parameters())
        # The float32 parameters round their own gradients.
        assert largest_difference(module, reference) < 1e-6, stage


def test_parameters_without_dimensions_and_of_several_dtypes_train() -> None:
    run_ranks(trains_mixed, 3)


class Normalised(nn.Module):
    """Running statistics between two layers, in a block and at the root."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.norm = nn.Linear(6, 10), nn.BatchNorm1d(10)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(10, 10), nn.BatchNorm1d(10), nn.GELU(), nn.Linear(10, 10)) for _ in range(2)
        )
        self.out = nn.Linear(10, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.into(x))
        for block in self.blocks:
            x = block(x)
        return self.out(x)


def statistics_in_16_bits() -> None:
    for stage in STAGES:
        module, reference = pair(Normalised, torch.float32)
        engine = engine_of(module, stage, precision="bf16-mixed", autocast=True)
        for index in range(3):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                backward(engine, index, dtype=torch.float32)
                loss_of(reference, batch(index, dist.get_rank(), torch.float32))
        found, expected = dict(module.named_buffers()), dict(reference.named_buffers())
        for name, buffer in found.items():
            assert buffer.dtype == expected[name].dtype
            assert torch.equal(buffer, expected[name]), (stage, name)
        assert all(parameter.dtype == torch.float32 for parameter in module.parameters())


def test_running_statistics_stay_in_full_precision_where_layers_run_in_16_bits() -> None:
    run_ranks(statistics_in_16_bits, 2)


# Weights and modules that differ by rank --------------------------------------------------------------------------------


def built_with_own_seed(meta: bool) -> list[float]:
    torch.manual_seed(100 + dist.get_rank())
    with torch.device("meta" if meta else "cpu"):
        module = nn.Sequential(nn.Linear(6, 10), nn.LayerNorm(10), nn.Sequential(nn.Linear(10, 3), nn.Linear(3, 3)))
    engine_of(module, 3)
    found = [whole(parameter) for parameter in module.parameters()]
    torch.manual_seed(100)
    plain = nn.Sequential(nn.Linear(6, 10), nn.LayerNorm(10), nn.Sequential(nn.Linear(10, 3), nn.Linear(3, 3)))
    assert all(map(torch.equal, found, plain.parameters())), "not what rank 0 would have built by itself"
    return [float(value.sum()) for value in found]


@pytest.mark.parametrize("meta", [False, True])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_ranks_with_seeds_of_their_own_start_from_the_weights_of_rank_0(ranks: int, meta: bool) -> None:
    sums = run_ranks(built_with_own_seed, ranks, meta)
    assert all(other == sums[0] for other in sums)


def shard_other_modules(kind: str) -> None:
    rank = dist.get_rank()
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 5 if kind == "shape" and rank else 4))
    if kind == "count" and rank:
        module.append(nn.Linear(2, 2))
    if kind == "frozen" and rank:
        module[1].requires_grad_(False)
    engine_of(module, 2)


@pytest.mark.parametrize("kind", ["shape", "count", "frozen"])
def test_ranks_with_different_modules_are_told_so_on_every_rank(kind: str) -> None:
    run_ranks_expecting(
        shard_other_modules, 3, kind, error=meshbolt.TopologyError, match="Ranks have different modules"
    )


def shard_nothing() -> None:
    engine_of(nn.Sequential(nn.ReLU(), nn.Dropout()), 2)


def test_a_module_without_parameters_is_refused() -> None:
    run_ranks_expecting(shard_nothing, 2, error=meshbolt.ConfigError, match="Sequential has no parameters")


def shard_twice() -> None:
    module = made()
    plan = engine_of(module, 2).plan
    Engine(module, plan=plan, mesh=engine_of(made(), 2).mesh, device=CPU)


def test_a_module_that_is_sharded_already_is_refused() -> None:
    run_ranks_expecting(shard_twice, 2, error=meshbolt.ConfigError, match="DTensor already.*build a new one")


class Branching(nn.Module):
    """Two branches of one shape; which one runs is decided by the rank."""

    def __init__(self) -> None:
        super().__init__()
        self.branches = nn.ModuleList(Block() for _ in range(2))
        self.diverges = True

    def forward(self, x: Tensor) -> Tensor:
        return self.branches[dist.get_rank() % 2 if self.diverges else 0](x)


def ones(module: nn.Module) -> None:
    for index, branch in enumerate(module.branches):
        for parameter in branch.parameters():
            parameter.data.fill_(index + 1.0)


def diverge(debug: bool, stage: int) -> float:
    module = Branching().double()
    ones(module)
    os.environ["MESHBOLT_DEBUG"] = str(int(debug))
    engine = engine_of(module, stage, environment=read_environment())
    with torch.no_grad():
        return float(engine.call(module, torch.ones(2, 10, dtype=torch.float64)).sum())


def test_ranks_that_take_different_branches_compute_with_mixed_weights_unless_watched() -> None:
    """The first half shows why the second is needed: nothing but the numbers tells."""
    plain = Branching().double()
    ones(plain)
    with torch.no_grad():
        expected = [float(branch(torch.ones(2, 10, dtype=torch.float64)).sum()) for branch in plain.branches]
    found = run_ranks(diverge, 2, False, 3)
    assert found[0] != expected[0]
    assert found[1] != expected[1]
    for stage in (1, 3):
        messages = run_ranks_expecting(
            diverge, 2, True, stage, error=meshbolt.TopologyError, match="different branches"
        )
        assert all("'branches.0'" in message and "'branches.1'" in message for message in messages)


def train_watched() -> None:
    module, reference = pair()
    engine = engine_of(module, 3, environment=Environment(debug=True))
    trained(engine, sgd(module))
    reference_trained(reference, sgd(reference))
    assert largest_difference(module, reference) < 1e-12


def test_ranks_that_agree_train_as_ever_under_the_watch() -> None:
    run_ranks(train_watched, 2)


def use_a_layer_of_a_unit() -> None:
    module = made()
    engine = engine_of(module, 3)
    engine.call(lambda: module.blocks[0].up(torch.ones(2, 10, dtype=torch.float64)))


def test_a_layer_inside_a_unit_that_is_called_by_itself_is_refused_by_name() -> None:
    run_ranks_expecting(use_a_layer_of_a_unit, 2, error=meshbolt.UnsupportedError, match=r"'blocks\.0'.*Zero\(unit=")
