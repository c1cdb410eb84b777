"""What layers leave each other beside arguments and results is refused by name, or found when stages are compared."""

from __future__ import annotations

import collections
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from meshbolt.errors import UnsupportedError
from meshbolt.pipeline import PipelineReport, choose_cuts, compare_stages, emulate

CPU = torch.device("cpu")
Between = Callable[["Layer", Tensor, dict[str, Tensor]], Tensor]
LAST: Any = None


class Layer(nn.Module):
    """Does with what it has computed what a test says."""

    def __init__(self, number: int, shared: SimpleNamespace, between: Between) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.number, self.shared, self.between = number, shared, between

    def forward(self, x: Tensor, given: dict[str, Tensor]) -> Tensor:
        return self.between(self, torch.tanh(self.linear(x)), given)


class Net(nn.Module):
    """Four layers, which share an object and a dictionary."""

    def __init__(self, between: Between, after: Callable[[Net], Any] = lambda _net: 0.0) -> None:
        super().__init__()
        self.shared = SimpleNamespace(values=[], count=0)
        self.layers = nn.ModuleList(Layer(number, self.shared, between) for number in range(4))
        self.head = nn.Linear(4, 1)
        self.memory = nn.BatchNorm1d(4)
        self.after = after

    def forward(self, x: Tensor) -> Tensor:
        self.shared.values.clear()
        self.shared.count, given = 0, dict[str, Tensor]()
        self.shared.memory = self.memory.running_mean
        for layer in self.layers:
            x = layer(x, given)
        return self.head(x).mean() + self.after(self)


def in_attribute(layer: Layer, y: Tensor, given: dict[str, Tensor]) -> Tensor:
    layer.cache = 2 * y
    return y


def of_neighbour(layer: Layer, y: Tensor, given: dict[str, Tensor]) -> Tensor:
    y = y if layer.number == 0 else y + layer.shared.cache
    layer.shared.cache = 2 * y
    return y


def in_list(layer: Layer, y: Tensor, given: dict[str, Tensor]) -> Tensor:
    layer.shared.values.append(y.square().mean())
    return y


def in_argument(layer: Layer, y: Tensor, given: dict[str, Tensor]) -> Tensor:
    if layer.number == 0:
        given["early"] = 2 * y
    return y + given["early"] if layer.number == 3 else y


def in_global(layer: Layer, y: Tensor, given: dict[str, Tensor]) -> Tensor:
    global LAST
    if layer.number == 0:
        LAST = 2 * y
    return y + LAST if layer.number == 3 else y


def counted(layer: Layer, y: Tensor, given: dict[str, Tensor]) -> Tensor:
    layer.shared.count += 1
    return y * layer.shared.count


def counted_in_class(layer: Layer, y: Tensor, given: dict[str, Tensor]) -> Tensor:
    Counter.count += 1
    return y * Counter.count


class Counter(Layer):
    count = 0


def of_first(layer: Layer, y: Tensor, given: dict[str, Tensor]) -> Tensor:
    if layer.number == 0:
        layer.shared.mask = torch.ones(4)
    return y * layer.shared.mask


def in_buffer(layer: Layer, y: Tensor, given: dict[str, Tensor]) -> Tensor:
    if layer.number == 0:
        layer.shared.memory.copy_(y.detach().mean(dim=0))
    return y + layer.shared.memory if layer.number == 3 else y


def lazily(layer: Layer, y: Tensor, given: dict[str, Tensor]) -> Tensor:
    if not hasattr(layer.shared, "mask"):
        layer.shared.mask = torch.arange(4.0)
    return y * layer.shared.mask


def within_a_stage(layer: Layer, y: Tensor, given: dict[str, Tensor]) -> Tensor:
    if layer.number % 2 == 0:
        layer.shared.even = 2 * y
        return y
    return y + layer.shared.even


def sizes_only(layer: Layer, y: Tensor, given: dict[str, Tensor]) -> Tensor:
    if layer.number == 3:
        values = layer.shared.values
        return y * (sum(value.numel() + value.size(0) + value.dim() for value in values) > 0 or not values)
    layer.shared.values.append(y * 2)
    return y


