"""If these fail, whoever handles a tensor that is not read yet gets other values than those saved, or all of them at once."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable

import pytest
import torch
from torch import nn

from meshbolt.checkpoint import TensorInfo
from meshbolt.checkpoint.lazy import LazyTensor, observed


class Counted:
    """Gives values, and counts how often."""

    def __init__(self, values: torch.Tensor) -> None:
        self.values, self.reads = values, 0

    def __call__(self) -> torch.Tensor:
        self.reads += 1
        return self.values.clone()


@pytest.fixture
def source() -> Counted:
    return Counted(torch.arange(6.0).view(2, 3))


def lazy(source: Counted, *, keeps_parts: bool = True) -> LazyTensor:
    info = TensorInfo(shape=tuple(source.values.shape), dtype=source.values.dtype)
    return LazyTensor(source, info=info, keeps_parts=keeps_parts)


def test_shape_and_dtype_are_known_without_reading(source: Counted) -> None:
    tensor = lazy(source)
    assert isinstance(tensor, torch.Tensor)
    assert (tensor.shape, tensor.dtype, tensor.device.type, tensor.nbytes) == ((2, 3), torch.float32, "cpu", 24)
    assert not tensor.is_pinned()
    assert source.reads == 0


def test_a_copy_into_a_parameter_reads_and_keeps_nothing(source: Counted) -> None:
    tensor, layer = lazy(source), nn.Linear(3, 2, bias=False)
    layer.load_state_dict({"weight": tensor})
    layer.load_state_dict({"weight": tensor})
    assert torch.equal(layer.weight, source.values)
    assert source.reads == 2


@pytest.mark.parametrize(
    "operation",
    [
        lambda x: x + 1,
        lambda x: x.to(torch.bfloat16),
        lambda x: torch.cat([x, x]),
        lambda x: x.sum(),
        lambda x: x.tolist(),
    ],
)
def test_operations_see_the_values(source: Counted, operation: Callable[[torch.Tensor], object]) -> None:
    found, expected = operation(lazy(source)), operation(source.values)
    assert torch.equal(found, expected) if isinstance(expected, torch.Tensor) else found == expected
    assert not isinstance(found, LazyTensor)


@pytest.mark.parametrize(
    "change",
    [lambda x: x.mul_(2), lambda x: x[0].zero_(), lambda x: x.detach().fill_(7), lambda x: x.numpy().fill(5)],
)
def test_changes_in_place_stay_whether_of_the_whole_or_of_a_part(
    source: Counted, change: Callable[[torch.Tensor], object]
) -> None:
    tensor, expected = lazy(source), source.values.clone()
    change(tensor)
    change(expected)
    assert torch.equal(tensor + 0, expected)


def test_who_only_writes_tensors_may_take_aliases_that_are_not_kept(source: Counted) -> None:
    tensor = lazy(source, keeps_parts=False)
    assert torch.equal(tensor.detach(), source.values)
    assert torch.equal(tensor.detach(), source.values)
    assert source.reads == 2


def test_copies_and_pickles_have_the_values(source: Counted) -> None:
    content = io.BytesIO()
    torch.save({"x": lazy(source)}, content)
    content.seek(0)
    assert torch.equal(torch.load(content, weights_only=True)["x"], source.values)
    copied = copy.deepcopy(lazy(source))
    assert type(copied) is torch.Tensor
    assert torch.equal(copied, source.values)


def test_an_observed_tensor_tells_of_each_read(source: Counted) -> None:
    told: list[int] = []
    tensor = observed(lazy(source), told.append)
    assert torch.equal(tensor + 0, source.values)
    assert torch.equal(observed(source.values, told.append) + 0, source.values)
    assert told == [24, 24]
