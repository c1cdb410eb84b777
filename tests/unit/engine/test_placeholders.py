from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from meshbolt.engine.load import check_weights, load_model
from meshbolt.engine.placeholders import held_elsewhere, model_state, placeholder
from meshbolt.engine.state import empty_like_saved, load_optimizer_state, optimizer_state
from meshbolt.errors import CheckpointError
from meshbolt.pipeline.taint import Foreign, foreign_parameters, is_foreign

CPU = torch.device("cpu")


class Net(nn.Module):
    """Two layers, of which the second belongs to another stage once `divided` has been here."""

    def __init__(self) -> None:
        super().__init__()
        self.here, self.there, self.norm = nn.Linear(2, 2), nn.Linear(2, 3), nn.BatchNorm1d(2)


@pytest.fixture
def divided() -> Any:
    module = Net()
    with foreign_parameters(module, ["there.weight", "there.bias"], Foreign(), device=CPU):
        yield module


def test_a_placeholder_has_a_shape_and_a_dtype_and_no_memory() -> None:
    made = placeholder(torch.zeros(2, 3, dtype=torch.float16))
    assert (made.shape, made.dtype, made.device.type) == ((2, 3), torch.float16, "meta")
    assert held_elsewhere(made)
    assert not held_elsewhere(torch.zeros(2))


def test_a_modules_state_has_placeholders_for_what_others_hold_and_keeps_its_versions(divided: Net) -> None:
    plain = divided.state_dict()
    state = model_state(plain, elsewhere={"norm.running_mean"})
    assert list(state) == list(plain)
    assert state._metadata == plain._metadata  # type: ignore[attr-defined]
    others = {"there.weight", "there.bias", "norm.running_mean"}
    assert {name for name, value in state.items() if value.is_meta} == others
    assert all(state[name] is plain[name] for name in state.keys() - others)
    assert not plain["norm.running_mean"].is_meta


@pytest.mark.parametrize("whole", [False, True])
def test_a_load_leaves_what_others_hold(divided: Net, whole: bool) -> None:
    theirs = divided.there.weight
    saved = Net().state_dict()
    state = {
        name: placeholder(value) if name.startswith("there.") and not whole else value for name, value in saved.items()
    }
    state["norm.running_var"] = placeholder(saved["norm.running_var"])
    divided.norm.running_var.fill_(7.0)
    check_weights(divided.state_dict(), state, strict=True, source="it")
    load_model(divided, state)
    assert divided.there.weight is theirs
    assert is_foreign(theirs)
    assert torch.equal(divided.here.weight, saved["here.weight"])
    assert divided.norm.running_var.tolist() == [7.0, 7.0]


def test_names_and_shapes_of_what_others_hold_are_compared_as_well(divided: Net) -> None:
    state = {**Net().state_dict(), "there.weight": torch.empty(4, 4, device="meta")}
    with pytest.raises(CheckpointError, match=r"there.weight: float32\[4, 4\] there, float32\[3, 2\] here"):
        check_weights(divided.state_dict(), state, strict=True, source="it")
    del state["there.weight"]
    with pytest.raises(CheckpointError, match=r"1 missing there:\n    there.weight"):
        check_weights(divided.state_dict(), state, strict=True, source="it")


def test_a_parameter_with_values_is_never_left_for_want_of_saved_ones(divided: Net) -> None:
    state = {**Net().state_dict(), "here.weight": torch.empty(2, 2, device="meta")}
    with pytest.raises(RuntimeError, match="Cannot copy out of meta tensor"):
        load_model(divided, state)


class Registered(nn.Module):
    """Has an entry in its state that is neither a parameter nor a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.count = torch.ones(2)

    def get_extra_state(self) -> Any:
        return self.count

    def set_extra_state(self, state: Any) -> None:
        self.count = state


def test_an_entry_of_another_stage_is_not_given_to_the_module() -> None:
    module = Registered()
    state = {"weight": torch.zeros(2), "_extra_state": torch.empty(2, device="meta")}
    load_model(module, state)
    assert module.count.tolist() == [1.0, 1.0]
    assert module.weight.tolist() == [0.0, 0.0]
    assert "_extra_state" in state


def test_an_optimizer_saves_and_loads_state_of_its_own_parameters_only(divided: Net) -> None:
    names = {parameter: name for name, parameter in divided.named_parameters()}
    optimizer = torch.optim.Adagrad(divided.parameters(), lr=0.1)  # has state for all of them already
    own = {name for name, parameter in divided.named_parameters() if not is_foreign(parameter)}
    saved = optimizer_state(optimizer, names)
    assert saved["state"].keys() == own
    assert saved["param_groups"][0]["params"] == list(names.values())

    module = Net()
    other = torch.optim.Adagrad(module.parameters(), lr=0.5, initial_accumulator_value=3.0)
    of_others = {parameter: name for name, parameter in module.named_parameters()}
    load_optimizer_state(optimizer, optimizer_state(other, of_others), names)
    assert {names[parameter] for parameter in optimizer.state} == own
    assert optimizer.state[divided.here.weight]["sum"].tolist() == [[3.0, 3.0], [3.0, 3.0]]
    for parameter in divided.parameters():
        parameter.grad = None if is_foreign(parameter) else torch.ones_like(parameter)
    optimizer.step()


def test_there_is_no_room_for_what_others_hold(divided: Net) -> None:
    for shape in (torch.Size([3, 2]), torch.Size([]), torch.Size([5])):
        room = empty_like_saved(shape, torch.float64, divided.there.weight)
        assert (room.shape, room.dtype, room.device.type) == (shape, torch.float64, "meta")
