"""Every touch of what torch keeps private, in one place, so that a new version of torch is checked by reading one file.

The tests of this file run on every supported version of torch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import IO, Any, cast

import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import Variable
from torch.distributed._composable.replicate_with_fsdp import replicate
from torch.distributed.checkpoint.utils import _create_file_view
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard import _fsdp_common, _fsdp_param_group, _fsdp_state
from torch.distributed.fsdp._fully_shard._fsdp_api import AllGather, ReduceScatter
from torch.distributed.tensor import DTensor, Placement
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

__all__ = [
    "AllGather",
    "ReduceScatter",
    "TorchDispatchMode",
    "aliased_arguments",
    "casts",
    "distributed_tensor",
    "drop_kept_gradients",
    "drop_pending_gather",
    "gathered_bytes",
    "given_other_data",
    "gradients_land_in_place",
    "handle_sharded",
    "has_pending_gather",
    "is_gathered",
    "kept_gradients",
    "lighten_hooks",
    "local_tensor",
    "make_hooks_skippable",
    "managed_parameters",
    "on_gradient",
    "part_of_file",
    "plain_calls",
    "queue_after_backward",
    "replicate",
    "reset_after_error",
    "reshard",
    "set_async_gather",
    "set_group_timeout",
    "storage_identity",
    "storages_without_memory",
    "tensors_without_memory",
    "tree_leaves",
    "tree_map",
    "untouched_by_functions",
    "was_gathered",
    "written_arguments",
]

# What a tensor subclass says that only changes what operations do, not what torch's functions do.
untouched_by_functions = torch._C._disabled_torch_function_impl


def local_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """Return this rank's part of a tensor: a DTensor's shard (sharing its storage, outside autograd), else the tensor."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def distributed_tensor(local: torch.Tensor, *, like: DTensor, placements: Sequence[Placement]) -> DTensor:
    """Return this rank's part as a DTensor, outside autograd and unchecked: what `DTensor.from_local` takes a while for.

    Args:
        local: this rank's part, of the same storage as the result.
        like: a DTensor of the result's global shape, strides and mesh.
        placements: of the result, one per axis of the mesh.
    """
    meta = TensorMeta(like.shape, like.stride(), local.dtype)
    return DTensor(local, DTensorSpec(like.device_mesh, tuple(placements), tensor_meta=meta), requires_grad=False)


def handle_sharded(operation: Any, handler: Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]) -> None:
    """Let a function do what an operation is to do on DTensors, in this process from now on.

    Args:
        operation: an overload of one of torch's operations.
        handler: takes the operation, its positional arguments, the first one a DTensor, and its other arguments.
    """
    dispatcher: Any = DTensor._op_dispatcher
    dispatcher._custom_op_handlers[operation] = handler


def managed_parameters(unit: FSDPModule) -> list[nn.Parameter]:
    """Return the sharded parameters that the unit gathers, whether they are gathered now or not."""
    return [fsdp_param.sharded_param for group in _groups(unit) for fsdp_param in group.fsdp_params]


def storage_identity(tensor: torch.Tensor) -> int:
    """Return what changes when a tensor is given other data by assignment (`tensor.data = ...`), sharded or not."""
    return int(tensor.untyped_storage()._cdata)


def given_other_data(unit: FSDPModule) -> list[nn.Parameter]:
    """Return the sharded parameters whose whole copy was given other data by assignment since it was gathered."""
    return [
        fsdp_param.sharded_param
        for group in _groups(unit)
        if group.is_unsharded
        for fsdp_param in group.fsdp_params
        if fsdp_param.all_gather_outputs
        and storage_identity(fsdp_param.unsharded_param) != storage_identity(fsdp_param.all_gather_outputs[0])
    ]


def gathered_bytes(unit: FSDPModule) -> int:
    """Return the bytes of the unit's whole parameters, in the dtype in which they are stored."""
    return sum(parameter.numel() * parameter.element_size() for parameter in managed_parameters(unit))


def is_gathered(unit: FSDPModule) -> bool:
    """Return whether the unit's whole parameters are in memory."""
    return any(group.is_unsharded for group in _groups(unit))


def has_pending_gather(unit: FSDPModule) -> bool:
    """Return whether an all-gather was launched whose result no forward has taken yet."""
    return any(group._all_gather_result is not None for group in _groups(unit))


