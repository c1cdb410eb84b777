"""Around the steps of an offloaded optimizer: checkpoints, what it is refused for, and when its updates run."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from tests.ranks.trainer.test_offload import WARNING, Net, fit
from tests.rows import full

from meshbolt import Offload
from meshbolt.compat import local_tensor
from meshbolt.errors import MeshboltError, StorageError, UnsupportedError
from meshbolt.testing import run_ranks

pytestmark = pytest.mark.filterwarnings(WARNING)


def offload_of(place: str | None, path: str) -> Offload | None:
    return {
        None: None,
        "cpu": Offload("cpu"),
        "half": Offload("cpu", fraction=0.5),
        "nvme": Offload("nvme", path=path),
    }[place]


def train(place: str | None, path: str, zero: int, steps: int, save: str, load: str | None) -> list[torch.Tensor]:
    """Train, from a checkpoint where one is given, save another, and return this rank's parts of the parameters."""
    trainer, found = fit(
        Net(fused=True), offload_of(place, path), zero=zero, steps=steps, **({"ckpt_path": load} if load else {})
    )
    trainer.save_checkpoint(save)
    return found


@pytest.mark.parametrize(
    ("first", "second"),
    [("cpu", "nvme"), ("nvme", None), full(None, "half"), full("half", "cpu"), full("nvme", "cpu"), full(None, "nvme")],
)
def test_state_goes_from_any_place_to_any_other(first: str | None, second: str | None, tmp_path: Path) -> None:
    path, half, whole, end = str(tmp_path), str(tmp_path / "half"), str(tmp_path / "whole"), str(tmp_path / "end")
    expected = run_ranks(train, 2, None, path, 2, 6, whole, None, timeout=60)
    run_ranks(train, 2, first, path, 3, 3, half, None, timeout=60)
    found = run_ranks(train, 2, second, path, 2, 6, end, half, timeout=60)
    assert all(torch.equal(*pair) for rank in zip(found, expected, strict=True) for pair in zip(*rank, strict=True))


def test_another_number_of_ranks_reads_it(tmp_path: Path) -> None:
    path, half = str(tmp_path), str(tmp_path / "half")
    run_ranks(train, 2, "nvme", path, 3, 3, half, None, timeout=60)
    alone = run_ranks(train, 1, "cpu", path, 2, 3, str(tmp_path / "end"), half, timeout=60)[0]
    again = run_ranks(train, 1, None, path, 1, 3, str(tmp_path / "end2"), half, timeout=60)[0]
    assert all(torch.equal(*pair) for pair in zip(alone, again, strict=True))


class Forgets(pl.Callback):
    """Notes what the optimizer keeps after some steps, whole, and sets half of it to zero."""

    def __init__(self) -> None:
        self.seen: dict[str, torch.Tensor] = {}

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *_: Any) -> None:
        if trainer.global_step == 2 and not self.seen:
            with trainer.strategy.gathered(module, optimizer=trainer.optimizers[0]) as state:  # type: ignore[attr-defined]
                for name, values in state.items():
                    self.seen[name] = values["exp_avg_sq"].clone()
                    values["exp_avg"].zero_()


def forgetting(place: str | None, path: str) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    forgets = Forgets()
    _, found = fit(Net(fused=True), offload_of(place, path), zero=2, callbacks=[forgets])
    return found, forgets.seen


@pytest.mark.parametrize("place", ["cpu", "nvme"])
def test_state_can_be_read_and_changed_whole_wherever_it_lies(place: str, tmp_path: Path) -> None:
    expected, found = (run_ranks(forgetting, 2, each, str(tmp_path), timeout=60) for each in (None, place))
    for (parameters, seen), (own, other) in zip(expected, found, strict=True):
        assert seen.keys() == other.keys()
        assert len(seen) > 10
        assert all(torch.equal(value, other[name]) for name, value in seen.items())
        assert all(torch.equal(*pair) for pair in zip(parameters, own, strict=True))


