"""If these fail, compile is ignored or asked for in vain."""

import pytest
from torch import nn

from meshbolt.blocks import compile_blocks
from meshbolt.errors import ConfigError


# Importing inductor meets a deprecation of torch's own.
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")
def test_every_block_is_compiled_and_nothing_else():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    compile_blocks([model[0]], enabled=True)
    assert model[0]._compiled_call_impl is not None
    assert model[1]._compiled_call_impl is None


def test_switched_off_nothing_is_compiled():
    block = nn.Linear(2, 2)
    compile_blocks([block], enabled=False)
    assert block._compiled_call_impl is None


def test_a_model_without_blocks_cannot_be_compiled():
    with pytest.raises(ConfigError, match="none was found"):
        compile_blocks([], enabled=True)
