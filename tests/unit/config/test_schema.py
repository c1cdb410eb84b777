"""If these fail, an argument of a strategy is ignored or misread."""

import pytest

from meshbolt import Offload, Recompute, TensorParallel, Zero
from meshbolt.config import Settings
from meshbolt.errors import ConfigError

DEFAULTS = {
    "zero": 3,
    "tensor_parallel": 1,
    "pipeline_parallel": 1,
    "offload": None,
    "recompute": "none",
    "compile": False,
    "checkpoint": None,
}


def test_plain_values_and_their_dataclasses_are_the_same():
    plain = Settings.from_arguments(**{**DEFAULTS, "zero": 2, "recompute": "full"})
    assert plain == Settings.from_arguments(**{**DEFAULTS, "zero": Zero(stage=2), "recompute": Recompute("full")})
    sizes = [Settings.from_arguments(**{**DEFAULTS, "tensor_parallel": value}) for value in (2, TensorParallel(2))]
    assert sizes[0] == sizes[1]


def test_what_is_written_is_what_was_given():
    for given in (2, "node", TensorParallel(2, plan={"a": "colwise"})):
        settings = Settings.from_arguments(**{**DEFAULTS, "tensor_parallel": given})
        assert settings.written() == {"zero": "3", "tensor_parallel": repr(given)}


def test_an_offload_may_be_written_as_where_the_state_lies():
    assert Settings.from_arguments(**{**DEFAULTS, "offload": "cpu"}).offload == Offload("cpu")
    half = Settings.from_arguments(**{**DEFAULTS, "offload": Offload("cpu", fraction=0.5)})
    assert half.written() == {"zero": "3", "offload": repr(Offload("cpu", fraction=0.5))}


def test_compile_is_a_switch():
    with pytest.raises(ConfigError, match="compile='max-autotune' is a switch"):
        Settings.from_arguments(**{**DEFAULTS, "compile": "max-autotune"})
