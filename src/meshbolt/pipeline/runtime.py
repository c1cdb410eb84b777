"""Run a step over stages on several ranks: torch's schedules over stages that are parts of the user's own step."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from meshbolt.compat import PipelineStageBase
from meshbolt.errors import UnsupportedError
from meshbolt.pipeline.analyse import analyse
from meshbolt.pipeline.calls import Calls
from meshbolt.pipeline.microbatch import signature_of
from meshbolt.pipeline.plan import Crossing, PipelinePlan
from meshbolt.pipeline.schedule import build_schedule, find_schedule
from meshbolt.pipeline.stage import run_stage
from meshbolt.pipeline.taint import Foreign, foreign_parameters

Forward = Callable[[int, list[Tensor]], tuple[list[Tensor], Tensor]]


class Pipeline:
    """This rank's stages of a module, and the steps over them.

    Every rank has the module, the microbatches and the step, and runs those parts that are its own.

    Args:
        module: the user's.
        cuts: names of the modules with which stages 1, 2, ... begin.
        schedule: name of the order.
        microbatches: of a step.
        group: the ranks among which stages are distributed.
        device: where this rank computes.

    Raises:
        ConfigError: a cut names no module, or the schedule does not fit the numbers.
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
    ) -> None:
        self._module, self._group, self._device, self._count = module, group, device, microbatches
        self._num_stages, ranks = len(cuts) + 1, group.size()
        order = find_schedule(schedule, stages=self._num_stages, ranks=ranks, microbatches=microbatches)
        per_rank = self._num_stages // ranks
        self._stages_of_ranks = [order.stages_of(rank, ranks=ranks, stages_per_rank=per_rank) for rank in range(ranks)]
        self._calls = Calls(module, cuts)
        self._kept = ExitStack()
        self._own: frozenset[str] | None = None
        self._plans: dict[Any, PipelinePlan] = {}
        self._stages = [
            _Stage(module, stage, self._num_stages, device, group) for stage in self._stages_of_ranks[group.rank()]
        ]
        self._schedule = build_schedule(order, self._stages, microbatches)

    @property
    def has_last_stage(self) -> bool:
        """Whether this rank computes the loss."""
        return any(stage.stage_index == self._num_stages - 1 for stage in self._stages)

    def plan(self, function: Callable[[Any], Any], microbatch: Any) -> PipelinePlan:
        """Return how a microbatch's step is cut; it is looked at once for each signature.

        Args:
            function: the step of a microbatch.
            microbatch: one.
        """
        key = signature_of(microbatch), self._module.training
        if key not in self._plans:
            step = functools.partial(function, microbatch)
            self._plans[key] = analyse(self._module, self._calls, step, device=self._device)
        return self._plans[key]

    def step(
        self,
        function: Callable[[Any], Any],
        microbatches: Sequence[Any],
        *,
        weights: Sequence[float],
        loss_of: Callable[[Any], Tensor],
        seed: int,
    ) -> list[Any]:
        """Run a step forwards and backwards; gradients are added to those of the parameters of this rank's stages.

        Args:
            function: the step of a microbatch, from its inputs to the loss.
            microbatches: as many as the schedule was made for.
            weights: of each microbatch's loss in the step's.
            loss_of: finds the loss in what the function returns.
            seed: of the step, for random numbers.

        Returns:
            What the function has returned for each microbatch, on the rank of the last stage; elsewhere nothing.
        """
        plans = self._plans_of(function, microbatches)
        results: list[Any] = []
        for stage in self._stages:

            def forward(
                number: int, received: list[Tensor], stage: int = stage.stage_index
            ) -> tuple[list[Tensor], Any]:
                sent, result = run_stage(
                    self._calls,
                    plans[number],
                    functools.partial(function, microbatches[number]),
                    stage=stage,
                    received=received,
                    seed=seed,
                    microbatch=number,
                    device=self._device,
                )
                if stage < self._num_stages - 1:
                    return sent, None
                results.append(result)
                return sent, loss_of(result) * weights[number]

            stage.begin(plans, forward)
        nothing = [None] * self._count
        with self._tied_summed(plans[0]), self._calls.backward():
            self._schedule._step_microbatches([()] * self._count, [{} for _ in nothing], nothing, None, False)
        return results

    def evaluate(self, function: Callable[[Any], Any], microbatches: Sequence[Any], *, seed: int) -> list[Any]:
        """Run microbatches forwards only, any number of them and without gradients, one after the other through the stages.

        Args:
            function: the step of a microbatch.
            microbatches: of any number.
            seed: for random numbers.

        Returns:
            What the function has returned for each microbatch, on the rank of the last stage; elsewhere nothing.
        """
        plans = self._plans_of(function, microbatches)
        results: list[Any] = []
        for stage in self._stages:
            stage.begin(plans, lambda *_: ([], torch.empty(0)))
        with torch.no_grad():
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
            sent, result = run_stage(
                self._calls,
                plan,
                step,
                stage=index,
                received=received,
                seed=seed,
                microbatch=number,
                device=self._device,
            )
            if stage.is_last:
                results.append(result)
            elif index + 1 not in of_this_rank:
                leaving += stage.send(sent)
        for work in leaving:
            work.wait()
        return results

    def close(self) -> None:
        """Leave the module as it was."""
        self._calls.remove()
        self._kept.close()

    def _plans_of(self, function: Callable[[Any], Any], microbatches: Sequence[Any]) -> list[PipelinePlan]:
        plans = [self.plan(function, microbatch) for microbatch in microbatches]
        for plan in plans:
            self._leave_others(plan)
        return plans

    def _leave_others(self, plan: PipelinePlan) -> None:
        """Keep the parameters of this rank's stages; those of others have no values from now on.

        Raises:
            UnsupportedError: a later kind of microbatch needs others than the first one.
        """
        own = frozenset[str]().union(*(plan.owned(stage.stage_index) for stage in self._stages))
        if self._own is None:
            others = plan.stages_of.keys() - own
            self._kept.enter_context(foreign_parameters(self._module, others, Foreign(), device=self._device))
            self._own = own
        elif not own <= self._own:
            raise UnsupportedError(
                f"A microbatch of another form reads {sorted(own - self._own)[0]!r} on a stage that did not read it before, so "
                "that another stage has it. Let the step read the same parameters on the same stages for every batch, or cut "
                "elsewhere."
            )

    @contextmanager
    def _tied_summed(self, plan: PipelinePlan) -> Iterator[None]:
        """Add up what a step inside adds to gradients of parameters that stages of several ranks hold."""
        parameters = dict(self._module.named_parameters(remove_duplicate=False))
        shared: dict[nn.Parameter, bool] = {}
        for name, stages in sorted(plan.tied().items()):
            ranks = [rank for rank, own in enumerate(self._stages_of_ranks) if set(own) & set(stages)]
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


