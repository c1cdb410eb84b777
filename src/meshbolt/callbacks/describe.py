"""A run in a few words, for the first line and the last table of its log."""

from __future__ import annotations

import lightning.pytorch as pl

from meshbolt.config import Plan


def describe_strategy(trainer: pl.Trainer) -> str:
    """Return the name that people give to what the strategy does."""
    plan = getattr(trainer.strategy, "plan", None)
    if not isinstance(plan, Plan):
        return type(trainer.strategy).__name__
    copies = f", {plan.mesh.dp_replicate} copies" if plan.stage.shards and plan.mesh.dp_replicate > 1 else ""
    recompute = plan.settings.recompute.mode
    shared = f", layers shared by {plan.mesh.tp} ranks" if plan.mesh.tp > 1 else ""
    stages = f", {plan.settings.pipeline_parallel.stages} stages on {plan.mesh.pp} ranks" if plan.mesh.pp > 1 else ""
    return f"ZeRO-{plan.stage.stage}{copies}{shared}{stages}" + (
        f", recompute {recompute}" if recompute != "none" else ""
    )


def describe_ranks(trainer: pl.Trainer) -> str:
    """Return the number of ranks and what they run on."""
    nodes = f" on {trainer.num_nodes} nodes" if trainer.num_nodes > 1 else ""
    return f"{trainer.world_size} × {trainer.strategy.root_device.type}{nodes}"