def was_gathered(unit: FSDPModule) -> bool:
    """Return whether the unit's whole parameters have been in memory at least once."""
    return all(hasattr(p, "_unsharded_param") for group in _groups(unit) for p in group.fsdp_params)


def drop_pending_gather(unit: FSDPModule) -> None:
    """Wait for an all-gather that was launched early and throw its result away; without one, do nothing."""
    for group in _groups(unit):
        result, group._all_gather_result = group._all_gather_result, None
        if result is None:
            continue
        if result.all_gather_event is not None:
            group.device_handle.current_stream().wait_event(result.all_gather_event)
        if isinstance(result.all_gather_work, dist.Work):
            result.all_gather_work.wait()


def reset_after_error(root: FSDPModule) -> None:
    """Bring every unit back to its resting state after a forward or backward was cut short by an exception.

    Gradients of earlier batches stay, also those that replicas have not summed yet.
    """
    if hasattr(root, "reset_iter_state"):
        groups = [group for state in root._get_fsdp_state()._state_ctx.all_states for group in state._fsdp_param_groups]
        parts = [group._partial_reduce_output for group in groups]
        root.reset_iter_state()
        for group, part in zip(groups, parts, strict=True):
            group._partial_reduce_output = part
        return
    _reset_without_torch(root)


def _reset_without_torch(root: FSDPModule) -> None:
    """Do what `reset_iter_state` does, for torch < 2.13, which has no such method."""
    state = root._get_fsdp_state()
    context, communication = state._state_ctx, state._comm_ctx
    stream = state._device_handle.current_stream()
    for name in ("all_gather_state", "reduce_scatter_state"):
        held = getattr(communication, name)
        if held is not None and held.event is not None:
            stream.wait_event(held.event)
        setattr(communication, name, None)
    communication.post_forward_order.clear()
    for each in context.all_states:
        each._modules_to_run_forward.clear()
        each._training_state = _fsdp_common.TrainingState.IDLE
        if (group := each._fsdp_param_group) is not None:
            _reset_group(group, stream)
    context.iter_forward_root = None
    context.post_backward_final_callback_queued = False


def _reset_group(group: Any, stream: Any) -> None:
    if (gathering := group._all_gather_result) is not None and isinstance(gathering.all_gather_work, dist.Work):
        gathering.all_gather_work.wait()
    reducing = group._all_reduce_state
    events = (
        gathering and gathering.all_gather_event,
        group._post_reduce_event,
        reducing and reducing.event,
        group._reshard_after_forward_event,
    )
    for event in events:
        if event is not None:
            stream.wait_event(event)
    group._all_gather_result = group._post_reduce_event = None
    group._all_reduce_state = group._reshard_after_forward_event = None
    group._post_forward_indices.clear()
    group._training_state = _fsdp_common.TrainingState.IDLE
    group._to_sharded()


def set_async_gather(unit: FSDPModule) -> None:
    """Let prefetched all-gathers of the unit run behind the computation on devices without streams."""
    unit._set_unshard_async_op(True)


def kept_gradients(unit: FSDPModule, used: Collection[nn.Parameter]) -> Iterator[tuple[nn.Parameter, torch.Tensor]]:
    """Yield what the unit keeps inside a window: a sharded parameter, and its gradient that is not yet what it will be.

    That is a whole gradient which has not been communicated, or a shard that was summed inside this replica only.

    Args:
        unit: between two batches of a window.
        used: the sharded parameters that got a gradient in this window.
    """
    for group in _groups(unit):
        first = 0
        for fsdp_param in group.fsdp_params:
            if group._partial_reduce_output is not None:
                if fsdp_param.sharded_param in used:
                    yield fsdp_param.sharded_param, _part_of(group._partial_reduce_output, fsdp_param, first)
                    first += fsdp_param.padded_sharded_param_size.numel()
            elif fsdp_param.unsharded_accumulated_grad is not None:
                yield fsdp_param.sharded_param, fsdp_param.unsharded_accumulated_grad_data
            elif hasattr(fsdp_param, "_unsharded_param") and fsdp_param.unsharded_param.grad is not None:
                yield fsdp_param.sharded_param, fsdp_param.unsharded_grad_data


def _part_of(flat: torch.Tensor, fsdp_param: Any, first: int) -> torch.Tensor:
    return torch.as_strided(flat, fsdp_param.sharded_size, fsdp_param.contiguous_sharded_stride, storage_offset=first)


