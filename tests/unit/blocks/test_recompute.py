"""If these fail, recompute changes the result, is not done, or is asked for in vain."""

import pytest
import torch
from torch import nn

from meshbolt.blocks import Recompute, recompute_blocks
from meshbolt.errors import ConfigError


class Counted(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.calls = nn.Linear(3, 3), 0

    def forward(self, x):
        self.calls += 1
        return torch.sin(self.linear(x))


@pytest.mark.parametrize(("mode", "calls"), [("none", 1), ("full", 2), ("selective", 2)])
def test_gradients_are_equal_and_the_forward_runs_again_in_backward(mode, calls):
    torch.manual_seed(0)
    plain, block = Counted(), Counted()
    block.load_state_dict(plain.state_dict())
    recompute_blocks([block], Recompute(mode))
    x = torch.randn(2, 3)
    plain(x).sum().backward()
    block(x).sum().backward()
    assert block.calls == calls
    torch.testing.assert_close(block.linear.weight.grad, plain.linear.weight.grad, rtol=0, atol=0)


def test_every_second_block_can_be_chosen():
    blocks = [Counted() for _ in range(4)]
    recompute_blocks(blocks, Recompute("full", every=2))
    x = torch.randn(2, 3)
    for block in blocks:
        x = block(x)
    x.sum().backward()
    assert [block.calls for block in blocks] == [2, 1, 2, 1]


def test_without_gradients_nothing_is_recomputed():
    block = Counted()
    recompute_blocks([block], Recompute("full"))
    with torch.no_grad():
        block(torch.randn(2, 3))
    assert block.calls == 1


def test_names_of_parameters_stay_the_users():
    block = Counted()
    recompute_blocks([block], Recompute("full"))
    assert list(block.state_dict()) == ["linear.weight", "linear.bias"]


def test_a_model_without_blocks_cannot_recompute():
    with pytest.raises(ConfigError, match="none was found"):
        recompute_blocks([], Recompute("full"))


def test_unknown_modes_and_intervals_are_refused():
    with pytest.raises(ConfigError, match=r"'ful' is not a mode.*did you mean 'full'"):
        Recompute("ful")
    for every in (0, "2", True):
        with pytest.raises(ConfigError, match=f"every={every!r}"):
            Recompute("full", every=every)
