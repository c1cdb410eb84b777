"""The progress of a run on ranks: rank 0 alone speaks, and in meshbolt's way, without being asked."""

from __future__ import annotations

import contextlib
import io
from typing import Any

import lightning.pytorch as pl
import pytest
from lightning.pytorch.callbacks import TQDMProgressBar
from tests.rows import full

from meshbolt import MeshStrategy
from meshbolt.demos import ByteGPT, PydocText
from meshbolt.testing import run_ranks

PLANS = [{"zero": 2}, full({"zero": 0, "tensor_parallel": 2}), full({"zero": 1, "pipeline_parallel": 2})]


def fit(plan: dict[str, Any], bar: type[pl.Callback] | None = None, **options: Any) -> tuple[str, str]:
    """Return the class of the bar, and what was written."""
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=MeshStrategy(**plan),
        max_steps=2,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        callbacks=[bar()] if bar is not None else None,
        **options,
    )
    with contextlib.redirect_stdout(io.StringIO()) as written:
        trainer.fit(
            ByteGPT(dim=16, num_layers=2, num_heads=2, max_length=16),
            PydocText(length=16, batch_size=4, num_workers=0),
        )
    return type(trainer.progress_bar_callback).__name__, written.getvalue()


@pytest.mark.parametrize("plan", PLANS)
def test_rank_0_writes_lines_and_the_others_nothing(plan: dict[str, Any]) -> None:
    (kind, written), (_, other) = run_ranks(fit, 2, plan)
    lines = [line for line in written.splitlines() if line.startswith(("train",))]

    assert kind == "LogProgress"
    assert "training |" not in other
    assert "trained to" not in other
    assert [line.split(" | ")[1] for line in lines[1:-1]] == ["step 1 of 2", "step 2 of 2"]
    assert " train_loss " in lines[1]
    assert "tokens/s" in lines[2]
    assert lines[-1].startswith("trained to step 2 in ")


def test_a_bar_of_the_users_stays() -> None:
    assert {kind for kind, _ in run_ranks(fit, 2, {"zero": 1}, TQDMProgressBar)} == {"TQDMProgressBar"}
