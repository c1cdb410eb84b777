"""Can a module be cut into pipeline stages as it is? In one process, on the CPU, before any ranks are started."""

from __future__ import annotations

import functools
import inspect
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from meshbolt.errors import ConfigError
from meshbolt.pipeline import (
    Calls,
    CountCost,
    PipelinePlan,
    Timeline,
    analyse,
    buffers_apart,
    choose_cuts,
    draw,
    emulate,
    plan_timeline,
    split_batch,
)

CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class PipelineReport:
    """What a module's stages hold, what passes between them, and whether they compute what the whole module does.

    Attributes:
        plan: the stages.
        cuts: the modules with which stages 1, 2, ... begin.
        shares: of the forward pass's work, by stage; their sum is 1.
        num_parameters: that each stage holds, tied ones on each of their stages.
        compared_with: "the whole module", or "one stage" where a step draws random numbers.
        loss_difference: the largest between losses.
        gradient_difference: the largest between gradients, relative to the largest gradient of the parameter.
        tolerance: of both.
    """

    plan: PipelinePlan
    cuts: tuple[str, ...]
    shares: tuple[float, ...]
    num_parameters: tuple[int, ...]
    compared_with: str
    loss_difference: float
    gradient_difference: float
    tolerance: float

    @property
    def is_equal(self) -> bool:
        """Whether the stages compute what they were compared with."""
        return max(self.loss_difference, self.gradient_difference) <= self.tolerance

    def timeline(self, schedule: str = "1f1b", *, microbatches: int, ranks: int | None = None) -> Timeline:
        """Return when each stage would compute which microbatch, by the work that was counted.

        Args:
            schedule: its name.
            microbatches: of a step.
            ranks: among which the stages are distributed; None: one each.

        Raises:
            ConfigError: the schedule does not fit the numbers.
        """
        return plan_timeline(schedule, self.shares, ranks=ranks or self.plan.stages, microbatches=microbatches)

    def draw(self, path: str | Path, schedule: str = "1f1b", *, microbatches: int, ranks: int | None = None) -> None:
        """Write the timeline of a schedule as a picture.

        Args:
            path: of the SVG file.
            schedule: its name.
            microbatches: of a step.
            ranks: among which the stages are distributed; None: one each.
        """
        Path(path).write_text(draw(self.timeline(schedule, microbatches=microbatches, ranks=ranks)), encoding="utf-8")

    def __str__(self) -> str:
        """Return it as a table, with a line for each tensor that passes a cut."""
        lines = [
            f"{self.plan.stages} stages, the slowest with {max(self.shares) * self.plan.stages:.2f} of the mean work"
        ]
        for stage, (share, count) in enumerate(zip(self.shares, self.num_parameters, strict=True)):
            begins = f"begins with {self.cuts[stage - 1]}" if stage else "begins with the step"
            lines.append(f"  stage {stage}: {share:6.1%} of the work, {count:,} parameters, {begins}")
            lines += [f"    sends {crossing}, {crossing.num_bytes:,} bytes" for crossing in self.plan.sent(stage)]
        for name, stages in self.plan.tied().items():
            lines.append(f"  {name} is held by stages {', '.join(map(str, stages))}, which add up its gradients")
        verdict = "equal" if self.is_equal else "NOT EQUAL"
        lines.append(
            f"{verdict} to {self.compared_with}: losses differ by {self.loss_difference:.1e}, gradients by "
            f"{self.gradient_difference:.1e} (at most {self.tolerance:.0e})"
        )
        return "\n".join(lines)


