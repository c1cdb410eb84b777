"""The sharded average of the weights against torch's AveragedModel in one process; through checkpoints and exceptions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging, WeightAveraging
from tests.ranks.trainer.loops_support import (
    ADVICE,
    BATCH,
    Regressor,
    alone,
    batches,
    difference,
    in_order,
    metrics,
    trainer,
    weights,
)
from tests.rows import full
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from meshbolt import UnsupportedError
from meshbolt.callbacks import ExponentialMovingAverage
from meshbolt.testing import run_ranks, run_ranks_expecting

pytestmark = ADVICE


class Reference(pl.Callback):
    """torch's AveragedModel in a Trainer of one process."""

    def __init__(self, decay: float, every: int, start: int) -> None:
        self.every, self.start, self.periods = every, start, 0
        self.average = AveragedModel(Regressor().double(), multi_avg_fn=get_ema_multi_avg_fn(decay))
        self.kept: dict[str, Tensor] = {}

    def on_train_batch_end(self, owner: pl.Trainer, module: pl.LightningModule, *_: Any) -> None:
        periods = max(0, owner.global_step - self.start) // self.every
        if periods > self.periods:
            self.average.update_parameters(module)
            self.periods = periods

    def on_validation_start(self, owner: pl.Trainer, module: pl.LightningModule) -> None:
        self.kept = weights(module)
        if self.periods:
            module.load_state_dict(dict(self.average.module.named_parameters()))

    def on_validation_end(self, owner: pl.Trainer, module: pl.LightningModule) -> None:
        module.load_state_dict(self.kept)


def fit_with(average: str, batch_size: int, strategy: str, setting: tuple[float, int, int]) -> dict[str, Any]:
    decay, every, start = setting
    pl.seed_everything(0, verbose=False)
    module = Regressor()
    module.inp.bias.requires_grad_(False)
    scores: list[float] = []

    class Scores(pl.Callback):
        def on_validation_end(self, owner: pl.Trainer, _module: pl.LightningModule) -> None:
            scores.append(metrics(owner)["val"])

    ours = ExponentialMovingAverage(decay, every_n_steps=every, start_step=start)
    callback = ours if average == "ours" else Reference(decay, every, start)
    make = trainer if average == "ours" else alone
    owner = make(
        strategy,
        precision="64-true",
        max_epochs=4,
        accumulate_grad_batches=2,
        callbacks=[callback, Scores()],
        gradient_clip_val=1.0,
    )
    owner.fit(module, in_order(batch_size=batch_size), batches(batch_size=batch_size))
    found = {"scores": scores, "weights": weights(module)}
    if average == "ours":
        owner.test(module, batches(batch_size=batch_size), verbose=False)
        with ours.averaged(owner):
            found["average"] = weights(module)
        found["tested"] = metrics(owner)["test"]
        found["weights after"] = weights(module)
    else:
        found["average"] = dict(callback.average.module.named_parameters())
    return found


@pytest.mark.parametrize("strategy", [full("zero0"), "zero2", "zero3"])
@pytest.mark.parametrize("setting", [(0.9, 1, 0), (0.5, 2, 3)], ids=str)
def test_the_average_is_that_of_torch_in_one_process(strategy: str, setting: tuple[float, int, int]) -> None:
    ours = run_ranks(fit_with, 2, "ours", BATCH, strategy, setting)
    (theirs,) = run_ranks(fit_with, 1, "torch's", 2 * BATCH, "auto", setting)

    assert difference(theirs["average"], theirs["weights"]) > 1e-3
    for rank in ours:
        assert difference(rank["weights"], theirs["weights"]) <= 1e-12
        assert difference(rank["weights after"], rank["weights"]) == 0
        assert difference(rank["average"], theirs["average"]) <= 1e-12
        assert rank["scores"] == pytest.approx(theirs["scores"], rel=1e-12)
        assert rank["tested"] == pytest.approx(theirs["scores"][-1], rel=1e-12)


def fit_and_save(folder: Path, strategy: str, epochs: int, resume: bool) -> dict[str, Any]:
    pl.seed_everything(0, verbose=False)
    module, average = Regressor(), ExponentialMovingAverage(0.8, every_n_steps=5)
    owner = trainer(strategy, max_epochs=epochs, callbacks=[average])
    owner.fit(module, batches(), batches(), ckpt_path=folder / "run.ckpt" if resume else None)
    owner.save_checkpoint(folder / ("resumed.ckpt" if resume else "run.ckpt"))
    with average.averaged(owner):
        averaged = weights(module)
    return {"weights": weights(module), "average": averaged, "val": metrics(owner)["val"]}


def evaluate(folder: Path, strategy: str) -> dict[str, Any]:
    module, average = Regressor(), ExponentialMovingAverage()
    owner = trainer(strategy, callbacks=[average])
    (scores,) = owner.validate(module, batches(), ckpt_path=folder / "run.ckpt", verbose=False)
    with average.averaged(owner):
        averaged = weights(module)
    return {"weights": weights(module), "average": averaged, "val": scores["val"]}


