"""Parameters that lie elsewhere in a loop of Fabric: windows, clipping, a checkpoint and back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from lightning.fabric import Fabric
from torch import nn

from meshbolt import Offload
from meshbolt.compat import local_tensor
from meshbolt.fabric import MeshStrategy
from meshbolt.testing import run_ranks

PLACES = {"hosted": {"parameters": "cpu"}, "infinity": {"optimizer": "nvme", "parameters": "nvme"}}


def train(place: str | None, path: str) -> list[torch.Tensor]:
    torch.manual_seed(0)
    further = {} if place != "infinity" else {"path": path}
    offload = None if place is None else Offload(**{"optimizer": "cpu", **PLACES[place], **further})  # type: ignore[arg-type]
    fabric = Fabric(strategy=MeshStrategy(zero=3, offload=offload), accelerator="cpu", devices=dist.get_world_size())
    fabric.launch()
    net = nn.Sequential(*(nn.Linear(32, 32) for _ in range(4)))
    net, optimizer = fabric.setup(net, torch.optim.AdamW(net.parameters(), lr=1e-2, fused=True))
    generator = torch.Generator().manual_seed(1 + fabric.global_rank)
    for step in range(5):
        for batch in range(2):
            with fabric.no_backward_sync(net, enabled=batch == 0):
                fabric.backward(net(torch.randn(4, 32, generator=generator)).square().mean())
        fabric.clip_gradients(net, optimizer, max_norm=0.5)
        optimizer.step()
        optimizer.zero_grad()
        if step == 2:
            fabric.save(f"{path}/half-{place}", {"net": net, "optimizer": optimizer})
    fabric.load(f"{path}/half-{place}", {"net": net, "optimizer": optimizer})
    fabric.backward(net(torch.ones(4, 32)).square().mean())
    optimizer.step()
    return [local_tensor(parameter).detach().clone() for parameter in net.parameters()]


@pytest.mark.parametrize("place", ["hosted", "infinity"])
def test_it_trains_as_without(place: str, tmp_path: Path) -> None:
    expected, found = (run_ranks(train, 2, each, str(tmp_path), timeout=60) for each in (None, place))
    assert all(torch.equal(*pair) for rank in zip(found, expected, strict=True) for pair in zip(*rank, strict=True))
