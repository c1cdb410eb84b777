"""What a Trainer loads: all of it or nothing, the same error on every rank, and what was left out on purpose."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
import torchmetrics
from tests.ranks.trainer.loops_support import (
    ADVICE,
    Regressor,
    alone,
    batches,
    difference,
    in_order,
    strategy_of,
    trainer,
    weights,
    whole,
)
from tests.rows import full
from torch import Tensor, nn

import meshbolt
from meshbolt import Checkpoint, CheckpointError, MeshStrategy
from meshbolt.checkpoint import saved_tensors
from meshbolt.plugins import MixedPrecision
from meshbolt.testing import run_ranks

pytestmark = ADVICE


def save_runs(folder: Path) -> None:
    """Save a whole checkpoint, one of weights only, one with a shard that cannot be read, and a plain file."""
    owner = trainer("zero3", max_epochs=1)
    owner.fit(Regressor(), batches())
    for name, only in (("run.ckpt", False), ("weights.ckpt", True), ("damaged.ckpt", False)):
        owner.save_checkpoint(folder / name, weights_only=only)
    dist.barrier()
    if dist.get_rank() == 0:
        shard = folder / "damaged.ckpt" / "__1_0.distcp"
        shard.write_bytes(b"\0" * shard.stat().st_size)


def save_plain(folder: Path) -> None:
    owner = alone(max_epochs=1)
    owner.fit(Regressor(), batches())
    owner.save_checkpoint(folder / "plain.ckpt")


class Victim(Regressor):
    """A module that a checkpoint may not fit."""

    def __init__(
        self, optimizers: Callable[[Victim], Any] | None = None, *, width: int = 7, tail: bool = False
    ) -> None:
        super().__init__()
        self.make, self.random = optimizers, torch.empty(0)
        self.inp = nn.Linear(width, 10)
        if tail:
            self.tail = nn.Linear(2, 2)

    def configure_optimizers(self) -> Any:
        return super().configure_optimizers() if self.make is None else self.make(self)

    def on_fit_start(self) -> None:
        torch.manual_seed(17 + dist.get_rank())


def scheduled(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)}


def another_class(module: Victim) -> Any:
    return scheduled(torch.optim.Adam(module.parameters(), lr=1e-2))


def other_groups(module: Victim) -> Any:
    first, *rest = module.parameters()
    return scheduled(torch.optim.AdamW([{"params": [first]}, {"params": rest}], lr=1e-2))


def fewer_parameters(module: Victim) -> Any:
    return scheduled(torch.optim.AdamW(list(module.parameters())[1:], lr=1e-2))


def no_scheduler(module: Victim) -> Any:
    return torch.optim.AdamW(module.parameters(), lr=1e-2)


class TwoOptimizers(Victim):
    """Optimizes by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def configure_optimizers(self) -> Any:
        first, *rest = self.parameters()
        return [torch.optim.AdamW([first], lr=1e-2), torch.optim.AdamW(rest, lr=1e-2)]


MISFITS: dict[str, tuple[str, Callable[[], Victim], str]] = {
    # name: (checkpoint, module, what every rank says)
    "names": ("run.ckpt", lambda: Victim(tail=True), "2 missing there:\n    tail.bias\n    tail.weight"),
    "shapes": ("run.ckpt", lambda: Victim(width=9), "inp.weight: float32[10, 7] there, float32[10, 9] here"),
    "class": ("run.ckpt", lambda: Victim(another_class), "state of AdamW, and this run's optimizer is Adam."),
    "groups": ("run.ckpt", lambda: Victim(other_groups), "groups of [18] parameters, this run's has [1, 17]"),
    "parameters": ("run.ckpt", lambda: Victim(fewer_parameters), "only there: ['scale']"),
    "scheduler": ("run.ckpt", lambda: Victim(no_scheduler), "1 learning rate schedulers, this run has 0"),
    "optimizers": ("run.ckpt", TwoOptimizers, "state of 1 optimizers, this run has 2"),
    "weights only": ("weights.ckpt", Victim, "cannot be resumed from: it has weights, but no optimizer_states"),
    "damaged": ("damaged.ckpt", Victim, "file __1_0.distcp"),
    "absent": ("absent.ckpt", Victim, "nothing at this path"),
    "plain: names": ("plain.ckpt", lambda: Victim(tail=True), "tail.weight"),
    "plain: shapes": ("plain.ckpt", lambda: Victim(width=9), "inp.weight"),
    "plain: class": ("plain.ckpt", lambda: Victim(another_class), "this run's optimizer is Adam."),
    "plain: groups": ("plain.ckpt", lambda: Victim(other_groups), "groups of [18] parameters"),
}


