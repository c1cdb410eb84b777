"""Every operation that keeps a split, against the same on whole tensors: values and gradients.

To cover a new operation, add a line to the table of its kind in `elements.py` or `shapes.py`.
"""

from __future__ import annotations

import collections
import functools

import pytest
from tests.ranks.tensor.elements import element_rows, noise_rows
from tests.ranks.tensor.rows import Row, run_rows
from tests.ranks.tensor.shapes import shape_rows

from meshbolt.tensor.split import _RULES
from meshbolt.testing import run_ranks

ROWS: list[Row] = [*element_rows(), *noise_rows(), *shape_rows()]
# Names under which torch 2.13 hands nothing over: it knows them by others, such as `add` for `__radd__`.
BY_OTHER_NAMES = {
    *("tanh", "sigmoid", "Tensor.__iter__"),
    *(f"TensorBase.__{name}__" for name in ("ne", "radd", "rmul", "iadd", "isub", "imul", "idiv", "ifloordiv", "imod")),
}
ELSEWHERE = {"TensorBase.cuda", "Tensor.register_hook", "TensorBase.retain_grad", "multi_head_attention_forward"}


def job() -> tuple[dict[str, str], list[str]]:
    return run_rows(ROWS, list(_RULES))


@functools.cache
def outcome(ranks: int) -> list[tuple[dict[str, str], list[str]]]:
    """Compute all rows once, in one world."""
    return run_ranks(job, ranks, timeout=120)


def test_rows_have_names_of_their_own() -> None:
    assert [name for name, times in collections.Counter(row.name for row in ROWS).items() if times > 1] == []


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_parts_compute_what_the_whole_does(row: Row) -> None:
    faults = {rank: wrong[row.name] for rank, (wrong, _) in enumerate(outcome(2)) if row.name in wrong}
    assert not faults, "\n".join(f"rank {rank}: {fault}" for rank, fault in faults.items())


def test_every_rule_has_a_row() -> None:
    _, without = outcome(2)[0]
    assert set(without) <= BY_OTHER_NAMES | ELSEWHERE


@pytest.mark.full
def test_four_ranks_compute_what_the_whole_does() -> None:
    assert [wrong for wrong, _ in outcome(4)] == [{}] * 4
