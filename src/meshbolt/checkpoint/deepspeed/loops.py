"""How far a run of DeepSpeed's own engine was, as Lightning's loops write it: so many optimizer steps, before any epoch."""

from __future__ import annotations

from typing import Any


def loops_of(global_steps: int) -> dict[str, Any]:
    """Return the entry "loops" of a Trainer's checkpoint for a run without a Trainer, which counts steps and no epochs.

    Args:
        global_steps: optimizer steps done.
    """
    steps = {"total": _done(global_steps), "current": _done(0)}
    epoch = "epoch_loop."
    fit = {
        "state_dict": {},
        "epoch_progress": {
            part: _done(0, "ready", "started", "processed", "completed") for part in ("total", "current")
        },
        f"{epoch}state_dict": {"_batches_that_stepped": global_steps},
        f"{epoch}automatic_optimization.optim_progress": {
            "optimizer": {
                "step": steps,
                "zero_grad": {part: _done(0, "ready", "started", "completed") for part in ("total", "current")},
            }
        },
        f"{epoch}manual_optimization.optim_step_progress": steps,
    }
    return {"fit_loop": fit, "validate_loop": {}, "test_loop": {}, "predict_loop": {}}


def _done(count: int, *stages: str) -> dict[str, int]:
    return dict.fromkeys(stages or ("ready", "completed"), count)
