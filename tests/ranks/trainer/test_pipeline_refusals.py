"""What a pipeline cannot do is refused before training, on every rank, by the module's name and with what to do instead."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from tests.ranks.trainer.test_pipeline_fit import CLASSES, WIDTH, data
from tests.ranks.trainer.test_pipeline_steps import Plain
from tests.rows import full
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from meshbolt import MeshStrategy, PipelineParallel
from meshbolt.testing import run_ranks

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{start}:lightning.fabric.utilities.warnings.PossibleUserWarning")
    for start in ("It is recommended to use", "You are using the `dataloader_iter`")
]


class WaitsForAll(Plain):
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.trainer.strategy.barrier()
        return loss


class Broadcasts(Plain):
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        self.trainer.strategy.broadcast(batch_idx)
        return super().training_step(batch, batch_idx)


class Gathers(Plain):
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.all_gather(super().training_step(batch, batch_idx), sync_grads=True).mean()


class Reduces(Plain):
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.trainer.strategy.reduce(loss.detach())
        return loss


class ReturnsNothing(Plain):
    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:  # type: ignore[override]
        super().training_step(batch, batch_idx)


class Twice(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + super().forward(-x)


class Jumps(Plain):
    def forward(self, x: Tensor) -> Tensor:
        early = torch.relu(self.embed(x))
        hidden = early
        for layer in self.layers:
            hidden = layer(hidden)
        return self.head(hidden + early)


class Sums(Plain):
    def forward(self, x: Tensor) -> Tensor:
        hidden, total = self.embed(x), torch.zeros(())
        for layer in self.layers:
            hidden = layer(hidden)
            total += hidden.square().mean()
        return self.head(hidden) + total


class Checkpoints(Plain):
    def forward(self, x: Tensor) -> Tensor:
        hidden = self.embed(x)
        for layer in self.layers:
            hidden = checkpoint(layer, hidden, use_reentrant=False)
        return self.head(hidden)


class TakesIterator(Plain):
    def training_step(self, dataloader_iter: Iterator[Any]) -> Tensor:  # type: ignore[override]
        return super().training_step(next(dataloader_iter)[0], 0)


class SeveralOptimizers(Plain):
    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(each.parameters(), lr=0.1) for each in (self.embed, self.head)]


class Chain(Plain):
    """The same layers twice, in one module."""

    def __init__(self) -> None:
        pl.LightningModule.__init__(self)
        self.net = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) - self.net(-x)


class Began(pl.Callback):
    began = False

    def on_train_start(self, *_: Any) -> None:
        self.began = True


def refused(kind: type[Plain], pipeline: dict[str, Any], options: dict[str, Any]) -> str:
    began = Began()
    try:
        pl.Trainer(
            strategy=MeshStrategy(zero=1, pipeline_parallel=PipelineParallel(2, **pipeline)),
            accelerator="cpu",
            devices=2,
            max_steps=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            callbacks=[began, *options.get("callbacks", [])],
        ).fit(kind(), data(1, 0))
    except Exception as error:  # every kind is looked at by the test
        return f"{'in training: ' if began.began else ''}{type(error).__name__}: {error}"
    return "nothing"


ALONE = r"UnsupportedError: A step called barrier\(\), broadcast\(\), .*on_train_batch_end"
CUT = {"cuts": ["layers.2"]}
SWA = {"callbacks": [pl.callbacks.StochasticWeightAveraging(0.1)]}
DISORDER = {"schedule": "interleaved_1f1b", "stages_per_rank": 2, "cuts": ["layers.3", "layers.1", "head"]}
MANY = {"schedule": "interleaved_1f1b", "stages_per_rank": 3, "blocks": "layers"}


@pytest.mark.parametrize(
    ("kind", "pipeline", "options", "message"),
    [
        (WaitsForAll, {}, {}, ALONE),
        full(Broadcasts, {}, {}, ALONE),
        (Gathers, {}, {}, ALONE),
        full(Reduces, {}, {}, ALONE),
        (ReturnsNothing, {}, {}, r"UnsupportedError: ReturnsNothing\.training_step returned NoneType .* 0\.0 \* loss"),
        (Twice, {}, {}, r"ConfigError: Twice cannot .*more than once in a step.*: embed, layers\.0.* call it once"),
        (Twice, CUT, {}, r"CutError: 'layers\.2', with which a stage begins, is called 2 times in a step"),
        full(Chain, {}, {}, r"ConfigError: Chain cannot be cut into 2 stages.*more than once .*: net\."),
        (Jumps, CUT, {}, r"CutError: torch's relu makes a value .* on stage 0 that is read on stage 1.*layers\.2"),
        (Sums, CUT, {}, r"UnsupportedError: aten\.add_\.Tensor writes a value that another pipeline stage computes"),
        (Checkpoints, {}, {}, r"UnsupportedError: 'layers\.0' would be called again .* torch\.utils\.checkpoint"),
        full(TakesIterator, {}, {}, r"UnsupportedError: TakesIterator\.training_step takes a dataloader_iter"),
        full(SeveralOptimizers, {}, {}, r"\w+: .*multiple optimizers"),
        full(
            Plain,
            DISORDER,
            {},
            r"UnsupportedError: .*'layers\.1' is called before 'layers\.3'\. Name cuts in the order",
        ),
        full(Plain, {"cuts": ["layers"]}, {}, r"ConfigError: .*'layers' is a ModuleList, which is never called"),
        full(Plain, {"microbatches": 1}, {}, r"ConfigError: .*microbatches"),
        full(Plain, MANY, {}, r"ConfigError: .*6 stages"),
        full(Plain, {"replicate": ["embedding"]}, {}, r"ConfigError: .*no module 'embedding'"),
        full(Plain, {}, SWA, r"UnsupportedError: The callback StochasticWeightAveraging cannot be used"),
    ],
)
def test_what_cannot_be_is_refused_before_training(
    kind: type[Plain], pipeline: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    for found in run_ranks(refused, 2, kind, pipeline, options):
        assert re.match(message, found, re.DOTALL), found