class _Stage(PipelineStageBase):
    """What torch's schedules ask of a stage, answered from a plan."""

    def __init__(
        self, module: nn.Module, stage: int, num_stages: int, device: torch.device, group: dist.ProcessGroup
    ) -> None:
        super().__init__(module, stage, num_stages, device, group)
        self._ranks = group
        self.has_backward = True
        self.args_recv_info = {0: ()}  # which torch reads once to see that only neighbours communicate
        self._plans: Sequence[PipelinePlan] = ()
        self._forward: Forward = lambda _number, _received: ([], torch.empty(0))
        self._arriving: dict[int, list[Tensor]] = {}
        self._arriving_gradients: dict[int, list[Tensor]] = {}
        self._edges: dict[int, tuple[list[Tensor], list[Tensor]]] = {}
        self._leaving_gradients: dict[int, list[Tensor]] = {}

    def begin(self, plans: Sequence[PipelinePlan], forward: Forward) -> None:
        """Prepare for a step.

        Args:
            plans: of its microbatches.
            forward: runs a microbatch through this stage.
        """
        self._plans, self._forward = plans, forward

    def _received(self, number: int) -> tuple[Crossing, ...]:
        return self._plans[number].received(self.stage_index)

    def _sent(self, number: int) -> tuple[Crossing, ...]:
        return self._plans[number].sent(self.stage_index)

    def _empty(self, crossing: Crossing) -> Tensor:
        return torch.empty(crossing.shape, dtype=crossing.dtype, device=self.device)

    # What torch asks before the first step ---------------------------------------------------------------------------------

    def _prepare_forward_infra(self, *_: Any, **__: Any) -> None:
        return None

    def _prepare_backward_infra(self, *_: Any, **__: Any) -> None:
        return None

    def _create_grad_recv_info(self, *_: Any) -> tuple[()]:
        return ()

    def _get_init_p2p_neighbors_ops(self) -> list[dist.P2POp]:
        return []  # gloo connects ranks when they meet; two neighbours may be on one rank

    # Communication ---------------------------------------------------------------------------------------------------------

    def _operations(self, kind: Any, tensors: Sequence[Tensor], stage: int) -> list[dist.P2POp]:
        peer = dist.get_global_rank(self._ranks, self.stage_index_to_group_rank[stage])
        return [dist.P2POp(kind, tensor, peer, self.group) for tensor in tensors]

    def receive(self, number: int) -> list[Tensor]:
        """Return a microbatch's inputs, when they have come from another rank."""
        for operation in self.get_fwd_recv_ops(number):
            operation.op(operation.tensor, group=operation.group, group_src=operation.group_peer).wait()
        return self._arriving.pop(number, [])

    def send(self, sent: Sequence[Tensor]) -> list[dist.Work]:
        """Begin to send a microbatch's outputs to another rank."""
        operations = self._operations(dist.isend, sent, self.stage_index + 1)
        return [each.op(each.tensor, group=each.group, group_dst=each.group_peer) for each in operations]

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        """Return how a microbatch's inputs arrive."""
        if self.is_first:
            return []
        arriving = [self._empty(crossing) for crossing in self._received(fwd_chunk_id)]
        self._arriving[fwd_chunk_id] = arriving
        return self._operations(dist.irecv, arriving, self.stage_index - 1)

    def get_fwd_send_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        """Return how a microbatch's outputs leave."""
        if self.is_last:
            return []
        sent = [tensor.detach() for tensor in self._edges[fwd_chunk_id][1]]
        return self._operations(dist.isend, sent, self.stage_index + 1)

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        """Return how the gradients of a microbatch's outputs arrive."""
        if self.is_last:
            return []
        arriving = [self._empty(crossing) for crossing in self._sent(bwd_chunk_id) if crossing.requires_grad]
        self._arriving_gradients[bwd_chunk_id] = arriving
        return self._operations(dist.irecv, arriving, self.stage_index + 1)

    def get_bwd_send_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        """Return how the gradients of a microbatch's inputs leave."""
        if self.is_first:
            return []
        return self._operations(dist.isend, self._leaving_gradients.pop(bwd_chunk_id), self.stage_index - 1)

    # Two neighbours on one rank --------------------------------------------------------------------------------------------

    def set_local_fwd_input(self, prev_stage_outputs: Any, mb_index: int) -> None:
        """Take a microbatch's inputs from the stage before, which is on this rank."""
        outputs = prev_stage_outputs if isinstance(prev_stage_outputs, (tuple, list)) else (prev_stage_outputs,)
        self._arriving[mb_index] = [tensor.detach() for tensor in outputs]

    def get_local_bwd_output(self, mb_index: int) -> tuple[Tensor, ...]:
        """Return the gradients of a microbatch's inputs to the stage before, which is on this rank."""
        return tuple(self._leaving_gradients.pop(mb_index))

    def set_local_bwd_input(self, next_stage_bwd_outputs: Any, mb_index: int) -> None:
        """Take the gradients of a microbatch's outputs from the stage after, which is on this rank."""
        self._arriving_gradients[mb_index] = list(next_stage_bwd_outputs)

    # Computation -----------------------------------------------------------------------------------------------------------

    def forward_one_chunk(
        self, fwd_chunk_id: int, args: Any, kwargs: Any = None, save_forward_output: bool = True
    ) -> Tensor | tuple[Tensor, ...]:
        """Run a microbatch forwards; the last stage returns its loss."""
        arrived = self._arriving.pop(fwd_chunk_id, [])
        received = [
            tensor.requires_grad_(crossing.requires_grad and torch.is_grad_enabled())
            for tensor, crossing in zip(arrived, self._received(fwd_chunk_id), strict=True)
        ]
        sent, loss = self._forward(fwd_chunk_id, received)
        self._edges[fwd_chunk_id] = received, sent
        return loss if self.is_last else tuple(sent)

    def backward_one_chunk(
        self, bwd_chunk_id: int, loss: Tensor | None = None, full_backward: bool = True, last_backward: bool = False
    ) -> None:
        """Run a microbatch backwards, for inputs and parameters together."""
        received, sent = self._edges.pop(bwd_chunk_id)
        if loss is not None:
            loss.backward()
        else:
            leaving = [
                tensor
                for tensor, crossing in zip(sent, self._sent(bwd_chunk_id), strict=True)
                if crossing.requires_grad
            ]
            gradients = self._arriving_gradients.pop(bwd_chunk_id)
            pairs = [pair for pair in zip(leaving, gradients, strict=True) if pair[0].requires_grad]
            torch.autograd.backward([tensor for tensor, _ in pairs], [gradient for _, gradient in pairs])
        self._leaving_gradients[bwd_chunk_id] = [
            torch.zeros_like(tensor) if tensor.grad is None else tensor.grad.contiguous()
            for tensor, crossing in zip(received, self._received(bwd_chunk_id), strict=True)
            if crossing.requires_grad
        ]

    def backward_weight_one_chunk(self, bwd_chunk_id: int, last_backward: bool = False) -> None:
        """Do nothing: `backward_one_chunk` has done it, as torch's split of the two loses gradients of some modules."""

    def perform_reduce_grad(self, grad_scale_factor: int) -> None:
        """Do nothing: there is one rank for each stage."""

    def clear_runtime_states(self) -> None:
        """Do nothing: what a step has made is gone with its last microbatch."""
