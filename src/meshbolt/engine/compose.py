"""Turn a user's module into what the engine runs; the order of the steps, and why it is this one.

1. check: every rank has the same module, and it can be sharded; nothing has been changed yet when an error is raised.
2. tensor parallelism: a plan says which layers are divided, and their forwards are made to see it.
3. recompute, then compile: both replace a block's forward, and compile is to see the recomputation.
4. fill, divide and shard: units are divided and sharded as soon as they are full, innermost first, so that no rank holds the
   whole model.
5. root: it owns what is left, and must be sharded last.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parameter import is_lazy

from meshbolt.blocks import compile_blocks, recompute_blocks
from meshbolt.collectives import agree_on_error, same_on_all_ranks
from meshbolt.compat import COMPILES_DIVIDED_LAYERS
from meshbolt.config import Plan
from meshbolt.engine.hosted import HostedParameters
from meshbolt.engine.materialize import fill_and_shard
from meshbolt.engine.stages import Stages
from meshbolt.errors import ConfigError, TopologyError, UnsupportedError
from meshbolt.mesh import MeshAxis
from meshbolt.offload.setting import Offload
from meshbolt.pipeline import Gathered
from meshbolt.tensor import (
    Axis,
    Division,
    TensorPlan,
    choose_plan,
    for_compiled,
    let_splits_through,
    plain_leaves,
    shard_dim,
    trace_styles,
)
from meshbolt.zero import KeepNorms, Root, UnitPlan, plan_units, shard_unit

Hook = Callable[[torch.Tensor], None]
ROOT = "the root"
"""How the outermost unit is called where the others have their names in the user's module."""


@dataclass(frozen=True, kw_only=True)
class Composition:
    """A module, sharded.

    Attributes:
        root: the outermost unit; a module around the user's.
        units: the inner units by their name in the user's module.
        whole: parameters that stay whole on every data-parallel rank.
        tensor: which layers are divided; None where none is.
        tensor_axis: over which ranks.
        hooks: what is to be called with each of those when its gradient has been averaged.
    """

    root: FSDPModule
    units: Mapping[str, FSDPModule]
    whole: frozenset[nn.Parameter]
    tensor: TensorPlan | None
    tensor_axis: Axis | None
    hooks: Mapping[nn.Parameter, Sequence[Hook]]


def compose(
    module: nn.Module,
    *,
    plan: Plan,
    mesh: DeviceMesh,
    device: torch.device,
    example: Callable[[nn.Module], Any] | None = None,
    stages: Stages | None = None,
    hosted: HostedParameters | None = None,
) -> Composition:
    """Apply a plan to a module, in place.

    Args:
        module: the user's whole module, on any device or on meta, equal in structure on every rank.
        plan: what to do.
        mesh: the mesh of the plan's shape.
        device: this rank's device.
        example: calls a module as the run will, for plans that are found by that.
        stages: what of it this rank holds; None: all.
        hosted: where shards lie; None: on the device.

    Raises:
        ConfigError: the module does not fit the plan, or cannot be filled.
        StorageError: shards do not fit where they are to lie.
        TopologyError: the ranks have different modules.
        UnsupportedError: the module has what cannot be sharded.
    """
    agree_on_error(lambda: _check_module(module))
    _check_same_on_all_ranks(module)
    keep_norms = _norms_to_keep(plan)
    tensor = _choose_tensor_plan(module, plan, example)
    stages = stages or Stages()
    if tensor is not None:
        tensor = _held_here(tensor, module, stages)
    whole = frozenset(module.parameters()) if _is_alone(plan) else stages.parameters_elsewhere(module)
    if tensor is not None and plan.stage.shards:
        whole |= _sections_in_one_dim(module, tensor)
        _check_sections(module, tensor, shards=plan.mesh.dp_shard)
    planned: list[UnitPlan] = []
    agree_on_error(
        lambda: planned.append(plan_units(module, plan.settings.zero, keep_norms=keep_norms, also_whole=whole))
    )
    units = stages.without_cuts(planned[0], module)
    _check_same_units(units, stages.group)
    division = None
    if tensor is not None:
        agree_on_error(lambda: _check_compiler(plan))
        division = Division(tensor, mesh=mesh[MeshAxis.TP.value])
        division.watch(module, compiled=units.blocks.values() if plan.settings.compile else ())
    blocks = list(units.blocks.values())
    if blocks or not planned[0].blocks:  # of the model's blocks, a stage may have none
        recompute_blocks(blocks, plan.settings.recompute, pack=plain_leaves if division else None)
        compile_blocks(blocks, enabled=plan.settings.compile, around=for_compiled if division else None)
    hosted = hosted or HostedParameters(Offload(), device=device)
    hosted.check_room(
        [*units.units.values(), module],
        ranks=plan.mesh.dp_shard * plan.mesh.tp,
        left_out=units.whole | stages.parameters_elsewhere(module),
    )
    composition = _shard(module, units, division, plan=plan, mesh=mesh, device=device, stages=stages, hosted=hosted)
    hosted.check()
    return dataclasses.replace(composition, tensor=tensor, tensor_axis=division.axis if division else None)


