"""Modules that every stage keeps: what they return crosses no cut, and their gradients are those of one stage."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from meshbolt.errors import ConfigError, UnsupportedError
from meshbolt.pipeline import Call, Calls, PipelineParallel, analyse, cuts_of, emulate
from meshbolt.pipeline.plan import PipelinePlan

CPU = torch.device("cpu")
WIDTH, WORDS, LAYERS = 6, 11, 4
CUTS = ("layers.1", "layers.2")

Forward = Callable[["Net", Tensor], Tensor]


class Conditioning(nn.Module):
    """A small network with dropout and running statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WORDS, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.norm, self.drop = nn.BatchNorm1d(2 * WIDTH), nn.Dropout(0.2)

    def forward(self, ids: Tensor) -> Tensor:
        counts = F.one_hot(ids, WORDS).sum(dim=1).to(self.up.weight.dtype)
        return self.down(self.drop(torch.tanh(self.norm(self.up(counts)))))


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.drop = nn.Linear(WIDTH, WIDTH), nn.Dropout(0.1)

    def forward(self, x: Tensor, beside: Tensor | None = None) -> Tensor:
        return x + self.drop(torch.tanh(self.linear(x if beside is None else x + beside)))


class Net(nn.Module):
    def __init__(self, forward: Forward) -> None:
        super().__init__()
        self.words, self.of_layers = nn.Embedding(WORDS, WIDTH), nn.Embedding(WORDS, LAYERS * WIDTH)
        self.conditions = Conditioning()
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.head = nn.Linear(WIDTH, WORDS, bias=False)
        self.how = forward

    def forward(self, ids: Tensor) -> Tensor:
        return F.cross_entropy(self.head(self.how(self, ids)).transpose(1, 2), ids)


def inputs_of_layers(net: Net, ids: Tensor) -> Tensor:
    """As Gemma 3n does: each layer has words of its own, which are read at once."""
    x, beside = net.words(ids), net.of_layers(ids).unflatten(-1, (LAYERS, WIDTH)) * 0.5
    for number, layer in enumerate(net.layers):
        x = layer(x, beside[:, :, number])
    return x


def words_by_a_function(net: Net, ids: Tensor) -> Tensor:
    """The words' embedding is read again by a function, and used between layers."""
    again = F.embedding(ids, net.words.weight) * 0.5
    x = net.words(ids)
    for number, layer in enumerate(net.layers):
        x = layer(x) + (again if number == 1 else 0)
    return F.linear(x, net.words.weight.T @ net.words.weight)


def conditioned(net: Net, ids: Tensor) -> Tensor:
    """What a small network returns is added between layers."""
    condition = F.silu(net.conditions(ids))[:, None]
    x = net.words(ids)
    for layer in net.layers:
        x = layer(x) + condition
    return x


def conditioned_by_argument(net: Net, ids: Tensor) -> Tensor:
    """What a small network returns is read by all layers."""
    condition = F.silu(net.conditions(ids))[:, None]
    x = net.words(ids)
    for layer in net.layers:
        x = layer(x, condition)
    return x


ROWS = [
    (inputs_of_layers, ("of_layers",), "of_layers.weight"),
    (words_by_a_function, ("words",), "words.weight"),
    (conditioned, ("conditions",), "conditions.up.weight"),
]


def made(forward: Forward, *, tied: bool = False) -> tuple[Net, list[Callable[[], Tensor]]]:
    torch.manual_seed(0)
    net = Net(forward).double()
    if tied:
        net.head.weight = net.words.weight
    batches = torch.randint(WORDS, (2, 3, 5), generator=torch.Generator().manual_seed(1))
    return net, [lambda batch=batch: net(batch) for batch in batches]  # type: ignore[misc]


def trained(net: Net) -> dict[str, Any]:
    gradients = {f"{name}.grad": each.grad for name, each in net.named_parameters() if each.grad is not None}
    return {**gradients, **dict(net.named_buffers())}


def cut(
    forward: Forward, replicate: Sequence[str], cuts: Sequence[str] = CUTS, *, tied: bool = False
) -> tuple[dict[str, Any], PipelinePlan]:
    net, steps = made(forward, tied=tied)
    losses, plan = emulate(net, steps, cuts, replicate=replicate, seed=3)
    return {**trained(net), "losses": torch.stack([loss.detach() for loss in losses])}, plan


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("forward", "replicate", "kept"), ROWS)
def test_stages_that_keep_a_module_train_as_one(
    forward: Forward, replicate: tuple[str, ...], kept: str, tied: bool
) -> None:
    found, plan = cut(forward, replicate, tied=tied)
    expected, _ = cut(forward, (), (), tied=tied)
    torch.testing.assert_close(found, expected, rtol=0.0, atol=1e-12)
    assert plan.tied()[kept] == (0, 1, 2)
    assert ("head.weight" in plan.tied()) == tied
    assert all(len(crossing) == 1 for crossing in plan.crossings)


