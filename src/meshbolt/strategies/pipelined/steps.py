"""The steps of a Trainer's loops, run through the stages of a pipeline.

Every rank has the batch. The user's step runs once for each microbatch and stage; the last stage's rank has what it returns and
logs, puts that together as if the whole batch had been one, and tells the others, where it is returned and logged too.
"""

from __future__ import annotations

import hashlib
import inspect
import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.autograd import Function
from torch.distributed.device_mesh import DeviceMesh

from meshbolt.collectives import agree_on_error, same_on_all_ranks
from meshbolt.config import Plan
from meshbolt.engine import PipelinedEngine, Stages
from meshbolt.engine.placeholders import model_state, states_of_all_stages
from meshbolt.errors import TopologyError, UnsupportedError
from meshbolt.mesh import MeshAxis, stage_group
from meshbolt.pipeline import Pipeline, PipelinePlan, batch_size, cuts_of, split_batch
from meshbolt.plugins import MeshPrecision
from meshbolt.strategies.pipelined.example import example_batch
from meshbolt.strategies.pipelined.logs import Logged, combine, record_logs, replay
from meshbolt.strategies.pipelined.metrics import quiet_metrics, share_metrics
from meshbolt.strategies.pipelined.results import detached, join_results, placed

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


class PipelinedSteps:
    """Runs steps through this rank's stages.

    Args:
        trainer: whose loops take the steps.
        plan: of the run.
        mesh: of all axes.
        device: this rank's.
    """

    def __init__(self, trainer: pl.Trainer, *, plan: Plan, mesh: DeviceMesh, device: torch.device) -> None:
        self._trainer, self._plan, self._device = trainer, plan, device
        self._module = trainer.lightning_module
        self._setting = plan.settings.pipeline_parallel
        self._group = mesh.get_group(MeshAxis.PP.value)
        self._is_in_step, self._count = False, 1
        self._engine: PipelinedEngine | None = None
        prepared: list[tuple[Pipeline, PipelinePlan]] = []
        agree_on_error(lambda: prepared.append(self._prepare()))
        self._pipeline, self._first_plan = prepared[0]
        self._check_same()
        self._owner = self._pipeline.rank_of_last_stage
        self.stages = self._stages_of(stage_group(mesh))

    @property
    def group(self) -> dist.ProcessGroup:
        """The ranks of this pipeline."""
        return self._group

    @property
    def plan(self) -> PipelinePlan:
        """How the first step is cut."""
        return self._first_plan

    def run_by(self, engine: PipelinedEngine) -> None:
        """Take the engine, once it holds this rank's stages.

        Args:
            engine: surrounds their passes.
        """
        self._engine = engine
        self._pipeline.run_by(engine, self._first_plan)
        share_metrics(self._module, group=self._group, source=self._owner, is_in_step=lambda: self._is_in_step)

    def buffers_elsewhere(self) -> frozenset[str]:
        """Return the names of the buffers that units of other ranks' stages keep up to date."""
        own = set(self._pipeline.own_stages)
        stages = self._first_plan.stages_of_units
        names = [name for name, _ in self._module.named_buffers(remove_duplicate=False)]
        homes = {name: next((stages[unit] for unit in stages if name.startswith(f"{unit}.")), None) for name in names}
        return frozenset(name for name, home in homes.items() if home is not None and home not in own)

    def model_state(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """Return the module's state dict with placeholders for what other stages hold; all ranks call it together."""
        return dict(model_state(state, elsewhere=self.buffers_elsewhere(), group=self._group))

    def optimizer_state(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """Return an optimizer's state with placeholders for that of other stages; all ranks call it together."""
        return states_of_all_stages(state, group=self._group)

    # Before the first step ------------------------------------------------------------------------------------------------

    def _prepare(self) -> tuple[Pipeline, PipelinePlan]:
        self._check_module()
        batch = example_batch(self._trainer, self._setting)
        kind = _STEPS[self._trainer.state.fn]  # type: ignore[index]
        self._count = count = self._setting.microbatches_of(batch_size(batch))
        microbatch = split_batch(batch, count)[0]
        takes_more = (0,) if _takes_index(self._module, kind) else ()
        function = self._function(kind, takes_more)

        def look() -> Any:
            with record_logs(self._module, []), quiet_metrics(self._module):
                return function(microbatch)

        grad = torch.set_grad_enabled(kind == "training_step")
        with grad:
            cuts = cuts_of(self._module, self._setting, look, device=self._device)
            pipeline = Pipeline(
                self._module,
                cuts,
                schedule=self._setting.schedule,
                microbatches=count,
                group=self._group,
                device=self._device,
                replicate=self._setting.replicate,
            )
            return pipeline, pipeline.plan(lambda _: look(), microbatch, kind=kind)

    def _check_module(self) -> None:
        name = type(self._module).__name__
        if self._trainer.state.fn == TrainerFn.FITTING and not self._module.automatic_optimization:
            raise UnsupportedError(
                f"{name} optimises by itself (automatic_optimization = False), and under pipeline parallelism forward and "
                "backward passes of microbatches take turns, so that no step of its own could stand between them. Use "
                "automatic optimisation, or train without pipeline_parallel."
            )

    def _check_same(self) -> None:
        plan = self._first_plan
        described = ([str(cut) for cut in plan.cuts], [[str(each) for each in cut] for cut in plan.crossings])
        equal, by_rank = same_on_all_ranks((described, dict(plan.stages_of)))
        if not equal:
            raise TopologyError(
                f"Ranks would cut the module in different places: {[each[0][0] for each in by_rank]} by rank. They see different "
                "example batches; name one: PipelineParallel(example_batch=...), or give cuts."
            )

    def _stages_of(self, group: dist.ProcessGroup) -> Stages:
        plan, own = self._first_plan, set(self._pipeline.own_stages)
        of_units: dict[str, int] = {}
        for name, stages in plan.stages_of.items():
            here = own & set(stages)
            parts = name.split(".")
            for depth in range(1, len(parts)) if here else ():
                of_units[".".join(parts[:depth])] = max(here)
        holders = {name: self._pipeline.ranks_of(stages) for name, stages in plan.tied().items()}
        first_names = {name for name, _ in self._module.named_parameters()}
        return Stages(
            elsewhere=self._pipeline.others(plan),
            around=self._pipeline.around,
            of_units=of_units,
            tied={name: ranks for name, ranks in holders.items() if len(ranks) > 1 and name in first_names},
            pipeline=self._group,
            group=group,
        )

    # Steps ----------------------------------------------------------------------------------------------------------------

    def train(self, args: tuple[Any, ...]) -> Any:
        """Run a batch forwards and backwards; return what training_step returns, whose loss gives the gradients when asked.

        Args:
            args: of training_step.
        """
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
                    seed=self._seed("training_step", args),
                    kind="training_step",
                ),
                "training_step",
                args[1:],
            )
        output = self._told(found, sizes)
        return _with_loss(output, lambda loss: _played(loss, engine, factor))

    def evaluate(self, kind: str, args: tuple[Any, ...]) -> Any:
        """Run a batch forwards only; return what the step returns.

        Args:
            kind: "validation_step", "test_step" or "predict_step".
            args: of the step.
        """
        parts, sizes = self._split(args[0])
        found = self._running().call(
            self._in_step,
            lambda function: self._pipeline.evaluate(function, parts, seed=self._seed(kind, args), kind=kind),
            kind,
            args[1:],
        )
        return self._told(found, sizes)

    def _running(self) -> PipelinedEngine:
        if self._engine is None:
            raise AssertionError("A step was taken before the engine was there.")
        return self._engine

    @property
    def _precision(self) -> MeshPrecision:
        precision = self._trainer.precision_plugin
        if not isinstance(precision, MeshPrecision):
            raise AssertionError("The strategy has not taken its precision plugin.")
        return precision

    def _split(self, batch: Any) -> tuple[list[Any], list[int]]:
        samples = batch_size(batch)
        parts = split_batch(batch, min(self._count, samples))
        return parts, [batch_size(part) for part in parts]

    def _in_step(self, run: Callable[[Callable[[Any], Any]], Any], kind: str, more: tuple[Any, ...]) -> Any:
        step = self._function(kind, more)

        def function(microbatch: Any) -> Any:
            logged: list[Logged] = []
            quiet = quiet_metrics(self._module) if self._pipeline.is_looking else nullcontext()
            with record_logs(self._module, logged), quiet:
                result = step(microbatch)
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

    def _told(self, found: list[Any], sizes: list[int]) -> Any:
        """Log on every rank what the last stage's has found, and return what it has returned."""
        box: list[Any] = [None]
        if self._pipeline.has_last_stage:
            logged = combine([outcome.logged for _, _, outcome in found], sizes)
            box = [(detached(join_results([result for result, *_ in found], sizes)), logged)]
        dist.broadcast_object_list(box, group=self._group, group_src=self._owner)
        output, logged = box[0]
        replay(self._module, logged)
        return placed(output, self._device)

    def _seed(self, kind: str, args: tuple[Any, ...]) -> int:
        """Return a seed of the step that depends on the run's seed and where it is, and draws no number from any generator."""
        place = (
            self._trainer.current_epoch,
            self._trainer.global_step,
            *(each for each in args[1:] if isinstance(each, int)),
        )
        named = f"{torch.initial_seed()}/{self._plan.mesh.data_parallel_rank(dist.get_rank())}/{kind}/{place}"
        return int.from_bytes(hashlib.blake2b(named.encode(), digest_size=7).digest(), "big")


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


def _played(loss: Tensor, engine: PipelinedEngine, factor: float) -> Tensor:
    anchor = torch.zeros((), device=loss.device, requires_grad=True)
    played: Tensor = _Played.apply(anchor, loss, engine, factor)  # type: ignore[no-untyped-call]
    return played


class _Played(Function):
    """A loss whose backward pass has been: it gives the parameters the gradients that were made."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, loss: Tensor, engine: PipelinedEngine, factor: float) -> Tensor:
        """Return the loss."""
        ctx.engine, ctx.factor, ctx.precision = engine, factor, torch.finfo(loss.dtype).eps
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        """Give the gradients.

        Raises:
            UnsupportedError: they would have to be others.
        """
        if not math.isclose(float(gradient), ctx.factor, rel_tol=4 * ctx.precision):
            raise UnsupportedError(
                f"backward was called on {float(gradient) / ctx.factor:g} times the loss that training_step has returned, whose "
                "gradients are made already under pipeline parallelism. Change the loss in training_step, not in backward()."
            )
        ctx.engine.give_gradients()
        return None, None, None, None
