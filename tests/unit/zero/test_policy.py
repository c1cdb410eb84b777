"""If these fail, a ZeRO stage means something else than documented."""

import pytest

from meshbolt.errors import ConfigError
from meshbolt.zero import POLICIES, Zero


def test_each_stage_shards_and_communicates_what_the_one_before_does_and_more():
    assert [(p.shards, p.reduces_every_batch, p.reshards_after_forward) for p in POLICIES.values()] == [
        (False, False, False),
        (True, False, False),
        (True, True, False),
        (True, True, True),
    ]
    assert all(stage == policy.stage for stage, policy in POLICIES.items())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"stage": 4}, "zero=4 is not a ZeRO stage"),
        ({"stage": True}, "zero=True is not a ZeRO stage"),
        ({"stage": 2.0}, r"zero=2\.0 is not a ZeRO stage"),
        ({"stage": [3]}, r"zero=\[3\] is not a ZeRO stage"),
        ({"unit": 3}, "unit=3"),
        ({"unit": None}, "unit=None"),
        ({"unit": [1]}, r"unit=\[1\]"),
        ({"unit": ""}, "unit=''"),
        ({"replicate": 0}, "replicate=0"),
        ({"stage": 0, "replicate": 2}, "stage 0 keeps everything whole"),
        ({"reduce_dtype": "fp8"}, "reduce_dtype='fp8'"),
    ],
)
def test_wrong_values_are_refused_with_the_value(arguments, message):
    with pytest.raises(ConfigError, match=message):
        Zero(**arguments)


def test_units_are_found_or_named():
    assert Zero().unit_names is None
    assert Zero(unit="Block").unit_names == ["Block"]
    assert Zero(unit=["a.b", "Block"]).unit_names == ["a.b", "Block"]
