"""A checkpoint belongs to the model: whatever layout wrote it, any other goes on from it, moments included."""

from __future__ import annotations

import pytest
import torch
from tests.parity.trips import LAYOUTS, LOOPS, PLAIN, TENSOR_LAYOUTS, Trip, Trips, Values, all_trips, selected_trips

SELECTED = selected_trips(seed=0)
PARAMETERS = [
    pytest.param(trip, marks=[] if trip in SELECTED else pytest.mark.full, id=str(trip)) for trip in all_trips()
]
TOLERANCE = 1e-12


@pytest.fixture(scope="session")
def trips(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trips:
    called = (getattr(item, "callspec", None) for item in request.session.items)
    wanted = (call.params["trip"] for call in called if call is not None and "trip" in call.params)
    return Trips(wanted, tmp_path_factory.mktemp("trips"))


def differing(ours: Values, theirs: Values) -> list[str]:
    assert ours.keys() == theirs.keys()
    return [key for key, value in ours.items() if not torch.equal(value, theirs[key])]


def largest_difference(ours: Values, theirs: Values) -> float:
    assert ours.keys() == theirs.keys()
    return max(float((value - theirs[key]).abs().max()) for key, value in ours.items())


@pytest.mark.parametrize("trip", PARAMETERS)
def test_what_is_loaded_is_what_was_saved_and_training_goes_on_as_in_one_process(trip: Trip, trips: Trips) -> None:
    saved, loaded = trips.saved(trip).end, trips.loaded(trip)
    assert differing(loaded.start, saved) == []
    assert any(key.startswith("exp_avg ") and bool(value.any()) for key, value in saved.items())
    assert largest_difference(loaded.end, trips.through(trip.model)) < TOLERANCE
    assert largest_difference(loaded.end, saved) > 1e-4


def test_every_layout_saves_and_loads_in_the_selection() -> None:
    assert {trip.saving for trip in SELECTED} == {trip.loading for trip in SELECTED} == {*LAYOUTS, *TENSOR_LAYOUTS}
    assert {(trip.loop, trip.loading == PLAIN, trip.saving == PLAIN) for trip in SELECTED} >= {
        (loop, *plain) for loop in LOOPS for plain in ((True, False), (False, True), (False, False))
    }


def test_the_selection_is_the_same_every_time() -> None:
    assert selected_trips(seed=0) == SELECTED
