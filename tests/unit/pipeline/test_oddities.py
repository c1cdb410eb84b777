"""Things that modules do, each of which has once given a wrong gradient or a false refusal: with stages as without."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from meshbolt.blocks import find_blocks
from meshbolt.pipeline import Calls, emulate

Forward = Callable[["Net", Tensor], Tensor]


class Masking(nn.Module):
    """Returns a value that does not depend on its parameters, another one in each step."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mask = (torch.rand(x.shape) < 0.5).to(x.dtype)
        return self.linear(x) * mask, mask


class Choosing(nn.Module):
    """Computes on those rows that a value chooses, as experts do."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        chosen = (x.sum(dim=-1) > 0).nonzero().squeeze(-1)
        return x.index_add(0, chosen, self.linear(x[chosen]))


class Scaling(nn.Module):
    """Is given a parameter, as layers are that share embeddings of positions."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        return self.linear(x) @ scale


class Noise(nn.Module):
    """Has no parameters, and draws."""

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.randn_like(x)


class Net(nn.Module):
    def __init__(self, forward: Forward) -> None:
        super().__init__()
        self.embed = nn.Linear(4, 4)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(4))
        self.in_place = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 4))
        self.scaling, self.scaling_too = Scaling(), Scaling()
        self.masking, self.choosing, self.noise, self.relu = Masking(), Choosing(), Noise(), nn.ReLU()
        self.square = nn.Parameter(torch.randn(4, 4))
        self.how = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.how(self, x).square().mean()


def through(net: Net, x: Tensor) -> Tensor:
    for layer in net.layers:
        x = layer(x)
    return x


def in_place_at_the_cut(net: Net, x: Tensor) -> Tensor:
    return net.in_place(net.embed(x))


def in_place_around(net: Net, x: Tensor) -> Tensor:
    h = net.embed(x)
    h += 1
    h[:, 0] = 0
    return through(net, h)


def transposed(net: Net, x: Tensor) -> Tensor:
    return through(net, net.embed(x)) @ net.square.T


def carried_without_parameters(net: Net, x: Tensor) -> Tensor:
    early = net.relu(net.embed(x))
    return through(net, early) + early


def teacher_without_gradient(net: Net, x: Tensor) -> Tensor:
    student = net.embed(x)
    with torch.no_grad():
        teacher = through(net, x)
    return student - teacher


def of_shared_parameter(net: Net, x: Tensor) -> Tensor:
    return F.linear(through(net, F.linear(x, net.square)), net.square)


def given_a_parameter(net: Net, x: Tensor) -> Tensor:
    x = net.layers[0](x)
    x = net.scaling(x, net.square)
    for layer in net.layers[1:]:
        x = layer(x)
    return net.scaling_too(x, scale=net.square)


def masked(net: Net, x: Tensor) -> Tensor:
    h, mask = net.masking(x)
    return through(net, h) * (1 - mask)


def noise_of_a_unit(net: Net, x: Tensor) -> Tensor:
    noisy = net.noise(x)
    return through(net, F.dropout(net.embed(noisy), 0.5)) - noisy + torch.randn(4)


def mixed_by_python(net: Net, x: Tensor) -> Tensor:
    share = random.random()
    return through(net, net.embed(x)) - share * x


def chosen_rows(net: Net, x: Tensor) -> Tensor:
    return through(net, net.choosing(x))


PLAIN = [in_place_around, transposed, carried_without_parameters, teacher_without_gradient, chosen_rows]
RANDOM = [masked, noise_of_a_unit, mixed_by_python]


def gradients(forward: Forward, run: Callable[[nn.Module, Any], Any], *, frozen: bool = False) -> dict[str, Any]:
    torch.manual_seed(0)
    net = Net(forward).double()
    net.embed.requires_grad_(not frozen)
    x = torch.randn(3, 4, dtype=torch.float64)
    steps = [lambda: net(x), lambda: net(x + 1)]
    run(net, steps)
    return {name: p.grad for name, p in net.named_parameters() if p.grad is not None}


def whole(_: nn.Module, steps: Any) -> None:
    for step in steps:
        step().backward()


def cut(*cuts: str) -> Callable[[nn.Module, Any], Any]:
    return lambda net, steps: emulate(net, steps, cuts, seed=5)