def refusals(folder: Path) -> dict[str, tuple[str, list[str]]]:
    """Return by name what was said, and what had changed although it was refused."""
    found = {}
    for name, (path, make, _) in MISFITS.items():
        module, owner = make(), trainer(MeshStrategy(zero=2))
        before = {key: value.detach().clone() for key, value in module.named_parameters()}
        for key in before:
            dist.broadcast(before[key], 0)  # where a fit starts
        with pytest.raises(CheckpointError) as refused:
            owner.fit(module, batches(), ckpt_path=folder / path)
        drawn = torch.rand(3)
        torch.manual_seed(17 + dist.get_rank())
        changed = [] if torch.equal(drawn, torch.rand(3)) else ["random state"]
        changed += [key for key, value in weights(module).items() if not torch.equal(value, before[key])]
        changed += ["optimizer" for one in owner.optimizers if one.state or one.param_groups[0]["lr"] != 1e-2]
        changed += ["steps"] * (owner.global_step > 0)
        found[name] = str(refused.value).replace(str(folder), ""), changed
    return found


def test_a_checkpoint_that_does_not_fit_changes_nothing_and_every_rank_says_the_same(tmp_path: Path) -> None:
    run_ranks(save_runs, 2, tmp_path)
    run_ranks(save_plain, 1, tmp_path)
    first, second = run_ranks(refusals, 2, tmp_path)
    assert first == second
    for name, (_, _, said) in MISFITS.items():
        assert said in first[name][0], name
        assert first[name][1] == [], name


def go_on_after_a_refusal(folder: Path) -> tuple[float, int]:
    """Load in one Trainer what does not fit, then what does."""
    module, owner = Victim(), trainer("zero2", max_epochs=2)
    with pytest.raises(CheckpointError):
        owner.fit(module, batches(), ckpt_path=folder / "weights.ckpt")
    owner.fit(module, batches(), ckpt_path=folder / "run.ckpt")
    again, other = Victim(), trainer("zero2", max_epochs=2)
    other.fit(again, batches(), ckpt_path=folder / "run.ckpt")
    return difference(weights(module), weights(again)), owner.global_step


def test_a_trainer_goes_on_after_a_refusal(tmp_path: Path) -> None:
    run_ranks(save_runs, 2, tmp_path)
    assert run_ranks(go_on_after_a_refusal, 2, tmp_path) == [(0.0, 8)] * 2


