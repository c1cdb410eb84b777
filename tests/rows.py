"""Rows of parametrized tests that only the full runs take (`tox -e ranks-full`, `parity-full`, `faults`)."""

from __future__ import annotations

import functools

import pytest

full = functools.partial(pytest.param, marks=pytest.mark.full)

# Of files with many rows alike, every how many-th row each run takes; the others carry the mark as well.
THINNED = {
    "tests/ranks/trainer/test_optimisation_derivatives.py": 3,
    "tests/ranks/trainer/test_optimisation_parameters.py": 2,
    "tests/ranks/trainer/test_callbacks_load.py": 2,
    "tests/ranks/trainer/test_callbacks_background.py": 2,
    "tests/ranks/trainer/test_callbacks_resume.py": 2,
    "tests/ranks/test_user_edits.py": 2,
    "tests/ranks/test_guards.py": 2,
    "tests/ranks/test_fabric_saving.py": 2,
    "tests/ranks/test_tensor_parameters.py": 2,
    "tests/ranks/test_tensor_random.py": 2,
    "tests/ranks/test_tensor_samples.py": 2,
    "tests/ranks/test_tensor_precision.py": 2,
    "tests/ranks/test_tensor_clip.py": 2,
    "tests/ranks/test_checkpoint_odd_things.py": 2,
    "tests/faults/test_checkpoint_load.py": 2,
    "tests/faults/test_checkpoint_save.py": 2,
}


def thin(items: list[pytest.Item]) -> None:
    """Mark the rows that are left to the full runs: of each test function its own, so that every function runs.

    Args:
        items: all that were collected, in their order.
    """
    counts: dict[tuple[str, str], int] = {}
    for item in items:
        file, _, _ = item.nodeid.partition("::")
        every = THINNED.get(file)
        if every is None or not hasattr(item, "callspec") or item.get_closest_marker("full"):
            continue
        key = (file, getattr(item, "originalname", item.name))
        if counts.setdefault(key, 0) % every:
            item.add_marker(pytest.mark.full)
        counts[key] += 1
