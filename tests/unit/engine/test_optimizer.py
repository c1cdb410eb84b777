from typing import Any

import pytest
import torch
from torch import nn

from meshbolt.engine.optimizer import ELEMENTWISE, REFUSED, check_optimizer, step
from meshbolt.errors import UnsupportedError


def test_no_class_is_both_known_and_refused() -> None:
    assert not {kind.__name__ for kind in ELEMENTWISE} & set(REFUSED)


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_a_refusal_names_the_reason_and_every_alternative(name: str) -> None:
    params = [nn.Parameter(torch.zeros(2, 2))]
    with pytest.raises(UnsupportedError) as caught:
        check_optimizer(getattr(torch.optim, name)(params), sharded=params)
    assert REFUSED[name] in str(caught.value)
    assert all(kind.__name__ in str(caught.value) for kind in ELEMENTWISE)


def test_a_class_of_the_same_name_that_is_not_torchs_is_not_refused() -> None:
    class Muon(torch.optim.SGD):
        """Elementwise, whatever its name."""

    params = [nn.Parameter(torch.zeros(2))]
    check_optimizer(Muon(params), sharded=params)


def test_parameters_that_are_not_the_modules_are_counted() -> None:
    inside, outside = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
    with pytest.raises(UnsupportedError, match="AdamW holds 1 tensors that are not parameters of the sharded module"):
        check_optimizer(torch.optim.AdamW([inside, outside]), sharded=[inside])


def test_a_step_on_plain_parameters_is_the_optimizers_own() -> None:
    ours, theirs = (nn.Parameter(torch.arange(3.0)) for _ in range(2))
    optimizers = [torch.optim.AdamW([parameter], lr=0.1) for parameter in (ours, theirs)]
    for _ in range(2):
        ours.grad, theirs.grad = torch.ones(3), torch.ones(3)
        step(optimizers[0])
        optimizers[1].step()
    assert torch.equal(ours, theirs)
    assert optimizers[0].param_groups[0]["params"] == [ours]
    assert optimizers[0].state[ours].keys() == optimizers[1].state[theirs].keys()


def test_hooks_around_a_step_run_once() -> None:
    parameter = nn.Parameter(torch.zeros(2))
    parameter.grad = torch.ones(2)
    optimizer, seen = torch.optim.SGD([parameter], lr=0.1), []
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    step(optimizer)
    assert seen == ["before", "after"]


def test_an_optimizer_is_left_as_it_was_when_its_step_fails() -> None:
    parameter = nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([parameter], lr=0.1)

    def fail(*_: Any) -> None:
        raise RuntimeError("stop")

    optimizer.register_step_pre_hook(fail)
    with pytest.raises(RuntimeError, match="stop"):
        step(optimizer)
    assert optimizer.param_groups[0]["params"] == [parameter]
