"""What cannot be cut is refused by name, before anything has run or when it first happens; nothing is computed wrongly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from meshbolt.errors import ConfigError, UnsupportedError
from meshbolt.pipeline import emulate

Forward = Callable[["Net", Tensor], Tensor]


class Net(nn.Module):
    """Four layers, called as a test says."""

    def __init__(self, forward: Forward) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))
        self.head = nn.Linear(4, 1)
        self.how, self.runs = forward, 0

    def forward(self, x: Tensor) -> Tensor:
        self.runs += 1
        return self.head(self.how(self, x)).mean()


def straight(net: Net, x: Tensor) -> Tensor:
    for layer in net.layers:
        x = layer(x)
    return x


def run(forward: Forward, *cuts: str, microbatches: int = 1) -> Any:
    net = Net(forward)
    return emulate(net, [lambda: net(torch.ones(2, 4))] * microbatches, cuts or ["layers.2"])


@pytest.mark.parametrize(
    ("cuts", "message"),
    [
        (["layer.2"], r"no module 'layer\.2' \(did you mean 'layers\.2'\?"),
        (["layers"], r"'layers' is a ModuleList, which is never called. Name a module in it: 'layers\.0'"),
        (["layers.1", "layers.1"], r"'layers\.1' stands there twice"),
        ([""], r"no module ''"),
    ],
)
def test_a_cut_that_names_no_module_is_refused(cuts: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run(straight, *cuts)


def test_cuts_out_of_order_are_refused() -> None:
    with pytest.raises(UnsupportedError, match=r"'layers\.1' is called before 'layers\.3'. Name cuts in the order"):
        run(straight, "layers.3", "layers.1")


def test_a_cut_that_is_never_called_is_refused() -> None:
    with pytest.raises(UnsupportedError, match=r"ended without calling 'layers\.3', with which stage 1 begins"):
        run(lambda net, x: net.layers[0](x), "layers.3")


def test_a_cut_that_is_called_twice_is_refused() -> None:
    with pytest.raises(UnsupportedError, match=r"'layers\.2', with which a stage begins, is called 2 times in a step"):
        run(lambda net, x: net.layers[2](straight(net, x)))


def test_a_value_of_a_function_that_jumps_a_cut_is_refused() -> None:
    def forward(net: Net, x: Tensor) -> Tensor:
        early = F.relu(net.layers[0](x))
        return net.layers[2](net.layers[1](early)) + early

    with pytest.raises(UnsupportedError, match=r"relu makes a value of \[2, 4\] on stage 0 that is read on stage 1"):
        run(forward)


def test_a_sum_over_layers_in_a_tensor_of_the_forward_is_refused() -> None:
    def forward(net: Net, x: Tensor) -> Tensor:
        total = torch.zeros(())
        for layer in net.layers:
            x = layer(x)
            total += x.square().mean()
        return x + total

    with pytest.raises(UnsupportedError, match=r"writes a value that another pipeline stage computes into a tensor"):
        run(forward)


def test_a_branch_on_an_activation_between_layers_is_refused() -> None:
    def forward(net: Net, x: Tensor) -> Tensor:
        x = net.layers[1](net.layers[0](x))
        return net.layers[2](x if x.abs().max() < 100 else x / 2)

    with pytest.raises(UnsupportedError, match=r"DataDependent.* in stage 0: .*cannot branch on them or read them"):
        run(forward)


def test_a_branch_on_an_activation_inside_a_layer_runs_where_the_layer_is() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x) if x.abs().max() < 100 else x

    net = Net(straight)
    net.layers[1] = Branching()
    (loss,), plan = emulate(net, [lambda: net(torch.ones(2, 4))], ["layers.2"])
    found = [p.grad.clone() for p in net.parameters() if p.grad is not None]
    net.zero_grad()
    expected = net(torch.ones(2, 4))
    expected.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(found, [p.grad for p in net.parameters()])
    assert plan.stages_of["layers.1.linear.weight"] == (0,)


def test_a_bare_except_around_the_model_is_recognised() -> None:
    def forward(net: Net, x: Tensor) -> Tensor:
        try:
            return straight(net, x)
        except:  # noqa: E722 - what users write
            return x

    with pytest.raises(UnsupportedError, match=r"a bare `except:` around the model"):
        run(forward)


def test_a_path_that_is_taken_later_only_is_refused_when_it_is_taken() -> None:
    def forward(net: Net, x: Tensor) -> Tensor:
        first = net.layers[0](x)
        x = net.layers[2](net.layers[1](first))
        return x if net.runs < 2 else net.layers[3](x + first)

    with pytest.raises(
        UnsupportedError, match=r"On stage 1 the step calls layers\.3, whose parameters another stage holds"
    ):
        run(forward, microbatches=2)


def test_a_loss_that_reads_a_parameter_of_another_stage_is_refused_when_it_was_not_seen() -> None:
    def forward(net: Net, x: Tensor) -> Tensor:
        x = straight(net, x)
        return x if net.runs < 2 else F.linear(x, net.layers[0].weight)

    with pytest.raises(UnsupportedError, match=r"head reads a tensor of \[2, 4\] that another stage holds"):
        run(forward, microbatches=2)


def test_a_module_is_left_as_it_was() -> None:
    net = Net(straight)
    net.register_buffer("count", torch.zeros(()))
    kinds, parameters = [type(module) for module in net.modules()], list(net.parameters())
    with pytest.raises(UnsupportedError):
        emulate(net, [lambda: net(torch.ones(2, 4))], ["layers.3", "layers.1"])
    assert [type(module) for module in net.modules()] == kinds
    assert all(after is before for after, before in zip(net.parameters(), parameters, strict=True))
    assert net.runs == 0


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("cuts", [(), ("layers.2",)])
def test_a_checkpoint_around_layers_is_refused(cuts: tuple[str, ...], reentrant: bool) -> None:
    def forward(net: Net, x: Tensor) -> Tensor:
        for layer in net.layers:
            x = checkpoint(layer, x.requires_grad_(), use_reentrant=reentrant)
        return x

    net = Net(forward)
    net.layers = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(4))
    with pytest.raises(UnsupportedError, match=r"'layers\.\d' would be called again in the backward pass"):
        emulate(net, [lambda: net(torch.ones(2, 4))], cuts)


class Reversed(torch.autograd.Function):
    """What domain adaptation puts between features and a second head."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return -gradient


def test_a_function_of_ones_own_that_takes_a_value_past_the_pipeline_is_refused() -> None:
    def forward(net: Net, x: Tensor) -> Tensor:
        early = net.layers[1](net.layers[0](x))
        return net.layers[2](early) + net.layers[3](Reversed.apply(early))

    with pytest.raises(UnsupportedError, match=r"another stage holds"):
        run(forward)