class Renaming(Regressor):
    """Takes a checkpoint of older names and sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.tail = self.head
        self.inp = nn.Linear(9, 10)
        del self.head

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        state = checkpoint["state_dict"]
        for part in ("weight", "bias"):
            state[f"tail.{part}"] = state.pop(f"head.{part}")
        old = whole(state["inp.weight"])
        state["inp.weight"] = torch.cat([old, torch.zeros(10, 2)], dim=1)

    def forward(self, x: Tensor) -> Tensor:
        self.__dict__["head"] = self.tail
        return super().forward(nn.functional.pad(x, (0, 2)))


def migrate(folder: Path) -> tuple[float, float]:
    module, original = Renaming(), Regressor()
    ours = trainer("zero3").validate(module, batches(), ckpt_path=folder / "run.ckpt", verbose=False)
    theirs = trainer("zero3").validate(original, batches(), ckpt_path=folder / "run.ckpt", verbose=False)
    return ours[0]["val"], theirs[0]["val"]


def test_a_module_may_make_a_checkpoint_of_other_names_and_shapes_fit(tmp_path: Path) -> None:
    run_ranks(save_runs, 2, tmp_path)
    for ours, theirs in run_ranks(migrate, 2, tmp_path):
        assert ours == pytest.approx(theirs, rel=1e-6)


def lenient(folder: Path) -> list[str]:
    """Return what is said of the names that differ, where they may."""
    module = Victim(tail=True)
    module.strict_loading = False
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("meshbolt.strategies").addHandler(handler)
    trainer("zero2").validate(module, batches(), ckpt_path=folder / "run.ckpt", verbose=False)
    return said


def test_names_that_may_differ_are_said_once(tmp_path: Path) -> None:
    run_ranks(save_runs, 2, tmp_path)
    first, second = run_ranks(lenient, 2, tmp_path)
    assert [said.split("\n") for said in first] == [
        [
            "Of the weights in the checkpoint only what fits is loaded.",
            "  2 missing there:",
            "    tail.bias",
            "    tail.weight",
        ]
    ]
    assert second == []


def begin_anew(folder: Path, path: str) -> tuple[float, int, int, float]:
    """Fit with the weights of a checkpoint and nothing else of it."""
    begun: list[Any] = []

    class AtStart(pl.Callback):
        def on_train_start(self, owner: pl.Trainer, module: pl.LightningModule) -> None:
            begun.extend([weights(module), owner.global_step, owner.current_epoch, len(owner.optimizers[0].state)])

    module, source = Victim(another_class), Regressor()
    trainer("zero3").validate(source, batches(), ckpt_path=folder / "run.ckpt", verbose=False)
    expected = weights(source)
    if path == "plain.ckpt":
        expected = torch.load(folder / path)["state_dict"]
    strategy = MeshStrategy(zero=2, checkpoint=Checkpoint(load_weights_only=True))
    owner = trainer(strategy, max_epochs=1, callbacks=[AtStart()])
    owner.fit(module, batches(), ckpt_path=folder / path)
    assert owner.global_step == 4
    return difference(begun[0], expected), begun[1], begun[2], begun[3]


@pytest.mark.parametrize("path", ["run.ckpt", "weights.ckpt", "plain.ckpt"])
def test_a_new_run_begins_with_the_weights_of_a_checkpoint_where_that_is_asked_for(tmp_path: Path, path: str) -> None:
    run_ranks(save_runs, 2, tmp_path)
    run_ranks(save_plain, 1, tmp_path)
    assert run_ranks(begin_anew, 2, tmp_path, path) == [(0.0, 0, 0, 0)] * 2


def hpc(folder: Path) -> tuple[int, int]:
    """Resume from the newest of the checkpoints that SLURM's requeue has left."""
    owner = trainer("zero3", max_epochs=3, default_root_dir=folder)
    owner.fit(Regressor(), batches(), ckpt_path="hpc")
    return owner.global_step, len(owner.lightning_module.losses)


def save_hpc(folder: Path) -> None:
    for number, epochs in ((1, 1), (2, 2)):
        owner = trainer("zero2", max_epochs=epochs)
        owner.fit(Regressor(), batches())
        owner.save_checkpoint(folder / f"hpc_ckpt_{number}.ckpt")


def test_hpc_is_the_newest_requeue_checkpoint(tmp_path: Path) -> None:
    run_ranks(save_hpc, 2, tmp_path)
    assert run_ranks(hpc, 2, tmp_path) == [(12, 4)] * 2


def different_kinds(folder: Path) -> str:
    """Name a path that is a file for one rank only."""
    own = folder / str(dist.get_rank())
    own.mkdir()
    if dist.get_rank() == 0:
        torch.save({}, own / "a.ckpt")
    os.chdir(own)
    with pytest.raises(CheckpointError) as refused:
        trainer("zero2").validate(Regressor(), batches(), ckpt_path="a.ckpt", verbose=False)
    return str(refused.value)


def test_a_path_that_is_a_file_for_some_ranks_only_is_refused_on_all(tmp_path: Path) -> None:
    first, second = run_ranks(different_kinds, 2, tmp_path)
    assert first == second
    assert "['a file', 'a directory, or nothing'] by rank" in first


