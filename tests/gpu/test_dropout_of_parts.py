"""What ranks drop of a split tensor, put together, is what one GPU drops of the whole."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from meshbolt.tensor.axis import ImaginedAxis
from meshbolt.tensor.exchange import own_part
from meshbolt.tensor.layout import Layout
from meshbolt.tensor.rules.elementwise import drawn_noise
from meshbolt.testing import needs


@needs(gpus=1)
@pytest.mark.parametrize("layout", [Layout(2), Layout(1), Layout(2, 3)], ids=str)
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("probability", [0.3, 1.0])
def test_parts_of_the_mask_are_those_of_one_gpu(layout: Layout, turned: bool, probability: float) -> None:
    whole = torch.ones(8, 6, 12, device="cuda")
    whole = whole.transpose(0, 1).contiguous().transpose(0, 1) if turned else whole
    torch.manual_seed(1)
    wanted = F.dropout(whole, probability)
    for rank in range(2):
        axis = ImaginedAxis(2, on_gather=lambda *_: None)
        axis.rank = rank
        part = own_part(whole, layout, axis).clone(memory_format=torch.preserve_format)
        torch.manual_seed(1)
        assert torch.equal(drawn_noise(part, layout, axis, probability), own_part(wanted, layout, axis))
