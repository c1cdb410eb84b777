"""If these fail, a rank computes with other elements than its own.

The arithmetic is compared with the elements themselves: a tensor is numbered, cut into parts, and the parts are looked at.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from meshbolt.tensor.axis import ImaginedAxis
from meshbolt.tensor.exchange import all_parts, joined, own_part
from meshbolt.tensor.layout import (
    Layout,
    SplitLostError,
    dim_from_front,
    local_shape,
    narrowed,
    resolved_shape,
    viewed,
    whole_shape,
    whole_strides,
)


def as_rank(rank: int, ranks: int) -> ImaginedAxis:
    axis = ImaginedAxis(ranks, on_gather=lambda *_: None)
    axis.rank = rank
    return axis


def numbered(shape: Sequence[int]) -> Tensor:
    return torch.arange(math.prod(shape)).view(tuple(shape))


def parts_of(whole: Tensor, layout: Layout, ranks: int) -> list[Tensor]:
    return [own_part(whole, layout, as_rank(rank, ranks)) for rank in range(ranks)]


def fits(shape: Sequence[int], layout: Layout, ranks: int) -> bool:
    return shape[layout.dim] > 0 and shape[layout.dim] % (layout.sections * ranks) == 0


@st.composite
def groupings(draw: st.DrawFn, factors: Sequence[int]) -> tuple[int, ...]:
    """Draw a shape of as many elements as the product of the factors, which are multiplied in their order, with ones between."""
    shape: list[int] = []
    for factor in factors:
        if shape and draw(st.booleans()):
            shape[-1] *= factor
        else:
            shape.append(factor)
        if draw(st.integers(0, 4)) == 0:
            shape.append(1)
    return tuple(shape or [1])


@st.composite
def views(draw: st.DrawFn) -> tuple[tuple[int, ...], Layout, tuple[int, ...], int]:
    """Draw a shape, how it is split, another shape of the same elements, and a number of ranks."""
    factors = draw(st.lists(st.sampled_from([2, 2, 2, 3, 4, 5]), min_size=1, max_size=6))
    shape = draw(groupings(factors))
    wanted = draw(groupings(factors if draw(st.booleans()) else draw(st.permutations(factors))))
    ranks = draw(st.sampled_from([2, 3, 4]))
    layouts = [
        Layout(dim, sections)
        for dim in range(len(shape))
        for sections in (1, 2, 3, 4, 6)
        if fits(shape, Layout(dim, sections), ranks)
    ]
    if not layouts:
        return (*shape, ranks), Layout(len(shape)), (*wanted, ranks), ranks
    return shape, draw(st.sampled_from(layouts)), wanted, ranks


@settings(max_examples=400, deadline=None)
@given(views())
def test_a_view_of_a_part_is_the_part_of_the_view(drawn: tuple[tuple[int, ...], Layout, tuple[int, ...], int]) -> None:
    shape, layout, wanted, ranks = drawn
    parts = parts_of(numbered(shape), layout, ranks)
    try:
        found = viewed(shape, layout, wanted, ranks)
    except SplitLostError:
        possible = [
            candidate
            for dim in range(len(wanted))
            for sections in range(1, wanted[dim] + 1)
            if fits(wanted, candidate := Layout(dim, sections), ranks)
            and all(
                torch.equal(part.flatten(), own.flatten())
                for part, own in zip(parts, parts_of(numbered(wanted), candidate, ranks), strict=True)
            )
        ]
        assert possible == []
        return
    inner = local_shape(wanted, found, ranks)
    for part, own in zip(parts, parts_of(numbered(wanted), found, ranks), strict=True):
        assert torch.equal(part.reshape(inner), own)


@settings(max_examples=300, deadline=None)
@given(
    ranks=st.sampled_from([2, 3, 4]),
    sections=st.integers(1, 4),
    each=st.integers(1, 3),
    where=st.tuples(st.integers(-2, 50), st.integers(0, 50)),
    in_sections=st.booleans(),
)
def test_a_range_of_a_part_is_the_part_of_the_range(
    ranks: int, sections: int, each: int, where: tuple[int, int], in_sections: bool
) -> None:
    section = ranks * each
    size, layout = sections * section, Layout(1, sections)
    start, length = where
    if in_sections:
        start, length = start % sections * section, length % (sections + 1) * section
    whole = numbered((2, size))
    try:
        found, own_start, own_length = narrowed(size, layout, start, length, ranks)
    except SplitLostError:
        assert start < 0 or start + length > size or start % section or length % section or not length
        return
    wanted = parts_of(whole.narrow(1, start, length), found, ranks)
    parts = parts_of(whole, layout, ranks)
    for part, own in zip(parts, wanted, strict=True):
        assert torch.equal(part.narrow(1, own_start, own_length), own)


@settings(max_examples=100, deadline=None)
@given(views())
def test_parts_make_up_the_whole_again(drawn: tuple[tuple[int, ...], Layout, tuple[int, ...], int]) -> None:
    shape, layout, _, ranks = drawn
    whole = numbered(shape)
    parts = torch.stack(parts_of(whole, layout, ranks))
    assert parts[0].shape == local_shape(shape, layout, ranks)
    assert whole_shape(parts[0].shape, layout, ranks) == shape
    assert torch.equal(parts, all_parts(whole, layout, as_rank(0, ranks)))
    assert torch.equal(joined(parts, layout), whole)


@settings(max_examples=100, deadline=None)
@given(views(), st.randoms(use_true_random=False))
def test_strides_of_a_part_tell_those_of_the_whole(
    drawn: tuple[tuple[int, ...], Layout, tuple[int, ...], int], random: object
) -> None:
    shape, layout, _, ranks = drawn
    order = list(range(len(shape)))
    random.shuffle(order)  # type: ignore[attr-defined]
    # In this order in memory: (dims outside first), as after a permutation.
    whole = torch.empty([shape[dim] for dim in order]).permute([order.index(dim) for dim in range(len(shape))])
    part = torch.empty([local_shape(shape, layout, ranks)[dim] for dim in order])
    part = part.permute([order.index(dim) for dim in range(len(shape))])
    strides = whole_strides(part.shape, part.stride(), layout, ranks)
    # A dim of one element may have any stride.
    if 1 not in shape:
        assert strides == whole.stride()


def test_the_picture_of_sections_holds() -> None:
    assert [part.tolist() for part in parts_of(torch.arange(12), Layout(0), 2)] == [
        [0, 1, 2, 3, 4, 5],
        [6, 7, 8, 9, 10, 11],
    ]
    assert [part.tolist() for part in parts_of(torch.arange(12), Layout(0, 3), 2)] == [
        [0, 1, 4, 5, 8, 9],
        [2, 3, 6, 7, 10, 11],
    ]


@pytest.mark.parametrize(
    ("shape", "layout", "wanted", "found"),
    [
        ((2, 6, 24), Layout(2), (2, 6, 4, 6), Layout(2)),
        ((2, 6, 24), Layout(2, 3), (2, 6, 3, 4, 2), Layout(3)),
        ((2, 6, 24), Layout(2, 3), (2, 6, 12, 2), Layout(2, 3)),
        ((2, 6, 4, 6), Layout(2), (2, 6, 24), Layout(2)),
        ((2, 6, 24), Layout(2), (12, 24), Layout(1)),
        ((2, 6, 24), Layout(1), (12, 24), Layout(0, 2)),
        ((12, 24), Layout(0, 2), (2, 6, 24), Layout(1)),
        ((24,), Layout(0), (24, 1, 1), Layout(0)),
        ((1, 24), Layout(1), (24,), Layout(0)),
    ],
)
def test_views_of_attention_are_followed(
    shape: tuple[int, ...], layout: Layout, wanted: tuple[int, ...], found: Layout
) -> None:
    assert viewed(shape, layout, wanted, 2) == found


def test_a_view_that_one_split_more_would_allow_says_so() -> None:
    with pytest.raises(SplitLostError, match="no dim that 4 ranks can divide") as caught:
        viewed((2, 36), Layout(1), (2, 3, 12), 4)
    assert caught.value.sections == 3


def test_a_range_that_more_sections_would_allow_says_so() -> None:
    with pytest.raises(SplitLostError, match="elements 12 to 24 of the split dim of 36") as caught:
        narrowed(36, Layout(0), 12, 12, 2)
    assert caught.value.sections == 3


@pytest.mark.parametrize("shape", [(7,), (4, 6)])
def test_what_the_ranks_cannot_share_is_refused(shape: tuple[int, ...]) -> None:
    layout = Layout(len(shape) - 1, 2)
    with pytest.raises(SplitLostError, match=f"{shape[-1]} cannot be divided into 2 x 2 equal parts"):
        own_part(numbered(shape), layout, as_rank(0, 2))


def test_a_size_left_open_is_found() -> None:
    assert resolved_shape((4, 6), (2, -1, 3)) == (2, 4, 3)
    assert resolved_shape((4, 6), (24,)) == (24,)
    assert resolved_shape((0, 6), (0, -1)) == (0, 0)


def test_dims_are_counted_from_the_front() -> None:
    assert [dim_from_front(dim, 3) for dim in (0, 2, -1, -3)] == [0, 2, 2, 0]
    for dim in (3, -4):
        with pytest.raises(SplitLostError, match="no dim"):
            dim_from_front(dim, 3)


def test_a_shape_that_is_no_view_is_refused() -> None:
    with pytest.raises(SplitLostError, match="not a view"):
        viewed((2, 6), Layout(1), (5, 3), 2)
    with pytest.raises(SplitLostError, match="no dim 2"):
        viewed((2, 6), Layout(2), (12,), 2)


@pytest.mark.parametrize("layout", [Layout(2), Layout(1), Layout(2, 3)], ids=str)
@pytest.mark.parametrize("order", [(0, 1, 2), (1, 0, 2), (2, 0, 1)], ids=str)
def test_a_part_lies_in_memory_in_the_order_of_the_whole(layout: Layout, order: tuple[int, ...]) -> None:
    whole = numbered([8, 6, 12]).permute(order).contiguous().permute([order.index(dim) for dim in range(3)])
    for part in parts_of(whole, layout, 2):
        assert sorted(range(3), key=part.stride().__getitem__) == sorted(range(3), key=whole.stride().__getitem__)
