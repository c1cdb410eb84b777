"""Gradients are reduced beside passes backwards, those of stages that follow each other at the same time."""

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

from meshbolt import MeshStrategy, PipelineParallel
from meshbolt.testing import run_ranks

Event = tuple[str, float, float]
WARNING = "ignore:It is recommended to use:lightning.fabric.utilities.warnings.PossibleUserWarning"


def watched_step(overlaps: bool, setting: PipelineParallel) -> list[Event]:
    """Return what a rank does in a step, in order: passes of stages and reductions of gradients, with start and end.

    A pass is named by its work, stage and microbatch: B1.3.
    """
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
            events.append((f"{kind}{stage}.{number}", start, time.perf_counter()))

        class Watch(pl.Callback):
            def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
                events.clear()
                trainer.strategy.pipeline.observe_passes(observe)

        trainer = pl.Trainer(
            strategy=MeshStrategy(pipeline_parallel=setting, zero=1),
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


def passes_of_reductions(events: list[Event]) -> list[str]:
    """Return the pass backwards in which each reduction began, or "after" for those behind all of them."""
    passes = [event for event in events if event[0][0] == "B"]
    starts = [start for name, start, _ in events if name == "reduction"]
    return [next((name for name, begun, end in passes if begun < start < end), "after") for start in starts]


@pytest.mark.filterwarnings(WARNING)
def test_reductions_run_beside_the_last_backward_pass() -> None:
    setting = PipelineParallel(size=2, microbatches=4, align_reductions=False)
    found = [passes_of_reductions(events) for events in run_ranks(watched_step, 4, True, setting, timeout=60)]
    assert [set(each) for each in found] == [{"B0.3"}, {"B0.3"}, {"B1.3"}, {"B1.3"}]
    assert min(map(len, found)) >= 3, "two layers and the root, or more"


@pytest.mark.filterwarnings(WARNING)
def test_without_the_fast_path_they_follow_all_passes() -> None:
    setting = PipelineParallel(size=2, microbatches=4)
    found = [passes_of_reductions(events) for events in run_ranks(watched_step, 4, False, setting, timeout=60)]
    assert [set(each) for each in found] == [{"after"}] * 4


@pytest.mark.filterwarnings(WARNING)
def test_the_last_stage_waits_for_the_first_ones_last_pass() -> None:
    setting = PipelineParallel(size=2, microbatches=4)
    found = [passes_of_reductions(events) for events in run_ranks(watched_step, 4, True, setting, timeout=60)]
    # The second stage is through before the first one begins its last pass.
    assert [set(each) for each in found] == [{"B0.3"}, {"B0.3"}, {"after"}, {"after"}]


@pytest.mark.filterwarnings(WARNING)
def test_stages_in_turns_wait_for_each_other() -> None:
    cuts = ("layers.1", "layers.2", "layers.3")
    setting = PipelineParallel(size=2, microbatches=4, schedule="interleaved_1f1b", cuts=cuts)
    by_rank = run_ranks(watched_step, 4, True, setting, timeout=60)
    for events, own in zip(by_rank, (0, 0, 1, 1), strict=True):
        order = [name for name, *_ in events if name[0] == "B"]
        after_upper = order.index(f"B{own + 2}.3") + own  # the second rank waits for one pass
        found = set(passes_of_reductions(events))
        assert found == {order[after_upper], "B0.3" if own == 0 else "after"}