def drop_kept_gradients(unit: FSDPModule, dropped: Collection[nn.Parameter], used: Collection[nn.Parameter]) -> None:
    """Forget what `kept_gradients` yields for some of the parameters.

    Args:
        unit: between two batches of a window.
        dropped: the sharded parameters whose gradients are to be forgotten.
        used: as for `kept_gradients`.
    """
    kept = list(kept_gradients(unit, used))
    for group in _groups(unit):
        partial = group._partial_reduce_output is not None
        if partial and all(parameter in dropped for parameter, _ in kept):
            group._partial_reduce_output = None
        for fsdp_param in group.fsdp_params if not partial else ():
            if fsdp_param.sharded_param in dropped and hasattr(fsdp_param, "_unsharded_param"):
                fsdp_param.unsharded_accumulated_grad = None
                fsdp_param.unsharded_param.grad = None
        for parameter, gradient in kept if partial else ():
            if parameter in dropped:
                gradient.zero_()


def on_gradient(unit: FSDPModule, seen: Callable[[nn.Parameter], None]) -> None:
    """Call a function with the sharded parameter whenever autograd has made a gradient for its whole copy.

    Args:
        unit: gathered at least once.
        seen: called in backward, on every rank for itself.
    """
    for group in _groups(unit):
        for fsdp_param in group.fsdp_params:
            whole = fsdp_param.unsharded_param
            wanted = whole.requires_grad
            whole.requires_grad_(True)  # only then torch takes a hook; it may be trained later
            whole.register_post_accumulate_grad_hook(functools.partial(_tell, seen, fsdp_param))
            whole.requires_grad_(wanted)


def _tell(seen: Callable[[nn.Parameter], None], fsdp_param: Any, _: torch.Tensor) -> None:
    seen(fsdp_param.sharded_param)


def gradients_land_in_place(unit: FSDPModule, reduced: torch.dtype) -> bool:
    """Return whether the unit's gradients are mere views of what the reduce-scatter writes.

    Only then may the reduce-scatter finish later: when torch adds to older gradients, casts, divides, all-reduces or calls
    hooks right after the reduce-scatter call returns, it would read a buffer that nobody has filled yet.

    Args:
        unit: whose gradients are being reduced.
        reduced: dtype of what the reduce-scatter writes.
    """
    return all(_lands_in_place(group, reduced) for group in _groups(unit))


def _lands_in_place(group: Any, reduced: torch.dtype) -> bool:
    # torch divides other dtypes before and after, against overflow.
    plain = group._orig_dtype == reduced and reduced in (torch.float32, torch.bfloat16)
    reduces_once = not group._is_hsdp and group.gradient_divide_factor is None and group._all_reduce_hook is None
    return (
        plain
        and reduces_once
        and not group.force_sum_reduction_for_comms
        and all(
            p.sharded_param.grad is None
            and not getattr(p.sharded_param, "_post_accumulate_grad_hooks", None)
            and not p.offload_to_cpu
            for p in group.fsdp_params
        )
    )


def lighten_hooks() -> None:
    """Spare FSDP2's hooks two things they do at every call, a third of their time on a CPU; what they do stays the same.

    Each makes a new wrapper that hides it from `torch.compile` (one made once does), and labels of which only a running
    profiler takes notice. The process's other users of FSDP2 profit too.
    """
    for module in (_fsdp_param_group, _fsdp_state):
        for owner in vars(module).values():
            if isinstance(owner, type) and owner.__module__ == module.__name__:
                for name, hook in list(vars(owner).items()):
                    if getattr(hook, "__code__", None) is _HIDING:
                        setattr(owner, name, torch._dynamo.disable(hook.__wrapped__, recursive=True))
    if getattr(_fsdp_param_group, "record_function", None) is torch.profiler.record_function:
        setattr(_fsdp_param_group, "record_function", _label)  # noqa: B010 - not a name that torch exports


def _label(name: str) -> AbstractContextManager[Any]:
    return torch.profiler.record_function(name) if torch._C._autograd._profiler_enabled() else nullcontext()


_HIDING = getattr(getattr(_fsdp_common, "_dynamo_disable", lambda _: None)(lambda: None), "__code__", object())


