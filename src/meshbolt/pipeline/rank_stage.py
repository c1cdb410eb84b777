"""A stage of this rank as torch's schedules see it: what arrives, what is computed, what leaves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from meshbolt.compat import PipelineStageBase
from meshbolt.pipeline.passes import Passes, PlainPasses
from meshbolt.pipeline.plan import Crossing, PipelinePlan
from meshbolt.pipeline.split_backward import Leaving, try_halves
from meshbolt.pipeline.stage import left_stage

Forward = Callable[[int, list[Tensor]], tuple[list[Tensor], Tensor | None]]
Observer = Callable[[str, int, int], AbstractContextManager[Any]]
"""Given "F", "B", "I" or "W", a stage and a microbatch, returns what surrounds that pass.

I and W are the two halves of B: gradients of inputs, gradients of parameters.
"""


class Surround(Protocol):
    """Returns what surrounds the pass that ends a microbatch in a stage."""

    def __call__(self, stage: int, *, halves: bool, is_trial: bool = False) -> AbstractContextManager[Any]:
        """Return it.

        Args:
            stage: which.
            halves: the pass makes gradients of parameters only.
            is_trial: what the pass leaves is looked at, so that nothing may be reduced in it.
        """


def _nothing_around(stage: int, *, halves: bool, is_trial: bool = False) -> AbstractContextManager[Any]:
    return nullcontext()


def unobserved(_work: str, _stage: int, _microbatch: int) -> AbstractContextManager[Any]:
    """Surround a pass with nothing."""
    return nullcontext()


class RankStage(PipelineStageBase):
    """What torch's schedules ask of a stage, answered from a plan."""

    def __init__(
        self, module: nn.Module, stage: int, num_stages: int, device: torch.device, group: dist.ProcessGroup
    ) -> None:
        super().__init__(module, stage, num_stages, device, group)
        self._ranks = group
        # gloo sends from the host.
        self._wire = torch.device("cpu") if dist.get_backend(group) == "gloo" else device
        self.has_backward = True
        self.args_recv_info = {0: ()}  # which torch reads once to see that only neighbours communicate
        self._plans: Sequence[PipelinePlan] = ()
        self._forward: Forward = lambda _number, _received: ([], None)
        self._passes: Passes = PlainPasses()
        self._surround: Surround = _nothing_around
        self._arriving: dict[int, list[Tensor]] = {}
        self._arriving_gradients: dict[int, list[Tensor]] = {}
        self._edges: dict[int, tuple[list[Tensor], list[Tensor]]] = {}
        self._leaving_gradients: dict[int, list[Tensor]] = {}
        self.observer: Observer = unobserved
        self._ends_with = 0
        self._splits = False
        self._module = module
        self._places: tuple[PipelinePlan | None, list[tuple[nn.Module, str]]] = None, []
        self._refused: Callable[[int, str], None] = lambda _stage, _reason: None
        self._tried: set[Any] = set()
        self._later: dict[int, tuple[Callable[[], None], bool]] = {}  # and whether that is a half

    def begin(
        self,
        plans: Sequence[PipelinePlan],
        forward: Forward,
        passes: Passes,
        surround: Surround = _nothing_around,
        *,
        ends_with: int = 0,
    ) -> None:
        """Prepare for a step.

        Args:
            plans: of its microbatches.
            forward: runs a microbatch through this stage.
            passes: surrounds its passes.
            surround: given a stage and whether a pass makes gradients of parameters only, returns what surrounds the pass that
                ends a microbatch there.
            ends_with: the microbatch that is run backwards last.
        """
        self._plans, self._forward, self._passes, self._surround = plans, forward, passes, surround
        self._ends_with = ends_with
        self._later.clear()  # of a step that an exception has ended

    def as_planned(self, sent: Sequence[Tensor], number: int) -> list[Tensor]:
        """Return a microbatch's outputs in the dtypes in which the next stage expects them, as tensors of their own."""
        pairs = zip(sent, self._sent(number), strict=True)
        return [left_stage(tensor.to(crossing.dtype)) for tensor, crossing in pairs]

    def _received(self, number: int) -> tuple[Crossing, ...]:
        return self._plans[number].received(self.stage_index)

    def _sent(self, number: int) -> tuple[Crossing, ...]:
        return self._plans[number].sent(self.stage_index)

    def _empty(self, crossing: Crossing) -> Tensor:
        return torch.empty(crossing.shape, dtype=crossing.dtype, device=self._wire)

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
        return [dist.P2POp(kind, tensor.to(self._wire), peer, self.group) for tensor in tensors]

    def receive(self, number: int) -> list[Tensor]:
        """Return a microbatch's inputs, when they have come from another rank."""
        for operation in self.get_fwd_recv_ops(number):
            operation.op(operation.tensor, group=operation.group, group_src=operation.group_peer).wait()
        return [tensor.to(self.device) for tensor in self._arriving.pop(number, [])]

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
        arrived = [tensor.to(self.device) for tensor in self._arriving.pop(fwd_chunk_id, [])]
        received = [
            tensor.requires_grad_(crossing.requires_grad and torch.is_grad_enabled())
            for tensor, crossing in zip(arrived, self._received(fwd_chunk_id), strict=True)
        ]
        with self.observer("F", self.stage_index, fwd_chunk_id):
            sent, loss = self._passes.forward_pass(
                lambda: self._forward(fwd_chunk_id, received), is_last=fwd_chunk_id == self._ends_with
            )
        left = self.as_planned(sent, fwd_chunk_id)
        self._edges[fwd_chunk_id] = received, left if loss is None else [loss]
        # Without the graph: torch holds on to losses until the end of the step.
        return tuple(tensor.detach() for tensor in left) if loss is None else loss.detach()

    def backward_one_chunk(
        self, bwd_chunk_id: int, loss: Tensor | None = None, full_backward: bool = True, last_backward: bool = False
    ) -> None:
        """Run a microbatch backwards; `loss` has no graph.

        Args:
            bwd_chunk_id: the microbatch.
            loss: not used.
            full_backward: for inputs and parameters together; else `backward_weight_one_chunk` makes those of the latter, where
                that has been tried and is right.
            last_backward: not used.
        """
        received, sent = self._edges.pop(bwd_chunk_id)
        leaving = self._leaving(received, sent, number=bwd_chunk_id)
        if full_backward or not self._splits:
            with self.observer("B", self.stage_index, bwd_chunk_id), self._surround(self.stage_index, halves=False):
                leaving.run()
        else:
            self._backward_to_inputs(leaving, number=bwd_chunk_id)
        self._leaving_gradients[bwd_chunk_id] = [
            torch.zeros_like(tensor) if tensor.grad is None else tensor.grad.contiguous()
            for tensor, crossing in zip(received, self._received(bwd_chunk_id), strict=True)
            if crossing.requires_grad
        ]

    def _leaving(self, received: Sequence[Tensor], sent: Sequence[Tensor], *, number: int) -> Leaving:
        if self.is_last:
            return Leaving(received=received, sent=sent, gradients=[torch.ones_like(sent[0])])
        leaving = [tensor for tensor, crossing in zip(sent, self._sent(number), strict=True) if crossing.requires_grad]
        gradients = [gradient.to(self.device) for gradient in self._arriving_gradients.pop(number)]
        pairs = [pair for pair in zip(leaving, gradients, strict=True) if pair[0].requires_grad]
        return Leaving(received=received, sent=[each for each, _ in pairs], gradients=[each for _, each in pairs])

    # The backward pass in halves ----------------------------------------------------------------------------------------

    def split_backward(self, refused: Callable[[int, str], None]) -> None:
        """Make gradients of parameters apart from those of inputs where the schedule says so, once that is seen to be right.

        Args:
            refused: told the stage and why, where it is not right.
        """
        self._splits, self._refused = True, refused

    def _parameters(self, number: int) -> list[nn.Parameter]:
        """Return this stage's parameters, as the graph of a microbatch has them: a sharding engine puts others in their place."""
        plan = self._plans[number]
        if self._places[0] is not plan:
            split = (name.rpartition(".") for name in sorted(plan.owned(self.stage_index)))
            self._places = plan, [(self._module.get_submodule(path), name) for path, _, name in split]
        return list(dict.fromkeys(getattr(owner, name) for owner, name in self._places[1]))

    def _backward_to_inputs(self, leaving: Leaving, *, number: int) -> None:
        if not any(tensor.requires_grad for tensor in leaving.received):
            self._later[number] = leaving.run, False  # nobody waits for anything
            return
        form = self._plans[number].form_of(self.stage_index)
        if form in self._tried:
            with self.observer("I", self.stage_index, number):
                self._later[number] = leaving.run_to_inputs(self._parameters(number)), True
            return
        around = self._surround(self.stage_index, halves=False, is_trial=True)
        with self.observer("B", self.stage_index, number), around:
            trial = try_halves(leaving, self._parameters(number))
        if trial.is_sound:
            self._tried.add(form)
        if trial.reason:
            self._splits = False
            self._refused(self.stage_index, trial.reason)

    def backward_weight_one_chunk(self, bwd_chunk_id: int, last_backward: bool = False) -> None:
        """Make the gradients of parameters that `backward_one_chunk` has left."""
        run, is_half = self._later.pop(bwd_chunk_id, (None, False))
        if run is not None:
            with self.observer("W", self.stage_index, bwd_chunk_id), self._surround(self.stage_index, halves=is_half):
                run()

    def perform_reduce_grad(self, grad_scale_factor: int) -> None:
        """Do nothing: there is one rank for each stage."""

    def clear_runtime_states(self) -> None:
        """Do nothing: what a step has made is gone with its last microbatch."""
