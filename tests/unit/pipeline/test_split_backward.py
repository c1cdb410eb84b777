"""A stage's backward pass in halves makes the gradients of the pass in one, or is seen not to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from meshbolt.pipeline.split_backward import Leaving, try_halves
from meshbolt.pipeline.stage import left_stage

WIDTH = 6


class Chain(nn.Module):
    """Layers one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Tied(Chain):
    """Uses one weight at both ends."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(self.layers(x), self.layers[0].weight)


class Beside(Chain):
    """Adds what does not depend on what it was sent: torch's halves make no gradient of it."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(4, WIDTH)
        self.scale = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x) + self.scale * self.table(torch.arange(3))


class Twice(Chain):
    """Uses a value that depends on a parameter only between two layers and after them, as T5 does with its position bias."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        bias = self.bias.tanh()
        return self.layers[3](self.layers[0](x + bias) * bias)


class Unused(Chain):
    """Has a parameter that the step does not read, and a frozen one."""

    def __init__(self) -> None:
        super().__init__()
        self.more = nn.Linear(WIDTH, WIDTH)
        self.layers[0].bias.requires_grad_(False)


class Recomputed(Chain):
    """Keeps no activations."""

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.layers, x, use_reentrant=False)  # type: ignore[no-any-return]


class _Wrong(torch.autograd.Function):
    """Says something else when it is asked for the second time."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.asked = 0
        return x * weight

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        ctx.asked += 1
        return gradients[0] * weight, ctx.asked * (gradients[0] * x).sum(0)


class Changing(Chain):
    """Has a function whose gradient cannot be made twice."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return _Wrong.apply(self.layers(x), self.scale)  # type: ignore[no-any-return, no-untyped-call]


def stage(make: Callable[[], nn.Module]) -> tuple[nn.Module, Leaving]:
    """Return a stage and a microbatch that went through it."""
    torch.manual_seed(0)
    module = make().double()
    received = torch.randn(3, WIDTH, dtype=torch.float64, requires_grad=True)
    sent = left_stage(module(received))
    gradient = torch.randn(sent.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return module, Leaving(received=[received], sent=[sent], gradients=[gradient])


def gradients(module: nn.Module, leaving: Leaving) -> list[Tensor | None]:
    return [leaving.received[0].grad, *(parameter.grad for parameter in module.parameters())]


@pytest.mark.parametrize(
    ("make", "early"),
    [
        (Chain, set()),
        (Tied, {"layers.0.weight"}),  # used in two places
        (Beside, set()),
        (Twice, {"bias"}),  # of a value that depends on no input, used in two places
        (Unused, set()),
    ],
)
def test_halves_make_the_same_gradients(make: Callable[[], nn.Module], early: set[str]) -> None:
    whole = stage(make)
    whole[1].run()
    module, leaving = stage(make)
    run_to_parameters = leaving.run_to_inputs(list(module.parameters()))
    torch.testing.assert_close(leaving.received[0].grad, whole[1].received[0].grad, rtol=0.0, atol=1e-14)
    assert {name for name, parameter in module.named_parameters() if parameter.grad is not None} == early
    run_to_parameters()
    for found, expected in zip(gradients(module, leaving), gradients(*whole), strict=True):
        assert (found is None) == (expected is None)
        if found is not None:
            torch.testing.assert_close(found, expected, rtol=0.0, atol=1e-14)


@pytest.mark.parametrize("make", [Chain, Tied, Beside, Twice, Unused, Recomputed])
def test_a_trial_adds_the_gradients_of_one_pass(make: Callable[[], nn.Module]) -> None:
    whole = stage(make)
    whole[1].run()
    module, leaving = stage(make)
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter)
    try_halves(leaving, list(module.parameters()))
    for found, expected in zip(gradients(module, leaving)[1:], gradients(*whole)[1:], strict=True):
        wanted = torch.ones_like(found) if expected is None else 1.0 + expected  # type: ignore[arg-type]
        torch.testing.assert_close(found, wanted, rtol=0.0, atol=1e-14)


@pytest.mark.parametrize("make", [Chain, Tied, Beside, Twice, Unused])
def test_a_trial_finds_halves_right(make: Callable[[], nn.Module]) -> None:
    module, leaving = stage(make)
    assert try_halves(leaving, list(module.parameters())).reason == ""


@pytest.mark.parametrize(
    ("make", "reason"),
    [(Recomputed, "Sequential is computed again"), (Changing, "1 of 8 gradients would not be those")],
)
def test_a_trial_says_why_not(make: Callable[[], nn.Module], reason: str) -> None:
    module, leaving = stage(make)
    assert reason in try_halves(leaving, list(module.parameters())).reason


def test_a_trial_sees_a_lost_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    module, leaving = stage(Beside)
    reached = list(module.parameters())[:-2]  # as torch's halves alone would do
    monkeypatch.setattr(Leaving, "run_to_inputs", _only(reached, Leaving.run_to_inputs))
    assert "2 of" in try_halves(leaving, list(module.parameters())).reason


def _only(reached: list[nn.Parameter], plain: Any) -> Any:
    return lambda self, _parameters, **options: plain(self, reached, **options)


def test_overflow_is_no_reason() -> None:
    module, leaving = stage(Chain)
    leaving.gradients[0].fill_(torch.inf)
    assert try_halves(leaving, list(module.parameters())).reason == ""


class _Consuming(torch.autograd.Function):
    """Scales what it has saved in place, as fused losses do: only its first gradient is right."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward((x * weight).cos(), weight)
        return (x * weight).sin()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        kept, weight = ctx.saved_tensors
        kept.mul_(gradients[0])
        return kept * weight, kept.sum(0)


class Consuming(Changing):
    """Has a function that can be derived once."""

    def forward(self, x: Tensor) -> Tensor:
        return _Consuming.apply(self.layers(x), self.scale)  # type: ignore[no-any-return, no-untyped-call]


def test_the_gradients_of_a_trial_are_those_of_the_first_pass() -> None:
    whole = stage(Consuming)
    whole[1].run()
    module, leaving = stage(Consuming)
    assert try_halves(leaving, list(module.parameters())).reason, "it cannot be derived again"
    for found, expected in zip(gradients(module, leaving), gradients(*whole), strict=True):
        torch.testing.assert_close(found, expected, rtol=0.0, atol=0.0)


class Hooked(Chain):
    """Scales gradients of activations in hooks."""

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
            x.register_hook(lambda gradient: 0.5 * gradient)
        return x


def test_hooks_of_activations_count_once() -> None:
    whole = stage(Hooked)
    whole[1].run()
    module, leaving = stage(Hooked)
    leaving.run_to_inputs(list(module.parameters()))()
    for found, expected in zip(gradients(module, leaving), gradients(*whole), strict=True):
        torch.testing.assert_close(found, expected, rtol=0.0, atol=1e-14)


def test_a_trial_without_gradients_says_nothing() -> None:
    module, leaving = stage(Chain)
    assert try_halves(leaving, list(module.parameters())).is_sound
    module, leaving = stage(Chain)
    leaving.gradients[0].zero_()
    assert not try_halves(leaving, list(module.parameters())).is_sound
    module, leaving = stage(Chain)
    leaving.gradients[0].fill_(torch.nan)
    assert not try_halves(leaving, list(module.parameters())).is_sound
