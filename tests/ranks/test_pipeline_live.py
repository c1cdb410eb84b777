"""If these fail, a rank holds activations of more microbatches at a time than its schedule promises."""

from __future__ import annotations

import weakref
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from tests.ranks.trainer.loops_support import trainer
from tests.rows import full
from torch import Tensor, nn
from torch.utils.data import DataLoader

import meshbolt
from meshbolt.pipeline import Pipeline, is_foreign, plan_timeline, split_batch
from meshbolt.testing import run_ranks

STAGES_PER_RANK = {"gpipe": 1, "1f1b": 1, "interleaved_1f1b": 2, "looped_bfs": 2, "zbv": 2}


class Token:
    """Lives as long as the graph of a microbatch."""


class Held(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, watched: Watched) -> Tensor:
        ctx.token = Token()
        watched.note(ctx.token)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class Watched(nn.Module):
    """A stage that counts its live graphs and those of the stages beside it on the rank."""

    def __init__(self, tokens: weakref.WeakSet[Token], counts: list[int]) -> None:
        super().__init__()
        self.layer, self.tokens, self.counts = nn.Linear(3, 3), tokens, counts

    def note(self, token: Token) -> None:
        self.tokens.add(token)
        self.counts.append(len(self.tokens))

    def forward(self, x: Tensor) -> Tensor:
        # While it is looked at, a module's input has no values.
        return self.layer(x if is_foreign(x) or is_foreign(self.layer.weight) else Held.apply(self.layer(x), self))


class Module(pl.LightningModule):
    def __init__(self, stages: int) -> None:
        super().__init__()
        tokens, self.counts = weakref.WeakSet[Token](), list[int]()
        self.stages = nn.ModuleList(Watched(tokens, self.counts) for _ in range(stages))

    def training_step(self, batch: Any, _index: int = 0) -> dict[str, Any]:
        x = batch
        for stage in self.stages:
            x = stage(x)
        self.log("mean", x.mean(), batch_size=len(batch))
        return {"loss": x.square().mean(), "parts": [x]}

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def in_engine(schedule: str, stages: int, microbatches: int) -> int:
    module = Module(stages)
    setting = meshbolt.PipelineParallel(
        dist.get_world_size(),
        schedule=schedule,
        microbatches=microbatches,
        cuts=[f"stages.{index}" for index in range(1, stages)],
    )
    run = trainer(meshbolt.MeshStrategy(pipeline_parallel=setting), max_steps=2, max_epochs=None)
    run.fit(module, DataLoader(torch.randn(4 * microbatches, 3), batch_size=2 * microbatches))
    return max(module.counts)


def in_runtime(schedule: str, stages: int, microbatches: int) -> int:
    module = Module(stages)
    module.log = lambda *_, **__: None  # type: ignore[method-assign]
    cuts = [f"stages.{index}" for index in range(1, stages)]
    group, device = dist.group.WORLD, torch.device("cpu")
    pipeline = Pipeline(module, cuts, schedule=schedule, microbatches=microbatches, group=group, device=device)
    parts, weights = split_batch(torch.randn(2 * microbatches, 3), microbatches), [1 / microbatches] * microbatches
    for step in range(2):
        kept = pipeline.step(module.training_step, parts, weights=weights, loss_of=lambda each: each["loss"], seed=step)
        assert not any(each["loss"].requires_grad or each["parts"][0].requires_grad for each in kept)
    pipeline.close()
    return max(module.counts)


@pytest.mark.parametrize("run", [in_runtime, in_engine])
@pytest.mark.parametrize(
    ("schedule", "ranks", "microbatches", "live"),
    [
        ("gpipe", 2, 6, [6, 6]),
        ("1f1b", 2, 6, [2, 1]),
        ("interleaved_1f1b", 2, 6, [5, 3]),  # of both stages together
        full("looped_bfs", 2, 6, [12, 12]),
        full("1f1b", 4, 6, [4, 3, 2, 1]),
        full("gpipe", 4, 6, [6, 6, 6, 6]),
        full("zbv", 2, 6, [4, 4]),
    ],
)
def test_a_rank_holds_graphs_of_as_many_microbatches_as_its_schedule_promises(
    run: Any, schedule: str, ranks: int, microbatches: int, live: list[int]
) -> None:
    stages = ranks * STAGES_PER_RANK[schedule]
    timeline = plan_timeline(schedule, [1.0] * stages, ranks=ranks, microbatches=microbatches)
    assert [timeline.live(rank) for rank in range(ranks)] == live
    assert run_ranks(run, ranks, schedule, stages, microbatches) == live
