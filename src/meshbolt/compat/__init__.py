"""Every touch of what torch keeps private, in one place, so that a new version of torch is checked by reading one folder.

May import: `errors`. `tensors.py` has what belongs to no unit, `calls.py` the collectives that are started, `connections.py`
what lies between ranks, `exiting.py` what threads of torch still do at the end, `halves.py` how torch's pipelines halve a
backward pass, `hosted.py` shards in other memory, `memory.py` what FSDP2 and a GPU's allocator hold, `parts.py` where the parts
of a DTensor lie, `recorder.py` the last collectives, `units.py` what FSDP2 knows of a unit, `waits.py` where a rank waits for
others; everybody imports from here. The tests of this folder run on every supported version of torch.
"""

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed._composable.replicate_with_fsdp import replicate
from torch.distributed.fsdp._fully_shard._fsdp_api import AllGather, ReduceScatter
from torch.distributed.pipelining.schedules import PipelineScheduleSingle
from torch.distributed.pipelining.schedules import _PipelineSchedule as PipelineSchedule
from torch.distributed.pipelining.schedules import get_schedule_class as schedule_class
from torch.distributed.pipelining.stage import _PipelineStageBase as PipelineStageBase
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

from meshbolt.compat.calls import collectives_observed
from meshbolt.compat.connections import end_connections, is_broken_connection
from meshbolt.compat.exiting import settle_before_exit
from meshbolt.compat.hosted import move_shards, shards_on_host
from meshbolt.compat.memory import (
    AllocatorFigures,
    allocator_figures,
    cast_dtype,
    dump_allocator,
    gathered_tensors,
    peak_allocated,
    reset_peak,
    whole_gradients,
)
from meshbolt.compat.parts import divided_placement, own_pieces, sections_of, whole_of
from meshbolt.compat.recorder import Collective, meeting_store, recorded_collectives
from meshbolt.compat.stored import RUN_BYTES, Box, StoredTensor, box_span, box_view, boxes_of, copy_runs, cut_box
from meshbolt.compat.tensors import (
    NeedsValues,
    aliased_arguments,
    current_pass,
    device_of,
    distributed_part,
    distributed_tensor,
    flattened_group,
    flops_of,
    gather_into,
    handle_sharded,
    local_in_graph,
    local_tensor,
    mark_of,
    on_meta,
    outdate,
    part_of_file,
    plain_calls,
    queue_after_backward,
    same_bytes,
    set_group_timeout,
    storage_identity,
    storages_without_memory,
    sum_into,
    tensors_without_memory,
    will_accumulate,
    without_compiling,
    written_arguments,
)
from meshbolt.compat.units import (
    casts,
    copies_by_shard,
    drop_kept_gradients,
    drop_pending_gather,
    end_backward,
    enter_pass,
    gathered_bytes,
    given_other_data,
    gradients_land_in_place,
    has_pending_gather,
    is_gathered,
    keep_gradients,
    kept_gradients,
    lighten_hooks,
    make_hooks_skippable,
    managed_parameters,
    on_gradient,
    on_reduced_gradient,
    reduce_gradients,
    reset_after_error,
    reshard,
    set_async_gather,
    sharded_parameters_away,
    untouched_by_functions,
    was_gathered,
    watch_passes,
    whole_copies,
)
from meshbolt.compat.updates import (
    add_step_hook,
    fused_adagrad_,
    fused_adam_,
    fused_sgd_,
    pin_host_memory,
    step_hooks,
    unpin_host_memory,
)
from meshbolt.compat.waits import waits_observed, works_observed

__all__ = [
    "COMPILES_DIVIDED_LAYERS",
    "RUN_BYTES",
    "AllGather",
    "AllocatorFigures",
    "Box",
    "Collective",
    "FakeTensor",
    "FakeTensorMode",
    "NeedsValues",
    "PipelineSchedule",
    "PipelineScheduleSingle",
    "PipelineStageBase",
    "ReduceScatter",
    "StoredTensor",
    "TorchDispatchMode",
    "TorchFunctionMode",
    "add_step_hook",
    "aliased_arguments",
    "allocator_figures",
    "box_span",
    "box_view",
    "boxes_of",
    "cast_dtype",
    "casts",
    "collectives_observed",
    "copies_by_shard",
    "copy_runs",
    "current_pass",
    "cut_box",
    "device_of",
    "distributed_part",
    "distributed_tensor",
    "divided_placement",
    "drop_kept_gradients",
    "drop_pending_gather",
    "dump_allocator",
    "end_backward",
    "end_connections",
    "enter_pass",
    "flattened_group",
    "flops_of",
    "fused_adagrad_",
    "fused_adam_",
    "fused_sgd_",
    "gather_into",
    "gathered_bytes",
    "gathered_tensors",
    "given_other_data",
    "gradients_land_in_place",
    "handle_sharded",
    "has_pending_gather",
    "is_broken_connection",
    "is_gathered",
    "keep_gradients",
    "kept_gradients",
    "lighten_hooks",
    "local_in_graph",
    "local_tensor",
    "make_hooks_skippable",
    "managed_parameters",
    "mark_of",
    "meeting_store",
    "move_shards",
    "on_gradient",
    "on_meta",
    "on_reduced_gradient",
    "outdate",
    "own_pieces",
    "part_of_file",
    "peak_allocated",
    "pin_host_memory",
    "plain_calls",
    "queue_after_backward",
    "recorded_collectives",
    "reduce_gradients",
    "replicate",
    "reset_after_error",
    "reset_peak",
    "reshard",
    "same_bytes",
    "schedule_class",
    "sections_of",
    "set_async_gather",
    "set_group_timeout",
    "settle_before_exit",
    "sharded_parameters_away",
    "shards_on_host",
    "step_hooks",
    "storage_identity",
    "storages_without_memory",
    "sum_into",
    "tensors_without_memory",
    "tree_leaves",
    "tree_map",
    "tree_map_only",
    "unpin_host_memory",
    "untouched_by_functions",
    "waits_observed",
    "was_gathered",
    "watch_passes",
    "whole_copies",
    "whole_gradients",
    "whole_of",
    "will_accumulate",
    "without_compiling",
    "works_observed",
    "written_arguments",
]

COMPILES_DIVIDED_LAYERS = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 13)
"""Whether torch's compiler computes with divided weights what eager mode does; tests/ranks/test_tensor_compile.py tells."""
