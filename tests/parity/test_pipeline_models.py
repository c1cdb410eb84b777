"""Models cut into stages, all of them in one process, train as they do whole; nothing about them is written for that."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from tests.parity.pipeline_models import CUTS, Cut
from tests.rows import full
from torch import Tensor, nn

from meshbolt.pipeline import emulate

STEPS, MICROBATCHES = 5, 2
# One of each kind: plain, tied, experts, encoder and decoder, a head by function, statistics, skips, states, noise.
SELECTED = {"llama", "mixtral", "whisper", "nanogpt_functional", "resnet_inside_a_block", "unet", "recurrent", "noise"}
NAMES = [name if name in SELECTED else full(name) for name in CUTS]


def made(cut: Cut, *, training: bool) -> nn.Module:
    """Make the model, as a module with the name that cuts begin with."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.ModuleDict({"network": cut.model.network()}).double().train(training)


def steps_of(cut: Cut, module: nn.Module, step: int) -> list[Callable[[], Tensor]]:
    generators = [torch.Generator().manual_seed(MICROBATCHES * step + each) for each in range(MICROBATCHES)]
    batches = [in_float64(cut.model.batch(generator)) for generator in generators]
    return [functools.partial(cut.model.loss, module["network"], batch) for batch in batches]  # type: ignore[index]


def in_float64(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: value.double() if value.is_floating_point() else value for key, value in batch.items()}


def train(
    cut: Cut, run: Callable[[nn.Module, list[Callable[[], Tensor]], int], list[Tensor]], *, training: bool
) -> Any:
    """Return losses, gradients of the first step, and parameters and buffers after the last."""
    module = made(cut, training=training)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9)
    losses, first = list[float](), dict[str, Tensor]()
    for step in range(STEPS):
        optimizer.zero_grad()
        losses += [float(loss.detach()) for loss in run(module, steps_of(cut, module, step), step)]
        first = first or {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
        optimizer.step()
    return torch.tensor(losses), first, {name: value.clone() for name, value in module.state_dict().items()}


def whole(module: nn.Module, steps: list[Callable[[], Tensor]], _step: int) -> list[Tensor]:
    losses = [step() for step in steps]
    for loss in losses:
        loss.backward()
    return losses


def cut_at(cuts: Sequence[str]) -> Callable[[nn.Module, list[Callable[[], Tensor]], int], list[Tensor]]:
    return lambda module, steps, step: emulate(module, steps, cuts, seed=step)[0]


@pytest.fixture(autouse=True)
def _float64(request: pytest.FixtureRequest) -> Any:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "noise"])  # which it draws without streams
def test_stages_compute_what_the_whole_model_does(name: str) -> None:
    cut = CUTS[name]
    found, expected = train(cut, cut_at(cut.cuts), training=False), train(cut, whole, training=False)
    torch.testing.assert_close(found, expected, rtol=0.0, atol=cut.tolerance)


@pytest.mark.parametrize("name", NAMES)
def test_several_stages_are_one_stage_with_dropout_noise_and_running_statistics(name: str) -> None:
    cut = CUTS[name]
    found, expected = train(cut, cut_at(cut.cuts), training=True), train(cut, cut_at(()), training=True)
    torch.testing.assert_close(found, expected, rtol=0.0, atol=cut.tolerance)


@pytest.mark.parametrize("name", NAMES)
def test_what_passes_a_cut_and_what_is_tied_is_found(name: str) -> None:
    cut = CUTS[name]
    module = made(cut, training=True)
    _, plan = emulate(module, steps_of(cut, module, 0)[:1], cut.cuts)
    assert tuple(map(len, plan.crossings)) == tuple(cut.tensors)
    assert plan.tied().keys() == cut.tied
    assert set(plan.stages_of) == {name for name, _ in module.named_parameters(remove_duplicate=False)}