def _is_alone(plan: Plan) -> bool:
    """Return whether no other rank of a pipeline has parts of this one's parameters, and nothing casts them.

    They are plain ones then: to shard them over one rank would cost a copy of each in every step.
    """
    policy = plan.precision.unit_policy(stored=plan.precision.storage_dtype or torch.float32)
    is_cast = any(dtype is not None for dtype in (policy.param_dtype, policy.reduce_dtype))
    is_moved = plan.settings.offload.parameters is not None
    return plan.mesh.pp > 1 and plan.mesh.data_parallel_size * plan.mesh.tp == 1 and not (is_cast or is_moved)


def _check_compiler(plan: Plan) -> None:
    """Refuse to compile divided layers with a version of torch whose compiler computes something else.

    Raises:
        UnsupportedError: it is such a version.
    """
    if plan.settings.compile and not COMPILES_DIVIDED_LAYERS:
        raise UnsupportedError(
            f"compile=True with tensor_parallel={plan.mesh.tp} needs torch 2.13: the compiler of torch {torch.__version__} "
            "computes other values from divided weights. Update torch, or leave compile out."
        )


def _held_here(tensor: TensorPlan, module: nn.Module, stages: Stages) -> TensorPlan:
    """Return a plan without the layers of which other stages hold all parameters."""
    others = stages.parameters_elsewhere(module)
    kept = {
        name: entry
        for name, entry in tensor.modules.items()
        if not others or any(p not in others for p in module.get_submodule(name).parameters())
    }
    return dataclasses.replace(tensor, modules=kept)


def _choose_tensor_plan(module: nn.Module, plan: Plan, example: Callable[[nn.Module], Any] | None) -> TensorPlan | None:
    setting, ranks = plan.settings.tensor_parallel, plan.mesh.tp
    if ranks == 1:
        return None

    def trace() -> tuple[dict[str, str], dict[str, str]]:
        if example is None:
            raise ConfigError(
                "plan='auto' finds no registered plan for this module. Give TensorParallel(plan={pattern: style})."
            )
        return trace_styles(module, example, ranks=ranks, loss_parallel=setting.loss_parallel)

    chosen: list[TensorPlan] = []
    agree_on_error(lambda: chosen.append(choose_plan(module, setting, ranks=ranks, trace=trace)))
    # What a rank has looked at may depend on its data; the first one's plan counts.
    equal, plans = same_on_all_ranks(chosen[0])
    return chosen[0] if equal else cast("TensorPlan", plans[0])


def _sections_in_one_dim(module: nn.Module, tensor: TensorPlan) -> frozenset[nn.Parameter]:
    """Return the parameters whose only dim is divided in sections: a rank's part is not one run, which could be sharded."""
    return frozenset(
        parameter
        for name, entry in tensor.modules.items()
        for key, layout in entry.layouts.items()
        if layout.sections > 1 and (parameter := module.get_submodule(name).get_parameter(key)).dim() == 1
    )


