from __future__ import annotations

from collections.abc import Mapping

import pytest

from meshbolt.callbacks.moment import Moment
from meshbolt.callbacks.summing import SharedSums

FIRST, SECOND, THIRD = (Moment(2 * number, number) for number in (1, 2, 3))


class Told:
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.heard: list[tuple[Moment, dict[str, float]]] = []

    def __call__(self, moment: Moment, sums: Mapping[str, float]) -> None:
        self.heard.append((moment, dict(sums)))


def test_a_sum_begins_with_the_next_step_and_is_told_of_with_the_one_behind() -> None:
    sums, told = SharedSums(), Told()
    part, own = sums.join(["one", "two"], told), {"one": 1.0, "two": 2.0}
    part.go_on(1)
    part.want(FIRST, lambda: own)
    part.go_on(1)  # another's, after the same step
    assert part.wanted == FIRST
    own["two"] = 3.0
    part.go_on(2)
    own["two"] = 4.0
    assert (part.wanted, told.heard, sums.oldest) == (None, [], FIRST)
    part.go_on(3)
    assert told.heard == [(FIRST, {"one": 1.0, "two": 3.0})]
    assert sums.oldest is None


def test_each_hears_of_its_own_numbers_and_only_where_it_wants_any() -> None:
    sums, (first, second) = SharedSums(), (Told(), Told())
    one, two = sums.join(["a"], first), sums.join(["b", "a"], second)
    one.want(FIRST, lambda: {"a": 1.0})
    two.want(FIRST, lambda: {"a": 2.0, "b": 3.0})
    one.go_on(2)
    two.want(SECOND, lambda: {"a": 4.0, "b": 5.0})
    assert sums.oldest == FIRST
    for step in (3, 4):
        two.go_on(step)
    assert first.heard == [(FIRST, {"a": 1.0})]
    assert second.heard == [(FIRST, {"a": 2.0, "b": 3.0}), (SECOND, {"a": 4.0, "b": 5.0})]


def test_what_is_wanted_last_is_told_of_when_the_last_one_leaves() -> None:
    sums, (first, second) = SharedSums(), (Told(), Told())
    one, two = sums.join(["a"], first), sums.join(["b"], second)
    one.want(FIRST, lambda: {"a": 1.0})
    one.go_on(2)
    one.want(SECOND, lambda: {"a": 2.0})
    two.want(THIRD, lambda: {"b": 3.0})
    one.leave()
    assert first.heard == second.heard == []
    two.leave()
    assert first.heard == [(FIRST, {"a": 1.0}), (SECOND, {"a": 2.0})]
    assert second.heard == [(THIRD, {"b": 3.0})]


def test_numbers_that_nobody_wants_are_not_taken() -> None:
    with pytest.raises(AssertionError):
        SharedSums().join(["a"], Told()).take()
