import pytest
import torch
from torch import nn

from meshbolt.engine.state import empty_like_saved, load_optimizer_state, optimizer_state
from meshbolt.errors import CheckpointError

def made(*shapes: tuple[int, ...]) -> tuple[torch.optim.Optimizer, dict[nn.Parameter, str]]:
    params = [nn.Parameter(torch.zeros(shape)) for shape in shapes]
    return torch.optim.AdamW(params, lr=0.1), {parameter: f"p{index}" for index, parameter in enumerate(params)}


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


def test_room_for_a_saved_tensor_has_its_shape_and_dtype() -> None:
    parameter = nn.Parameter(torch.zeros(2, 3))
    for shape in (torch.Size([2, 3]), torch.Size([])):
        room = empty_like_saved(shape, torch.float64, parameter)
        assert (room.shape, room.dtype) == (shape, torch.float64)
    assert empty_like_saved(torch.Size([4]), torch.int64, None).shape == (4,)
