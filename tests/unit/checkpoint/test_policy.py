"""The Checkpoint setting: what can be written down, and that nothing else can."""

from __future__ import annotations

import dataclasses

import pytest

from meshbolt.checkpoint import Checkpoint
from meshbolt.errors import ConfigError


def test_the_defaults_write_in_the_foreground_verify_and_keep_nothing() -> None:
    assert Checkpoint() == Checkpoint(asynchronous=False, verify=True, keep_partial=False)


def test_it_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Checkpoint().verify = False  # type: ignore[misc]


@pytest.mark.parametrize("name", ["asynchronous", "verify", "keep_partial"])
def test_a_value_that_is_no_switch_is_refused_with_its_name(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"Checkpoint\({name}='yes'\) is a switch"):
        Checkpoint(**{name: "yes"})
