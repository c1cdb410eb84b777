"""A module whose stages are on several ranks, for whichever loop takes steps with it."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from meshbolt.collectives import agree_on_error, same_on_all_ranks
from meshbolt.config import Plan
from meshbolt.engine import PipelinedEngine, Stages, gathered_in
from meshbolt.engine.deferred import attached
from meshbolt.engine.placeholders import model_state, states_of_all_stages
from meshbolt.errors import TopologyError, UnsupportedError
from meshbolt.mesh import MeshAxis, stage_group
from meshbolt.pipeline import (
    Microbatches,
    Pipeline,
    PipelinePlan,
    batch_size,
    cuts_of,
    is_foreign,
    part_sizes,
    split_batch,
)
from meshbolt.strategies.compat import refuse_norms_of_stages


@dataclass(frozen=True, kw_only=True)
class FirstStep:
    """A step of one microbatch, by which it is found out how the module is cut.

    Attributes:
        kind: of the step, such as "training_step".
        look: takes the step; nothing is logged or kept of it.
        microbatch: that it takes.
        count: of microbatches in a batch.
        trains: it has a backward pass.
        plan: how it is cut, where the module itself knows; None: to be looked at.
    """

    kind: str
    look: Callable[[], Any]
    microbatch: Any
    count: int
    trains: bool
    plan: PipelinePlan | None = None


class StagedModule:
    """This rank's stages of a module.

    Args:
        module: the user's, before it is sharded.
        plan: of the run.
        mesh: of all axes.
        device: this rank's.

    Attributes:
        called_in: where the module can be called, in words.
    """

    called_in = "a step"

    def __init__(self, module: nn.Module, *, plan: Plan, mesh: DeviceMesh, device: torch.device) -> None:
        self._module: Any = module
        self._plan, self._device = plan, device
        self._setting = plan.settings.pipeline_parallel
        self._group = mesh.get_group(MeshAxis.PP.value)
        self._count = 1
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
    def place(self) -> str:
        """This rank in words."""
        own = _counted("stage", self._pipeline.own_stages)
        return f"rank {dist.get_rank()} ({own} of {self._first_plan.stages})"

    @property
    def ranks_of_stages(self) -> list[int]:
        """The rank of the pipeline that has each stage."""
        return [self._pipeline.ranks_of([stage])[0] for stage in range(self._first_plan.stages)]

    @property
    def microbatches(self) -> int:
        """Into how many a batch is divided."""
        return self._count

    @property
    def schedule(self) -> str:
        """The name of the order of passes."""
        return self._setting.schedule

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
        self._pipeline.run_by(engine, self._first_plan, called_in=self.called_in)
        refuse_norms_of_stages(is_foreign)

    def observe_passes(self, observer: Callable[[str, int, int], AbstractContextManager[Any]] | None) -> None:
        """Surround each pass of a step through a stage of this rank with what an observer returns for it.

        Args:
            observer: is given "F", "B" or its halves "I" and "W", the stage and the microbatch; None: end it.
        """
        self._pipeline.observe_passes(observer)

    def entries_elsewhere(self, names: Iterable[str]) -> frozenset[str]:
        """Return which entries of the module's state other ranks keep up to date.

        What belongs to no unit, such as a metric, a root's buffer, or what a step does after the model, the last stage's rank
        has: it alone goes through all of a step but the units of others.

        Args:
            names: in the module's state dict, of what is no parameter.
        """
        own, stages = set(self._pipeline.own_stages), self._first_plan.stages_of_units
        homes = {name: next((stages[unit] for unit in stages if name.startswith(f"{unit}.")), None) for name in names}
        is_last = self._pipeline.has_last_stage
        return frozenset(name for name, home in homes.items() if (not is_last if home is None else home not in own))

    def model_state(self, state: dict[str, Any]) -> dict[str, Any]:
        """Return the module's state dict with placeholders for what other stages hold; all ranks call it together."""
        parameters = dict(self._module.named_parameters(remove_duplicate=False))
        elsewhere = self.entries_elsewhere(state.keys() - parameters.keys())
        return model_state(state, elsewhere=elsewhere, group=self._group)

    def optimizer_state(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """Return an optimizer's state with placeholders for that of other stages; all ranks call it together."""
        return states_of_all_stages(state, group=self._group)

    def of_all_stages(self, value: Any) -> Any:
        """Return, on the first rank of the pipeline, what the first rank has that has it; all ranks call it together.

        Args:
            value: this rank's; None: it has none.
        """
        is_first = self._group.rank() == 0
        every: list[Any] | None = [None] * self._group.size() if is_first else None
        dist.gather_object(value, every, group=self._group, group_dst=0)
        return next((each for each in every or () if each is not None), None)

    # Before the first step ------------------------------------------------------------------------------------------------

    def _first_step(self) -> FirstStep:
        """Return a step to look at."""
        raise NotImplementedError

    def _prepare(self) -> tuple[Pipeline, PipelinePlan]:
        if (deferred := attached(self._module)) is not None:
            deferred.stop()  # the step is looked at with other tensors that have no values
        first = self._first_step()
        self._count = first.count
        with torch.set_grad_enabled(first.trains):
            cuts = cuts_of(self._module, self._setting, first.look, device=self._device)
            pipeline = Pipeline(
                self._module,
                cuts,
                schedule=self._setting.schedule,
                microbatches=first.count,
                group=self._group,
                device=self._device,
                replicate=self._setting.replicate,
                gathered=gathered_in(self._module, self._plan),
                splits_backward=self._setting.split_backward,
            )
            if first.plan is not None:
                return pipeline, first.plan
            return pipeline, pipeline.plan(lambda _: first.look(), first.microbatch, kind=first.kind)

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
                of_units[".".join(parts[:depth])] = min(here)  # whose passes backwards are the rank's last ones
        holders = {name: self._pipeline.ranks_of(stages) for name, stages in plan.tied().items()}
        first_names = {name for name, _ in self._module.named_parameters()}
        return Stages(
            elsewhere=self._pipeline.others(plan),
            called_in=self.called_in,
            holders={name: self._holder(stages) for name, stages in plan.stages_of.items()},
            around=self._pipeline.around,
            of_units=of_units,
            tied={name: ranks for name, ranks in holders.items() if len(ranks) > 1 and name in first_names},
            pipeline=self._group,
            group=group,
        )

    def _holder(self, stages: Sequence[int]) -> str:
        ranks = [dist.get_global_rank(self._group, rank) for rank in self._pipeline.ranks_of(stages)]
        return f"{_counted('stage', stages)}, on {_counted('rank', ranks)}"

    # Steps ----------------------------------------------------------------------------------------------------------------

    def _running(self) -> PipelinedEngine:
        if self._engine is None:
            raise AssertionError("A step was taken before the engine was there.")
        return self._engine

    def _split(self, batch: Any) -> tuple[list[Any], list[int]]:
        if isinstance(batch, Microbatches):
            return list(batch.parts), [1] * len(batch.parts)
        samples = batch_size(batch)
        parts = split_batch(batch, min(self._count, samples))
        return parts, part_sizes(samples, len(parts))

    def _tell(self, found: Callable[[], Any]) -> Any:
        """Return on every rank what the one of the last stage has found.

        Args:
            found: called there; what it returns is sent.
        """
        box = [found() if self._pipeline.has_last_stage else None]
        try:
            dist.broadcast_object_list(box, group=self._group, group_src=self._owner)
        except (AttributeError, TypeError, pickle.PicklingError) as error:
            raise UnsupportedError(
                f"What the step has returned or logged cannot be sent to the ranks of other stages: {error}. Return tensors, "
                "numbers, texts and containers of them, or objects that can be pickled."
            ) from error
        return box[0]

    def _seed(self, *place: Any) -> int:
        """Return a seed of a step that depends on the run's seed and the place, and draws no number from any generator."""
        named = f"{torch.initial_seed()}/{self._plan.mesh.data_parallel_rank(dist.get_rank())}/{place}"
        return int.from_bytes(hashlib.blake2b(named.encode(), digest_size=7).digest(), "big")


def _counted(noun: str, numbers: Sequence[int]) -> str:
    return f"{noun}{'s' if len(numbers) > 1 else ''} {' and '.join(map(str, numbers))}"