@pytest.mark.parametrize(("forward", "frozen"), [*((forward, False) for forward in PLAIN), (chosen_rows, True)])
def test_gradients_are_those_of_the_whole(forward: Forward, frozen: bool) -> None:
    expected = gradients(forward, whole, frozen=frozen)
    found = gradients(forward, cut("layers.1", "layers.3"), frozen=frozen)
    torch.testing.assert_close(found, expected, rtol=0.0, atol=1e-12)


def test_a_stage_may_begin_with_a_change_in_place() -> None:
    expected = gradients(in_place_at_the_cut, whole)
    torch.testing.assert_close(gradients(in_place_at_the_cut, cut("in_place")), expected, rtol=0.0, atol=1e-12)


@pytest.mark.parametrize("forward", RANDOM)
def test_random_numbers_are_those_of_one_stage(forward: Forward) -> None:
    expected = gradients(forward, cut())
    torch.testing.assert_close(gradients(forward, cut("layers.1", "layers.3")), expected, rtol=0.0, atol=1e-12)


def test_hooks_that_a_forward_registers_are_gone_when_it_was_only_looked_at() -> None:
    def forward(net: Net, x: Tensor) -> Tensor:
        if not hasattr(net, "_captured"):
            net._captured = []
            net.layers[0].register_forward_hook(lambda *_: net._captured.append(1))
        return through(net, x)

    net = Net(forward)
    emulate(net, [lambda: net(torch.ones(2, 4))], ["layers.2"])
    assert len(net.layers[0]._forward_hooks) == 1  # of the run, not of the look before it


def test_statistics_of_a_unit_that_all_stages_run_count_each_microbatch_once() -> None:
    def forward(net: Net, x: Tensor) -> Tensor:
        return through(net, net.embed(net.noise(x)))  # the unit in the place of noise has no parameters

    def buffers(*cuts: str) -> Any:
        torch.manual_seed(0)
        net = Net(forward).double()
        net.noise = nn.BatchNorm1d(4, affine=False).double()  # type: ignore[assignment]
        x = torch.randn(3, 4, dtype=torch.float64)
        for _ in range(2):
            emulate(net, [lambda: net(x), lambda: net(x + 1)], cuts)
        return dict(net.named_buffers())

    torch.testing.assert_close(buffers("layers.1", "layers.3"), buffers(), rtol=0.0, atol=1e-12)
    assert buffers()["noise.num_batches_tracked"] == 4


@pytest.mark.parametrize("cuts", [("layers.2",), ("layers.1", "layers.3")])
def test_a_parameter_of_several_names_that_is_not_used_has_one_stage(cuts: tuple[str, ...]) -> None:
    net = Net(through)
    shared = nn.Parameter(torch.zeros(2))
    net.layers[3].spare = net.layers[0].spare = shared
    _, plan = emulate(net, [lambda: net(torch.ones(2, 4))], cuts)
    assert plan.stages_of["layers.0.spare"] == plan.stages_of["layers.3.spare"] == (0,)
    assert "layers.3.spare" not in plan.tied()
    assert shared.grad is None


def test_blocks_beside_one_that_holds_a_cut_stay_blocks() -> None:
    net = Net(through)
    before = list(find_blocks(net))
    calls = Calls(net, ["layers.1.1"])
    assert list(find_blocks(net)) == before
    assert calls.around == {"layers.1"}
    calls.remove()


@pytest.mark.parametrize(
    ("forward", "cuts", "passing"),
    [
        (of_shared_parameter, ("layers.0",), [1]),
        (of_shared_parameter, ("layers.0", "layers.2"), [1, 1]),
        (given_a_parameter, ("scaling",), [1]),
        (given_a_parameter, ("scaling", "scaling_too"), [1, 1]),
    ],
)
def test_a_parameter_that_several_stages_read_crosses_no_cut(
    forward: Forward, cuts: tuple[str, ...], passing: list[int]
) -> None:
    expected = gradients(forward, whole)
    torch.testing.assert_close(gradients(forward, cut(*cuts)), expected, rtol=0.0, atol=1e-12)
    net = Net(forward)
    _, plan = emulate(net, [lambda: net(torch.ones(2, 4))], cuts)
    assert [len(crossings) for crossings in plan.crossings] == passing
    assert plan.stages_of["square"][-1] == len(cuts)
