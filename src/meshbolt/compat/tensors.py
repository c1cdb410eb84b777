"""What torch keeps private of tensors, autograd, process groups and files."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from datetime import timedelta
from typing import IO, Any, cast

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    in_kernel_invocation_manager,
)
from torch.autograd import Variable
from torch.distributed.checkpoint.utils import _create_file_view
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry


def local_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """Return this rank's part of a tensor: a DTensor's shard (sharing its storage, outside autograd), else the tensor."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def local_in_graph(tensor: DTensor) -> torch.Tensor:
    """Return this rank's part of a DTensor to compute with: its gradient is one of the DTensor, of the same placements.

    A third of the time of `DTensor.to_local`, which works out again what the placements already say.
    """
    if torch.compiler.is_compiling():
        return tensor.to_local()
    local: torch.Tensor = _Local.apply(tensor)  # type: ignore[no-untyped-call]
    return local


class _Local(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: DTensor) -> torch.Tensor:
        """Return the part, as another tensor of the same memory."""
        ctx.spec = tensor._spec
        return tensor._local_tensor.view_as(tensor._local_tensor)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> DTensor:
        """Return the gradient of the part as one of the whole."""
        return DTensor(gradient, ctx.spec, requires_grad=gradient.requires_grad)


def distributed_tensor(local: torch.Tensor, *, like: DTensor, placements: Sequence[Placement]) -> DTensor:
    """Return this rank's part as a DTensor, outside autograd and unchecked: what `DTensor.from_local` takes a while for.

    Args:
        local: this rank's part, of the same storage as the result.
        like: a DTensor of the result's global shape, strides and mesh.
        placements: of the result, one per axis of the mesh.
    """
    meta = TensorMeta(like.shape, like.stride(), local.dtype)
    return DTensor(local, DTensorSpec(like.device_mesh, tuple(placements), tensor_meta=meta), requires_grad=False)


def distributed_part(
    part: torch.Tensor, *, mesh: DeviceMesh, placements: Sequence[Placement], shape: Sequence[int]
) -> DTensor:
    """Return this rank's part as a DTensor of a whole that has no DTensor yet, outside autograd and unchecked.

    Args:
        part: this rank's.
        mesh: over which the whole is divided.
        placements: one per axis of the mesh.
        shape: of the whole, which is contiguous.
    """
    stride = torch._prims_common.make_contiguous_strides_for(tuple(shape))
    meta = TensorMeta(torch.Size(shape), stride, part.dtype)
    return DTensor(part, DTensorSpec(mesh, tuple(placements), tensor_meta=meta), requires_grad=False)


def handle_sharded(operation: Any, handler: Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]) -> None:
    """Let a function do what an operation is to do on DTensors, in this process from now on.

    Args:
        operation: an overload of one of torch's operations.
        handler: takes the operation, its positional arguments, the first one a DTensor, and its other arguments.
    """
    dispatcher: Any = DTensor._op_dispatcher
    dispatcher._custom_op_handlers[operation] = handler


def storage_identity(tensor: torch.Tensor) -> int:
    """Return what changes when a tensor is given other data by assignment (`tensor.data = ...`), sharded or not."""
    return int(tensor.untyped_storage()._cdata)


_compare_memory = ctypes.CDLL("msvcrt" if os.name == "nt" else None).memcmp
_compare_memory.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)


