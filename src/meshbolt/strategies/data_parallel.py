"""Which ranks see different samples, and which the same: what a strategy reduces, gathers, seeds and checks by it.

Ranks that share layers (the `tp` axis) or are stages of one pipeline (`pp`) are one to the data: they see the same samples, count
once in every mean and sum, and draw the same random numbers, so that what each computes by itself is the same on all of them.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.utilities.seed import pl_worker_init_function
from torch import nn
from torch.autograd import Function
from torch.distributed.device_mesh import DeviceMesh
from torchmetrics import Metric

from meshbolt.collectives import agree_on_error, same_on_all_ranks
from meshbolt.config import Plan
from meshbolt.engine.debug import SameBatch
from meshbolt.engine.random_state import collect_random_state, restore_random_state
from meshbolt.mesh import data_parallel_group, same_samples_group
from meshbolt.strategies.compat import ranks_are_connected, reduce_over_ranks
from meshbolt.strategies.gathering import GatherOver
from meshbolt.strategies.pipelined.meeting import refuse_in_step


class DataParallelRanks:
    """The part of a strategy that knows which ranks see different samples; stands before `MeshCore`'s other bases."""

    _plan: Plan | None
    _mesh: DeviceMesh | None
    _samples_group: dist.ProcessGroup | None = None
    _copies_group: dist.ProcessGroup | None = None
    _control_group: dist.ProcessGroup | None
    _same_batch: SameBatch | None = None

    @property
    def plan(self) -> Plan:
        """The resolved plan of this run."""
        raise NotImplementedError

    @property
    def root_device(self) -> torch.device:
        """This rank's device."""
        raise NotImplementedError

    @property
    def is_distributed(self) -> bool:
        """Whether samples are divided: Lightning gives loaders a sampler for it, which shuffles what was in order."""
        return self._copies == 1 or self.data_parallel_size > 1

    @property
    def data_parallel_size(self) -> int:
        """The number of ranks that see different samples: all of them, divided by those that share layers or a pipeline.

        Example:
            >>> samples_in_a_step = batch_size * trainer.strategy.data_parallel_size
        """
        return self.plan.mesh.data_parallel_size

    @property
    def data_parallel_rank(self) -> int:
        """Which part of the samples this rank sees; the same number on all ranks that share layers or a pipeline.

        Example:
            >>> own = itertools.islice(samples, strategy.data_parallel_rank, None, strategy.data_parallel_size)
        """
        return self.plan.mesh.data_parallel_rank(dist.get_rank())

    @property
    def data_parallel_group(self) -> dist.ProcessGroup | None:
        """The group of the ranks that see different samples with this one's share of the layers; None before set-up.

        Example:
            >>> accuracy = torchmetrics.Accuracy("binary", process_group=fabric.strategy.data_parallel_group)
        """
        return self._samples_group

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """Which part of the samples this rank sees, as `DistributedSampler` takes it.

        Example:
            >>> sampler = DistributedSampler(dataset, **trainer.strategy.distributed_sampler_kwargs)
        """
        return {"num_replicas": self.data_parallel_size, "rank": self.data_parallel_rank}

    # What is put together over ranks ----------------------------------------------------------------------------------

    def all_gather(self, tensor: torch.Tensor, group: Any = None, sync_grads: bool = False) -> torch.Tensor:
        """Return a tensor of every rank that sees different samples, stacked, (data_parallel_size, *tensor.shape).

        Args:
            tensor: of one shape on all ranks.
            group: other ranks to gather from; Lightning gives all of them where the user gives none.
            sync_grads: let gradients flow back.
        """
        refuse_in_step()
        if group in (None, dist.group.WORLD) and self._copies > 1:
            # torch's own cannot send gradients back along some of the ranks under gloo.
            with torch.set_grad_enabled(sync_grads and torch.is_grad_enabled()):
                return _Gathered.apply(tensor, self._samples_group)  # type: ignore[no-any-return, no-untyped-call]
        return super().all_gather(tensor, group=group, sync_grads=sync_grads)  # type: ignore[misc,no-any-return]

    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        """Return what all ranks decide together, those that share layers included.

        Args:
            decision: this rank's.
            all: every rank has to say yes; else one is enough.
        """
        votes = torch.tensor(int(decision), device=self.root_device)
        if (everybody := self._reachable()) is not None:
            votes = reduce_over_ranks(votes, everybody, dist.ReduceOp.SUM)
        return bool(votes == self.world_size) if all else bool(votes)  # type: ignore[attr-defined]

    def _reachable(self) -> dist.ProcessGroup | None:
        """Return the group of all ranks as far as they can be talked to; None where there is nobody to talk to.

        Raises:
            UnsupportedError: in a step of a pipeline, where ranks do not meet.
        """
        refuse_in_step()
        return dist.group.WORLD if ranks_are_connected() else None

    def _reduce(self, value: Any, group: Any, reduce_op: Any) -> Any:
        """Reduce a value over the ranks that see different samples; what is not a tensor stays as it is."""
        if not isinstance(value, torch.Tensor) or (everybody := self._reachable()) is None:
            return value
        if group not in (None, dist.group.WORLD):
            return reduce_over_ranks(value, group, reduce_op)
        if everybody is dist.group.WORLD:
            return reduce_over_ranks(value, self._samples_group or everybody, reduce_op)
        # After an exception only a group of all ranks is fresh, in which each sample counts as often as layers are shared.
        result = reduce_over_ranks(value, everybody, reduce_op)
        sums = str(reduce_op).rpartition(".")[2].lower() == "sum"
        return result.div_(self._copies, rounding_mode=_whole(result)) if sums else result

    @property
    def _copies(self) -> int:
        return 1 if self._plan is None else self._plan.mesh.copies

    # Ranks that see the same samples ----------------------------------------------------------------------------------

    def _take_places(self, *, timeout: Any) -> None:
        """Make the groups by which samples are counted, once the mesh is there; all ranks together."""
        if self._mesh is None or self._samples_group is not None:
            return
        self._samples_group = data_parallel_group(self._mesh, timeout=timeout)
        if self._copies > 1:
            self._copies_group = group = same_samples_group(self._mesh, timeout=timeout)
            self._same_batch = SameBatch(group, device=self.root_device, always=self.plan.environment.debug)

    def _draw_alike(self) -> None:
        """Let ranks that see the same samples go on from the random state of the first of them: seeds of their own part them."""
        if self._copies_group is None:
            return
        box = [collect_random_state(self.root_device)]
        dist.broadcast_object_list(box, group=self._copies_group, group_src=0)
        restore_random_state(box[0], self.root_device)

    def told_by_ranks(self, find: Callable[[], Any]) -> list[Any]:
        """Return what every rank finds, by rank; all ranks together.

        Args:
            find: returns this rank's, small and such that it can be pickled.

        Raises:
            Exception: that of the first rank on which finding fails, on every rank.
        """
        found: list[Any] = []
        agree_on_error(lambda: found.append(find()), group=self._control_group)
        return same_on_all_ranks(found[0], group=self._control_group)[1]

    def given_to_copies(self, value: Any, *, source: int) -> Any:
        """Return what one rank has on all that see the same samples; they call it together.

        Args:
            value: that rank's; not used on the others.
            source: global rank, one of them.
        """
        box = [value]
        dist.broadcast_object_list(box, src=source, group=self._copies_group)
        return box[0]

    def _look_at_step(self, name: str, args: tuple[Any, ...]) -> None:
        """Compare a batch with those of the ranks that are to see the same: the first of each loader, in debug mode all.

        Args:
            name: of the step that takes it.
            args: what the step takes: the batch, and where it has them the numbers of the batch and of its loader.

        Raises:
            TopologyError: they differ; on each of these ranks.
        """
        if self._same_batch is not None:
            index = args[1] if len(args) > 1 else None
            what = name if index is None else f"{name} at batch {index}"
            self._same_batch.check(what, args, kind=(name, *args[2:]), is_first=index == 0)

    def _look_at_call(self, module: nn.Module, *args: Any) -> None:
        """Compare what a module is called with, as `_look_at_step`: the first time, in debug mode every time."""
        if self._same_batch is not None:
            self._same_batch.check(
                f"the forward of {type(module).__name__}", args, kind=(id(module), module.training), is_first=False
            )

    def _seed_workers(self, loader: Any) -> None:
        """Let workers of ranks that see the same samples draw the same numbers, where Lightning seeds workers by the rank."""
        if self._copies == 1 or not int(os.environ.get("PL_SEED_WORKERS", 0)) or not hasattr(loader, "worker_init_fn"):
            return
        known = loader.worker_init_fn
        if known is None or getattr(known, "func", None) is pl_worker_init_function:
            loader.worker_init_fn = functools.partial(pl_worker_init_function, rank=self.data_parallel_rank)

    def _count_samples_once(self, module: nn.Module) -> None:
        """Let metrics and synchronised batch norms of a module look at the ranks that see different samples.

        Args:
            module: the user's. What was given a group, or a way to gather, keeps it.
        """
        for part in module.modules():
            if isinstance(part, Metric) and (part.dist_sync_fn is None or isinstance(part.dist_sync_fn, GatherOver)):
                own = part.process_group is not None or self._copies == 1
                part.dist_sync_fn = None if own else GatherOver(self._samples_group)
            elif isinstance(part, nn.SyncBatchNorm) and part.process_group is None and self._copies > 1:
                part.process_group = self._samples_group


def _whole(tensor: torch.Tensor) -> Any:
    return None if tensor.is_floating_point() else "trunc"


class _Gathered(Function):
    """The tensors of a group's ranks, stacked; each rank's gradient is the sum over them of what each has for it."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, group: Any) -> torch.Tensor:
        """Gather."""
        ctx.group, tensor = group, tensor.contiguous()
        gathered = [torch.empty_like(tensor) for _ in range(group.size())]
        dist.all_gather(gathered, tensor, group=group)
        return torch.stack(gathered)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        """Add up, and keep this rank's part."""
        gradient = gradient.contiguous().clone()
        dist.all_reduce(gradient, group=ctx.group)
        return gradient[ctx.group.rank()], None
