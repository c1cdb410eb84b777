from typing import Any

import pytest
import torch
from tests.unit.checkpoint.test_tree import same
from torch import nn

from meshbolt.engine.state import (
    check_optimizer_state,
    empty_like_saved,
    load_optimizer_state,
    optimizer_state,
    trained_state,
)
from meshbolt.errors import CheckpointError


def made(
    *shapes: tuple[int, ...], kind: type[torch.optim.Optimizer] = torch.optim.AdamW, **options: Any
) -> tuple[torch.optim.Optimizer, dict[nn.Parameter, str]]:
    params = [nn.Parameter(torch.zeros(shape)) for shape in shapes]
    make: Any = kind
    return make(params, **{"lr": 0.1, **options}), {parameter: f"p{index}" for index, parameter in enumerate(params)}


def test_state_is_keyed_by_name_and_comes_back() -> None:
    optimizer, names = made((2,), (3,))
    for parameter in names:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    saved = optimizer_state(optimizer, names)
    assert set(saved["state"]) == {"p0", "p1"}
    assert saved["param_groups"][0]["params"] == ["p0", "p1"]
    other, others_names = made((2,), (3,))
    other.param_groups[0]["lr"] = 7.0
    load_optimizer_state(other, saved, others_names)
    assert other.param_groups[0]["lr"] == 0.1
    assert other.param_groups[0]["params"] == list(others_names)
    for parameter, name in others_names.items():
        assert torch.equal(other.state[parameter]["exp_avg"], saved["state"][name]["exp_avg"])


def test_a_fresh_optimizer_has_no_state_and_gets_none() -> None:
    optimizer, names = made((2,))
    assert optimizer_state(optimizer, names)["state"] == {}
    assert len(optimizer.state) == 0


def test_groups_that_differ_are_refused_with_the_difference() -> None:
    optimizer, names = made((2,), (3,))
    saved = optimizer_state(optimizer, names)
    other, others_names = made((2,))
    with pytest.raises(
        CheckpointError, match=r"groups of \[2\] parameters, this run's has \[1\].*only there: \['p1'\]"
    ):
        load_optimizer_state(other, saved, others_names)


def trained_pair(kind: type[torch.optim.Optimizer], **options: Any) -> tuple[torch.optim.Optimizer, Any]:
    optimizer, names = made((2, 3), (3,), kind=kind, **options)
    for parameter in names:
        parameter.grad = torch.full_like(parameter, 0.5)
    optimizer.step()
    return optimizer, names


def test_state_by_number_follows_the_order_of_the_groups() -> None:
    optimizer, names = trained_pair(torch.optim.AdamW, lr=0.3)
    other, others_names = made((2, 3), (3,))
    load_optimizer_state(other, optimizer.state_dict(), others_names)
    assert other.param_groups[0]["lr"] == 0.3
    for ours, theirs in zip(others_names, names, strict=True):
        for key, value in optimizer.state[theirs].items():
            assert torch.equal(other.state[ours][key], value)
            assert other.state[ours][key] is not value


def test_state_of_another_class_is_refused_by_name_and_by_number() -> None:
    optimizer, names = trained_pair(torch.optim.SGD, lr=0.1, momentum=0.9)
    other, others_names = made((2, 3), (3,))
    with pytest.raises(CheckpointError, match="state of SGD, and this run's optimizer is AdamW"):
        check_optimizer_state(other, optimizer_state(optimizer, names), others_names)
    with pytest.raises(CheckpointError, match=r"settings \[.*'momentum'.*\], and this run's optimizer is AdamW"):
        check_optimizer_state(other, optimizer.state_dict(), others_names)
    adam, _ = trained_pair(torch.optim.Adam)
    with pytest.raises(CheckpointError, match="this run's optimizer is AdamW"):
        check_optimizer_state(other, adam.state_dict(), others_names)


def test_state_that_is_refused_leaves_the_optimizer_as_it_was() -> None:
    optimizer, names = trained_pair(torch.optim.AdamW)
    before = optimizer.state_dict()
    for wrong in (
        optimizer_state(*made((2, 3))),
        {"class": "AdamW", "state": {}, "param_groups": [{"params": ["p0"]}, {"params": ["p1"]}]},
        {"class": "AdamW", "state": {}, "param_groups": [{"params": ["p0"]}]},
        optimizer_state(*trained_pair(torch.optim.SGD, lr=0.1)),
    ):
        with pytest.raises(CheckpointError):
            load_optimizer_state(optimizer, wrong, names)
    assert same(optimizer.state_dict(), before)


