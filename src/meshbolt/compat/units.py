"""What FSDP2 keeps private of its units: their state, their hooks, and the gradients that they hold."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard import _fsdp_common, _fsdp_param_group, _fsdp_state
from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam
from torch.distributed.tensor import DTensor

from meshbolt.compat.tensors import current_pass, local_tensor, storage_identity

# What a tensor subclass says that only changes what operations do, not what torch's functions do.
untouched_by_functions = torch._C._disabled_torch_function_impl


def managed_parameters(unit: FSDPModule) -> list[nn.Parameter]:
    """Return the sharded parameters that the unit gathers, whether they are gathered now or not."""
    return [fsdp_param.sharded_param for group in groups_of(unit) for fsdp_param in group.fsdp_params]


@contextmanager
def sharded_parameters_away() -> Iterator[None]:
    """Let modules load a `state_dict` while ordinary parameters stand where torch looks for sharded ones."""
    plain: Callable[[FSDPParam], None] = FSDPParam.reset_sharded_param

    def reset(fsdp_param: FSDPParam) -> None:
        place = fsdp_param._module_info
        if isinstance(getattr(place.module, place.param_name), DTensor):
            plain(fsdp_param)

    setattr(FSDPParam, "reset_sharded_param", reset)  # noqa: B010
    try:
        yield
    finally:
        setattr(FSDPParam, "reset_sharded_param", plain)  # noqa: B010


def given_other_data(unit: FSDPModule) -> list[nn.Parameter]:
    """Return the sharded parameters whose whole copy was given other data by assignment since it was gathered."""
    return [
        fsdp_param.sharded_param
        for group in groups_of(unit)
        if group.is_unsharded
        for fsdp_param in group.fsdp_params
        if fsdp_param.all_gather_outputs
        and storage_identity(local_tensor(fsdp_param.unsharded_param))
        != storage_identity(fsdp_param.all_gather_outputs[0])
    ]


def gathered_bytes(unit: FSDPModule) -> int:
    """Return the bytes of the unit's whole parameters, in the dtype in which they are stored."""
    return sum(parameter.numel() * parameter.element_size() for parameter in managed_parameters(unit))


def is_gathered(unit: FSDPModule) -> bool:
    """Return whether the unit's whole parameters are in memory."""
    return any(group.is_unsharded for group in groups_of(unit))


def has_pending_gather(unit: FSDPModule) -> bool:
    """Return whether an all-gather was launched whose result no forward has taken yet."""
    return any(group._all_gather_result is not None for group in groups_of(unit))


def was_gathered(unit: FSDPModule) -> bool:
    """Return whether the unit's whole parameters have been in memory at least once."""
    return all(hasattr(p, "_unsharded_param") for group in groups_of(unit) for p in group.fsdp_params)


def drop_pending_gather(unit: FSDPModule) -> None:
    """Wait for an all-gather that was launched early and throw its result away; without one, do nothing."""
    for group in groups_of(unit):
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
    for group in groups_of(unit):
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
    for group in groups_of(unit):
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
    for group in groups_of(unit):
        for fsdp_param in group.fsdp_params:
            whole = fsdp_param.unsharded_param
            wanted = whole.requires_grad
            whole.requires_grad_(True)  # only then torch takes a hook; it may be trained later
            whole.register_post_accumulate_grad_hook(functools.partial(_tell, seen, fsdp_param))
            whole.requires_grad_(wanted)


def on_reduced_gradient(unit: FSDPModule, seen: Callable[[torch.Tensor], None]) -> None:
    """Call a function with a sharded parameter when its gradient has been reduced, on the stream that reduces.

    Args:
        unit: sharded.
        seen: called in backward, on every rank for itself.
    """
    for shard in managed_parameters(unit):
        wanted = shard.requires_grad
        shard.requires_grad_(True)  # only then torch takes a hook; it may be trained later
        shard.register_post_accumulate_grad_hook(seen)
        shard.requires_grad_(wanted)


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
    return all(_lands_in_place(group, reduced) for group in groups_of(unit))


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
    state, groups = unit._get_fsdp_state(), groups_of(unit)
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


