from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import nn

from meshbolt import ConfigError
from meshbolt.strategies.meta import meta_tensors

REAL = torch.ones(3, 2)


def load(layer: nn.Linear) -> None:
    layer.load_state_dict({"weight": REAL, "bias": REAL[:, 0]})


def copy(layer: nn.Linear) -> None:
    layer.weight.data.copy_(REAL)


def assign_slice(layer: nn.Linear) -> None:
    layer.weight.data[1:] = REAL[1:]


@pytest.mark.parametrize("lose", [load, copy, assign_slice])
def test_values_that_would_be_lost_are_refused_with_a_remedy(lose: Callable[[nn.Linear], None]) -> None:
    with pytest.raises(ConfigError, match=r"load_pretrained.*assign=True"), meta_tensors():
        lose(nn.Linear(2, 3))


def test_layers_are_built_without_values_and_may_be_initialised_there() -> None:
    with meta_tensors():
        layer = nn.Linear(2, 3)
        nn.init.orthogonal_(layer.weight)
        layer.weight.data[0] = layer.weight.data[1]
        attention = nn.TransformerEncoderLayer(8, 2)
    assert all(parameter.is_meta for part in (layer, attention) for parameter in part.parameters())


def test_real_tensors_and_other_warnings_are_left_alone() -> None:
    real = nn.Linear(2, 3)
    with meta_tensors():
        real.load_state_dict({"weight": REAL, "bias": REAL[:, 0]})
        with pytest.warns(UserWarning, match="something else"):
            warnings.warn("something else", UserWarning, stacklevel=1)
    assert torch.equal(real.weight, REAL)

    with pytest.raises(UserWarning, match="something else"), meta_tensors():
        raise UserWarning("something else")
