"""The Checkpoint setting: what can be written down, and that nothing else can."""

from __future__ import annotations

import dataclasses

import pytest

from meshbolt.checkpoint import Checkpoint
from meshbolt.errors import ConfigError

SWITCHES = ["asynchronous", "verify", "keep_partial", "trainable_only", "load_weights_only"]


def test_by_default_only_verification_is_on() -> None:
    assert dataclasses.asdict(Checkpoint()) == {name: name == "verify" for name in SWITCHES}


def test_it_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Checkpoint().verify = False  # type: ignore[misc]


@pytest.mark.parametrize("name", SWITCHES)
def test_a_value_that_is_no_switch_is_refused_with_its_name(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"Checkpoint\({name}='yes'\) is a switch"):
        Checkpoint(**{name: "yes"})