def same_bytes(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Return whether two tensors hold the same bytes, four times as fast as `torch.equal` compares floats.

    Args:
        first: contiguous, on the CPU.
        second: likewise, and of as many bytes.
    """
    return not _compare_memory(first.data_ptr(), second.data_ptr(), first.nbytes)


def mark_of(tensor: torch.Tensor) -> tuple[int, int]:
    """Return what changes when a tensor is written to, or another takes its place while it lives."""
    return tensor.data_ptr(), tensor._version


def current_pass() -> int:
    """Return a number of the pass of autograd that is running, -1 where none is."""
    return torch._C._current_graph_task_id()


def will_accumulate(node: Any) -> bool:
    """Return whether the pass that is running adds to the gradient of the node's parameter.

    Args:
        node: adds to the gradient of a leaf.
    """
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:
        return False  # torch.autograd.grad was asked for this gradient, and returns it


def outdate(tensors: Sequence[torch.Tensor]) -> None:
    """Let autograd refuse graphs that were made before now and need the tensors' values, as after a change in place."""
    torch._C._autograd._unsafe_set_version_counter(tuple(tensors), tuple(each._version + 1 for each in tensors))


def queue_after_backward(callback: Any) -> None:
    """Run a callback at the end of the backward that is running now, after torch's own callbacks queued before it."""
    Variable._execution_engine.queue_callback(callback)


def flattened_group(mesh: DeviceMesh, axes: Sequence[str]) -> dist.ProcessGroup:
    """Return the group of all ranks along several axes of a mesh, made at the first call.

    Args:
        mesh: with named axes.
        axes: neighbours, in the order of the mesh.
    """
    return mesh[tuple(axes)]._flatten().get_group()


def device_of(group: dist.ProcessGroup) -> torch.device:
    """Return a device from which this rank can communicate in a group."""
    return (
        torch.device("cuda", torch.cuda.current_device()) if "nccl" in dist.get_backend(group) else torch.device("cpu")
    )


def set_group_timeout(group: dist.ProcessGroup, timeout: timedelta) -> None:
    """Set how long a collective of a group waits for its peers.

    Args:
        group: one that this rank belongs to.
        timeout: from the next collective on.
    """
    dist.distributed_c10d._set_pg_timeout(timeout, group)


def gather_into(whole: torch.Tensor, part: torch.Tensor, group: dist.ProcessGroup) -> None:
    """Fill a tensor with the parts of all ranks, one after the other; torch >= 2.13 has another name for it.

    Args:
        whole: (ranks * elements,).
        part: (elements,), this rank's.
        group: the ranks.
    """
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gather(whole, part, group=group)


def sum_into(part: torch.Tensor, whole: torch.Tensor, group: dist.ProcessGroup) -> None:
    """Fill a tensor with this rank's part of the sum over the ranks; torch >= 2.13 has another name for it.

    Args:
        part: (elements,).
        whole: (ranks * elements,), this rank's addend.
        group: the ranks.
    """
    reduce = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    reduce(part, whole, group=group)


def without_compiling(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that runs as it is where the code that calls it is compiled."""
    return cast("Callable[..., Any]", torch._dynamo.disable(function))


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


def tensors_without_memory(*, beside_others: bool = False) -> AbstractContextManager[Any]:
    """Make tensors inside that have shape, dtype and a storage of their own, but no memory.

    Args:
        beside_others: they may meet tensors with memory, whose values are not used then.
    """
    return FakeTensorMode(allow_non_fake_inputs=beside_others)


def on_meta(mode: FakeTensorMode, operation: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Return what an operation makes of the meta tensors behind tensors without memory, as a meta tensor.

    Args:
        mode: of the tensors.
        operation: has an implementation for the meta device.
        args: its positional arguments.
        kwargs: its other arguments.
    """
    with in_kernel_invocation_manager(mode):
        return operation(*args, **kwargs)


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


NeedsValues = (DataDependentOutputException, DynamicOutputShapeException)
"""What is raised where an operation needs values of a tensor that has none."""


def flops_of(operation: Any, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> int:
    """Return how many floating-point operations an operation takes, by torch's own table; 0 for those that are not in it.

    Args:
        operation: as a dispatch mode gets it.
        args: its positional arguments.
        kwargs: its other arguments.
        result: what it has returned.
    """
    count = flop_registry.get(operation._overloadpacket)
    return 0 if count is None else int(count(*args, **kwargs, out_val=result))


def _aliases(operation: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[tuple[Any, torch.Tensor]]:
    declared = operation._schema.arguments
    given = [
        *zip(declared, args, strict=False),
        *((each, kwargs[each.name]) for each in declared if each.name in kwargs),
    ]
    for argument, value in given:
        if argument.alias_info is not None:
            yield from ((argument.alias_info, leaf) for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor))
