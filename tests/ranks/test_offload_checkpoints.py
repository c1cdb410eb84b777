"""State in a file goes to checkpoints and comes from them, bit for bit, whichever way a program saves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.fabric import Fabric
from tests.rows import full
from torch import nn

from meshbolt import Checkpoint, Offload, TensorParallel
from meshbolt.compat import local_tensor
from meshbolt.fabric import MeshStrategy
from meshbolt.testing import run_ranks

WIDTH = 24


def build(place: str | None, path: str, **settings: Any) -> tuple[Fabric, Any, Any]:
    offload = {None: None, "cpu": Offload("cpu"), "nvme": Offload("nvme", path=path)}[place]
    asynchronous = settings.pop("asynchronous", False)
    strategy = MeshStrategy(offload=offload, checkpoint=Checkpoint(asynchronous=asynchronous), **settings)
    fabric = Fabric(accelerator="cpu", devices=dist.get_world_size(), strategy=strategy)
    fabric.launch()
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(WIDTH, 3 * WIDTH), nn.ReLU(), nn.Linear(3 * WIDTH, WIDTH))
    model = fabric.setup_module(model)
    optimizer = fabric.setup_optimizers(torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True))
    return fabric, model, optimizer


def steps(fabric: Fabric, model: Any, optimizer: Any, numbers: range) -> None:
    for number in numbers:
        batch = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(number))
        fabric.backward(model(batch).square().mean())
        optimizer.step()
        optimizer.zero_grad()


def through(
    places: list[str | None], path: str, saved: str, settings: list[dict[str, Any]], goes_on: bool = False
) -> list[torch.Tensor]:
    """Train two steps at each place, from what was saved at the one before."""
    for number, (place, options) in enumerate(zip(places, settings, strict=True)):
        fabric, model, optimizer = build(place, path, **options)
        state = {"model": model, "optimizer": optimizer}
        if number:
            fabric.load(f"{saved}-{number - 1}", state)
        steps(fabric, model, optimizer, range(2 * number, 2 * number + 2))
        fabric.save(f"{saved}-{number}", state)
        if goes_on:  # while it is written
            steps(fabric, model, optimizer, range(50, 52))
        fabric.strategy.wait_for_checkpoint()  # type: ignore[attr-defined]
        fabric.load(f"{saved}-{number}", state)
    with fabric.strategy.gathered(model, optimizer=optimizer) as of_each:  # type: ignore[attr-defined]
        moments = [value.clone() for values in of_each.values() for value in values.values()]
        return [*(p.detach().clone() for p in model.parameters()), *map(local_tensor, moments)]


ZERO = [{"zero": 3}, {"zero": 1}, {"zero": 2}]
DIVIDED = {"zero": 2, "tensor_parallel": TensorParallel(2, plan={"0": "colwise", "2": "rowwise"})}


@pytest.mark.parametrize(
    ("ranks", "places", "settings", "goes_on"),
    [
        (2, ["nvme", "nvme", "nvme"], ZERO, False),
        (2, ["nvme", "nvme"], [{"zero": 3, "asynchronous": True}] * 2, True),
        full(2, ["nvme", "cpu", "nvme"], ZERO, False),
        full(2, ["nvme", None, "nvme"], ZERO, False),
        (4, ["nvme", "nvme", "nvme"], [{"zero": 3}, DIVIDED, {"zero": 1}], False),
    ],
)
def test_a_run_through_checkpoints_is_one_without_offloading(
    ranks: int, places: list[str | None], settings: list[dict[str, Any]], goes_on: bool, tmp_path: Path
) -> None:
    plain = [{k: v for k, v in each.items() if k != "asynchronous"} for each in settings]
    expected = run_ranks(through, ranks, [None] * len(places), str(tmp_path), str(tmp_path / "plain"), plain)
    found = run_ranks(through, ranks, places, str(tmp_path), str(tmp_path / "found"), settings, goes_on)
    for own, others in zip(found, expected, strict=True):
        assert len(own) == len(others) == 4 + 4 * 3
        assert all(torch.equal(*pair) for pair in zip(own, others, strict=True))