def test_a_group_may_have_its_parameters_in_another_order_and_frozen_ones_beside_them() -> None:
    optimizer, names = trained_pair(torch.optim.AdamW)
    saved = optimizer_state(optimizer, names)
    saved["param_groups"][0]["params"].reverse()
    frozen = nn.Parameter(torch.zeros(4), requires_grad=False)
    other, others_names = made((2, 3), (3,))
    other.param_groups[0]["params"].insert(1, frozen)
    load_optimizer_state(other, saved, {**others_names, frozen: "frozen"})
    for parameter, name in others_names.items():
        assert torch.equal(other.state[parameter]["exp_avg"], saved["state"][name]["exp_avg"])
    assert frozen not in other.state
    frozen.requires_grad_(True)
    with pytest.raises(CheckpointError, match=r"only here: \['frozen'\]"):
        load_optimizer_state(other, saved, {**others_names, frozen: "frozen"})


def test_groups_in_another_order_are_refused_with_that_order_and_others_with_a_name() -> None:
    optimizer, names = made((2,), (3,))
    saved = optimizer_state(optimizer, names)
    first, second = names
    other = torch.optim.AdamW([{"params": [second]}, {"params": [first]}], lr=0.1)
    (group,) = saved["param_groups"]
    saved["param_groups"] = [{**group, "params": ["p0"]}, {**group, "params": ["p1"]}]
    with pytest.raises(
        CheckpointError, match=r"same groups, in another order: .* number \[1, 0\] there.*load_weights_only"
    ):
        check_optimizer_state(other, saved, names)
    with pytest.raises(CheckpointError, match=r"another way: 'p1' is in group 0 here and 1 there"):
        check_optimizer_state(optimizer, saved, names)


def test_frozen_parameters_that_numbers_have_no_place_for_are_named() -> None:
    optimizer, _ = trained_pair(torch.optim.AdamW)
    other, others_names = made((2, 3), (3,))
    frozen = nn.Parameter(torch.zeros(4), requires_grad=False)
    other.param_groups[0]["params"].append(frozen)
    with pytest.raises(CheckpointError, match=r"only parameters that are trained, without \['still'\]"):
        check_optimizer_state(other, optimizer.state_dict(), {**others_names, frozen: "still"})


def test_state_of_other_shapes_is_refused() -> None:
    optimizer, names = trained_pair(torch.optim.AdamW)
    wider, wider_names = made((2, 4), (3,))
    with pytest.raises(CheckpointError, match=r"other shapes .*p0 \(2, 3\)"):
        check_optimizer_state(wider, optimizer_state(optimizer, names), wider_names)


def test_settings_that_an_older_torch_did_not_have_get_their_default() -> None:
    optimizer, names = trained_pair(torch.optim.AdamW)
    saved = optimizer.state_dict()
    for group in saved["param_groups"]:
        for key in ("fused", "decoupled_weight_decay", "capturable"):
            del group[key]
    load_optimizer_state(optimizer, saved, names)
    assert optimizer.param_groups[0]["fused"] is None
    optimizer.step()


def test_state_in_the_dtype_of_its_parameter_follows_it_and_other_state_does_not() -> None:
    optimizer, names = trained_pair(torch.optim.AdamW)
    saved = optimizer_state(optimizer, names)
    parameters = [nn.Parameter(torch.zeros(shape, dtype=torch.bfloat16)) for shape in ((2, 3), (3,))]
    other = torch.optim.AdamW(parameters)
    others_names = {parameter: f"p{index}" for index, parameter in enumerate(parameters)}
    load_optimizer_state(other, saved, others_names, dtypes={"p0": torch.float32, "p1": torch.bfloat16})
    assert other.state[parameters[0]]["exp_avg"].dtype == torch.bfloat16
    assert other.state[parameters[0]]["step"].dtype == torch.float32
    assert other.state[parameters[1]]["exp_avg"].dtype == torch.float32


def test_parameters_that_nobody_trains_are_left_out_and_buffers_are_not() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Linear(2, 2), nn.Linear(2, 2))
    optimizer = torch.optim.SGD(module[3].parameters(), lr=0.1, momentum=0.9)
    module[3](torch.ones(1, 2)).sum().backward()
    optimizer.step()
    for part in (module[0], module[1], module[3]):
        part.requires_grad_(False)
    state, left_out = trained_state(module.state_dict(), module, [optimizer])
    assert left_out == ["0.bias", "0.weight", "1.bias", "1.weight"]
    assert sorted(state) == sorted(set(module.state_dict()) - set(left_out))
    assert "1.running_mean" in state


def test_room_for_a_saved_tensor_has_its_shape_and_dtype() -> None:
    parameter = nn.Parameter(torch.zeros(2, 3))
    for shape in (torch.Size([2, 3]), torch.Size([])):
        room = empty_like_saved(shape, torch.float64, parameter)
        assert (room.shape, room.dtype) == (shape, torch.float64)
    assert empty_like_saved(torch.Size([4]), torch.int64, None).shape == (4,)
