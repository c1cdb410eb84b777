"""Checkpoints that callbacks save on an exception: where all ranks met it; and no hang where only some did."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from tests.ranks.trainer.loops_support import ADVICE, Regressor, batches, difference, trainer, weights
from torch import Tensor

from meshbolt import MeshStrategy
from meshbolt.checkpoint import is_checkpoint
from meshbolt.errors import RankError
from meshbolt.testing import RankFailure, run_ranks

pytestmark = ADVICE


class Failing(Regressor):
    """Fails at one step, on the ranks it is told to."""

    def __init__(self, ranks: tuple[int, ...], *, in_hook: bool = False) -> None:
        super().__init__()
        self.ranks, self.in_hook = ranks, in_hook

    def training_step(self, batch: Any, index: int) -> Tensor:
        self.fail(in_hook=False)
        return super().training_step(batch, index)

    def on_train_batch_end(self, *_: Any) -> None:
        self.fail(in_hook=True)

    def fail(self, *, in_hook: bool) -> None:
        if self.trainer.global_step == 5 and self.global_rank in self.ranks and self.in_hook == in_hook:
            raise ValueError(f"rank {self.global_rank} had enough")


def savers(folder: Path) -> list[pl.Callback]:
    return [
        ModelCheckpoint(folder / "model", "{step}", save_on_exception=True, save_last=True, every_n_epochs=1),
        OnExceptionCheckpoint(folder / "exception"),
    ]


def names_in(folder: Path) -> list[str]:
    return sorted(place.name for place in folder.iterdir()) if folder.exists() else []


def fail_together(folder: Path) -> dict[str, Any]:
    """Fail on all ranks, and go on from what was saved."""
    module = Failing((0, 1))
    owner = trainer("zero3", callbacks=savers(folder), max_epochs=3)
    with pytest.raises(ValueError, match="had enough"):
        owner.fit(module, batches(), batches())
    saved = names_in(folder / "model"), names_in(folder / "exception")
    again, other = Regressor(), trainer("zero3", max_epochs=3)
    other.validate(again, batches(), ckpt_path=folder / "exception/on_exception.ckpt", verbose=False)
    apart = difference(weights(module), weights(again))
    third, third_module = trainer("zero3", max_epochs=3), Regressor()
    third.fit(third_module, batches(), batches(), ckpt_path=folder / "exception/on_exception.ckpt")
    return {"saved": saved, "apart": apart, "first steps": owner.global_step, "steps": third.global_step}


def test_all_ranks_that_fail_together_save_what_they_have(tmp_path: Path) -> None:
    for rank in run_ranks(fail_together, 2, tmp_path):
        assert rank["saved"] == (["last.ckpt", "step=4.ckpt", "step=5.ckpt"], ["on_exception.ckpt"])
        assert rank["apart"] == 0
        assert rank["first steps"] == 5
        assert rank["steps"] == 12


def fail_alone(folder: Path, in_hook: bool) -> None:
    strategy = MeshStrategy(zero=3, timeout=timedelta(seconds=8))  # 0.8 s for the roll call
    owner = trainer(strategy, callbacks=savers(folder), max_epochs=3)
    owner.fit(Failing((1,), in_hook=in_hook), batches(), batches())


@pytest.mark.parametrize("in_hook", [False, True])
def test_a_rank_that_fails_alone_saves_nothing_and_leaves_nobody_hanging(tmp_path: Path, in_hook: bool) -> None:
    with pytest.raises(RankFailure) as raised:
        run_ranks(fail_alone, 2, tmp_path, in_hook)
    other, failed = raised.value.outcomes

    assert (failed.kind, failed.message) == ("raised", "rank 1 had enough")
    assert failed.raised(ValueError)
    # Had it hung, it would have been killed and not have raised.
    assert other.kind == "raised"
    assert other.raised(RankError)
    assert other.message.startswith("rank 1 failed: ValueError: rank 1 had enough")
    assert names_in(tmp_path / "exception") == []
    assert names_in(tmp_path / "model") == ["last.ckpt", "step=4.ckpt"]
    assert all(is_checkpoint(tmp_path / "model" / name) for name in names_in(tmp_path / "model"))
