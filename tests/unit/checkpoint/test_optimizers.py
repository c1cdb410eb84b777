"""Optimizer state by name and by number. If these fail, moments end at other parameters than they belong to."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from meshbolt.checkpoint.optimizers import by_name, by_number, owners_in, sharded_keys
from meshbolt.checkpoint.tree import split_tensors


def trained(*, named: bool) -> tuple[nn.Module, torch.optim.Optimizer]:
    module = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    pairs = list(module.named_parameters())
    groups = [pairs[2:], pairs[:2]]  # not in the order of the module
    taken = [{"params": group if named else [parameter for _, parameter in group], "lr": 0.1} for group in groups]
    optimizer = torch.optim.AdamW(taken)
    module(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return module, optimizer


def test_names_become_the_numbers_that_torch_gives() -> None:
    module, optimizer = trained(named=False)
    expected = optimizer.state_dict()
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    tree = {
        "class": "AdamW",
        "state": {names[id(parameter)]: values for parameter, values in optimizer.state.items()},
        "param_groups": [
            {**group, "params": [names[id(parameter)] for parameter in group["params"]]}
            for group in optimizer.param_groups
        ],
    }
    found = by_number({"any": [{"where": tree}]})["any"][0]["where"]
    assert found == expected
    assert by_number(expected) == expected


def test_a_file_that_has_names_beside_the_numbers_is_read_by_name() -> None:
    module, optimizer = trained(named=True)
    checkpoint = {"state_dict": module.state_dict(), "optimizer_states": [optimizer.state_dict()]}
    found, notes = by_name(checkpoint)
    assert notes == ()
    state = found["optimizer_states"][0]
    assert [group["params"] for group in state["param_groups"]] == [["1.weight", "1.bias"], ["0.weight", "0.bias"]]
    for name, parameter in module.named_parameters():
        assert state["state"][name]["exp_avg"] is optimizer.state[parameter]["exp_avg"]


def test_without_names_or_with_names_of_another_module_the_numbers_stay() -> None:
    for module, optimizer, prefix in [(*trained(named=False), ""), (*trained(named=True), "net.")]:
        weights = {f"{prefix}{name}": value for name, value in module.state_dict().items()}
        found, notes = by_name({"state_dict": weights, "optimizer_states": [optimizer.state_dict()]})
        assert set(found["optimizer_states"][0]["state"]) == {0, 1, 2, 3}
        assert "Optimizer 0 keeps its state by number" in notes[0]


def test_a_fresh_optimizer_and_a_checkpoint_without_any_leave_nothing_to_say() -> None:
    module = nn.Linear(2, 2)
    fresh = torch.optim.AdamW(module.parameters()).state_dict()
    assert by_name({"state_dict": module.state_dict(), "optimizer_states": [fresh]})[1] == ()
    assert by_name({"state_dict": {}}) == ({"state_dict": {}}, ())


def test_what_has_the_shape_of_its_weight_is_sharded_and_a_count_of_steps_is_not() -> None:
    tensors: dict[str, torch.Tensor] = {}
    state = {"w": {"exp_avg": torch.ones(2, 3), "step": torch.tensor(1.0), "row": torch.ones(2)}}
    tree: dict[str, Any] = {"state_dict": {"w": torch.ones(2, 3)}, "optimizer_states": [{"state": state}]}
    objects = {key: split_tensors(value, key, tensors) for key, value in tree.items()}
    assert sharded_keys(objects, tensors) == ["optimizer_states.0.state.w.exp_avg", "state_dict.w"]


def test_state_by_name_says_whose_it_is_wherever_it_stands_and_other_tensors_belong_to_nobody() -> None:
    values = {"step": torch.tensor(1.0), "rows": [torch.ones(2), {"part": torch.ones(1)}], "count": 3}
    by_name_ = {"state": {"a.b": values}, "param_groups": [{"params": ["a.b", "c"]}]}
    by_number_ = {"state": {0: values}, "param_groups": [{"params": [0]}]}
    tree = {
        "model": {"a.b": torch.ones(1)},
        "optimizers": [by_name_, by_number_],
        "inside": {"state": by_name_["state"]},
    }
    objects = {key: split_tensors(value, key, {}) for key, value in tree.items()}
    keys = ("step", "rows.0", "rows.1.part")
    assert owners_in(objects) == {f"optimizers.0.state.a.b.{key}": "a.b" for key in keys}
