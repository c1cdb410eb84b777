"""What a user should read once when a run begins."""

from __future__ import annotations

from lightning.pytorch.utilities import rank_zero_info

from meshbolt.engine import Engine


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
