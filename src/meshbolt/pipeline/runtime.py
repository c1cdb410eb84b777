"""Run a step over stages on several ranks: torch's schedules over stages that are parts of the user's own step."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from meshbolt.compat import PipelineSchedule, tree_map_only
from meshbolt.errors import UnsupportedError
from meshbolt.pipeline.analyse import analyse
from meshbolt.pipeline.calls import Calls
from meshbolt.pipeline.microbatch import signature_of
from meshbolt.pipeline.passes import Passes, PlainPasses
from meshbolt.pipeline.plan import PipelinePlan
from meshbolt.pipeline.pristine import Pristine
from meshbolt.pipeline.rank_stage import Observer, RankStage, Surround, unobserved
from meshbolt.pipeline.schedule import build_schedule, find_schedule, schedule_for
from meshbolt.pipeline.stage import run_stage
from meshbolt.pipeline.taint import Foreign, Gathered, foreign_parameters

_MOST_PLANS = 512
_log = logging.getLogger(__name__)


class Pipeline:
    """This rank's stages of a module, and the steps over them.

    Every rank has the module, the microbatches and the step, and runs those parts that are its own.

    Args:
        module: the user's, before anything was sharded.
        cuts: names of the modules with which stages 1, 2, ... begin.
        schedule: name of the order.
        microbatches: of a step.
        group: the ranks among which stages are distributed.
        device: where this rank computes.
        replicate: names of modules that every stage keeps.
        splits_backward: schedules that make gradients of parameters apart from those of inputs do so, where it is right.

    Raises:
        ConfigError: a cut or a module to keep is unknown, or the schedule does not fit the numbers.
    """

    def __init__(
        self,
        module: nn.Module,
        cuts: Sequence[str],
        *,
        schedule: str,
        microbatches: int,
        group: dist.ProcessGroup,
        device: torch.device,
        replicate: Sequence[str] = (),
        gathered: Gathered | None = None,
        splits_backward: bool = True,
    ) -> None:
        self._module, self._group, self._device = module, group, device
        self._num_stages, ranks = len(cuts) + 1, group.size()
        order = find_schedule(schedule, stages=self._num_stages, ranks=ranks, microbatches=microbatches)
        per_rank = self._num_stages // ranks
        self._name = schedule
        self._stages_of_ranks = [order.stages_of(rank, ranks=ranks, stages_per_rank=per_rank) for rank in range(ranks)]
        self._calls = Calls(module, cuts, replicate=replicate)
        self._pristine = Pristine(module)
        self._kept, self._gathered = ExitStack(), gathered
        self._own: frozenset[str] | None = None
        self._plans: dict[Any, PipelinePlan] = {}
        self._trained: tuple[bool, ...] | None = None  # which parameters need gradients; None: to be asked for
        self._passes: Passes = PlainPasses()
        self.is_in_last_stage = False  # while that runs
        self.is_looking = False  # while a step is looked at with tensors without values
        self._stages = [
            RankStage(module, stage, self._num_stages, device, group) for stage in self._stages_of_ranks[group.rank()]
        ]
        for stage in self._stages if splits_backward and order.splits_backward else ():
            stage.split_backward(_say_why_whole)
        # By number of microbatches. A schedule tells its stages where their neighbours are.
        self._schedules = {microbatches: build_schedule(order, self._stages, microbatches)}

    @property
    def has_last_stage(self) -> bool:
        """Whether this rank computes the loss."""
        return any(stage.is_last for stage in self._stages)

    @property
    def rank_of_last_stage(self) -> int:
        """Which rank of the group computes the loss."""
        return next(rank for rank, own in enumerate(self._stages_of_ranks) if self._num_stages - 1 in own)

    @property
    def around(self) -> frozenset[str]:
        """The modules in which stages begin, so that no stage has all of them."""
        return frozenset(self._calls.around)

    @property
    def own_stages(self) -> tuple[int, ...]:
        """The stages of this rank."""
        return self._stages_of_ranks[self._group.rank()]

    def ranks_of(self, stages: Sequence[int]) -> tuple[int, ...]:
        """Return the ranks of the group that have some of these stages."""
        return tuple(rank for rank, own in enumerate(self._stages_of_ranks) if set(own) & set(stages))

    def plan(self, function: Callable[[Any], Any], microbatch: Any, *, kind: str = "") -> PipelinePlan:
        """Return how a microbatch's step is cut; it is looked at once for each signature.

        Args:
            function: the step of a microbatch.
            microbatch: one.
            kind: of the step, where there are several.
        """
        if self._trained is None:
            self._trained = _trained_in(self._module)
        graph = torch.is_grad_enabled()
        key = kind, signature_of(microbatch), self._module.training, graph, self._trained if graph else ()
        if key not in self._plans:
            if len(self._plans) == _MOST_PLANS:
                del self._plans[next(iter(self._plans))]
            step = functools.partial(function, microbatch)
            self.is_looking = True
            try:
                with torch.inference_mode(False), torch.set_grad_enabled(graph), self._pristine.as_before():
                    self._plans[key] = analyse(
                        self._module, self._calls, step, device=self._device, gathered=self._gathered
                    )
            finally:
                self.is_looking = False
        return self._plans[key]

    def begin(self, plan: PipelinePlan) -> None:
        """Keep the parameters of this rank's stages; those of others have no values from now on.

        Args:
            plan: of the first step.
        """
        others = self.others(plan)
        self._kept.enter_context(foreign_parameters(self._module, others, Foreign(), device=self._device))
        self._own = frozenset(plan.stages_of) - others

    def run_by(self, passes: Passes, plan: PipelinePlan, *, called_in: str = "a step") -> None:
        """Let an engine surround the passes of stages, which has left the parameters of others and reduces gradients.

        Args:
            passes: the engine.
            plan: of the first step.
            called_in: where the module can be called, in words.
        """
        self._calls.is_in_pieces, self._calls.called_in = True, called_in
        self._calls.hooks_to_leave_out = self._pristine.hooks_since()  # the engine's
        self._passes, self._own = passes, self._needed(plan)

    def others(self, plan: PipelinePlan) -> frozenset[str]:
        """Return the names of the parameters that only other ranks need for a step."""
        return frozenset(plan.stages_of) - self._needed(plan)

    def step(
        self,
        function: Callable[[Any], Any],
        microbatches: Sequence[Any],
        *,
        weights: Sequence[float],
        loss_of: Callable[[Any], Tensor],
        seed: int,
        kind: str = "",
    ) -> list[Any]:
        """Run a step forwards and backwards; gradients are added to those of the parameters of this rank's stages.

        Args:
            function: the step of a microbatch, from its inputs to the loss.
            microbatches: as many as the schedule was made for, or another number, for which it is made then.
            weights: of each microbatch's loss in the step's.
            loss_of: finds the loss in what the function returns.
            seed: of the step, for random numbers.
            kind: of the step, where there are several.

        Returns:
            What the function has returned for each microbatch, on the rank of the last stage; elsewhere nothing. Tensors are
            without their graphs, which would outlive the microbatch.
        """
        plans = self._plans_of(function, microbatches, kind=kind)
        count, results = len(microbatches), dict[int, Any]()

        def forward(number: int, received: list[Tensor], stage: int) -> tuple[list[Tensor], Tensor | None]:
            step = functools.partial(function, microbatches[number])
            sent, result = self._run(plans[number], step, stage=stage, received=received, seed=seed, number=number)
            if stage < self._num_stages - 1:
                return sent, None
            results[number] = tree_map_only(Tensor, Tensor.detach, result)
            return sent, loss_of(result) * weights[number]

        surround = self._surrounding(count)
        for stage in self._stages:
            run = functools.partial(forward, stage=stage.stage_index)
            stage.begin(plans, run, self._passes, surround, ends_with=self._ends_with(count))
        nothing = [None] * count
        with self._tied_summed(plans[0]), self._calls.backward():
            self._schedule(count)._step_microbatches([()] * count, [{} for _ in nothing], nothing, None, False)
        return [result for _, result in sorted(results.items())]

    def evaluate(
        self, function: Callable[[Any], Any], microbatches: Sequence[Any], *, seed: int, kind: str = ""
    ) -> list[Any]:
        """Run microbatches forwards only, any number of them and without gradients, one after the other through the stages.

        Args:
            function: the step of a microbatch.
            microbatches: of any number.
            seed: for random numbers.
            kind: of the step, where there are several.

        Returns:
            What the function has returned for each microbatch, on the rank of the last stage; elsewhere nothing.
        """
        results: list[Any] = []
        with torch.no_grad():
            plans = self._plans_of(function, microbatches, kind=kind)
            for stage in self._stages:
                stage.begin(plans, lambda *_: ([], None), PlainPasses())
            for number, microbatch in enumerate(microbatches):
                step = functools.partial(function, microbatch)
                results += self._forwards(plans[number], step, number=number, seed=seed)
        return results

    def _forwards(self, plan: PipelinePlan, step: Callable[[], Any], *, number: int, seed: int) -> list[Any]:
        """Run a microbatch through this rank's stages; return what the last stage has returned."""
        of_this_rank = {stage.stage_index: stage for stage in self._stages}
        results, sent, leaving = list[Any](), list[Tensor](), list[Any]()
        for index, stage in sorted(of_this_rank.items()):
            received = sent if index - 1 in of_this_rank else stage.receive(number)
            sent, result = self._run(plan, step, stage=index, received=received, seed=seed, number=number)
            sent = stage.as_planned(sent, number)
            if stage.is_last:
                results.append(result)
            elif index + 1 not in of_this_rank:
                leaving += stage.send(sent)
        for work in leaving:
            work.wait()
        return results

    def _run(
        self,
        plan: PipelinePlan,
        step: Callable[[], Any],
        *,
        stage: int,
        received: Sequence[Tensor],
        seed: int,
        number: int,
    ) -> tuple[list[Tensor], Any]:
        self.is_in_last_stage = stage == self._num_stages - 1
        return run_stage(
            self._calls,
            plan,
            step,
            stage=stage,
            received=received,
            seed=seed,
            microbatch=number,
            device=self._device,
            leaving=self._passes.leaving,
        )

    def observe_passes(self, observer: Observer | None) -> None:
        """Surround each pass of a step through a stage of this rank with what an observer returns for it.

        Args:
            observer: is given "F", "B" or its halves "I" and "W", the stage and the microbatch; None: end it.
        """
        for stage in self._stages:
            stage.observer = observer or unobserved

    def close(self) -> None:
        """Leave the module as it was."""
        self._calls.remove()
        self._kept.close()

    # Inside -----------------------------------------------------------------------------------------------------------

    def _schedule(self, count: int) -> PipelineSchedule:
        if count not in self._schedules:
            order = schedule_for(self._name, stages=self._num_stages, ranks=self._group.size(), microbatches=count)
            self._schedules[count] = build_schedule(order, self._stages, count)
        return self._schedules[count]

    def _ends_with(self, count: int) -> int:
        """Return which microbatch of so many is run backwards last."""
        order = schedule_for(self._name, stages=self._num_stages, ranks=self._group.size(), microbatches=count)
        return 0 if order.reverses else count - 1

    def _surrounding(self, count: int) -> Surround:
        """Return what surrounds the pass that ends a stage's next microbatch, of as many as there are."""
        left = {stage.stage_index: count for stage in self._stages}

        def next_pass(stage: int, *, halves: bool, is_trial: bool = False) -> Any:
            left[stage] -= 1
            if halves:
                return self._passes.second_half(stage)
            ends_stage, ends_step = (left[stage] == 0, not any(left.values())) if not is_trial else (False, False)
            return self._passes.backward_pass(stage, ends_stage=ends_stage, ends_step=ends_step)

        return next_pass

    def _plans_of(
        self, function: Callable[[Any], Any], microbatches: Sequence[Any], *, kind: str
    ) -> list[PipelinePlan]:
        self._trained = None
        plans = [self.plan(function, microbatch, kind=kind) for microbatch in microbatches]
        if self._own is None:
            self.begin(plans[0])
        for plan in plans:
            self._check_own(plan)
        return plans

    def _needed(self, plan: PipelinePlan) -> frozenset[str]:
        return frozenset[str]().union(*(plan.owned(stage.stage_index) for stage in self._stages))

    def _check_own(self, plan: PipelinePlan) -> None:
        """Refuse a plan for which this rank lacks parameters.

        Raises:
            UnsupportedError: it does.
        """
        lacking = self._needed(plan) - (self._own or frozenset())
        if lacking:
            raise UnsupportedError(
                f"A microbatch of another form reads {sorted(lacking)[0]!r} on a stage that did not read it before, so "
                "that another stage has it. Let the step read the same parameters on the same stages for every batch, or cut "
                "elsewhere."
            )

    @contextmanager
    def _tied_summed(self, plan: PipelinePlan) -> Iterator[None]:
        """Add up what a step inside adds to gradients of parameters that stages of several ranks hold."""
        if not isinstance(self._passes, PlainPasses):
            yield  # whoever reduces gradients knows when they are whole
            return
        parameters = dict(self._module.named_parameters(remove_duplicate=False))
        shared: dict[nn.Parameter, bool] = {}
        for name, stages in sorted(plan.tied().items()):
            ranks = self.ranks_of(stages)
            if len(ranks) > 1:
                shared[parameters[name]] = self._group.rank() in ranks
        earlier = {parameter: parameter.grad for parameter in shared}
        for parameter in shared:
            parameter.grad = None
        yield
        for parameter, is_own in shared.items():
            # Ranks that do not hold it add nothing; theirs has no values, of which nothing could be sent.
            added = parameter.grad
            if added is None:
                added = torch.zeros(parameter.shape, dtype=parameter.dtype, device=self._device)
            dist.all_reduce(added, group=self._group)
            before = earlier[parameter]
            parameter.grad = (added if before is None else before.add_(added)) if is_own else before


def _trained_in(module: nn.Module) -> tuple[bool, ...]:
    return tuple(parameter.requires_grad for parameter in module.parameters())


def _say_why_whole(stage: int, reason: str) -> None:
    _log.warning(
        "pipeline: stage %d makes gradients of parameters together with those of inputs, not apart as its schedule allows: %s.",
        stage,
        reason,
    )