def _check_sections(module: nn.Module, tensor: TensorPlan, *, shards: int) -> None:
    """Refuse weights of several sections that cannot be sharded along their other dim.

    Raises:
        ConfigError: there is one; on every rank.
    """
    for name, entry in tensor.modules.items():
        for key, layout in entry.layouts.items():
            shape = module.get_submodule(name).get_parameter(key).shape
            if layout.sections > 1 and len(shape) > 1 and shape[1 - layout.dim] % shards:
                raise ConfigError(
                    f"{name}.{key} of {tuple(shape)} holds {layout.sections} projections that are divided one by one, so it is "
                    f"sharded along its dim {1 - layout.dim}, which {shards} ranks do not divide. Use a number of data-parallel "
                    f"ranks that divides {shape[1 - layout.dim]}, zero=0, or a plan that leaves the layer whole ('replicate')."
                )


def _shard(
    module: nn.Module,
    units: UnitPlan,
    division: Division | None,
    *,
    plan: Plan,
    mesh: DeviceMesh,
    device: torch.device,
    stages: Stages,
    hosted: HostedParameters,
) -> Composition:
    names = {unit: name for name, unit in units.units.items()}
    all_names = {child: name for name, child in module.named_modules()}
    sharded: dict[str, FSDPModule] = {}
    hooks = {name: _take_accumulate_hooks(p) for name, p in module.named_parameters()}
    whole_names = {name for name, p in module.named_parameters() if p in units.whole}

    def whole_now() -> frozenset[nn.Parameter]:
        # Filling a module that was on the meta device makes new parameters; names outlive them.
        return frozenset(p for name, p in module.named_parameters() if name in whole_names)

    def divide(unit: nn.Module) -> None:
        if division is not None:
            division.divide(module, {all_names[child]: child for child in unit.modules()})

    apply = functools.partial(
        shard_unit, mesh=mesh, stage=plan.stage, shard_dim=shard_dim if division else None, offload=hosted.policy
    )

    def shard(unit: nn.Module, may_free: Callable[[nn.Parameter], bool]) -> None:
        divide(unit)
        policy = plan.precision.unit_policy(stored=_stored_dtype(unit, whole_now()))
        sharded[names[unit]] = apply(unit, precision=policy, whole=whole_now(), may_free=may_free)
        hosted.take(names[unit], sharded[names[unit]])
        if division is not None:
            let_splits_through(unit)

    fill_and_shard(module, units.units, shard, device=device, stages=stages)
    divide(module)
    if division is not None:
        division.forget()
    policy = plan.precision.root_policy(stored=_stored_dtype(module, whole_now()))
    root = apply(Root(module), precision=policy, whole=whole_now(), is_root=True)
    hosted.take(ROOT, root)
    whole = whole_now() - stages.parameters_elsewhere(module)
    for name, parameter in module.named_parameters():
        for hook in hooks[name] if parameter not in whole else ():
            parameter.register_post_accumulate_grad_hook(hook)
    of_whole = {p: hooks[name] for name, p in module.named_parameters() if p in whole}
    in_order = {name: sharded[name] for name, _ in module.named_modules() if name in sharded}
    return Composition(root=root, units=in_order, whole=whole, tensor=None, tensor_axis=None, hooks=of_whole)


def gathered_in(module: nn.Module, plan: Plan) -> Gathered:
    """Return in which dtypes a module will compute once a plan is applied to it.

    Args:
        module: the user's whole module.
        plan: of the run.
    """
    policy = plan.precision.unit_policy()
    dtype = policy.param_dtype
    if dtype is None:
        return Gathered()
    units = plan_units(module, plan.settings.zero, keep_norms=_norms_to_keep(plan))
    named = module.named_parameters(remove_duplicate=False)
    return Gathered(
        parameters={name: dtype for name, parameter in named if parameter not in units.whole},
        inputs=dict.fromkeys(units.units, dtype) if policy.cast_forward_inputs else {},
    )


def _norms_to_keep(plan: Plan) -> KeepNorms:
    if plan.precision.param_dtype is None:
        return KeepNorms.NONE
    return KeepNorms.RUNNING_STATISTICS if plan.precision.autocast_dtype is None else KeepNorms.ALL