# Precisions ------------------------------------------------------------------------------------------------------------

FLAGS: dict[str, dict[str, Any]] = {
    flag: {"precision": flag} for flag in ("32-true", "64-true", "bf16-mixed", "bf16-true")
} | {"16-mixed": {}}


def train_in(flag: str, path: Path, *, save: bool) -> dict[str, Tensor]:
    plugins = [MixedPrecision("16-mixed", "cpu", init_scale=2.0**10)] if flag == "16-mixed" else []
    at_start: dict[str, Tensor] = {}

    class AtStart(pl.Callback):
        def on_train_start(self, owner: pl.Trainer, module: pl.LightningModule) -> None:
            at_start.update(values(owner))

    def values(owner: pl.Trainer) -> dict[str, Tensor]:
        module = owner.lightning_module
        with strategy_of(owner).gathered(module, optimizer=owner.optimizers[0]) as gathered:
            moments = {f"{key} {name}": whole(v) for name, own in gathered.items() for key, v in own.items()}
        return {**weights(module), **moments}

    owner = trainer("zero3", max_epochs=1 if save else 2, plugins=plugins, callbacks=[AtStart()], **FLAGS[flag])
    owner.fit(Regressor(), batches(), ckpt_path=None if save else path)
    if not save:
        return at_start
    owner.save_checkpoint(path)
    return values(owner)


def changed_precision(folder: Path, before: str, after: str) -> tuple[list[str], list[str]]:
    """Return which values are not the saved ones in the new dtype, and which moments have another dtype than their weight."""
    saved = train_in(before, folder / "run.ckpt", save=True)
    loaded = train_in(after, folder / "run.ckpt", save=False)
    assert saved.keys() == loaded.keys()
    wrong = [key for key, value in loaded.items() if not torch.equal(value, saved[key].to(value.dtype))]
    moments = [key for key in loaded if key.startswith("exp_avg")]
    return wrong, [key for key in moments if loaded[key].dtype != loaded[key.split(" ")[1]].dtype]


PRECISIONS = [
    ("bf16-mixed", "32-true"),
    ("32-true", "bf16-mixed"),
    ("16-mixed", "bf16-mixed"),
    ("32-true", "16-mixed"),
    ("bf16-true", "32-true"),
    full("32-true", "bf16-true"),
    full("64-true", "32-true"),
    full("32-true", "64-true"),
]


@pytest.mark.parametrize(("before", "after"), PRECISIONS)
def test_weights_and_moments_follow_into_another_precision(tmp_path: Path, before: str, after: str) -> None:
    assert run_ranks(changed_precision, 2, tmp_path, before, after) == [([], [])] * 2


# Optimizers of a class of one's own -------------------------------------------------------------------------------------


class OwnAdamW(torch.optim.AdamW):
    """Runs on DTensors, since meshbolt does not know what it does."""


class Custom(Regressor):
    def __init__(self) -> None:
        torch.manual_seed(3)
        super().__init__()

    def configure_optimizers(self) -> Any:
        return OwnAdamW(self.parameters(), lr=1e-2)


def own_class(folder: Path) -> float:
    through, resumed = Custom(), Custom()
    owner = trainer("zero3", max_epochs=2)
    owner.fit(through, in_order())
    half = trainer("zero2", max_epochs=1)
    half.fit(Custom(), in_order())
    half.save_checkpoint(folder / "run.ckpt")
    trainer("zero3", max_epochs=2).fit(resumed, in_order(), ckpt_path=folder / "run.ckpt")
    return difference(weights(through), weights(resumed))


def test_an_optimizer_that_runs_on_dtensors_gets_its_state_back(tmp_path: Path) -> None:
    assert max(run_ranks(own_class, 2, tmp_path)) < 1e-6


# Parts of a model -------------------------------------------------------------------------------------------------------


