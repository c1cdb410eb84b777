"""If these fail, an argument of a strategy is ignored or misread."""

import pytest

from meshbolt import Recompute, TensorParallel, Zero
from meshbolt.config import Settings
from meshbolt.errors import ConfigError, UnsupportedError

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


@pytest.mark.parametrize("asked", [{"offload": "cpu"}])
def test_what_this_version_does_not_have_is_refused_by_name(asked):
    with pytest.raises(UnsupportedError, match=f"{next(iter(asked))}.*not available"):
        Settings.from_arguments(**{**DEFAULTS, **asked})


def test_compile_is_a_switch():
    with pytest.raises(ConfigError, match="compile='max-autotune' is a switch"):
        Settings.from_arguments(**{**DEFAULTS, "compile": "max-autotune"})
