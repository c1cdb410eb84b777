"""Every row of the matrix trains as one process does; the rows beyond the seeded selection carry the mark `full`."""

from __future__ import annotations

import pytest
from tests.parity.matrix import (
    CLIPS,
    FEATURES,
    LOOPS,
    OPTIMIZERS,
    PRECISIONS,
    STRATEGIES,
    WINDOWS,
    Row,
    all_rows,
    selected_rows,
)
from tests.parity.worlds import Worlds

ROWS = all_rows()
SELECTED = selected_rows(ROWS, count=64, seed=0)
PARAMETERS = [pytest.param(row, marks=[] if row in SELECTED else pytest.mark.full, id=str(row)) for row in ROWS]


@pytest.fixture(scope="session")
def worlds(request: pytest.FixtureRequest) -> Worlds:
    called = (getattr(item, "callspec", None) for item in request.session.items)
    return Worlds(call.params["row"] for call in called if call is not None and "row" in call.params)


@pytest.mark.parametrize("row", PARAMETERS)
def test_a_row_trains_as_one_process_does(row: Row, worlds: Worlds) -> None:
    print(worlds.compare(row))


@pytest.mark.parametrize(
    ("column", "values"),
    [
        ("feature", FEATURES),
        ("strategy", STRATEGIES),
        ("precision", PRECISIONS),
        ("clip", CLIPS),
        ("window", WINDOWS),
        ("loop", LOOPS),
        ("optimizer", OPTIMIZERS),
        ("ranks", (2, 3, 4)),
    ],
)
def test_the_selection_has_every_value_of_every_column(column: str, values: object) -> None:
    assert {getattr(row, column) for row in SELECTED} == set(values)  # type: ignore[call-overload]


def test_the_selection_has_every_feature_sharded_and_every_strategy_in_every_precision() -> None:
    pairs = {(row.strategy, row.precision) for row in SELECTED}
    assert pairs == {(strategy, precision) for strategy in STRATEGIES for precision in PRECISIONS}


def test_the_selection_is_the_same_every_time() -> None:
    assert selected_rows(all_rows(), count=64, seed=0) == SELECTED