def make_hooks_skippable(unit: FSDPModule, is_quiet: Callable[[], bool]) -> None:
    """Let FSDP2's hooks of a unit rest in batches whose gradients stay whole, where all they would do is to look around.

    While quiet the unit is gathered for its forward if it is not yet, and that is all: gradients add up on the whole copies
    until the backward of a batch that is not quiet reduces them. Forward and backward of one graph have to be both quiet
    or both not.

    Args:
        unit: sharded, and without casts (see `casts`), which are done in its hooks.
        is_quiet: asked at every forward.
    """
    state, groups = unit._get_fsdp_state(), _groups(unit)
    before, after = cast("nn.Module", unit)._forward_pre_hooks, cast("nn.Module", unit)._forward_hooks
    enter, leave = before[state._pre_forward_hook_handle.id], after[state._post_forward_hook_handle.id]

    def entered(module: nn.Module, args: Any, kwargs: Any) -> Any:
        if not is_quiet():
            return enter(module, args, kwargs)
        for group in groups:
            if not group.is_unsharded:
                group.unshard()
                group.wait_for_unshard()
        return None

    def left(module: nn.Module, args: Any, output: Any) -> Any:
        return None if is_quiet() else leave(module, args, output)

    before[state._pre_forward_hook_handle.id] = torch._dynamo.disable(entered, recursive=True)
    after[state._post_forward_hook_handle.id] = torch._dynamo.disable(left, recursive=True)


def casts(unit: FSDPModule) -> bool:
    """Return whether the unit casts parameters, inputs, outputs or gradients, so that its hooks must run."""
    policy = unit._get_fsdp_state()._mp_policy
    return any(dtype is not None for dtype in (policy.param_dtype, policy.reduce_dtype, policy.output_dtype))


def queue_after_backward(callback: Any) -> None:
    """Run a callback at the end of the backward that is running now, after torch's own callbacks queued before it."""
    Variable._execution_engine.queue_callback(callback)


def _groups(unit: FSDPModule) -> list[Any]:
    state = unit._get_fsdp_state()
    many = getattr(state, "_fsdp_param_groups", None)
    if many is not None:
        return list(many)
    one = state._fsdp_param_group  # torch < 2.13 keeps a single group
    return [one] if one is not None else []


def reshard(unit: FSDPModule) -> None:
    """Free the unit's gathered parameters whatever state torch thinks the unit is in (its own `reshard` may decline)."""
    for group in _groups(unit):
        group._to_sharded()


def set_group_timeout(group: dist.ProcessGroup, timeout: timedelta) -> None:
    """Set how long a collective of a group waits for its peers.

    Args:
        group: one that this rank belongs to.
        timeout: from the next collective on.
    """
    dist.distributed_c10d._set_pg_timeout(timeout, group)


def plain_calls() -> AbstractContextManager[Any]:
    """Call torch's functions without asking modes and subclasses that watch them."""
    return cast("AbstractContextManager[Any]", torch._C.DisableTorchFunction())


def part_of_file(file: IO[bytes], start: int, num_bytes: int) -> IO[bytes]:
    """Return a part of a file as a file that `torch.load` reads.

    Args:
        file: open for reading.
        start: where the part begins.
        num_bytes: its length.
    """
    return cast("IO[bytes]", _create_file_view(cast("Any", file), start, num_bytes))


def tensors_without_memory() -> AbstractContextManager[Any]:
    """Make tensors inside that have shape, dtype and a storage of their own, but no memory."""
    return FakeTensorMode()


def storages_without_memory() -> AbstractContextManager[Any]:
    """Have `torch.save` inside write a file with room for the memory of its tensors, which is left empty.

    Tensors without memory are written as if they had some.
    """
    return torch.serialization.skip_data(materialize_fake_tensors=True)


def written_arguments(operation: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[torch.Tensor]:
    """Yield the tensors that an operation writes to.

    Args:
        operation: as a dispatch mode gets it.
        args: its positional arguments.
        kwargs: its other arguments.
    """
    for alias, tensor in _aliases(operation, args, kwargs):
        if alias.is_write:
            yield tensor


def aliased_arguments(operation: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[torch.Tensor]:
    """Yield the tensors that an operation writes to, or returns parts of that share their memory.

    Args:
        operation: as a dispatch mode gets it.
        args: its positional arguments.
        kwargs: its other arguments.
    """
    for _, tensor in _aliases(operation, args, kwargs):
        yield tensor


def _aliases(operation: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[tuple[Any, torch.Tensor]]:
    declared = operation._schema.arguments
    given = [
        *zip(declared, args, strict=False),
        *((each, kwargs[each.name]) for each in declared if each.name in kwargs),
    ]
    for argument, value in given:
        if argument.alias_info is not None:
            yield from ((argument.alias_info, leaf) for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor))
