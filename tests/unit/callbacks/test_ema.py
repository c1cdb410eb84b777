from __future__ import annotations

from typing import Any

import pytest

from meshbolt import ConfigError
from meshbolt.callbacks import ExponentialMovingAverage


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"decay": 1.0}, "decay=1.0"),
        ({"decay": -0.1}, "decay=-0.1"),
        ({"every_n_steps": 0}, "every_n_steps=0"),
        ({"start_step": -1}, "start_step=-1"),
    ],
)
def test_a_setting_out_of_range_is_refused_with_its_value(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        ExponentialMovingAverage(**settings)


def test_the_settings_are_part_of_a_checkpoint() -> None:
    average = ExponentialMovingAverage(0.5, every_n_steps=2, start_step=3)

    assert average.state_dict() == {"decay": 0.5, "every_n_steps": 2, "start_step": 3}
