"""State that has left the parameters' device comes back to it in the middle of training."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.unit.offload.hosts import FUSED, OWN_CLASS, assert_same, give_gradients, offloaded, parameters

from meshbolt.offload.files import StateFile
from meshbolt.offload.layout import PAGE_BYTES
from meshbolt.offload.tiers import FileTier


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("kind", ["adamw", "sgd momentum", "adagrad", "adamax"])
def test_it_trains_on_as_before(kind: str, share: float, tmp_path: Path) -> None:
    make = {**FUSED, **OWN_CLASS}[kind]
    mine, theirs = (make(parameters()) for _ in range(2))
    params, others = (optimizer.param_groups[0]["params"] for optimizer in (mine, theirs))
    with offloaded(mine, make_tier=lambda layout: FileTier(layout, lambda size: StateFile(tmp_path, size))) as host:
        whole = host.layout.bytes_of(stays=False)
        for step in range(6):
            for each in (params, others):
                give_gradients(each, step, without=(2,) if step == 1 else ())
            host.step()
            theirs.step()
            if step == 1:
                moved = host.bring_back(int(share * whole))
                assert moved <= share * whole
                assert (moved > 0) == (share > 0.0)
        with host.state_shown():
            assert_same(mine, theirs)
        assert host.layout.bytes_of(stays=True) >= moved
        read = host.traffic().state.read.num_bytes
        give_gradients(params, 7)
        host.step()
        again = host.traffic().state.read.num_bytes - read
        # A parameter without elements takes a page, and does not come back.
        assert (again <= PAGE_BYTES) == (share == 1.0)


def test_nothing_comes_back_twice(tmp_path: Path) -> None:
    params = parameters()
    optimizer = torch.optim.AdamW(params, fused=True)
    with offloaded(optimizer) as host:
        give_gradients(params, 0)
        host.step()
        assert host.bring_back(10**9) > 0
        assert host.bring_back(10**9) == 0
