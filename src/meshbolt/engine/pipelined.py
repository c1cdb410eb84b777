"""The engine under a pipeline: many passes forwards and backwards of one batch, in any order, of which the last ones reduce.

Parameters are gathered once a step and freed at its end, in every stage of ZeRO; gradients of a batch's microbatches are kept
whole, and reduced while the last one runs backwards through a stage.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from meshbolt import compat
from meshbolt.compat import device_of, distributed_tensor, local_tensor
from meshbolt.config import Plan
from meshbolt.engine.clip import Counted, clip_norm_, global_norm
from meshbolt.engine.engine import Engine
from meshbolt.engine.stages import Stages
from meshbolt.errors import UnsupportedError
from meshbolt.tensor import gathered as whole_of_splits

T = TypeVar("T")


class PipelinedEngine(Engine):
    """One rank's stages of a module under a plan; what `pipeline.Passes` asks for."""

    def __init__(self, module: nn.Module, *, plan: Plan, stages: Stages, **options: Any) -> None:
        """Shard this rank's stages in place.

        Args:
            module: the user's whole module.
            plan: what to do with it.
            stages: what of it this rank holds.
            options: as for `Engine`.
        """
        # Without it, as torch's own schedules do it: after the last pass, when nothing is left to hide it behind.
        self._overlaps = plan.environment.fast_path
        self._aligns = plan.settings.pipeline_parallel.align_reductions
        # Units that have not been reduced in this step, and those that wait for some passes to go by.
        self._unreduced: set[FSDPModule] = set()
        self._delayed: list[tuple[int, list[FSDPModule]]] = []
        self._quiet = False
        self.after_forward: Callable[[], None] | None = None
        """Called when a microbatch has passed forwards through a stage, to look at what is held."""
        self._keeps_parts = plan.stage.reduces_every_batch and plan.mesh.dp_replicate > 1
        self._frees_each_batch = plan.stage.reshards_after_forward
        kept = dataclasses.replace(plan.stage, reshards_after_forward=False)
        super().__init__(module, plan=dataclasses.replace(plan, stage=kept), stages=stages, **options)
        self.stages = stages
        self._stage_of = {unit: stages.of_units.get(name, -1) for name, unit in self._units.items()}
        self._tied = [(self.parameters_by_name[name], ranks) for name, ranks in sorted(stages.tied.items())]
        self._groups_of_tied = self._connect_tied()
        self._stash: list[tuple[nn.Parameter, torch.Tensor]] = []
        self._can_be_quiet = not any(compat.casts(unit) for unit in self._all_units)
        for unit in self._all_units if self._can_be_quiet else ():
            compat.make_hooks_skippable(unit, lambda: self._quiet)
        # FSDP takes whatever is called first for the outermost unit.
        with torch.no_grad():
            super().call(lambda: None)

    @property
    def spans_stages(self) -> bool:
        """True: other ranks have parameters that this one has not."""
        return True

    # Passes -----------------------------------------------------------------------------------------------------------

    @contextmanager
    def schedule(self) -> Iterator[None]:
        """Surround all passes of a batch; afterwards its gradients are where the window's policy says."""
        self._begin()
        try:
            yield
        except Exception as error:
            self._root.set_is_last_backward(True)
            self._recover()
            self._apply_window()
            self._explain(error)
            raise
        self._end()

    def forward_pass(self, function: Callable[[], T], *, is_last: bool) -> T:
        """Run a microbatch forwards through a stage, with the root's parameters gathered."""
        self._inside = True
        # The pass backwards of the last one reduces gradients.
        self._quiet = self._can_be_quiet and not is_last
        try:
            result = self._root(functools.partial(self._run, function))  # type: ignore[operator]
        finally:
            self._inside = self._quiet = False
        if self.after_forward is not None:
            self.after_forward()
        return cast("T", result)

    def leaving(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return what leaves a stage, whole over the ranks that share layers."""
        whole: torch.Tensor = whole_of_splits(tensor)
        return whole

    @contextmanager
    def backward_pass(self, stage: int, *, ends_stage: bool, ends_step: bool) -> Iterator[None]:
        """Surround a microbatch's pass backwards through a stage; the last one reduces what the stage holds."""
        self._reduce_due()
        closing = self._closing(stage, ends_stage=ends_stage, ends_step=ends_step) if self._overlaps else []
        if closing and self._delay_of(stage):
            self._delayed.append((self._delay_of(stage), closing))
            closing = []
        self._let_reduce(closing)
        self._unreduced.difference_update(closing)
        self._root.set_is_last_backward(ends_step)
        self._derivatives.before_backward(reduces=self._reduces and bool(closing))
        yield
        self._derivatives.after_backward()

    @contextmanager
    def second_half(self, stage: int) -> Iterator[None]:
        """Surround what makes the gradients of a stage's parameters: of it FSDP knows nothing."""
        yield
        for unit in (*self._units_of(-1), *self._units_of(stage), self._root):
            self._window.saw(shard for shard, copy in compat.copies_by_shard(unit) if copy.grad is not None)
            compat.keep_gradients(unit)

    def _units_of(self, stage: int) -> list[FSDPModule]:
        return [unit for unit, own in self._stage_of.items() if own == stage]

    def _closing(self, stage: int, *, ends_stage: bool, ends_step: bool) -> list[FSDPModule]:
        """Return the units for which a stage's pass is the step's last one."""
        if ends_step:
            return [*self._units_of(-1), *self._units_of(stage), self._root]
        return self._units_of(stage) if ends_stage else []

    def _delay_of(self, stage: int) -> int:
        """Return how many passes later a stage is reduced than it could be, so that all stages are at the same time.

        The stages that follow each other on all ranks end so many passes after each other, and the first of them last. Were
        each reduced at once, it would slow down one stage after the other, and all others would wait for it every time
        (`align_grad_reduce` of Megatron-LM).
        """
        pipeline = self.stages.pipeline
        return 0 if pipeline is None or not self._aligns else stage % pipeline.size()

    def _reduce_due(self) -> None:
        """Reduce the units that were to wait until this pass."""
        waiting = [(passes - 1, units) for passes, units in self._delayed]
        self._delayed = [(passes, units) for passes, units in waiting if passes]
        kept = self._derivatives.kept()
        due = [unit for passes, units in waiting if not passes for unit in units if unit not in kept]
        self._let_reduce(due)
        self._unreduced.difference_update(due)
        with self._derivatives.ending():
            for unit in due:
                compat.reduce_gradients(unit)

    def _let_reduce(self, units: Iterable[FSDPModule]) -> None:
        for unit in units:
            unit.set_requires_gradient_sync(self._reduces, recurse=False)
            unit.set_reshard_after_backward(self._frees, recurse=False)

    @property
    def _reduces(self) -> bool:
        return self._is_last_batch or self.plan.stage.reduces_every_batch

    @property
    def _frees(self) -> bool:
        return self._is_last_batch or self._frees_each_batch

    def _begin(self) -> None:
        self._derivatives.release_used()
        self._offloaded.wait()
        self._prime()
        self.sync_requires_grad()
        self._edits.refuse_other_data()
        if not self._window.is_open:
            self._hide_gradients()
        for unit in self._all_units if self._keeps_parts else ():
            unit.unshard()  # so that it is known from the first batch on which parameters each uses
        self._window.before_backward(last=self._is_last_batch)
        self._unreduced, self._delayed = set(self._all_units), []
        last = self._is_last_batch
        for unit in self._all_units:
            unit.set_requires_gradient_sync(False, recurse=False)
            unit.set_reshard_after_backward(False, recurse=False)
            if self.plan.mesh.dp_replicate > 1 and self.plan.stage.shards:
                unit.set_requires_all_reduce(last or not self.plan.stage.reduces_every_batch, recurse=False)

    def _end(self) -> None:
        self._root.set_is_last_backward(True)
        if self._unreduced:
            self._let_reduce(unit for unit in self._all_units if unit in self._unreduced)
            compat.end_backward(self._root)
        self._keep_edits()
        if self._frees:
            self._free()
        self._window.after_backward(last=self._is_last_batch)
        if self._is_last_batch:
            self._replicated.average_gradients()
            self._sum_tied()
            for parameter, hooks in self._hooks.items():
                for hook in hooks if parameter.grad is not None else ():
                    hook(parameter)
        self._apply_window()
        if self._hidden is None:
            return
        self._stash = [(p, p.grad) for p in self._held() if p.grad is not None]
        for parameter in self._held():
            parameter.grad = self._hidden.get(parameter)
        self._hidden = None

    # Gradients --------------------------------------------------------------------------------------------------------

    _hidden: dict[nn.Parameter, torch.Tensor] | None = None

    def _held(self) -> list[nn.Parameter]:
        return [p for name, p in self.parameters_by_name.items() if name not in self.stages.elsewhere]

    def _hide_gradients(self) -> None:
        """Take gradients of the step before away, which the loop drops only when this batch has been through the stages."""
        self._hidden = {p: p.grad for p in self._held() if p.grad is not None}
        for parameter in self._hidden:
            parameter.grad = None

    def give_gradients(self) -> None:
        """Add the gradients of the last batch to the parameters, where a loop expects its backward to make them."""
        for parameter, gradient in self._stash:
            parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
        self._stash = []

    def _connect_tied(self) -> dict[tuple[int, ...], dist.ProcessGroup]:
        """Make the groups in which gradients of tied parameters are summed; all ranks of the world together."""
        pipeline = self.stages.pipeline
        if pipeline is None:
            return {}
        columns: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(columns, (dist.get_process_group_ranks(pipeline), sorted({r for _, r in self._tied})))
        groups: dict[tuple[int, ...], dist.ProcessGroup] = {}
        for ranks, sets in columns[: dist.get_world_size() // pipeline.size()]:
            for members in sets:
                made = dist.new_group([ranks[member] for member in members])
                if dist.get_rank() in ranks:
                    groups[members] = made
        return groups

    @torch.no_grad()
    def _sum_tied(self) -> None:
        own = self._own_place()
        for parameter, ranks in self._tied:
            if own in ranks and parameter.requires_grad:
                self._sum_over(parameter, self._groups_of_tied[ranks])

    def _sum_over(self, parameter: nn.Parameter, group: dist.ProcessGroup) -> None:
        gradient = parameter.grad
        used = torch.tensor(float(gradient is not None), device=device_of(group))
        dist.all_reduce(used, group=group)
        if not used:
            return  # as in one process, where nobody has used it
        part = torch.zeros_like(local_tensor(parameter)) if gradient is None else local_tensor(gradient)
        dist.all_reduce(part, group=group)
        if gradient is None and isinstance(parameter, DTensor):
            part = distributed_tensor(part, like=parameter, placements=parameter.placements)
        parameter.grad = part if gradient is None else gradient

    def _own_place(self) -> int:
        return 0 if self.stages.pipeline is None else self.stages.pipeline.rank()

    def _counted(self) -> Counted:
        own = self._own_place()
        elsewhere = frozenset(parameter for parameter, ranks in self._tied if ranks[0] != own)
        return Counted(not_here=elsewhere, over=self.stages.pipeline)

    def clip_norm(self, parameters: Iterable[nn.Parameter], max_norm: float, **options: Any) -> torch.Tensor:
        """Clip gradients by their norm over all ranks and stages."""
        chosen = self._edits.shards_of(parameters)
        self._window.refuse_inside(chosen, what="clipped")
        return clip_norm_(chosen, max_norm, counted=self._counted(), **options)

    def grad_norm(self, parameters: Iterable[nn.Parameter] | None = None, *, norm_type: float = 2.0) -> torch.Tensor:
        """Return the norm of the gradients over all ranks and stages."""
        own = dict.fromkeys(self.parameters_by_name.values())
        chosen = [p for p in self._edits.shards_of(own if parameters is None else parameters) if p in own]
        self._window.refuse_inside(chosen, what="measured")
        return global_norm(chosen, norm_type=norm_type, counted=self._counted())

    @contextmanager
    def backward(self, loss: torch.Tensor) -> Iterator[torch.Tensor]:
        """Surround the backward of a loss that gives the gradients which the schedule has made: there is nothing to prepare."""
        yield loss

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call a function that uses this rank's stages, without a backward.

        Raises:
            UnsupportedError: it would have one.
        """
        if torch.is_grad_enabled() and not self._inside:
            raise UnsupportedError(
                "The module was called outside of a step, and under pipeline parallelism no rank has all of it. Call it in "
                f"{self.stages.called_in}."
            )
        return super().call(function, *args, **kwargs)