def watch_passes(
    unit: FSDPModule,
    *,
    is_other: Callable[[], bool],
    enter: Callable[[FSDPModule], None],
    leave: Callable[[FSDPModule], None],
    holds: Callable[[FSDPModule], bool],
    ending: Callable[[], AbstractContextManager[None]],
) -> None:
    """Decide what FSDP2's hooks do in a pass of autograd: torch takes every pass for the backward of the loss.

    Args:
        unit: before its first forward.
        is_other: whether the running pass is not one that FSDP2 is to know of.
        enter: called in place of FSDP2 when such a pass comes to the unit's output.
        leave: called in place of FSDP2 when it leaves the unit's input.
        holds: whether the unit, in any other pass, is not to be reduced and freed yet.
        ending: surrounds what FSDP2 does at the end of a pass.
    """
    state: Any = unit._get_fsdp_state()
    before, end = state._pre_backward, state._root_post_backward_final_callback

    def entered(gradient: torch.Tensor) -> torch.Tensor:
        if not is_other():
            before(gradient)
        else:
            enter(unit)
        return gradient

    def left(after: Callable[[], None], *_: Any) -> None:
        if current_pass() != -1 and is_other():
            leave(unit)
        elif not holds(unit):
            after()

    def ended() -> None:
        with ending():
            end()

    state._pre_backward, state._root_post_backward_final_callback = entered, ended
    for group in groups_of(unit):
        group.post_backward = functools.partial(left, group.post_backward)


def enter_pass(unit: FSDPModule) -> Callable[[], None]:
    """Let a unit know that a pass has come to it, for what is recomputed there; return what undoes that."""
    holders = [unit._get_fsdp_state(), *groups_of(unit)]
    states = [holder._training_state for holder in holders]

    def put(states: Iterable[Any]) -> None:
        for holder, state in zip(holders, states, strict=True):
            holder._training_state = state

    put([_fsdp_common.TrainingState.PRE_BACKWARD] * len(holders))
    return functools.partial(put, states)


def end_backward(root: FSDPModule) -> None:
    """Do what FSDP2 does at the end of a backward, after one that it has not noticed."""
    root._get_fsdp_state()._root_post_backward_final_callback()


def reduce_gradients(unit: FSDPModule) -> None:
    """Begin to reduce the whole gradients of a unit, outside of a pass of autograd; `end_backward` completes it."""
    for group in groups_of(unit):
        group.post_backward()


def keep_gradients(unit: FSDPModule) -> None:
    """Add whole gradients that were made outside of a pass of autograd to those that are kept, in the dtype of these."""
    for group in groups_of(unit):
        for fsdp_param in group.fsdp_params:
            if hasattr(fsdp_param, "_unsharded_param"):
                fsdp_param.accumulate_unsharded_grad_if_needed()
                fsdp_param.to_accumulated_grad_if_needed()


def whole_copies(unit: FSDPModule) -> Iterator[nn.Parameter]:
    """Yield the unit's whole parameters, in memory or freed; before it was gathered once there are none."""
    for _, copy in copies_by_shard(unit):
        yield copy


def copies_by_shard(unit: FSDPModule) -> Iterator[tuple[nn.Parameter, nn.Parameter]]:
    """Yield the unit's shards with their whole parameters, as `whole_copies` has them."""
    for group in groups_of(unit):
        for fsdp_param in group.fsdp_params:
            if hasattr(fsdp_param, "_unsharded_param"):
                yield fsdp_param.sharded_param, fsdp_param.unsharded_param


def groups_of(unit: FSDPModule) -> list[Any]:
    """Return what FSDP2 gathers and reduces together of a unit."""
    state = unit._get_fsdp_state()
    many = getattr(state, "_fsdp_param_groups", None)
    if many is not None:
        return cast("list[Any]", many)
    one = state._fsdp_param_group  # torch < 2.13 keeps a single group
    return [one] if one is not None else []


def reshard(unit: FSDPModule) -> None:
    """Free the unit's gathered parameters whatever state torch thinks the unit is in (its own `reshard` may decline)."""
    for group in groups_of(unit):
        group._to_sharded()
