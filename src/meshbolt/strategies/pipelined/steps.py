"""The steps of a Trainer's loops, run through the stages of a pipeline.

Every rank has the batch. The user's step runs once for each microbatch and stage; the last stage's rank has what it returns and
logs, puts that together as if the whole batch had been one, and tells the others, where it is returned and logged too.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from meshbolt.compat import tree_leaves
from meshbolt.config import Plan
from meshbolt.engine import PipelinedEngine
from meshbolt.errors import UnsupportedError
from meshbolt.mesh import data_parallel_group
from meshbolt.pipeline import batch_size, is_foreign, split_batch
from meshbolt.plugins import MeshPrecision
from meshbolt.strategies.checks import check_pipelined
from meshbolt.strategies.pipelined.absent import optimizers_stood_in_for
from meshbolt.strategies.pipelined.example import example_batch
from meshbolt.strategies.pipelined.finetuning import let_finetuning_know_parameters
from meshbolt.strategies.pipelined.logs import Logged, combine, record_logs, refuse_foreign_logs, replay
from meshbolt.strategies.pipelined.metrics import WholeBatch, quiet_metrics, share_metrics
from meshbolt.strategies.pipelined.played import played
from meshbolt.strategies.pipelined.results import detached, join_results, placed
from meshbolt.strategies.pipelined.staged import FirstStep, StagedModule

_STEPS = {
    TrainerFn.FITTING: "training_step",
    TrainerFn.VALIDATING: "validation_step",
    TrainerFn.TESTING: "test_step",
    TrainerFn.PREDICTING: "predict_step",
}


@dataclass(frozen=True, kw_only=True)
class _Outcome:
    """What a step has returned and logged for a microbatch; a leaf where results are looked through."""

    logged: list[Logged]


class PipelinedSteps(StagedModule):
    """Runs the steps of a Trainer's loops through this rank's stages.

    Args:
        trainer: whose loops take the steps.
        plan: of the run.
        mesh: of all axes.
        device: this rank's.
    """

    called_in = "training_step, validation_step, test_step or predict_step"

    def __init__(self, trainer: pl.Trainer, *, plan: Plan, mesh: DeviceMesh, device: torch.device) -> None:
        self._trainer, self._is_in_step = trainer, False
        self._whole = WholeBatch(trainer.lightning_module)
        # By kind of step, what its batches have shown of the batch sizes that it logs.
        self._constants: dict[str, dict[str, bool]] = {}
        self._samples_group = data_parallel_group(mesh)
        super().__init__(trainer.lightning_module, plan=plan, mesh=mesh, device=device)

    def run_by(self, engine: PipelinedEngine) -> None:
        """Take the engine, and let every rank ask metrics that only the last stage's updates.

        Args:
            engine: surrounds the passes of stages.
        """
        super().run_by(engine)
        let_finetuning_know_parameters()
        self._hide_example()
        share_metrics(
            self._module,
            group=self._group,
            source=self._owner,
            is_in_step=lambda: self._is_in_step,
            samples_group=self._samples_group,
        )

    def _hide_example(self) -> None:
        """Let the model's summary do without a forward of the whole model, which no rank has."""
        if self._trainer.state.fn == TrainerFn.FITTING and self._module.example_input_array is not None:
            self._example = self._module.example_input_array
            self._module.example_input_array = None

    def _show_example(self) -> None:
        """Give the module back what it says itself is an example, once training begins."""
        if self._example is not None:
            self._module.example_input_array, self._example = self._example, None

    _example: Any = None

    def _first_step(self) -> FirstStep:
        check_pipelined(self._trainer)
        batch = example_batch(self._trainer, self._setting)
        kind = _STEPS[self._trainer.state.fn]  # type: ignore[index]
        count = self._setting.microbatches_of(batch_size(batch))
        microbatch = split_batch(batch, count)[0]
        takes_more = (0,) if _takes_index(self._module, kind) else ()
        function = self._function(kind, takes_more)

        def look() -> Any:
            stood_in = optimizers_stood_in_for(self._module)
            with record_logs(self._module, []), quiet_metrics(self._module), stood_in:
                result = function(microbatch)
            if kind == "training_step":
                _loss_in(result, self._module)
            return result

        return FirstStep(
            kind=kind, look=look, microbatch=microbatch, count=count, trains=self._trainer.state.fn == TrainerFn.FITTING
        )

    # Steps ----------------------------------------------------------------------------------------------------------------

    def train(self, args: tuple[Any, ...]) -> Any:
        """Run a batch forwards and backwards; return what training_step returns, whose loss gives the gradients when asked.

        Args:
            args: of training_step.
        """
        self._show_example()
        engine, precision = self._running(), self._precision
        parts, sizes = self._split(args[0])
        scaler = precision.loss_scaler
        factor = (1.0 if scaler is None else scaler.current_scale) / self._trainer.accumulate_grad_batches
        with engine.schedule():
            found = self._in_step(
                lambda function: self._pipeline.step(
                    function,
                    parts,
                    weights=[factor * size / sum(sizes) for size in sizes],
                    loss_of=lambda outcome: _loss_in(outcome[0], self._module),
                    seed=self._seed_at("training_step", args),
                    kind="training_step",
                ),
                "training_step",
                args[1:],
            )
        output = self._told("training_step", found, sizes)
        return _with_loss(output, lambda loss: played(loss, engine, factor))

    def evaluate(self, kind: str, args: tuple[Any, ...]) -> Any:
        """Run a batch forwards only; return what the step returns.

        Args:
            kind: "validation_step", "test_step" or "predict_step".
            args: of the step.
        """
        parts, sizes = self._split(args[0])
        found = self._running().call(
            self._in_step,
            lambda function: self._pipeline.evaluate(function, parts, seed=self._seed_at(kind, args), kind=kind),
            kind,
            args[1:],
        )
        return self._told(kind, found, sizes)

    @property
    def _precision(self) -> MeshPrecision:
        precision = self._trainer.precision_plugin
        if not isinstance(precision, MeshPrecision):
            raise AssertionError("The strategy has not taken its precision plugin.")
        return precision

    def _in_step(self, run: Callable[[Callable[[Any], Any]], Any], kind: str, more: tuple[Any, ...]) -> Any:
        step = self._function(kind, more)

        def function(microbatch: Any) -> Any:
            logged: list[Logged] = []
            counts = self._pipeline.is_in_last_stage and not self._pipeline.is_looking
            with record_logs(self._module, logged), self._whole.watching() if counts else quiet_metrics(self._module):
                result = step(microbatch)
            if counts and not any(map(is_foreign, tree_leaves(result))):
                refuse_foreign_logs(logged, kind)
            # Beside what was returned, so that both are looked through for values of other stages.
            return result, [each.value for each in logged], _Outcome(logged=logged)

        self._is_in_step = True
        try:
            return run(function)
        finally:
            self._is_in_step = False

    def _function(self, kind: str, more: tuple[Any, ...]) -> Callable[[Any], Any]:
        contexts: Mapping[str, Callable[[], AbstractContextManager[Any]]] = {
            "training_step": self._precision.train_step_context,
            "validation_step": self._precision.val_step_context,
            "test_step": self._precision.test_step_context,
            "predict_step": self._precision.predict_step_context,
        }

        def function(microbatch: Any) -> Any:
            with contexts[kind]():
                return getattr(self._module, kind)(microbatch, *more)

        return function

    def _told(self, kind: str, found: list[Any], sizes: list[int]) -> Any:
        """Log on every rank what the last stage's has found, and return what it has returned."""

        def put_together() -> Any:
            constants = self._constants.setdefault(kind, {})
            logged = combine([outcome.logged for _, _, outcome in found], sizes, constants=constants)
            logged = self._whole.complete(logged)
            return detached(join_results([result for result, *_ in found], sizes)), logged

        output, logged = self._tell(put_together)
        replay(self._module, logged)
        return placed(output, self._device)

    def _seed_at(self, kind: str, args: tuple[Any, ...]) -> int:
        numbers = (each for each in args[1:] if isinstance(each, int))
        return self._seed(kind, self._trainer.current_epoch, self._trainer.global_step, *numbers)


def _takes_index(module: pl.LightningModule, kind: str) -> bool:
    return len(inspect.signature(getattr(module, kind)).parameters) > 1


def _loss_in(output: Any, module: pl.LightningModule) -> Tensor:
    loss = output.get("loss") if isinstance(output, Mapping) else output
    if not isinstance(loss, Tensor):
        raise UnsupportedError(
            f"{type(module).__name__}.training_step returned {type(loss).__name__} instead of a loss. A batch that is left out "
            "leaves the other ranks waiting for its gradients. Return a loss without weight instead, such as 0.0 * loss."
        )
    return loss


def _with_loss(output: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(output, Mapping):
        return {**output, "loss": change(output["loss"])}
    return change(output)
