import pytest
import torch
from torch import nn

from meshbolt.engine.load import check_names, load_model
from meshbolt.errors import CheckpointError


def test_names_that_differ_are_listed_from_both_sides() -> None:
    with pytest.raises(CheckpointError, match=r"run\.ckpt do not fit .*Missing there: b\. Unknown here: c.*strict"):
        check_names({"a": 0, "b": 0}, {"a", "c"}, strict=True, source="run.ckpt")
    check_names({"a": 0, "b": 0}, {"a", "c"}, strict=False, source="run.ckpt")


def test_a_long_list_of_names_is_cut() -> None:
    live = {f"layer{index}": 0 for index in range(20)}
    with pytest.raises(CheckpointError, match="and 12 more"):
        check_names(live, set(), strict=True, source="it")


def test_weights_are_copied_into_the_parameters_that_are_there() -> None:
    module, other = nn.Linear(2, 3), nn.Linear(2, 3)
    weight = module.weight
    load_model(module, other.state_dict(), strict=True, source="it")
    assert module.weight is weight
    assert torch.equal(module.weight, other.weight)


def test_what_fits_is_loaded_where_names_may_differ() -> None:
    module = nn.Linear(2, 3)
    bias = module.bias.detach().clone()
    load_model(module, {"weight": torch.ones(3, 2), "extra": torch.ones(1)}, strict=False, source="it")
    assert torch.equal(module.weight, torch.ones(3, 2))
    assert torch.equal(module.bias, bias)


def test_shapes_that_differ_are_refused_before_anything_is_loaded() -> None:
    module = nn.Linear(2, 3)
    before = module.bias.detach().clone()
    with pytest.raises(CheckpointError, match=r"weight is \(2, 2\), here \(3, 2\)"):
        load_model(module, {"weight": torch.ones(2, 2), "bias": torch.ones(3)}, strict=True, source="it")
    assert torch.equal(module.bias, before)