@pytest.mark.parametrize(("forward", "replicate", "kept"), ROWS)
def test_without_it_the_value_that_jumps_a_cut_is_refused_and_the_remedy_named(
    forward: Forward, replicate: tuple[str, ...], kept: str
) -> None:
    with pytest.raises(
        UnsupportedError, match=r"on stage 0 that is read on stage [12].* in `replicate`, or cut elsewhere"
    ):
        cut(forward, ())


@pytest.mark.parametrize(("forward", "replicate", "kept"), ROWS)
def test_it_is_the_whole_models_gradient_without_dropout(
    forward: Forward, replicate: tuple[str, ...], kept: str
) -> None:
    net, steps = made(forward)
    for each in net.modules():
        if isinstance(each, nn.Dropout):
            each.p = 0.0
    emulate(net, steps, CUTS, replicate=replicate)
    found = copy.deepcopy(trained(net))
    net.zero_grad()
    for name, buffer in made(forward)[0].named_buffers():
        net.get_buffer(name).copy_(buffer)
    for step in steps:
        step().backward()
    torch.testing.assert_close(found, trained(net), rtol=0.0, atol=1e-12)


@pytest.mark.parametrize(("forward", "replicate", "kept"), ROWS)
def test_a_module_without_values_is_cut_alike(forward: Forward, replicate: tuple[str, ...], kept: str) -> None:
    def plan(net: Net) -> PipelinePlan:
        calls = Calls(net, CUTS, replicate=replicate)
        try:
            return analyse(net, calls, lambda: net(torch.zeros(3, 5, dtype=torch.long)), device=CPU)
        finally:
            calls.remove()

    real = made(forward)[0]
    with torch.device("meta"):
        empty = Net(forward).double()
    before = dict(empty.named_parameters())
    assert plan(empty).crossings == plan(real).crossings
    assert plan(empty).stages_of == plan(real).stages_of
    assert dict(empty.named_parameters()) == before


def test_a_stage_is_not_begun_with_what_all_keep() -> None:
    class Uneven(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.kept, self.last = nn.Linear(64, 64), nn.Linear(64, 32), nn.Linear(64, 1)

        def forward(self, x: Tensor) -> Tensor:
            first = self.first(x)
            return self.last(first + torch.cat([self.kept(x)] * 2, dim=1)).mean()

    net, x = Uneven(), torch.ones(8, 64)

    def cuts(*replicate: str) -> tuple[str, ...]:
        return cuts_of(net, PipelineParallel(2, replicate=replicate), lambda: net(x), device=CPU)

    assert cuts() == ("kept",)
    assert cuts("kept") == ("last",)


class Box:
    """Holds a tensor where nobody looks for one."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


class Boxing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Conditioning()

    def forward(self, ids: Tensor) -> Box:
        return Box(self.inner(ids))


def test_a_kept_module_may_return_anything() -> None:
    def conditioned_by_box(net: Net, ids: Tensor) -> Tensor:
        box = net.boxing(ids)
        x = net.words(ids)
        for layer in net.layers:
            x = layer(x) + box.tensor[:, None]
        return x

    def run(cuts: Sequence[str], replicate: Sequence[str]) -> dict[str, Any]:
        net, steps = made(conditioned_by_box)
        net.boxing = Boxing().double()
        emulate(net, steps, cuts, replicate=replicate, seed=3)
        return trained(net)

    torch.manual_seed(0)
    expected = run((), ())
    torch.manual_seed(0)
    torch.testing.assert_close(run(CUTS, ("boxing",)), expected, rtol=0.0, atol=1e-12)


def test_what_a_kept_module_updates_counts_once_for_each_microbatch_of_a_process() -> None:
    calls = Calls(made(conditioned)[0], CUTS, replicate=("conditions",))
    calls.remove()
    for _step in range(2):
        for microbatch in range(2):
            ran = calls.ran_before(stage=1, microbatch=microbatch)
            assert ran == set()
            ran.add(Call("conditions"))
        for microbatch in range(2):
            assert calls.ran_before(stage=2, microbatch=microbatch) == {Call("conditions")}


def test_an_argument_of_all_layers_need_not_be_sent() -> None:
    sent, crossing = cut(conditioned_by_argument, ())
    kept, crossing_kept = cut(conditioned_by_argument, ("conditions",))
    torch.testing.assert_close(kept, sent, rtol=0.0, atol=1e-12)
    assert [len(each) for each in crossing.crossings] == [2, 2]
    assert [len(each) for each in crossing_kept.crossings] == [1, 1]


@pytest.mark.parametrize(
    ("replicate", "message"),
    [
        (["word"], r"replicate: Net has no module 'word' \(did you mean 'words'\?"),
        (["layers"], r"a stage begins with 'layers\.1', and 'layers' is to be kept whole"),
        (["layers.1"], r"a stage begins with 'layers\.1', and 'layers\.1' is to be kept whole"),
        ([""], r"no module ''"),
    ],
)
def test_what_cannot_be_kept_is_refused(replicate: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        cut(conditioned, replicate)
