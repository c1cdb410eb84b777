"""Every stage of a pipeline in one process, one after the other: what a module can be cut into, without any ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from meshbolt.errors import MeshboltError, UnsupportedError
from meshbolt.pipeline.analyse import analyse
from meshbolt.pipeline.apart import StagesApart
from meshbolt.pipeline.calls import Calls
from meshbolt.pipeline.plan import PipelinePlan
from meshbolt.pipeline.stage import run_stage
from meshbolt.pipeline.taint import Foreign, foreign_parameters

Step = Callable[[], Any]


def emulate(
    module: nn.Module,
    steps: Sequence[Step],
    cuts: Sequence[str],
    *,
    loss_of: Callable[[Any], Tensor] = lambda result: result,
    units: Sequence[str] = (),
    replicate: Sequence[str] = (),
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> tuple[list[Any], PipelinePlan]:
    """Run a step cut into stages, forwards and backwards; gradients are added to those of the module's parameters.

    Between stages only what the plan names is handed over, and on each stage only its own parameters have values. What modules
    keep in attributes and buffers, each stage has for itself, as on a rank of its own; afterwards the module has the attributes
    of the last stage, and each buffer of the stage that calls its module.

    Args:
        module: whole, on `device`.
        steps: one per microbatch; each runs the module from its inputs to the loss.
        cuts: names of the modules with which stages 1, 2, ... begin.
        loss_of: finds the loss in what a step returns.
        units: names of further units; each draws random numbers from a stream of its own, as those do that begin stages.
        replicate: names of modules that every stage keeps.
        seed: of the step, for random numbers.
        device: of the module.

    Returns:
        What the last stage has returned for each microbatch, and the plan of the first one.

    Raises:
        ConfigError: a cut, or what every stage is to keep, names no module.
        UnsupportedError: the step cannot be cut there.
    """
    device = torch.device(device)
    calls = Calls(module, cuts, units=units, replicate=replicate)
    apart = StagesApart(module, len(calls.cuts) + 1)
    try:
        plans = [analyse(module, calls, step, device=device) for step in steps]
        results = [
            _microbatch(module, calls, apart, plan, step, loss_of, seed=seed, microbatch=number, device=device)
            for number, (plan, step) in enumerate(zip(plans, steps, strict=True))
        ]
    except BaseException:
        apart.leave_as_it_was()
        raise
    else:
        apart.join(plans[0])
    finally:
        calls.remove()
    return results, plans[0]


def _microbatch(
    module: nn.Module,
    calls: Calls,
    apart: StagesApart,
    plan: PipelinePlan,
    step: Step,
    loss_of: Callable[[Any], Tensor],
    *,
    seed: int,
    microbatch: int,
    device: torch.device,
) -> Any:
    mode, received, edges = Foreign(), list[Tensor](), list[tuple[list[Tensor], list[Tensor]]]()
    result: Any = None
    for stage in range(plan.stages):
        others = frozenset(plan.stages_of) - plan.owned(stage)
        with apart.stage(stage), foreign_parameters(module, others, mode, device=device):
            sent, result = _run(
                calls, plan, step, stage=stage, received=received, seed=seed, microbatch=microbatch, device=device
            )
        received = [
            tensor.detach().requires_grad_(crossing.requires_grad and tensor.requires_grad)
            for tensor, crossing in zip(sent, plan.sent(stage), strict=True)
        ]
        edges.append((sent, received))
    loss = loss_of(result)
    if loss.requires_grad:
        with calls.backward():
            loss.backward()
            for sent, arrived in reversed(edges):
                pairs = [(s, a.grad) for s, a in zip(sent, arrived, strict=True) if a.grad is not None]
                if pairs:
                    torch.autograd.backward([s for s, _ in pairs], [gradient for _, gradient in pairs])
    return result


def _run(calls: Calls, plan: PipelinePlan, step: Step, *, stage: int, **options: Any) -> tuple[list[Tensor], Any]:
    """Run a stage as a rank would that has it alone.

    Raises:
        UnsupportedError: it failed, which the rank would too.
    """
    try:
        return run_stage(calls, plan, step, stage=stage, ran=set(), **options)
    except MeshboltError:
        raise
    except Exception as error:
        if stage == 0:
            raise
        raise UnsupportedError(
            f"Stage {stage} ends with {type(error).__name__}: {error}. If the whole module does not, a layer reads what one of "
            "an earlier stage has left in an attribute, a list or a global variable, and the rank of this stage does not run "
            "that layer. Return it from the layer, and pass it on as an argument."
        ) from error
