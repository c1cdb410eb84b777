"""Fabric's explicit steps through a pipeline compute what a plain loop does."""

from __future__ import annotations

import re
import tempfile
from typing import Any

import lightning.fabric as lf
import pytest
import torch
from lightning.fabric.strategies import SingleDeviceStrategy
from tests.rows import full
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from meshbolt import ConfigError, PipelineParallel
from meshbolt.compat import whole_of
from meshbolt.engine.placeholders import held_elsewhere
from meshbolt.fabric import MeshStrategy
from meshbolt.testing import run_ranks

WIDTH, BATCH, STEPS = 8, 8, 3


class Net(nn.Module):
    """Layers between two others, whose weights are one."""

    example_input_array = torch.zeros(4, WIDTH)

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH, bias=False)
        self.head.weight = self.embed.weight
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for layer in self.layers:
            x = x + layer(x)
        return self.head(x)


def loss_of(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return nn.functional.mse_loss(model(batch["x"]), batch["y"])


def train(settings: dict[str, Any] | None, ranks: int, window: int, folder: str) -> dict[str, Any]:
    torch.set_default_dtype(torch.float64)
    fabric = lf.Fabric(
        accelerator="cpu",
        devices=ranks,
        strategy=MeshStrategy(**settings) if settings else SingleDeviceStrategy(),
        precision="64-true",
    )
    fabric.launch()
    torch.manual_seed(1)
    module = Net()
    model, optimizer = fabric.setup(module, torch.optim.AdamW(module.parameters(), lr=0.01))
    size, own = (fabric.strategy.data_parallel_size, fabric.strategy.data_parallel_rank) if settings else (1, 0)
    losses = []
    for step in range(STEPS):
        for turn in range(window):
            generator = torch.Generator().manual_seed(10 * step + turn)
            whole = {key: torch.randn(BATCH, WIDTH, generator=generator) for key in ("x", "y")}
            batch = {key: value[own::size] for key, value in whole.items()}
            with fabric.no_backward_sync(model, enabled=turn < window - 1):
                if settings:
                    losses.append(float(fabric.strategy.pipeline_step(batch, loss_of)))
                else:
                    loss = loss_of(model, batch)
                    fabric.backward(loss)
                    losses.append(float(loss.detach()))
        fabric.clip_gradients(model, optimizer, max_norm=0.1)
        optimizer.step()
        optimizer.zero_grad()
    held = {name: p for name, p in module.named_parameters() if not held_elsewhere(p)}
    weights = {name: (whole_of(p) if isinstance(p, DTensor) else p).detach().clone() for name, p in held.items()}
    found: dict[str, Any] = {"losses": losses, "weights": weights}
    if settings:
        evaluated = fabric.strategy.pipeline_evaluate(batch, lambda model, part: model(part["x"]))
        fabric.save(f"{folder}/a.ckpt", {"model": model, "optimizer": optimizer})
        with torch.no_grad():
            for parameter in held.values():
                parameter.zero_()
        fabric.load(f"{folder}/a.ckpt", {"model": model, "optimizer": optimizer})
        again = {name: (whole_of(p) if isinstance(p, DTensor) else p).detach() for name, p in held.items()}
        found["restored"] = all(torch.equal(again[name], weights[name]) for name in weights)
    else:
        evaluated = model(batch["x"]).detach()
    torch.set_default_dtype(torch.float32)
    return {**found, "evaluated": evaluated}


@pytest.mark.parametrize(
    ("settings", "ranks", "window"),
    [
        ({"pipeline_parallel": 2, "zero": 1}, 2, 2),
        full({"pipeline_parallel": PipelineParallel(2, schedule="zbv"), "zero": 3}, 2, 1),
        full({"pipeline_parallel": 2, "zero": 0}, 4, 2),
        full({"pipeline_parallel": 2, "zero": 2}, 4, 1),
        full({"pipeline_parallel": PipelineParallel(2, microbatches=3), "zero": 3}, 4, 2),
    ],
)
def test_a_loop_of_fabric_trains_as_in_one_process(settings: dict[str, Any], ranks: int, window: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        (expected,) = run_ranks(train, 1, None, 1, window, folder)
        results = run_ranks(train, ranks, settings, ranks, window, folder, timeout=60)
    merged = {name: value for found in results for name, value in found["weights"].items()}
    assert merged.keys() == expected["weights"].keys()
    for name, value in expected["weights"].items():
        torch.testing.assert_close(merged[name], value, rtol=0.0, atol=1e-12, msg=name)
    assert all(found["restored"] for found in results)
    columns = ranks // 2
    means = [sum(row) / columns for row in zip(*(found["losses"] for found in results[:columns]), strict=True)]
    assert means == pytest.approx(expected["losses"], abs=1e-12)
    assert all(found["losses"] == results[rank % columns]["losses"] for rank, found in enumerate(results))
    for rank, found in enumerate(results):
        own = expected["evaluated"][rank % columns :: columns]
        torch.testing.assert_close(found["evaluated"], own, rtol=0.0, atol=1e-12)


def refused(what: str) -> str:
    fabric = lf.Fabric(accelerator="cpu", devices=2, strategy=MeshStrategy(pipeline_parallel=2, zero=1))
    fabric.launch()
    module = Net()
    if what == "no example":
        del Net.example_input_array
    try:
        model = fabric.setup_module(module)
        if what == "a call":
            model(torch.zeros(4, WIDTH))
        if what == "small":
            fabric.strategy.pipeline_step({"x": torch.zeros(()), "y": torch.zeros(())}, loss_of)
    except Exception as error:  # every kind is looked at by the test
        return f"{type(error).__name__}: {error}"
    return ""


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("a call", r"UnsupportedError.*outside of a step"),
        ("no example", r"ConfigError.*example_input_array"),
        ("small", r"ConfigError.*no tensor with a dim for its samples"),
    ],
)
def test_what_cannot_be_is_refused_on_every_rank(what: str, message: str) -> None:
    for found in run_ranks(refused, 2, what):
        assert re.match(message, found), found


def test_a_pipeline_step_without_a_pipeline_is_refused() -> None:
    strategy = MeshStrategy(zero=1)
    with pytest.raises(ConfigError, match="There is no pipeline"):
        strategy.pipeline_evaluate({}, lambda model, part: None)