class Signs(torch.optim.Optimizer):
    """Not torch's."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    def step(self, closure: Any = None) -> Any:
        return closure() if closure else None


class WithSigns(Net):
    def configure_optimizers(self) -> Any:
        return Signs(self.parameters(), lr=0.1)


def refused(offload: Offload, kind: str) -> str:
    try:
        fit(WithSigns() if kind == "signs" else Net(kind), offload, zero=2)
    except (UnsupportedError, StorageError) as error:
        return f"{type(error).__name__}: {error}"
    return "trained"


@pytest.mark.parametrize(
    ("offload", "kind", "words"),
    [
        (Offload("cpu"), "signs", "UnsupportedError: offload='cpu' updates .* and Signs is not known"),
        (Offload("nvme", path="/nowhere/at/all"), "AdamW", "StorageError: The folder '/nowhere/at/all' cannot be used"),
        (Offload("nvme", path="/proc/1"), "AdamW", "StorageError: "),
    ],
)
def test_every_rank_refuses_what_cannot_be(offload: Offload, kind: str, words: str) -> None:

    for said in run_ranks(refused, 2, offload, kind, timeout=60):
        assert re.match(words, said), said


def refused_on_one(path: str) -> str:
    """Try a directory that only the first rank has, under the same name."""
    own = Path(path, str(dist.get_rank()))
    (own / "disk").mkdir(parents=True) if dist.get_rank() == 0 else own.mkdir()
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(own)
        return refused(Offload("nvme", path="disk/state"), "AdamW")


def test_what_one_rank_cannot_do_no_rank_does(tmp_path: Path) -> None:
    for said in run_ranks(refused_on_one, 2, str(tmp_path), timeout=60):
        assert re.match("StorageError: The folder '.*/1/disk/state' cannot be used", said), said


class Looks(pl.Callback):
    def on_before_optimizer_step(self, *_: Any) -> None:
        """Look at gradients."""


class LooksLater(pl.Callback):
    def on_train_batch_end(self, *_: Any, **__: Any) -> None:
        """Look at parameters."""


class LooksItself(Net):
    def on_after_backward(self) -> None:
        """Look at gradients."""


def overlap(module: Net, callbacks: list[pl.Callback], settings: dict[str, Any]) -> tuple[bool, bool]:
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("MESHBOLT_FAST_PATH", "0")
        trainer, _ = fit(module, Offload("cpu", overlap=settings.pop("overlap", True)), callbacks=callbacks, **settings)
    steps = trainer.strategy.engine._offloaded  # type: ignore[attr-defined]
    return steps._early, steps._late


@pytest.mark.parametrize(
    ("kind", "callbacks", "settings", "expected"),
    [
        (Net, [], {}, (True, True)),
        (Net, [LearningRateMonitor, ModelCheckpoint], {"enable_checkpointing": True}, (True, True)),
        (Net, [Looks], {}, (False, True)),
        (Net, [LooksLater], {}, (True, False)),
        (LooksItself, [], {}, (False, True)),
        (Net, [], {"gradient_clip_val": 0.5}, (False, True)),
        (Net, [], {"precision": "16-mixed"}, (False, True)),
        (Net, [], {"overlap": "auto"}, (False, False)),  # on a CPU
    ],
)
def test_updates_overlap_where_nobody_could_notice(
    kind: type[Net],
    callbacks: list[type[pl.Callback]],
    settings: dict[str, Any],
    expected: tuple[bool, bool],
    tmp_path: Path,
) -> None:
    made: list[pl.Callback] = [
        each(dirpath=tmp_path / "kept") if each is ModelCheckpoint else each()
        for each in callbacks  # type: ignore[call-arg]
    ]
    if LearningRateMonitor in callbacks:
        settings = {**settings, "logger": pl.loggers.CSVLogger(str(tmp_path)), "log_every_n_steps": 1}
    assert run_ranks(overlap, 2, kind(fused=True), made, {"zero": 1, **settings}, timeout=60) == [expected] * 2


class ChangesInStep(Net):
    def training_step(self, batch: torch.Tensor, index: int) -> torch.Tensor:
        if index == 2:
            with torch.no_grad():
                self.blocks[1].up.weight.clamp_(-0.1, 0.1)
        return super().training_step(batch, index)


def changed_in_step(overlap: bool) -> str:
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("MESHBOLT_FAST_PATH", "0")
        try:
            fit(ChangesInStep(fused=True), Offload("cpu", overlap=overlap), zero=3)
        except MeshboltError as error:
            return str(error)
    return "trained"


@pytest.mark.parametrize(
    ("overlap", "words"), [(True, "was changed in training_step.*overlap=False"), (False, "trained")]
)
def test_a_step_that_changes_what_is_being_updated_is_refused(overlap: bool, words: str) -> None:
    for said in run_ranks(changed_in_step, 2, overlap, timeout=60):
        assert re.search(words, said, re.DOTALL), said


class Hooked(Net):
    """Its optimizer has hooks that change gradients before a step, and weights after it."""

    def configure_optimizers(self) -> Any:
        optimizers, schedules = super().configure_optimizers()

        def before(optimizer: torch.optim.Optimizer, *_: Any) -> None:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        local_tensor(parameter.grad).mul_(0.5)

        def after(optimizer: torch.optim.Optimizer, *_: Any) -> None:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    local_tensor(parameter).detach().clamp_(-0.2, 0.2)

        optimizers[0].register_step_pre_hook(before)
        optimizers[0].register_step_post_hook(after)
        return optimizers, schedules


def hooked(place: str | None, path: str) -> list[torch.Tensor]:
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("MESHBOLT_FAST_PATH", "0")
        more = {"path": path} if place == "nvme" else {}
        offload = None if place is None else Offload(place, parameters=place, overlap=True, **more)  # type: ignore[arg-type]
        return fit(Hooked(kind="SGD", momentum=0.9, fused=True), offload, zero=3)[1]


@pytest.mark.parametrize("place", ["cpu", "nvme"])
def test_hooks_of_the_optimizer_see_final_gradients_and_weights(place: str, tmp_path: Path) -> None:
    expected, found = (run_ranks(hooked, 2, each, str(tmp_path), timeout=60) for each in (None, place))
    assert all(torch.equal(*pair) for rank in zip(found, expected, strict=True) for pair in zip(*rank, strict=True))
