"""Calls that make no sense are refused before a process is started."""

from __future__ import annotations

import pytest

from meshbolt.errors import ConfigError
from meshbolt.testing import run_ranks


@pytest.mark.parametrize("wrong", [{"n": 0}, {"n": -1}, {"n": 1, "timeout": 0}, {"n": 1, "start": "forkserver"}])
def test_a_call_that_makes_no_sense_is_refused_with_its_values(wrong: dict[str, object]):
    with pytest.raises(ConfigError, match=str(next(reversed(wrong.values())))):
        run_ranks(print, **wrong)


def test_a_spawned_function_must_have_a_name_that_can_be_imported():
    with pytest.raises(TypeError, match="functions and classes from the top level of a module"):
        run_ranks(lambda: None, 1, start="spawn")
