"""The loops of one Trainer one after the other, and the flags that bound them, against one process without meshbolt."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from tests.ranks.trainer.loops_support import (
    ADVICE,
    BATCH,
    SAMPLES,
    Regressor,
    alone,
    batches,
    difference,
    in_order,
    metrics,
    strategy_of,
    trainer,
    weights,
)

from meshbolt.callbacks import ExponentialMovingAverage
from meshbolt.testing import run_ranks

pytestmark = ADVICE
Make = Callable[..., pl.Trainer]


def all_loops(make: Make, batch_size: int, evaluate_first: bool, options: dict[str, Any]) -> dict[str, Any]:
    """Fit, validate, fit on, test and predict with one Trainer, in float64."""
    pl.seed_everything(0, verbose=False)
    module, logs = Regressor(), []
    owner = make(precision="64-true", **options)
    data = in_order(batch_size=batch_size)
    if evaluate_first:
        logs += owner.validate(module, data, verbose=False)
        logs += owner.test(module, data, verbose=False)
    owner.fit(module, data, data)
    logs.append(metrics(owner))
    meshes = [strategy_of(owner).device_mesh] if make is trainer else []
    logs += owner.validate(module, data, verbose=False)
    owner.fit_loop.max_epochs = 3
    owner.fit(module, data, data)
    logs.append(metrics(owner))
    logs += owner.test(module, data, verbose=False)
    predictions = torch.cat(owner.predict(module, data))  # type: ignore[arg-type]
    same_mesh = all(mesh is strategy_of(owner).device_mesh for mesh in meshes)
    return {
        "logs": logs,
        "predictions": predictions,
        "weights": weights(module),
        "steps": owner.global_step,
        "same mesh": same_mesh,
    }


def same_logs(ours: list[dict[str, float]], theirs: list[dict[str, float]]) -> bool:
    same_names = [one.keys() for one in ours] == [one.keys() for one in theirs]
    return same_names and all(
        value == pytest.approx(theirs[index][name], abs=1e-12, rel=0)
        for index, one in enumerate(ours)
        for name, value in one.items()
    )


@pytest.mark.parametrize(("strategy", "evaluate_first"), [("zero3", False), ("zero2", True), ("zero0", True)])
def test_fit_validate_fit_test_predict_of_one_trainer_equal_one_process(strategy: str, evaluate_first: bool) -> None:
    ours = run_ranks(all_loops, 2, trainer, BATCH, evaluate_first, {"strategy": strategy})
    (theirs,) = run_ranks(all_loops, 1, alone, 2 * BATCH, evaluate_first, {})

    assert theirs["steps"] == 3 * SAMPLES // (2 * BATCH)
    for rank in ours:
        assert rank["same mesh"]
        assert rank["steps"] == theirs["steps"]
        assert difference(rank["weights"], theirs["weights"]) <= 1e-12
        assert same_logs(rank["logs"], theirs["logs"])
    interleaved = torch.stack([rank["predictions"] for rank in ours], dim=1).reshape(-1, 1)
    assert float((interleaved - theirs["predictions"]).abs().max()) <= 1e-12


class Counting(Regressor):
    """Counts the batches of each loop."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = {"train": 0, "val": 0, "test": 0}

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        self.seen["train"] += 1
        return super().training_step(batch, index)

    def validation_step(self, batch: Any, index: int) -> None:
        self.seen["val"] += 1
        super().validation_step(batch, index)

    def test_step(self, batch: Any, index: int) -> None:
        self.seen["test"] += 1
        super().test_step(batch, index)


def batches_under(flags: dict[str, Any]) -> dict[str, int]:
    module, data = Counting(), batches()
    owner = trainer("zero3", **{"max_epochs": 1, "num_sanity_val_steps": 0, **flags})
    owner.fit(module, data, data)
    owner.test(module, data, verbose=False)
    return {**module.seen, "steps": owner.global_step}


def every_flag() -> dict[str, dict[str, int]]:
    return {
        "all": batches_under({}),
        "limits": batches_under({"limit_train_batches": 3, "limit_val_batches": 2, "limit_test_batches": 1}),
        "shares": batches_under({"limit_train_batches": 0.5, "limit_val_batches": 0.25, "limit_test_batches": 0.75}),
        "fast": batches_under({"fast_dev_run": 2}),
        "sanity": batches_under({"num_sanity_val_steps": 2}),
        "interval": batches_under({"val_check_interval": 2}),
        "steps": batches_under({"max_epochs": -1, "max_steps": 5, "accumulate_grad_batches": 2}),
    }


def test_flags_that_bound_the_loops_are_kept_on_every_rank() -> None:
    """24 samples in batches of 3 are 4 batches for each of 2 ranks."""
    first, second = run_ranks(every_flag, 2)

    assert first == second
    assert first == {
        "all": {"train": 4, "val": 4, "test": 4, "steps": 4},
        "limits": {"train": 3, "val": 2, "test": 1, "steps": 3},
        "shares": {"train": 2, "val": 1, "test": 3, "steps": 2},
        "fast": {"train": 2, "val": 2, "test": 2, "steps": 2},
        "sanity": {"train": 4, "val": 6, "test": 4, "steps": 4},
        "interval": {"train": 4, "val": 8, "test": 4, "steps": 4},
        "steps": {"train": 10, "val": 8, "test": 4, "steps": 5},
    }


class Showing(Regressor):
    """Keeps what it was shown: the first number of each sample, by which it can be told apart."""

    def __init__(self) -> None:
        super().__init__()
        self.shown: list[list[float]] = []

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        self.shown.append(batch[0][:, 0].tolist())
        return super().training_step(batch, index)


def overfitted() -> list[list[float]]:
    module = Showing()
    trainer("zero2", overfit_batches=1, max_epochs=3).fit(module, batches())
    return module.shown


def test_overfit_batches_shows_each_rank_the_same_batch_again_and_again() -> None:
    first, second = run_ranks(overfitted, 2)

    assert first == [first[0]] * 3
    assert second == [second[0]] * 3
    assert not set(first[0]) & set(second[0])


def two_modules() -> dict[str, Any]:
    """Fit one module and then another with one Trainer, averaging each."""
    average, found = ExponentialMovingAverage(0.5), []
    owner = trainer("zero3", max_epochs=1, callbacks=[average])
    for seed in (1, 2):
        pl.seed_everything(seed, verbose=False)
        owner.fit_loop.max_epochs = owner.current_epoch + 1
        module = Regressor()
        owner.fit(module, in_order())
        found.append(weights(module))
        with average.averaged(owner):
            found.append(weights(module))
    pl.seed_everything(2, verbose=False)
    fresh, other = Regressor(), trainer("zero3", max_epochs=1, callbacks=[again := ExponentialMovingAverage(0.5)])
    other.fit(fresh, in_order())
    found.append(weights(fresh))
    with again.averaged(other):
        found.append(weights(fresh))
    return {"second": difference(found[2], found[4]), "average": difference(found[3], found[5])}


def test_a_second_module_in_the_same_trainer_is_fitted_and_averaged_as_in_a_new_one() -> None:
    assert run_ranks(two_modules, 2) == [{"second": 0, "average": 0}] * 2