def verify_pipeline(
    module: pl.LightningModule,
    batch: Any,
    *,
    stages: int = 2,
    cuts: Sequence[str] | None = None,
    microbatches: int = 2,
) -> PipelineReport:
    """Cut a module into pipeline stages, run all of them in this process, and compare their gradients with the module's own.

    Between stages only what the report names is handed over, and each stage has values only for its own parameters: a module
    that passes here computes the same when its stages are on different ranks, unless it hands values from one layer to another
    in attributes or containers, which all stages share here. Nothing is trained, and the module is left as it was.

    Args:
        module: an ordinary LightningModule with a `training_step`, on the CPU.
        batch: one of its batches.
        stages: how many, where `cuts` is not given; they are chosen so that the slowest takes as little time as can be.
        cuts: names of the modules with which stages 1, 2, ... begin.
        microbatches: into how many the batch is divided.

    Returns:
        The report; print it.

    Raises:
        ConfigError: a cut names no module, there are too few units or samples, or the module is not on the CPU.
        UnsupportedError: the module cannot be cut there; the message says which value is in the way.

    Example:
        >>> from meshbolt.demos import ByteGPT
        >>> tokens = torch.randint(256, (4, 17), generator=torch.Generator().manual_seed(0))
        >>> report = verify_pipeline(ByteGPT(dim=16, num_layers=4, num_heads=2, max_length=16), (tokens[:, :-1], tokens[:, 1:]))
        >>> report.cuts, report.is_equal
        (('blocks.3',), True)
    """
    _check(module)
    parts = split_batch(batch, microbatches)
    steps = [functools.partial(module.training_step, part, *_index(module)) for part in parts]
    with _quiet(module):
        chosen = tuple(cuts) if cuts is not None else choose_cuts(module, steps[0], stages, device=CPU)
        kept = {parameter: parameter.grad for parameter in module.parameters()}
        module.zero_grad()
        with buffers_apart(module):
            results, plan = emulate(module, steps, chosen, loss_of=_loss)
        found = _losses(results), _take_gradients(module)
        expected, compared_with = _reference(module, steps)
        shares = _shares(module, steps[0], chosen)
    for parameter, gradient in kept.items():
        parameter.grad = gradient
    return PipelineReport(
        plan=plan,
        cuts=chosen,
        shares=shares,
        num_parameters=tuple(_count(module, plan.owned(stage)) for stage in range(plan.stages)),
        compared_with=compared_with,
        loss_difference=_loss_difference(found[0], expected[0]),
        gradient_difference=_largest_difference(found[1], expected[1]),
        tolerance=1e-12 if all(p.dtype == torch.float64 for p in module.parameters()) else 1e-5,
    )


def _check(module: pl.LightningModule) -> None:
    elsewhere = next((name for name, p in module.named_parameters() if p.device != CPU), None)
    if elsewhere is not None:
        raise ConfigError(
            f"Parameter {elsewhere!r} is on {module.get_parameter(elsewhere).device}; stages are verified on the CPU. Call "
            "module.cpu() first."
        )
    if not module.automatic_optimization:
        raise ConfigError(
            "A module with automatic_optimization=False cannot be cut into stages: they run the backward pass."
        )


def _index(module: pl.LightningModule) -> tuple[int, ...]:
    """Return the index of a batch, where a training step takes one."""
    return (0,) if len(inspect.signature(module.training_step).parameters) > 1 else ()


@contextmanager
def _quiet(module: pl.LightningModule) -> Iterator[None]:
    """Let a module log into nothing."""
    for name in ("log", "log_dict"):
        module.__dict__[name] = lambda *_, **__: None
    try:
        yield
    finally:
        for name in ("log", "log_dict"):
            del module.__dict__[name]


def _reference(
    module: nn.Module, steps: Sequence[Callable[[], Any]]
) -> tuple[tuple[list[float], dict[str, Tensor]], str]:
    """Return losses and gradients of the whole module, or of one stage where random numbers are drawn."""
    before = torch.get_rng_state()
    with buffers_apart(module):
        results = [step() for step in steps]
        is_random = not torch.equal(before, torch.get_rng_state())
        torch.set_rng_state(before)
        for result in results if not is_random else ():
            _loss(result).backward()
    if is_random:
        with buffers_apart(module):
            results, _ = emulate(module, steps, (), loss_of=_loss)
    return (_losses(results), _take_gradients(module)), "one stage" if is_random else "the whole module"


def _loss(result: Any) -> Tensor:
    loss: Tensor = result["loss"] if isinstance(result, dict) else result
    return loss


def _losses(results: Sequence[Any]) -> list[float]:
    return [float(_loss(result).detach()) for result in results]


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


def _shares(module: nn.Module, step: Callable[[], Any], cuts: tuple[str, ...]) -> tuple[float, ...]:
    calls, cost = Calls(module, cuts), CountCost()
    try:
        plan = analyse(module, calls, step, device=CPU, cost=cost)
    finally:
        calls.remove()
    times = [0.0, *(plan.before[cut].time for cut in plan.cuts), cost.so_far.time]
    return tuple((end - start) / max(times[-1], 1.0) for start, end in itertools.pairwise(times))