class Adapted(Regressor):
    """A frozen base with buffers, and small layers that are trained."""

    def __init__(self, *, seed: int, extra: bool = False, bigger_base: bool = False) -> None:
        torch.manual_seed(seed)
        super().__init__()
        self.requires_grad_(False)
        self.adapters = nn.ModuleList(nn.Linear(10, 10, bias=False) for _ in range(2 + extra))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        torch.manual_seed(1)  # the base is the same in every run
        for base in (self.inp, *self.blocks, self.head):
            base.apply(lambda layer: layer.reset_parameters() if isinstance(layer, nn.Linear) else None)
        if bigger_base:
            self.more = nn.Linear(2, 2).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inp(x)
        for adapter in self.adapters:
            x = x + adapter(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x) * self.scale + self.extra.sum()

    def training_step(self, batch: Any, index: int) -> Tensor:
        self.seen += 1
        return super().training_step(batch, index)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)


def only_trainable(zero: int) -> MeshStrategy:
    return MeshStrategy(zero=zero, checkpoint=Checkpoint(trainable_only=True))


def adapters_only(folder: Path) -> dict[str, Any]:
    through, half, resumed = (Adapted(seed=seed) for seed in (3, 3, 4))
    trainer(only_trainable(3), max_epochs=2).fit(through, in_order())
    owner = trainer(only_trainable(3), max_epochs=1)
    owner.fit(half, in_order())
    owner.save_checkpoint(folder / "adapters.ckpt")
    # Whoever loads need not know how it was saved.
    trainer("zero2", max_epochs=2).fit(resumed, in_order(), ckpt_path=folder / "adapters.ckpt")
    said = []
    for stranger in (Adapted(seed=3, extra=True), Adapted(seed=3, bigger_base=True)):
        with pytest.raises(CheckpointError) as refused:
            trainer("zero3").validate(stranger, batches(), ckpt_path=folder / "adapters.ckpt", verbose=False)
        said.append(str(refused.value))
    return {"apart": difference(weights(through), weights(resumed)), "seen": int(resumed.seen), "said": said}


def test_a_checkpoint_of_what_is_trained_goes_on_top_of_the_base_that_is_there(tmp_path: Path) -> None:
    for found in run_ranks(adapters_only, 2, tmp_path):
        assert found["apart"] < 1e-6
        assert found["seen"] == 8
        assert "1 missing there:\n    adapters.2.weight\n" in found["said"][0]
        assert "2 missing there:\n    more.bias\n    more.weight\n" in found["said"][1]
    saved = saved_tensors(tmp_path / "adapters.ckpt")
    assert sorted(key for key in saved if key.startswith("state_dict.")) == [
        "state_dict.adapters.0.weight",
        "state_dict.adapters.1.weight",
        "state_dict.seen",
    ]
    manifest = json.loads((tmp_path / "adapters.ckpt" / "manifest.json").read_text())
    assert manifest["plan"]["checkpoint.trainable_only"] is True


class Measured(Regressor):
    """Keeps a metric in its state dict, which is neither parameter nor buffer, and loads it in a way of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.mean, self.all = torchmetrics.MeanMetric(), torchmetrics.CatMetric()
        self.mean.persistent(True)
        self.all.persistent(True)

    def training_step(self, batch: Any, index: int) -> Tensor:
        loss = super().training_step(batch, index)
        self.mean.update(loss.detach())
        self.all.update(loss.detach())
        return loss

    @property
    def measured(self) -> list[list[float]]:
        return [self.mean.mean_value.flatten().tolist(), [float(value) for value in self.all.value]]


def measure(folder: Path) -> tuple[list[list[float]], list[list[float]]]:
    module, again = Measured(), Measured()
    owner = trainer("zero2", max_epochs=1)
    owner.fit(module, batches())
    owner.save_checkpoint(folder / "measured.ckpt")
    trainer("zero3", max_epochs=1).fit(again, batches(), ckpt_path=folder / "measured.ckpt")
    return module.measured, again.measured


def test_metrics_that_are_saved_with_the_module_are_given_back(tmp_path: Path) -> None:
    (mean, values), again = run_ranks(measure, 2, tmp_path)[0]
    assert len(values) > 1
    assert again == [mean, values]
    module = meshbolt.load_from_checkpoint(Measured, tmp_path / "measured.ckpt")
    shutil.rmtree(tmp_path / "measured.ckpt")
    assert module.measured == [mean, values]
