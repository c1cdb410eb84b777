"""Whether the stages of a module compute what the module does: both in one process, and the gradients beside each other."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from meshbolt.pipeline.analyse import analyse
from meshbolt.pipeline.apart import Kept
from meshbolt.pipeline.calls import Calls
from meshbolt.pipeline.cost import CountCost
from meshbolt.pipeline.emulate import emulate
from meshbolt.pipeline.report import PipelineReport
from meshbolt.pipeline.taint import buffers_apart

_CPU = torch.device("cpu")
Step = Callable[[], Any]


def compare_stages(
    module: nn.Module,
    steps: Sequence[Step],
    cuts: Sequence[str],
    *,
    loss_of: Callable[[Any], Tensor],
    replicate: Sequence[str] = (),
) -> PipelineReport:
    """Run a module's stages and the module itself, forwards and backwards, and compare losses and gradients.

    Nothing is trained, and gradients, buffers and attributes are left as they were.

    Args:
        module: whole, on the CPU.
        steps: one per microbatch; each runs the module from its inputs to the loss.
        cuts: names of the modules with which stages 1, 2, ... begin.
        loss_of: finds the loss in what a step returns.
        replicate: names of modules that every stage keeps.

    Raises:
        ConfigError: a name is that of no module.
        UnsupportedError: the module cannot be cut there; the message says which value is in the way.
    """
    kept = {parameter: parameter.grad for parameter in module.parameters()}
    attributes = Kept(module)
    module.zero_grad()
    try:
        with buffers_apart(module):
            results, plan = emulate(module, steps, cuts, loss_of=loss_of, replicate=replicate)
        attributes.put_back()
        found = _losses(results, loss_of), _take_gradients(module)
        expected, compared_with = _reference(module, steps, cuts, loss_of, attributes)
        attributes.put_back()
        shares = _shares(module, steps[0], cuts, replicate)
    finally:
        attributes.put_back()
        for parameter, gradient in kept.items():
            parameter.grad = gradient
    return PipelineReport(
        plan=plan,
        cuts=tuple(cuts),
        shares=shares,
        num_parameters=tuple(_count(module, plan.owned(stage)) for stage in range(plan.stages)),
        compared_with=compared_with,
        loss_difference=_loss_difference(found[0], expected[0]),
        gradient_difference=_largest_difference(found[1], expected[1]),
        tolerance=1e-12 if all(p.dtype == torch.float64 for p in module.parameters()) else 1e-5,
    )


def _reference(
    module: nn.Module,
    steps: Sequence[Step],
    cuts: Sequence[str],
    loss_of: Callable[[Any], Tensor],
    attributes: Kept,
) -> tuple[tuple[list[float], dict[str, Tensor]], str]:
    """Return losses and gradients of the whole module, or of one stage where random numbers are drawn."""
    before = torch.get_rng_state()
    with buffers_apart(module):
        results = [step() for step in steps]
        is_random = not torch.equal(before, torch.get_rng_state())
        torch.set_rng_state(before)
        for result in results if not is_random else ():
            loss_of(result).backward()
    if is_random:
        attributes.put_back()
        with buffers_apart(module):
            results, _ = emulate(module, steps, (), loss_of=loss_of, units=cuts)
    return (_losses(results, loss_of), _take_gradients(module)), "one stage" if is_random else "the whole module"


def _losses(results: Sequence[Any], loss_of: Callable[[Any], Tensor]) -> list[float]:
    return [float(loss_of(result).detach()) for result in results]


def _take_gradients(module: nn.Module) -> dict[str, Tensor]:
    gradients = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    module.zero_grad(set_to_none=True)
    return gradients


def _loss_difference(found: list[float], expected: list[float]) -> float:
    if list(map(math.isfinite, found)) != list(map(math.isfinite, expected)):
        return float("inf")
    return max((abs(a - b) for a, b in zip(found, expected, strict=True) if math.isfinite(a)), default=0.0)


def _largest_difference(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    if found.keys() != expected.keys():
        return float("inf")
    return max((_difference(found[name], value) for name, value in expected.items()), default=0.0)


def _difference(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference relative to the largest value; infinite where one is not finite and the other is."""
    is_finite = expected.isfinite()
    if not torch.equal(found.isfinite(), is_finite):
        return float("inf")
    found, expected = found[is_finite], expected[is_finite]
    if not expected.numel():
        return 0.0
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=torch.finfo(torch.float32).tiny))


def _count(module: nn.Module, names: frozenset[str]) -> int:
    return sum({p: p.numel() for name, p in module.named_parameters(remove_duplicate=False) if name in names}.values())


def _shares(module: nn.Module, step: Step, cuts: Sequence[str], replicate: Sequence[str]) -> tuple[float, ...]:
    calls, cost = Calls(module, cuts, replicate=replicate), CountCost()
    try:
        plan = analyse(module, calls, step, device=_CPU, cost=cost)
    finally:
        calls.remove()
    times = [0.0, *(plan.before[cut].time for cut in plan.cuts), cost.so_far.time]
    return tuple((end - start) / max(times[-1], 1.0) for start, end in itertools.pairwise(times))
