import pytest
import torch
from torch import nn

from meshbolt.engine.rewire import names_by_parameter, rewire_optimizer
from meshbolt.errors import ConfigError


def test_an_optimizer_takes_the_new_parameters_with_their_state() -> None:
    before, after = nn.Linear(2, 2), nn.Linear(2, 2)
    names = names_by_parameter(before)
    optimizer = torch.optim.SGD(
        [{"params": [before.weight], "lr": 0.5}, {"params": [before.bias]}], lr=0.1, momentum=0.9
    )
    before(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    momentum = optimizer.state[before.weight]["momentum_buffer"]
    rewire_optimizer(optimizer, names, dict(after.named_parameters()))
    assert [group["params"] for group in optimizer.param_groups] == [[after.weight], [after.bias]]
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert optimizer.state[after.weight]["momentum_buffer"] is momentum
    assert before.weight not in optimizer.state


def test_an_optimizer_made_after_sharding_is_left_alone() -> None:
    module = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    rewire_optimizer(optimizer, {}, dict(module.named_parameters()))
    assert optimizer.param_groups[0]["params"] == [module.weight, module.bias]


def test_a_parameter_of_another_module_is_refused_with_its_shape() -> None:
    module, other = nn.Linear(2, 2), nn.Linear(5, 3)
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    with pytest.raises(ConfigError, match=r"SGD holds a parameter of shape \(3, 5\) that is not in the module"):
        rewire_optimizer(optimizer, names_by_parameter(module), dict(module.named_parameters()))
