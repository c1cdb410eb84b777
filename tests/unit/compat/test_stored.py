"""If these fail, whoever uses a tensor that stays in a file gets other values, loses changes, or all of it at once in memory."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
from collections.abc import Callable, Iterator

import pytest
import torch

from meshbolt.compat import StoredTensor, box_span, box_view, boxes_of, copy_runs, cut_box

SHAPES = [(), (7,), (4, 5), (1, 9), (3, 1, 4), (2, 3, 4, 2)]


class Runs:
    """Gives values in runs of three, and notes what it was asked for."""

    def __init__(self, values: torch.Tensor) -> None:
        self.values = values
        self.asked: list[tuple[int, int]] = []

    def read(self, start: int, stop: int) -> Iterator[torch.Tensor]:
        self.asked.append((start, stop))
        for first in range(start, stop, 3):
            yield self.values.reshape(-1)[first : min(first + 3, stop)].clone()


def stored(shape: tuple[int, ...], *, write: bool = False) -> tuple[StoredTensor, Runs]:
    store = Runs(torch.arange(float(math.prod(shape))).view(shape))
    return StoredTensor(store, shape=shape, dtype=torch.float32, write=store.values.copy_ if write else None), store


def slices(box: tuple[tuple[int, int], ...]) -> tuple[slice, ...]:
    return tuple(slice(*each) for each in box)


@pytest.mark.parametrize("shape", SHAPES)
def test_boxes_are_all_elements_of_a_range_in_their_order(shape: tuple[int, ...]) -> None:
    whole = torch.arange(math.prod(shape)).view(shape)
    for start, stop in itertools.combinations(range(whole.numel() + 1), 2):
        found = [whole[slices(box)].reshape(-1) for box in boxes_of(shape, start, stop)]
        assert torch.cat(found).tolist() == list(range(start, stop))
    assert list(boxes_of(shape, 0, 0)) == []


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("limit", [1, 2, 5, 100])
def test_a_box_is_cut_into_parts_that_lie_within_a_limit(shape: tuple[int, ...], limit: int) -> None:
    whole = torch.arange(math.prod(shape)).view(shape)
    ranges = [list(itertools.combinations(range(size + 1), 2)) for size in shape]
    for box in itertools.product(*ranges):
        parts = list(cut_box(box, shape, limit))
        spans = [box_span(part, shape) for part in parts]
        assert all(last - first <= limit for first, last in spans)
        found = [
            box_view(whole.reshape(-1)[first:last].clone(), part, shape).reshape(-1)
            for part, (first, last) in zip(parts, spans, strict=True)
        ]
        assert torch.cat(found).tolist() == whole[slices(box)].reshape(-1).tolist()


def test_shape_and_dtype_are_known_and_an_alias_and_a_part_are_made_without_reading() -> None:
    tensor, store = stored((4, 5))
    part = tensor.detach().part((slice(1, 3), slice(0, 5)))
    assert (tensor.shape, tensor.dtype, tensor.device.type, part.shape) == ((4, 5), torch.float32, "cpu", (2, 5))
    assert tensor.part((slice(0, 4), slice(0, 5))) is tensor
    assert tensor.as_dtype(torch.float32) is tensor
    assert not store.asked


@pytest.mark.parametrize("place", [(slice(1, 3), slice(0, 5)), (slice(0, 4), slice(1, 3)), (slice(2, 2), slice(0, 5))])
def test_a_part_has_the_values_of_the_part(place: tuple[slice, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("meshbolt.compat.stored.RUN_BYTES", 28)
    tensor, store = stored((4, 5))
    part, expected = tensor.part(place), store.values[place]
    assert torch.equal(part.value(), expected)
    assert all(stop - start <= 7 for start, stop in store.asked)
    flat = expected.reshape(-1)
    for start, stop in itertools.combinations(range(part.numel() + 1), 2):
        assert torch.cat(list(part.runs(start, stop))).tolist() == flat[start:stop].tolist()


def test_values_are_cast_as_they_are_copied() -> None:
    tensor, store = stored((4, 5))
    into = torch.empty(9, dtype=torch.bfloat16)
    copy_runs(tensor, into=into, start=6)
    assert torch.equal(into, store.values.view(-1)[6:15].bfloat16())
    assert torch.equal(tensor.as_dtype(torch.float64).value(), store.values.double())


@pytest.mark.parametrize(
    "operation",
    [
        lambda x: x + x,
        lambda x: x.to(torch.bfloat16),
        lambda x: torch.cat([x, x]),
        lambda x: torch.tensor(x.tolist()),
        copy.deepcopy,
        lambda x: pickle.loads(pickle.dumps(x)),
    ],
)
def test_any_operation_sees_the_values(operation: Callable[[torch.Tensor], torch.Tensor]) -> None:
    tensor, store = stored((4, 5))
    found = operation(tensor)
    assert not isinstance(found, StoredTensor)
    assert torch.equal(found, operation(store.values))


@pytest.mark.parametrize("change", [lambda x: x.mul_(2), lambda x: x.detach().fill_(7), lambda x: x.copy_(x + 1)])
def test_a_change_of_all_of_it_is_written_to_who_takes_it(change: Callable[[torch.Tensor], object]) -> None:
    tensor, store = stored((4, 5), write=True)
    expected = store.values.clone()
    change(tensor)
    change(expected)
    assert torch.equal(store.values, expected)
    assert tensor.kept is None


@pytest.mark.parametrize(
    "change", [lambda x: x[1].zero_(), lambda x: x.view(-1)[3:7].fill_(9), lambda x: x.numpy().fill(5)]
)
def test_a_change_of_a_part_is_kept_until_it_is_let_go(change: Callable[[torch.Tensor], object]) -> None:
    tensor, store = stored((4, 5), write=True)
    before = store.values.clone()
    expected = before.clone()
    change(tensor)
    change(expected)
    assert torch.equal(store.values, before)
    assert torch.equal(torch.cat(list(tensor.runs())), expected.view(-1))
    assert torch.equal(tensor.let_go(), expected)
    assert tensor.kept is None
    assert torch.equal(tensor + 0, before)


def test_one_that_was_made_in_inference_mode_can_be_changed_after_it() -> None:
    values = torch.zeros(4, 5)
    with torch.inference_mode():
        tensor = StoredTensor(Runs(values), shape=(4, 5), dtype=torch.float32, write=values.copy_)
    tensor.add_(1)
    assert values.sum() == 20