def compared(net: Net) -> PipelineReport:
    net.double()
    x = torch.randn(3, 4, dtype=torch.float64)
    return compare_stages(net, [lambda: net(x), lambda: net(x + 1)], ["layers.2"], loss_of=lambda result: result)


def sum_of_attributes(net: Net) -> Any:
    return sum(layer.cache.mean() for layer in net.layers)


@pytest.mark.parametrize(
    ("net", "message"),
    [
        (
            Net(in_attribute, sum_of_attributes),
            r"layers\.0 makes a value of \[3, 4\] on stage 0 and leaves it in the attribute 'cache' of layers\.0, where the code "
            r"outside of modules reads it on stage 1",
        ),
        (Net(of_neighbour), r"layers\.1 makes .* leaves it in the attribute 'shared' of Net, where layers\.2 reads it"),
        (
            Net(in_list, lambda net: sum(net.shared.values)),
            r"layers\.0 makes a value of \[\] .*'shared' of Net, where the",
        ),
        (Net(in_list, lambda net: torch.stack(net.shared.values).sum()), r"A loss that layers add up in this way"),
        (Net(in_argument), r"layers\.0 makes .* in a dictionary or list that it is called with, where layers\.2 reads"),
        (
            Net(in_global),
            r"layers\.0 makes .* in an object of its own, such as .* global variable, where layers\.3 reads",
        ),
    ],
)
def test_a_value_that_a_layer_leaves_for_a_later_stage_is_refused_by_name(net: Net, message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        compared(net)


def test_other_state_that_a_layer_leaves_is_found_when_stages_are_compared() -> None:
    report = compared(Net(counted))
    assert not report.is_equal
    assert "NOT EQUAL" in str(report)
    assert "in an attribute, a list or a generator" in str(report)


def test_what_is_counted_in_a_class_is_found_and_counts_on_from_where_it_was() -> None:
    Counter.count = 0
    net = Net(counted)
    net.layers = nn.ModuleList(Counter(number, net.shared, counted_in_class) for number in range(4))
    assert not compared(net).is_equal
    assert Counter.count == 0


def test_a_stage_that_lacks_what_an_earlier_layer_has_left_ends_with_a_reason() -> None:
    with pytest.raises(UnsupportedError, match=r"Stage 1 ends with AttributeError.*does not run that layer"):
        compared(Net(of_first))


@pytest.mark.parametrize("between", [lazily, within_a_stage, in_list, in_attribute, sizes_only])
def test_what_every_stage_makes_or_nobody_reads_elsewhere_is_no_matter(between: Between) -> None:
    assert compared(Net(between)).is_equal


def test_cuts_are_chosen_where_one_stage_has_writer_and_reader() -> None:
    def between(layer: Layer, y: Tensor, given: dict[str, Tensor]) -> Tensor:
        if layer.number == 1:
            layer.shared.early = 2 * y
        return y + layer.shared.early if layer.number == 2 else y

    net = Net(between)
    (cut,) = choose_cuts(net, lambda: net(torch.ones(3, 4)), 2, device=CPU)
    assert cut != "layers.2"


def in_deque(layer: Layer, y: Tensor, given: dict[str, Tensor]) -> Tensor:
    layer.shared.last.append(1.0)
    return y * len(layer.shared.last)


class Fixed(dict[str, int]):
    """A dictionary that refuses to be changed, as some that models return do."""

    def update(self, *_: Any, **__: Any) -> None:
        raise AssertionError


def test_containers_of_other_kinds_are_kept_apart_or_left_alone() -> None:
    net = Net(in_deque)
    net.shared.last, net.fixed = collections.deque([0.0], maxlen=50), Fixed(a=1)
    assert not compared(net).is_equal
    assert list(net.shared.last) == [0.0]
    assert net.shared.last.maxlen == 50
    assert net.fixed == {"a": 1}


def test_comparing_leaves_attributes_as_they_were() -> None:
    net = Net(in_list)
    net.shared.values.append(torch.zeros(()))
    net.shared.count = 7
    compared(net)
    assert (len(net.shared.values), net.shared.count) == (1, 7)


def test_running_keeps_the_last_stages_attributes() -> None:
    net = Net(counted)
    emulate(net, [lambda: net(torch.ones(3, 4))], ["layers.2"])
    assert net.shared.count == 2  # as on the rank of the last stage, which has two of the layers