def test_the_average_is_saved_resumed_exactly_and_read_by_other_layouts(tmp_path: Path) -> None:
    (tmp_path / "through").mkdir()
    saved = run_ranks(fit_and_save, 2, tmp_path, "zero3", 2, False)
    resumed = run_ranks(fit_and_save, 2, tmp_path, "zero3", 4, True)
    through = run_ranks(fit_and_save, 2, tmp_path / "through", "zero3", 4, False)

    assert difference(saved[0]["average"], saved[0]["weights"]) > 1e-4
    for ours, expected in zip(resumed, through, strict=True):
        assert difference(ours["weights"], expected["weights"]) == 0
        assert difference(ours["average"], expected["average"]) == 0
    for strategy, ranks in (("zero0", 2), ("zero2", 3)):
        for rank in run_ranks(evaluate, ranks, tmp_path, strategy):
            assert difference(rank["weights"], saved[0]["weights"]) == 0
            assert difference(rank["average"], saved[0]["average"]) == 0
            assert rank["val"] == pytest.approx(saved[0]["val"], rel=1e-6)


class SavesMeanwhile(Regressor):
    """Saves a checkpoint while the average is in the place of the weights."""

    folder: Path

    def on_validation_epoch_end(self) -> None:
        self.trainer.save_checkpoint(self.folder / f"epoch{self.current_epoch}.ckpt")


def saved_in_validation(folder: Path) -> list[float]:
    module, average = SavesMeanwhile(), ExponentialMovingAverage(0.8)
    module.folder = folder
    owner = trainer("zero2", max_epochs=1, callbacks=[average], num_sanity_val_steps=0)
    owner.fit(module, batches(), batches())
    trained, other = weights(module), Regressor()
    with average.averaged(owner):
        averaged = weights(module)
    fresh = trainer("zero2", callbacks=[again := ExponentialMovingAverage()])
    fresh.validate(other, batches(), ckpt_path=folder / "epoch0.ckpt", verbose=False)
    with again.averaged(fresh):
        read = weights(other)
    return [difference(trained, weights(other)), difference(averaged, read), difference(trained, averaged)]


def test_a_checkpoint_saved_during_validation_has_the_weights_and_the_average(tmp_path: Path) -> None:
    for of_weights, of_average, apart in run_ranks(saved_in_validation, 2, tmp_path):
        assert of_weights == of_average == 0
        assert apart > 1e-3


class Failing(Regressor):
    """Fails in the validation of its second epoch, and counts on its weights afterwards."""

    def validation_step(self, batch: Any, index: int) -> None:
        if self.current_epoch == 1:
            raise ValueError("enough")
        super().validation_step(batch, index)


def weights_after_failure() -> float:
    module, before = Failing(), {}

    class Before(pl.Callback):
        def on_validation_start(self, _owner: pl.Trainer, module: pl.LightningModule) -> None:
            before.update(weights(module))

    owner = trainer("zero3", callbacks=[Before(), ExponentialMovingAverage(0.8)], num_sanity_val_steps=0)
    with pytest.raises(ValueError, match="enough"):
        owner.fit(module, batches(), batches())
    return difference(before, weights(module))


def test_the_weights_are_back_after_a_validation_that_failed() -> None:
    assert run_ranks(weights_after_failure, 2) == [0, 0]


def evaluated_without_average(folder: Path) -> list[float]:
    module, average = Regressor(), ExponentialMovingAverage(0.5)
    owner = trainer("zero3", callbacks=[average])
    owner.fit(module, batches(), batches())
    owner.save_checkpoint(folder / "weights.ckpt", weights_only=True)
    plain = trainer("zero3").validate(Regressor(), batches(), ckpt_path=folder / "weights.ckpt", verbose=False)[0][
        "val"
    ]
    if owner.is_global_zero:
        with pytest.warns(UserWarning, match="holds no average"):
            found = owner.validate(module, batches(), ckpt_path=folder / "weights.ckpt", verbose=False)[0]["val"]
    else:
        found = owner.validate(module, batches(), ckpt_path=folder / "weights.ckpt", verbose=False)[0]["val"]
    return [plain, found]


def test_weights_of_a_checkpoint_without_an_average_are_evaluated_as_they_are(tmp_path: Path) -> None:
    for plain, found in run_ranks(evaluated_without_average, 2, tmp_path):
        assert found == plain


def refuse(callback: str) -> None:
    made: dict[str, Any] = {
        "EMA": EMAWeightAveraging,
        "averaging": WeightAveraging,
        "SWA": lambda: StochasticWeightAveraging(1e-2),
        "pruning": lambda: pl.callbacks.ModelPruning("l1_unstructured", amount=0.5),
    }
    trainer("zero3", callbacks=[made[callback]()]).fit(Regressor(), batches(), batches())


@pytest.mark.parametrize("callback", ["EMA", "averaging", "SWA", "pruning"])
def test_callbacks_that_copy_or_mask_the_whole_module_are_refused_by_name(callback: str) -> None:
    name = {"EMA": "EMAWeightAveraging", "averaging": "WeightAveraging", "SWA": "StochasticWeightAveraging"}
    run_ranks_expecting(refuse, 2, callback, error=UnsupportedError, match=name.get(callback, "ModelPruning"))


def two_averages() -> None:
    trainer("zero3", callbacks=[ExponentialMovingAverage(), ExponentialMovingAverage(0.5)]).fit(Regressor(), batches())


def average_without_shards() -> None:
    alone(callbacks=[ExponentialMovingAverage()]).fit(Regressor(), batches())


def test_two_averages_and_an_average_without_shards_are_refused() -> None:
    run_ranks_expecting(two_averages, 2, error=RuntimeError, match="more than one stateful callback")
    run_ranks_expecting(average_without_shards, 1, error=UnsupportedError, match="SingleDeviceStrategy")