def _stored_dtype(unit: nn.Module, whole: frozenset[nn.Parameter]) -> torch.dtype:
    return next((p.dtype for p in unit.parameters() if p not in whole), torch.float32)


def _take_accumulate_hooks(parameter: nn.Parameter) -> list[Hook]:
    """Return a parameter's hooks on its gradient, and leave it without: a whole one's own gradient is not reduced yet."""
    registered: dict[int, Hook] = getattr(parameter, "_post_accumulate_grad_hooks", None) or {}
    hooks = list(registered.values())
    registered.clear()
    return hooks


def _check_module(module: nn.Module) -> None:
    parameters = dict(module.named_parameters())
    kind = type(module).__name__
    if not parameters:
        raise ConfigError(
            f"{kind} has no parameters, so there is nothing to shard or train. Create its layers in __init__ or "
            "configure_model."
        )
    lazy = next((name for name, t in [*parameters.items(), *module.named_buffers()] if is_lazy(t)), None)
    if lazy is not None:
        raise UnsupportedError(
            f"{lazy!r} of {kind} is not initialised: a lazy layer learns its sizes from its first batch, and a tensor without "
            "a size cannot be sharded. Give the layer its sizes, such as nn.Linear(in, out), or run one batch through the "
            "module in __init__."
        )
    sparse = next((name for name, layer in module.named_modules() if _has_sparse_gradients(layer)), None)
    if sparse is not None:
        raise UnsupportedError(
            f"The embedding {sparse!r} of {kind} has sparse=True, and sparse gradients cannot be summed into shards. Set "
            "sparse=False: the gradients are the same, as dense tensors."
        )
    sharded = next((name for name, p in parameters.items() if isinstance(p, DTensor)), None)
    if sharded is not None:
        raise ConfigError(
            f"Parameter {sharded!r} of {kind} is a DTensor already. Hand over the plain module, without parallelize_module or "
            "fully_shard in configure_model: meshbolt shards it itself, and divides the layers that you name, tensor_parallel="
            'TensorParallel(2, plan={"layers.*.up": "colwise", "layers.*.down": "rowwise"}). And one module cannot be given to '
            "two Trainers; build a new one."
        )
    hooked = next((name for name, p in parameters.items() if p._backward_hooks), None)
    if hooked is not None:
        raise UnsupportedError(
            f"Parameter {hooked!r} of {kind} has a hook from register_hook(), which would never run on a sharded parameter. "
            "Use register_post_accumulate_grad_hook(), which sees the reduced gradient, or on_before_optimizer_step."
        )


def _has_sparse_gradients(layer: nn.Module) -> bool:
    return isinstance(layer, (nn.Embedding, nn.EmbeddingBag)) and layer.sparse


def _check_same_on_all_ranks(module: nn.Module) -> None:
    described = [f"{n} {tuple(p.shape)} {p.dtype} grad={p.requires_grad}" for n, p in module.named_parameters()]
    equal, _ = same_on_all_ranks(hashlib.sha256("\n".join(described).encode()).hexdigest())
    if equal:
        return
    _, lists = same_on_all_ranks(described)
    rank = next(rank for rank, other in enumerate(lists) if other != lists[0])
    longest = max(len(lists[0]), len(lists[rank]))
    first, other = ([*lines, *["(none)"] * (longest - len(lines))] for lines in (lists[0], lists[rank]))
    at = next(index for index in range(longest) if first[index] != other[index])
    raise TopologyError(
        f"Ranks have different modules: parameter {at} is {first[at]!r} on rank 0 and {other[at]!r} on rank {rank}. "
        "Build the same module on every rank; do not let its structure depend on the rank or on unseeded randomness."
    )


def _check_same_units(units: UnitPlan, group: dist.ProcessGroup | None) -> None:
    equal, lists = same_on_all_ranks(list(units.units), group=group)
    if equal:
        return
    rank = next(rank for rank, other in enumerate(lists) if other != lists[0])
    raise TopologyError(
        f"Ranks gather different units: {lists[0]} on rank 0 and {lists[rank]} on rank {rank}. Their parameters are alike, but "
        "the classes of the modules are not. Build the same module on every rank, or name the units with "
        "zero=Zero(unit=[...])."
    )
