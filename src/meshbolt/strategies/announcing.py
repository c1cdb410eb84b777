"""What a user should read once when a run begins."""

from __future__ import annotations

from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from meshbolt.engine import Engine, Stages
from meshbolt.strategies.pipelined import StagedModule
from meshbolt.units import format_bytes

_WORTH_A_WORD = 0.05  # of what a rank keeps


def say_what_is_divided(engine: Engine) -> None:
    """Print on rank 0 which layers are divided among ranks and which are left whole, and why; nothing where none is.

    Args:
        engine: with the module sharded.
    """
    plan = engine.tensor_plan
    if plan is None:
        return
    sequence = ", activations between them by the sequence, where its length divides" if plan.sequence else ""
    head = f"{type(engine.module).__name__} shares these layers among {engine.plan.mesh.tp} ranks (plan: {plan.name}){sequence}:"
    rank_zero_info("\n  ".join([f"tensor parallel: {head}", *plan.lines()]))


def say_where_it_is_cut(module: nn.Module, staged: StagedModule) -> None:
    """Print on rank 0 which stage begins where and is on which rank, and what passes between them.

    Args:
        module: the user's.
        staged: its stages.
    """
    plan, lines = staged.plan, []
    parameters = dict(module.named_parameters())
    for stage, rank in enumerate(staged.ranks_of_stages):
        begins = "the step" if stage == 0 else str(plan.cuts[stage - 1])
        size = sum(p.numel() * p.element_size() for name, p in parameters.items() if stage in plan.stages_of[name])
        sent = plan.sent(stage)
        sends = f", sends {format_bytes(sum(each.num_bytes for each in sent))} for each microbatch" if sent else ""
        lines.append(f"stage {stage} on pipeline rank {rank}: from {begins}, {format_bytes(size)} of parameters{sends}")
    head = f"{type(module).__name__} in {plan.stages} stages ({staged.schedule}, {staged.microbatches} microbatches of a batch):"
    rank_zero_info("\n  ".join([f"pipeline: {head}", *lines]))


def say_what_is_let_go(module: nn.Module, stages: Stages) -> None:
    """Print on rank 0 that a module was built with the values of other ranks' stages too; nothing where it was not.

    Args:
        module: before its parameters are given their values.
        stages: what of it this rank holds.
    """
    parameters = dict(module.named_parameters())
    kept = sum(p.nbytes for name, p in parameters.items() if name not in stages.elsewhere)
    others = sum(p.nbytes for name, p in parameters.items() if name in stages.elsewhere and not p.is_meta)
    if others > _WORTH_A_WORD * kept:
        rank_zero_info(
            f"pipeline: {type(module).__name__} was built with all its values in __init__, on every rank. This one keeps "
            f"{format_bytes(kept)} of its parameters, and lets go of {format_bytes(others)} now. Build it in configure_model "
            "(for Fabric under fabric.init_module(), in DeepSpeed's loop under deepspeed.zero.Init()), or train it by "
            "`meshbolt fit --meta true`, and no rank ever holds more than its stages."
        )


def say_what_is_offloaded(engine: Engine) -> None:
    """Print on rank 0 what lies outside of the devices, and how much it takes there; nothing where nothing does.

    Args:
        engine: that has its optimizers.
    """
    setting = engine.plan.settings.offload
    if not setting.is_used:
        return
    for what, needs in zip(("the state of optimizers takes", "parameters take"), engine.offloaded_needs(), strict=True):
        places = {
            f"in a file under {setting.path}": needs.file_bytes,
            "in host memory": needs.host_bytes,
            "on the device": needs.device_bytes,
        }
        taken = ", ".join(f"{format_bytes(size)} {place}" for place, size in places.items() if size)
        if taken:
            rank_zero_info(f"offload: {what} {taken}, on each rank like this one")
    engine.tell_returns(lambda text: rank_zero_info(f"offload: {text}"))
