"""A rank that fails in a step of a pipeline ends all others within seconds, which say what has happened to it."""

from __future__ import annotations

import contextlib
import os
import re
import time
from datetime import timedelta
from typing import Any

import lightning.fabric as lf
import lightning.pytorch as pl
import pytest
import torch
import torchmetrics
from tests.ranks.test_pipeline_fabric import WIDTH as FABRIC_WIDTH
from tests.ranks.test_pipeline_fabric import Net, loss_of
from tests.ranks.trainer.test_pipeline_fit import CLASSES, data
from tests.ranks.trainer.test_pipeline_steps import Plain
from tests.rows import full
from torch import Tensor, nn

from meshbolt import MeshStrategy, PipelineParallel
from meshbolt.errors import ConfigError, RankError
from meshbolt.fabric import MeshStrategy as FabricStrategy
from meshbolt.strategies.compat import default_store
from meshbolt.testing import RankFailure, run_ranks

pytestmark = pytest.mark.filterwarnings(
    "ignore:It is recommended to use:lightning.fabric.utilities.warnings.PossibleUserWarning"
)

# Of a collective. A rank that was left alone would wait so long, since the others' processes stay.
TIMEOUT_SECONDS = 60
SOON_SECONDS = 20


class LossFails(Plain):
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        if batch_idx == 1:
            raise ValueError("only on the last stage")
        return loss


class LossIsNone(Plain):
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        return None if batch_idx == 1 else loss


class ReturnsWhatCannotBeSent(Plain):
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
        return {"loss": super().training_step(batch, batch_idx), "function": lambda: None}


