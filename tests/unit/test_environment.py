"""If these fail, an environment variable is ignored or misread."""

import pytest

from meshbolt.environment import Environment, read_environment
from meshbolt.errors import ConfigError


def test_without_variables_debug_is_off_and_the_fast_path_on(monkeypatch):
    monkeypatch.delenv("MESHBOLT_DEBUG", raising=False)
    monkeypatch.delenv("MESHBOLT_FAST_PATH", raising=False)
    assert read_environment() == Environment(debug=False, fast_path=True)


def test_both_switches_turn_both_ways(monkeypatch):
    monkeypatch.setenv("MESHBOLT_DEBUG", "1")
    monkeypatch.setenv("MESHBOLT_FAST_PATH", "0")
    assert read_environment() == Environment(debug=True, fast_path=False)


def test_a_word_is_not_a_switch(monkeypatch):
    monkeypatch.setenv("MESHBOLT_DEBUG", "yes")
    with pytest.raises(ConfigError, match="MESHBOLT_DEBUG='yes' is not a switch"):
        read_environment()
