"""Steps of a Fabric loop, run through the stages of a pipeline: explicit, since Fabric does not know of microbatches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from meshbolt.config import Plan
from meshbolt.errors import ConfigError, UnsupportedError
from meshbolt.pipeline import Microbatches, PipelinePlan
from meshbolt.plugins import MeshPrecision
from meshbolt.strategies.examples import example_of
from meshbolt.strategies.pipelined.results import detached, join_results, placed
from meshbolt.strategies.pipelined.staged import FirstStep, StagedModule


@runtime_checkable
class KnowsItsStages(Protocol):
    """A module that says which of its layers are on which stage, so that no example of its inputs is needed."""

    def plan_of_stages(self) -> PipelinePlan:
        """Return how it is cut."""


class FabricSteps(StagedModule):
    """Runs steps of a module that Fabric has set up.

    Args:
        module: the user's, before it is sharded.
        precision: of the run.
        plan: of the run.
        mesh: of all axes.
        device: this rank's.
    """

    called_in = "the function that is given to fabric.strategy.pipeline_step or pipeline_evaluate"

    def __init__(
        self, module: nn.Module, *, precision: MeshPrecision, plan: Plan, mesh: DeviceMesh, device: torch.device
    ) -> None:
        self._precision, self._steps = precision, 0
        super().__init__(module, plan=plan, mesh=mesh, device=device)

    def _first_step(self) -> FirstStep:
        count = self._setting.microbatches
        count = count if isinstance(count, int) else 2 * self._setting.size
        if isinstance(self._module, KnowsItsStages):
            plan = self._module.plan_of_stages()
            return FirstStep(kind="forward", look=_nothing, microbatch=None, count=count, trains=True, plan=plan)
        name = self._setting.example_batch
        if name is not None and not hasattr(self._module, name):
            raise ConfigError(
                f"PipelineParallel(example_batch={name!r}): {type(self._module).__name__} has no such attribute. Define a method "
                "of that name, which returns the arguments of its forward."
            )
        example = getattr(self._module, name)() if name is not None else None
        call = example_of(self._module, self._precision.convert_input, values=example, device=self._device)

        def look() -> Any:
            with self._precision.forward_context():
                return call(self._module)

        return FirstStep(kind="forward", look=look, microbatch=None, count=count, trains=True)

    def train(self, batch: Any, loss_fn: Callable[[nn.Module, Any], Tensor]) -> Tensor:
        """Run a batch forwards and backwards; gradients are added to those of the parameters.

        Args:
            batch: the whole one, on every rank of the pipeline.
            loss_fn: takes the module and a microbatch, and returns the microbatch's loss.

        Returns:
            The loss of the batch, without a graph; the same on every rank of the pipeline.
        """
        engine, scaler = self._running(), self._precision.loss_scaler
        parts, sizes = self._split(batch)
        factor = 1.0 if scaler is None else scaler.current_scale
        with engine.schedule():
            found = self._pipeline.step(
                self._function(loss_fn),
                parts,
                weights=[factor * size / sum(sizes) for size in sizes],
                loss_of=_loss_in,
                seed=self._next_seed(),
                kind=f"pipeline_step {_name_of(loss_fn)}",
            )
        engine.give_gradients()
        loss: Tensor = self._told(found, sizes)
        return loss

    def evaluate(self, batch: Any, function: Callable[[nn.Module, Any], Any]) -> Any:
        """Run a batch forwards only.

        Args:
            batch: the whole one, on every rank of the pipeline.
            function: takes the module and a microbatch.

        Returns:
            What the function returns for the whole batch, on every rank of the pipeline; of `Microbatches` a list, for each.
        """
        parts, sizes = self._split(batch)
        kind = f"pipeline_evaluate {_name_of(function)}"
        with torch.no_grad():
            found = self._running().call(
                self._pipeline.evaluate, self._function(function), parts, seed=self._next_seed(), kind=kind
            )
        if isinstance(batch, Microbatches):
            return placed(self._tell(lambda: detached(found)), self._device)
        return self._told(found, sizes)

    def _function(self, function: Callable[[nn.Module, Any], Any]) -> Callable[[Any], Any]:
        def step(microbatch: Any) -> Any:
            with self._precision.forward_context():
                return function(self._module, self._precision.convert_input(microbatch))

        return step

    def _told(self, found: list[Any], sizes: list[int]) -> Any:
        return placed(self._tell(lambda: detached(join_results(found, sizes))), self._device)

    def _next_seed(self) -> int:
        self._steps += 1
        return self._seed(self._steps)


def _nothing() -> None:
    return None


def _loss_in(result: Any) -> Tensor:
    if not isinstance(result, Tensor) or result.numel() != 1:
        raise UnsupportedError(
            f"The loss_fn of pipeline_step returned {type(result).__name__} instead of a loss. Return a tensor with one number."
        )
    return result


def _name_of(function: Callable[..., Any]) -> str:
    """Return a name by which a function's plans are known; a lambda in a loop is a new object in each turn."""
    code = getattr(function, "__code__", None)
    return f"{function!r}" if code is None else f"{code.co_filename}:{code.co_firstlineno}"