class MetricFails(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.metric = torchmetrics.MeanMetric(nan_strategy="error")

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        self.metric(loss.detach() * (torch.nan if batch_idx == 1 else 1.0))
        self.log("metric", self.metric)
        return loss


class CatchesAll(Plain):
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
        try:
            return super().training_step(batch, batch_idx)
        except:  # noqa: E722 - what users write
            return torch.zeros((), requires_grad=True)


class LogsOfAnotherStage(Plain):
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
        if batch_idx == 1:
            self.log("size", self.embed.weight.norm())
        return super().training_step(batch, batch_idx)


class ValidationFails(Plain):
    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self(batch[0])
        if not self.trainer.sanity_checking:
            raise ValueError("only on the last stage")


class LastRankFails(Plain):
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        if batch_idx == 1 and self.trainer.global_rank == self.trainer.world_size - 1:
            raise ValueError("only here")
        return loss


class HookFails(Plain):
    def on_train_batch_end(self, *_: Any) -> None:
        if self.trainer.global_rank == 1:
            raise ValueError("only in a hook")


class Dies(Plain):
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        if batch_idx == 1:
            os._exit(7)
        return loss


class TakesAnotherWay(Plain):
    """In its second epoch."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.embed(x)
        for layer in self.layers:
            hidden = layer(hidden)
        return self.head(hidden if self.current_epoch == 0 else hidden + self.layers[0](hidden))


class LeavesLayersOut(Plain):
    """In its second epoch."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if self.current_epoch == 0 else self.head(self.layers[3](self.embed(x)))


class ReadsParameterLater(Plain):
    """In its second epoch, outside of modules."""

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        return out if self.current_epoch == 0 else out + nn.functional.linear(x, self.embed.weight)[:, :CLASSES]


def trainer(ranks: int, **settings: Any) -> pl.Trainer:
    return pl.Trainer(
        strategy=MeshStrategy(zero=1, pipeline_parallel=PipelineParallel(2, **settings)),
        accelerator="cpu",
        devices=ranks,
        max_epochs=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )


def fit(kind: type[Plain], ranks: int) -> tuple[float, float, str, str]:
    pl.seed_everything(1, verbose=False)
    validation = data(1, 0) if kind is ValidationFails else None
    began = time.monotonic()
    try:
        trainer(ranks).fit(kind(), data(1, 0), validation)
    except Exception as error:  # every kind is looked at by the test
        ended = time.monotonic()
        stay_for_the_others(ranks)
        return ended, ended - began, type(error).__name__, str(error)
    return 0.0, 0.0, "nothing", ""


def stay_for_the_others(ranks: int) -> None:
    """Keep this process, and so its connections, as a notebook does, until all ranks have ended, or would have."""
    store = default_store()
    store.set(f"ended/{torch.distributed.get_rank()}", "")
    with contextlib.suppress(RuntimeError):
        store.wait([f"ended/{rank}" for rank in range(ranks)], timedelta(seconds=SOON_SECONDS))


@pytest.mark.parametrize(
    ("kind", "ranks", "failing", "message"),
    [
        (LossFails, 2, 1, r"ValueError: only on the last stage"),
        (CatchesAll, 2, 0, r"UnsupportedError: The step went on after .* a bare `except:`"),
        full(
            ReturnsWhatCannotBeSent,
            2,
            1,
            r"UnsupportedError: What the step has returned or logged cannot be sent.*lambda",
        ),
        full(
            LogsOfAnotherStage,
            2,
            1,
            r"UnsupportedError: training_step logged 'size'.*'embed\.weight' is held by stage 0",
        ),
        full(ValidationFails, 2, 1, r"ValueError: only on the last stage"),
        (TakesAnotherWay, 2, 1, r"UnsupportedError: On stage 1 the step calls layers\.0 \(call 2\), .* stage 0 holds"),
        full(
            ReadsParameterLater, 2, 1, r"UnsupportedError: What the step returns .*'embed\.weight' is held by stage 0"
        ),
        full(LossIsNone, 2, 1, r"UnsupportedError: LossIsNone\.training_step returned NoneType instead of a loss"),
        full(MetricFails, 2, 1, r"RuntimeError: Encountered `nan`"),
        full(LeavesLayersOut, 2, 0, r"UnsupportedError: On stage 0 the step calls layers\.3, .* stage 1 holds"),
        full(LastRankFails, 4, 3, r"ValueError: only here"),
    ],
)
def test_all_ranks_end_soon_with_the_error_of_the_one_that_failed(
    kind: type[Plain], ranks: int, failing: int, message: str
) -> None:
    results = run_ranks(fit, ranks, kind, ranks, timeout=TIMEOUT_SECONDS)
    assert all(seconds < SOON_SECONDS for _, seconds, _, _ in results), results
    _, _, name, said = results[failing]
    assert re.match(message, f"{name}: {said}", re.DOTALL), results[failing]
    stage = 0 if failing < ranks // 2 else 1
    for rank, (at, _, name, said) in enumerate(results):
        if rank != failing:
            assert name == "RankError", results[rank]
            # The error, and in the traceback that follows the line of the step.
            told = rf"rank {failing} \(stage {stage} of 2\) failed: (meshbolt\.errors\.)?{message}.*Traceback"
            assert re.match(told, said, re.DOTALL), said
            assert f"This is rank {rank} (stage {0 if rank < ranks // 2 else 1} of 2)" in said
            assert at > results[failing][0], "the rank that failed shows its error first"


@pytest.mark.full
def test_ranks_that_a_hook_of_another_leaves_alone_end_soon() -> None:
    waiting, failing = run_ranks(fit, 2, HookFails, 2, timeout=TIMEOUT_SECONDS)
    assert failing[2:] == ("ValueError", "only in a hook")
    assert waiting[1] < SOON_SECONDS
    assert waiting[2] == "RankError"
    assert "rank 1 (stage 1 of 2) failed: ValueError: only in a hook" in waiting[3]


def test_a_rank_that_dies_is_missed_by_name() -> None:
    with pytest.raises(RankFailure) as failure:
        run_ranks(fit_and_raise, 2, Dies, timeout=TIMEOUT_SECONDS)
    waiting, dead = failure.value.outcomes
    assert (dead.kind, dead.exit_code) == ("died", 7)
    assert waiting.raised(RankError), waiting
    assert re.match(r"rank 0 \(stage 0 of 2\) waited in training_step for another rank, which is gone", waiting.message)


def fit_and_raise(kind: type[Plain]) -> None:
    trainer(2).fit(kind(), data(1, 0))


def fails_everywhere() -> tuple[str, float]:
    fabric = lf.Fabric(accelerator="cpu", devices=2, strategy=FabricStrategy(pipeline_parallel=2, zero=1))
    fabric.launch()
    fabric.setup_module(Net())
    began = time.monotonic()
    with pytest.raises(ConfigError, match="no tensor with a dim for its samples"):
        fabric.strategy.pipeline_step({"x": torch.zeros(())}, loss_of)
    seconds, total = time.monotonic() - began, torch.ones(())
    torch.distributed.all_reduce(total)  # ranks may still do things together, such as save
    return f"{total.item():g}", seconds


def test_ranks_that_all_fail_by_themselves_stay_connected() -> None:
    results = run_ranks(fails_everywhere, 2, timeout=TIMEOUT_SECONDS)
    assert [total for total, _ in results] == ["2", "2"]
    assert all(seconds < SOON_SECONDS for _, seconds in results)


def step_in_fabric(fails: bool) -> tuple[str, float]:
    fabric = lf.Fabric(accelerator="cpu", devices=2, strategy=FabricStrategy(pipeline_parallel=2, zero=1))
    fabric.launch()
    model = fabric.setup_module(Net())

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        found = loss_of(model, batch)
        if fails and fabric.global_rank == 1:
            raise ValueError("only here")
        return found

    began = time.monotonic()
    try:
        fabric.strategy.pipeline_step({key: torch.zeros(8, FABRIC_WIDTH) for key in ("x", "y")}, loss)
        model(torch.zeros(4, FABRIC_WIDTH))
    except Exception as error:  # every kind is looked at by the test
        ended = time.monotonic()
        stay_for_the_others(2)
        return f"{type(error).__name__}: {error}", ended - began
    return "", 0.0


def test_all_ranks_of_a_loop_of_fabric_end_soon() -> None:
    (waiting, seconds), (failing, _) = run_ranks(step_in_fabric, 2, True, timeout=TIMEOUT_SECONDS)
    assert failing == "ValueError: only here"
    assert re.match(r"RankError: rank 1 \(stage 1 of 2\) failed: ValueError: only here\n\(in pipeline_step;", waiting)
    assert seconds < SOON_SECONDS


def test_a_call_outside_of_fabrics_steps_is_refused_in_fabrics_words() -> None:
    for message, _ in run_ranks(step_in_fabric, 2, False):
        assert re.match(
            r"UnsupportedError.*outside of a step.*fabric\.strategy\.pipeline_step or pipeline_eval", message
        )
