"""Runs that stop anywhere and go on: where the epoch, the window, the random numbers and the samples are."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from tests.ranks.trainer.loops_support import ADVICE, Regressor, strategy_of, trainer, weights, whole
from tests.rows import full
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler

from meshbolt import MeshStrategy, Zero
from meshbolt.plugins import MixedPrecision
from meshbolt.testing import run_ranks

pytestmark = [mark for mark in ADVICE if "You're resuming" not in str(mark)]

SAMPLES = 48


class Noisy(Dataset[Any]):
    """Samples that say their number, with noise that is drawn when they are loaded."""

    def __init__(self, *, noise: bool = True) -> None:
        self.noise = noise

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, int]:
        x = torch.full((7,), index / SAMPLES) + self.noise * torch.rand(7) / 10
        return x, x.sum(0, keepdim=True), index


@dataclass(frozen=True)
class Plan:
    """A run.

    Attributes:
        zero: how the module is held.
        batch: samples of a batch on each rank.
        window: batches of a step.
        half: in fp16, with a loss scale.
        noise: dropout, noise in the samples, shuffling, and statistics of each rank's own batches.
        validate: how many batches stand between two validations; None for no validation.
        hook: where it saves.
    """

    zero: int | Zero = 2
    batch: int = 2
    window: int = 1
    half: bool = False
    noise: bool = True
    validate: int | None = None
    hook: str = "on_train_batch_end"


class Learner(Regressor):
    """Notes the samples that it has trained on, and every loss."""

    def __init__(self, *, dropout: float) -> None:
        super().__init__(dropout=dropout)
        self.norm = nn.BatchNorm1d(7) if dropout else nn.Identity()
        self.seen: list[tuple[int, list[int]]] = []

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.norm(x))

    def training_step(self, batch: Any, index: int) -> Tensor:
        self.seen.append((index, batch[2].tolist()))
        return super().training_step(batch[:2], index)

    def validation_step(self, batch: Any, index: int) -> None:
        return super().validation_step(batch[:2], index)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.95)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Stopper(pl.Callback):
    """Saves in a hook, after so many batches of all epochs, and counts what it sees itself."""

    def __init__(self, hook: str, path: Path | None, batch: int) -> None:
        self.hook, self.path, self.batch, self.counted = hook, path, batch, 0

    def on_train_batch_end(self, owner: pl.Trainer, *_: Any) -> None:
        self.counted += 1
        self.save(owner, "on_train_batch_end")

    def on_train_batch_start(self, owner: pl.Trainer, *_: Any) -> None:
        self.save(owner, "on_train_batch_start")

    def on_validation_end(self, owner: pl.Trainer, *_: Any) -> None:
        self.save(owner, "on_validation_end")

    def save(self, owner: pl.Trainer, hook: str) -> None:
        if self.path is not None and self.hook == hook and self.counted == self.batch:
            owner.save_checkpoint(self.path)

    def state_dict(self) -> dict[str, Any]:
        return {"counted": self.counted}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.counted = state["counted"]


def loader(plan: Plan, *, shuffle: bool) -> DataLoader[Any]:
    return DataLoader(Noisy(noise=plan.noise), batch_size=plan.batch, shuffle=shuffle)


def run(
    plan: Plan, *, save: tuple[Path, int] | None = None, load: Path | None = None, stop: int = -1
) -> dict[str, Any]:
    """Train two epochs, or go on and train what is left of them; return all that a next step depends on.

    Args:
        plan: what the run does.
        save: where, and after which batch.
        load: where from.
        stop: after how many steps.
    """
    pl.seed_everything(0, workers=True, verbose=False)  # of the order of samples
    torch.manual_seed(dist.get_rank() + (1000 if load is None else 5000))
    module = Learner(dropout=0.3 if plan.noise else 0.0)
    if not plan.noise:
        torch.manual_seed(7)
        module = Learner(dropout=0.0).double()
    plugins = [MixedPrecision("16-mixed", "cpu", growth_interval=5)] if plan.half else []
    owner = trainer(
        MeshStrategy(zero=plan.zero),
        max_epochs=2,
        max_steps=stop,
        accumulate_grad_batches=plan.window,
        val_check_interval=plan.validate,
        callbacks=[stopper := Stopper(plan.hook, *(save or (None, 0)))],
        plugins=plugins,
        precision=None if plan.half else ("32-true" if plan.noise else "64-true"),
    )
    owner.fit(
        module, loader(plan, shuffle=plan.noise), loader(plan, shuffle=False) if plan.validate else None, ckpt_path=load
    )
    with strategy_of(owner).gathered(module, optimizer=owner.optimizers[0]) as gathered:
        state = {f"{key} {name}": whole(value) for name, own in gathered.items() for key, value in own.items()}
    loop = owner.fit_loop.epoch_loop
    return {
        **{f"weight {name}": value for name, value in weights(module).items()},
        **{f"buffer {name}": buffer.clone() for name, buffer in module.named_buffers()},
        **state,
        **{f"scaling {key}": torch.tensor(float(v)) for key, v in owner.precision_plugin.state_dict().items()},
        "drawn next": torch.rand(4),
        "counts": torch.tensor([owner.global_step, owner.current_epoch, loop._batches_that_stepped]),
        "counted": stopper.counted,
        "rate": torch.tensor(owner.optimizers[0].param_groups[0]["lr"]),
        "batches": torch.tensor([loop.batch_progress.total.ready, loop.batch_progress.current.ready]),
        "seen": module.seen,
        "losses": module.losses,
    }


def differing(ours: dict[str, Any], theirs: dict[str, Any], *, but: tuple[str, ...] = ()) -> list[str]:
    assert ours.keys() == theirs.keys()
    tensors = [key for key, value in ours.items() if isinstance(value, Tensor) and key not in but]
    return [key for key in tensors if not torch.equal(ours[key], theirs[key])]


def stop_and_go_on(folder: Path, plan: Plan, after: int) -> tuple[dict[str, Any], dict[str, Any]]:
    through = run(plan, save=(folder / "half.ckpt", after))
    return run(plan, load=folder / "half.ckpt"), through


EPOCH = SAMPLES // (2 * 2)  # batches of a rank, of two samples, on two ranks
STOPS = [
    full(2, Plan(), 5),
    (2, Plan(zero=3, half=True), EPOCH + 4),
    (2, Plan(zero=1, window=3), 5),  # in the middle of a window
    (2, Plan(zero=2, window=5), EPOCH - 1),  # in the middle of the last one, which is shorter
    full(2, Plan(zero=0, window=3, validate=6), 8),  # where it goes back to a validation
    (2, Plan(zero=2, window=3, validate=6, hook="on_validation_end"), 6),
    (2, Plan(zero=2, window=3, hook="on_train_batch_start"), 7),  # in the middle of a batch
    full(2, Plan(zero=3, window=2), EPOCH),
    (2, Plan(zero=3, window=4), 2),  # in the first window of all
    full(1, Plan(zero=1, window=3), 31),
    full(4, Plan(Zero(3, replicate=2), window=2, half=True), 3),
]


@pytest.mark.parametrize(("ranks", "plan", "after"), STOPS, ids=str)
def test_a_run_that_stopped_after_any_batch_goes_on_bit_for_bit(
    tmp_path: Path, ranks: int, plan: Plan, after: int
) -> None:
    for ours, through in run_ranks(stop_and_go_on, ranks, tmp_path, plan, after):
        assert differing(ours, through) == []
        assert ("scaling scale" in ours) == plan.half
        epoch = SAMPLES // (ranks * plan.batch)
        begun = after - after % epoch % plan.window if after % epoch else after
        assert ours["seen"] == through["seen"][begun:]
        assert ours["losses"] == through["losses"][begun:]
        assert len(through["losses"]) == 2 * epoch
        # Callbacks are where they were when it was saved, and meet the batches of an unfinished window again.
        assert ours["counted"] == 2 * epoch + after - begun


def samples_of(runs: list[dict[str, Any]]) -> list[list[int]]:
    """Return the samples of every batch over all ranks, in an order of their own."""
    batches = zip(*(one["seen"] for one in runs), strict=True)
    return [sorted(sample for _, part in batch for sample in part) for batch in batches]


# Float64 and no noise, so that layouts agree; the order of samples is the same for any number of ranks.
WIDE, NARROW = Plan(zero=2, batch=2, noise=False), Plan(zero=3, batch=4, noise=False)


@pytest.mark.parametrize(("saving", "loading"), [(4, 2), (2, 4)], ids=str)
def test_in_the_middle_of_an_epoch_other_ranks_go_on_with_the_samples_that_are_left(
    tmp_path: Path, saving: int, loading: int
) -> None:
    plans = {4: WIDE, 2: NARROW}
    path = tmp_path / "half.ckpt"
    through = run_ranks(functools.partial(run, plans[saving], save=(path, 4)), saving)
    resumed = run_ranks(functools.partial(run, plans[loading], load=path), loading)
    assert samples_of(resumed) == samples_of(through)[4:]
    ours, expected = resumed[0], through[0]
    assert [int(x) for x in ours["counts"]] == [int(x) for x in expected["counts"]]
    trained = [key for key in expected if key.startswith(("weight ", "exp_avg "))]
    assert max(float((ours[key] - expected[key]).abs().max()) for key in trained) < 1e-12


def test_with_larger_batches_in_all_no_sample_is_left_out_and_few_come_twice(tmp_path: Path) -> None:
    path = tmp_path / "half.ckpt"
    through = run_ranks(functools.partial(run, WIDE, save=(path, 3)), 2)  # batches of 4: 12 samples are done
    resumed = run_ranks(functools.partial(run, NARROW, load=path, stop=6), 2)  # batches of 8
    assert [index for index, _ in resumed[0]["seen"]] == [1, 2, 3]
    ours, left = samples_of(resumed), samples_of(through)[2:8]
    assert sorted(sample for batch in ours for sample in batch) == sorted(sample for batch in left for sample in batch)


def test_with_another_window_a_run_goes_on_at_the_beginning_of_one_of_those(tmp_path: Path) -> None:
    path = tmp_path / "half.ckpt"
    through = run_ranks(functools.partial(run, Plan(window=3), save=(path, 8)), 2)
    resumed = run_ranks(functools.partial(run, Plan(window=4), load=path), 2)
    # Two windows of 3 are done, and the first one of 4.
    assert [one["seen"] for one in resumed] == [one["seen"][4:] for one in through]
    assert int(resumed[0]["counts"][0]) == 2 + 2 + 3


def ranks_and_random_numbers(path: Path) -> list[float]:
    return [float(x) for x in run(Plan(), load=path, stop=6)["drawn next"]]


def test_other_ranks_draw_numbers_that_are_the_same_each_time_and_differ_between_ranks(tmp_path: Path) -> None:
    path = tmp_path / "half.ckpt"
    run_ranks(functools.partial(run, Plan(), save=(path, 5), stop=5), 2)
    first, second = (run_ranks(ranks_and_random_numbers, 4, path) for _ in range(2))
    assert first == second
    assert len({tuple(numbers) for numbers in first}) == 4


class Backwards(Sampler[int]):
    """An order that nobody knows beforehand."""

    def __iter__(self) -> Iterator[int]:
        return iter(range(SAMPLES - 1, -1, -1))

    def __len__(self) -> int:
        return SAMPLES


class Placed(DataLoader[Any]):
    """A loader that keeps its place by itself."""

    place = 0

    def state_dict(self) -> dict[str, int]:
        return {"place": self.place}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.place = state["place"]

    def __iter__(self) -> Any:
        for batch in list(super().__iter__())[self.place :]:
            self.place += 1
            yield batch


def resumed_with(path: Path, kind: str) -> tuple[list[int], bool]:
    """Return the first samples that a resumed run sees, and whether Lightning gave advice."""

    def data() -> DataLoader[Any]:
        if kind == "placed":
            return Placed(Noisy(), batch_size=2)
        return DataLoader(Noisy(), batch_size=2, sampler=Backwards() if kind == "backwards" else None)

    for load in (None, path):
        module = Learner(dropout=0.0)
        owner = trainer("zero2", max_steps=5 if load is None else 6, max_epochs=-1, use_distributed_sampler=False)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            owner.fit(module, data(), ckpt_path=load)
        if load is None:
            owner.save_checkpoint(path)
    return module.seen[0][1], any("You're resuming" in str(warning.message) for warning in caught)


@pytest.mark.parametrize(
    ("kind", "first", "advice"),
    [("in order", [10, 11], False), ("backwards", [47, 46], True), ("placed", [10, 11], False)],
)
def test_loaders_of_an_unknown_order_begin_anew_with_advice_and_those_with_a_place_keep_it(
    tmp_path: Path, kind: str, first: list[int], advice: bool
) -> None:
    assert run_ranks(resumed_with, 1, tmp_path / "half.ckpt", kind) == [(first, advice)]
