"""Gradients of a stage are reduced while the step's last microbatch runs backwards through it, not after it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from tests.ranks.trainer.test_pipeline_fit import Classifier, data

from meshbolt import MeshStrategy
from meshbolt.testing import run_ranks

Event = tuple[str, float, float]


def watched_step(overlaps: bool) -> list[Event]:
    """Return what a rank does in a step, in order: passes of stages and reductions of gradients, with start and end."""
    events: list[Event] = []
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("MESHBOLT_FAST_PATH", str(int(overlaps)))
        # torch 2.13 has another name for it.
        name = "reduce_scatter_single" if hasattr(dist, "reduce_scatter_single") else "reduce_scatter_tensor"
        plain = getattr(dist, name)

        def reduce_scatter(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            work = plain(*args, **kwargs)
            events.append(("reduction", start, time.perf_counter()))
            return work

        patched.setattr(dist, name, reduce_scatter)

        @contextlib.contextmanager
        def observe(kind: str, stage: int, number: int) -> Iterator[None]:
            start = time.perf_counter()
            yield
            events.append((f"{kind}{number}", start, time.perf_counter()))

        class Watch(pl.Callback):
            def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
                events.clear()
                trainer.strategy.pipeline.observe_passes(observe)

        trainer = pl.Trainer(
            strategy=MeshStrategy(pipeline_parallel=2, zero=1),
            accelerator="cpu",
            devices=4,
            max_steps=3,
            limit_val_batches=0,
            callbacks=[Watch()],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
        )
        torch.set_default_dtype(torch.float32)
        own = dist.get_rank() % 2
        trainer.fit(Classifier(), data(2, own), data(2, own))
    return events


@pytest.mark.filterwarnings("ignore:It is recommended to use:lightning.fabric.utilities.warnings.PossibleUserWarning")
def test_reductions_run_beside_the_last_backward_pass() -> None:
    for overlaps in (True, False):
        for events in run_ranks(watched_step, 4, overlaps, timeout=60):
            backwards = [event for event in events if event[0].startswith("B")]
            _, start, end = max(backwards, key=lambda event: event[1])
            reductions = [event for event in events if event[0] == "reduction"]
            inside = [event for event in reductions if start < event[1] < end]
            assert len(reductions) >= 3, "two layers and the root, or more"
            assert len(inside) == (len(reductions) if overlaps else 0)
