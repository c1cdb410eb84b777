"""Offloaded state that is lost, left behind or cannot be: it is never saved, never trusted, and refused before training."""

from __future__ import annotations

import contextlib
import errno
import functools
import re
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.fabric as lf
import pytest
import torch
import torch.distributed as dist
from tests.faults.offload_support import (
    FAULTY,
    SAVED,
    TIMEOUT_SECONDS,
    WIDTH,
    Net,
    Scene,
    failing,
    kill,
    resume,
    stay_for_the_others,
    train,
    undisturbed,
)
from tests.ranks.trainer.loops_support import ADVICE
from tests.rows import full
from tests.unit.offload.faulty import PAGE, FaultyFace, no_fault
from torch import Tensor, nn

from meshbolt import Offload
from meshbolt.checkpoint import is_checkpoint
from meshbolt.errors import MeshboltError, RankError
from meshbolt.fabric import MeshStrategy as FabricStrategy
from meshbolt.offload.files import StateFile
from meshbolt.testing import RankFailure, run_ranks

pytestmark = ADVICE


# State that is lost is not saved -----------------------------------------------------------------------------------------


class CutShort(Net):
    """An exception ends a step, on all ranks, when the last layers are updated, and the first ones are not or nothing else is."""

    def __init__(self, place: str) -> None:
        super().__init__()
        self.place, self.is_cut = place, True

    def training_step(self, batch: Any, index: int) -> Tensor:
        handle = self.layers[0].register_forward_hook(
            lambda _module, _args, out: out.register_hook(self.cut_pass) and None
        )
        try:
            return super().training_step(batch, index)
        finally:
            handle.remove()

    def cut_pass(self, _gradient: Tensor) -> None:
        self.cut("backward")

    def cut(self, place: str) -> None:
        if self.is_cut and place == self.place and self.global_step == FAULTY:
            raise ValueError("in the middle of a step")


def cut_short(folder: Path, zero: int, place: str) -> tuple[bool, list[float]]:
    scene, module = Scene(folder, "", (), {"zero": zero, "overlap": True}), CutShort(place)
    with pytest.raises(ValueError, match="in the middle"):
        scene.run(module)
    is_saved = is_checkpoint(Path(scene.exception) / "on_exception.ckpt")
    module.is_cut = False
    module.losses.clear()
    scene.run(module, load=f"{scene.checkpoints}/step=2.ckpt")
    return is_saved, module.losses


@pytest.mark.parametrize(("zero", "place"), [(2, "backward"), full(1, "backward"), full(3, "backward")])
def test_a_step_that_was_cut_short_between_updates_is_not_saved(zero: int, place: str, tmp_path: Path) -> None:
    results = run_ranks(cut_short, 2, tmp_path, zero, place, timeout=TIMEOUT_SECONDS)
    for (is_saved, losses), expected in zip(results, undisturbed(tmp_path), strict=True):
        assert not is_saved, "parameters of two steps were saved as those of one"
        assert losses == expected[SAVED:], "the module goes on from the checkpoint, in the same process"


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def go_on_in_fabric(folder: Path) -> list[tuple[str, str]]:
    """Go on after a step that has failed on all ranks, as a loop may that catches errors."""
    face = FaultyFace()
    offload = Offload("nvme", path=folder / "disk")
    fabric = lf.Fabric(accelerator="cpu", devices=2, strategy=FabricStrategy(zero=2, offload=offload))
    fabric.launch()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("meshbolt.engine.offloaded.StateFile", functools.partial(StateFile, face=face))
        plain = Layers()
        model, optimizer = fabric.setup(plain, torch.optim.AdamW(plain.parameters(), fused=True))
    said: list[tuple[str, str]] = []

    def attempt(deed: Callable[[], object]) -> None:
        try:
            deed()
        except (OSError, MeshboltError) as error:
            said.append((type(error).__name__, str(error)))

    def step() -> None:
        fabric.backward(model(torch.ones(2, WIDTH)).sum())
        optimizer.step()

    step()
    face.fault = failing("read", errno.EIO)
    attempt(step)
    face.fault = no_fault  # the disk is well again, and the state is lost all the same
    attempt(lambda: fabric.save(folder / "late.ckpt", {"model": model, "optimizer": optimizer}))
    attempt(step)
    return said


def test_a_loop_that_goes_on_after_a_failed_step_can_neither_save_nor_train(tmp_path: Path) -> None:
    for first, *later in run_ranks(go_on_in_fabric, 2, tmp_path, timeout=TIMEOUT_SECONDS):
        assert first[0] == "StorageError"
        assert [name for name, _ in later] == ["MeshboltError"] * 2
        assert all("Start again from the last checkpoint" in said for _, said in later)
    assert not is_checkpoint(tmp_path / "late.ckpt")


# Ranks that are killed --------------------------------------------------------------------------------------------------


def train_and_raise(folder: Path, fault: str, ranks: tuple[int, ...], settings: dict[str, Any]) -> None:
    Scene(folder, fault, ranks, settings).run()


@pytest.mark.parametrize(
    "settings", [{"zero": 2}, full({"zero": 3, "overlap": True}), full({"parameters": True, "zero": 3})]
)
def test_a_rank_that_is_killed_leaves_no_file(settings: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(RankFailure) as failure:
        run_ranks(train_and_raise, 2, tmp_path, "it is killed", (1,), settings, timeout=TIMEOUT_SECONDS)
    waiting, killed = failure.value.outcomes
    assert killed.exit_code == -signal.SIGKILL
    assert waiting.raised(RankError), waiting
    assert not list((tmp_path / "disk").iterdir())
    last = str(tmp_path / "checkpoints/step=2.ckpt")
    assert run_ranks(resume, 2, tmp_path, last, settings, timeout=TIMEOUT_SECONDS) == [
        losses[SAVED:] for losses in undisturbed(tmp_path)
    ]


def train_until_a_name_is_to_go(folder: Path) -> None:
    if dist.get_rank() == 1:
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr("meshbolt.offload.scratch.Path.unlink", lambda _path: kill(""))
            train_and_raise(folder, "", (), {})
    train_and_raise(folder, "", (), {})


@pytest.mark.full
def test_an_empty_file_is_all_that_a_rank_leaves_in_the_instant_in_which_its_file_has_a_name(tmp_path: Path) -> None:
    """And no later run has a use for it: names are drawn, and files that are there are never opened."""
    with pytest.raises(RankFailure) as failure:
        run_ranks(train_until_a_name_is_to_go, 2, tmp_path, timeout=TIMEOUT_SECONDS)
    assert failure.value.outcomes[0].raised(RankError)
    (left,) = (tmp_path / "disk").iterdir()
    assert left.stat().st_size == 0
    found = run_ranks(train, 2, tmp_path, "", (), {}, timeout=TIMEOUT_SECONDS)
    assert [losses for _, _, losses, _ in found] == undisturbed(tmp_path)
    assert left.stat().st_size == 0
    assert list((tmp_path / "disk").iterdir()) == [left]


# What one rank alone sees before training --------------------------------------------------------------------------------


@contextlib.contextmanager
def mounted(folder: Path, options: str) -> Iterator[None]:
    """Mount a small file system; skip where that is not allowed."""
    folder.mkdir(parents=True, exist_ok=True)
    if subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", str(folder)], capture_output=True).returncode:
        pytest.skip("mounting a file system is not allowed here")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def refused(folder: Path) -> tuple[str, str]:
    """Train with a directory that has the same name on each rank, and is another one."""
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder / str(dist.get_rank()))
        name, said, _, _ = train(Path(), "", (), {"zero": 2})
    return name, said


@pytest.mark.parametrize("trouble", [full("no directory"), full("a file"), "no space", full("read-only")])
@pytest.mark.filterwarnings("ignore:.*lies on tmpfs, which is host memory")
def test_what_one_rank_cannot_use_all_ranks_refuse_before_training(trouble: str, tmp_path: Path) -> None:
    own, disk = tmp_path / "1", tmp_path / "1/disk"
    for rank in ("0", "1"):
        (tmp_path / rank).mkdir()
    with contextlib.ExitStack() as stack:
        if trouble == "a file":
            disk.write_text("")
        elif trouble == "no directory":
            disk.symlink_to(own / "gone/disk")
        else:
            stack.enter_context(mounted(disk, "size=16k" if trouble == "no space" else "ro"))
        results = run_ranks(refused, 2, tmp_path, timeout=TIMEOUT_SECONDS)
        assert not list((tmp_path / "0").rglob("*.ckpt"))
    words = {
        "no directory": r"The folder '.*/1/disk' cannot be used for the state of a run: .*\(E[A-Z]+\)",
        "a file": r"The folder '.*/1/disk' cannot be used for the state of a run: it is a file",
        "no space": r"files of 1 ranks on .* need 64\.0 KiB, and their disk has 16\.0 KiB free\. Free space there",
        "read-only": r"No file can be made in '.*/1/disk': Read-only file system \(EROFS\)\. Give a path that this process",
    }
    for name, said in results:
        assert name == "StorageError", said
        assert re.search(words[trouble], said), said


class Unfreezes(Net):
    """Trains its first layer from the fourth step on, whose state needs room then."""

    def __init__(self, disk: Path) -> None:
        super().__init__(width=256)
        self.layers[0].requires_grad_(False)
        self.disk = disk

    def training_step(self, batch: Any, index: int) -> Tensor:
        if self.global_step == FAULTY and not self.layers[0].weight.requires_grad:
            if dist.get_rank() == 1:
                with contextlib.suppress(OSError), (self.disk / "of somebody else").open("wb") as file:
                    while True:
                        file.write(bytes(PAGE))
                        file.flush()
            self.layers[0].requires_grad_(True)
        return super().training_step(batch, index)


def unfreeze(folder: Path) -> tuple[str, str]:
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(own := folder / str(dist.get_rank()))
        scene = Scene(Path(), "", (), {"width": 256})
        scene.checkpoints, scene.exception = str(folder / "checkpoints"), str(folder / "exception")
        try:
            scene.run(Unfreezes(own / "disk"))
        except Exception as error:  # every kind is looked at by the test
            stay_for_the_others()
            return type(error).__name__, str(error)
    return "nothing", ""


@pytest.mark.filterwarnings("ignore:.*lies on tmpfs, which is host memory")
def test_a_disk_that_others_have_filled_when_more_room_is_needed_ends_all_ranks(tmp_path: Path) -> None:
    (tmp_path / "0").mkdir()
    with mounted(tmp_path / "1/disk", "size=2m"):
        waiting, failing = run_ranks(unfreeze, 2, tmp_path, timeout=TIMEOUT_SECONDS)
    assert failing[0] == "StorageError"
    assert re.search(r"\d+ bytes \(.*\) are needed in '.*/1/disk', and this user may take 0 \(0 B\)", failing[1]), (
        failing
    )
    assert waiting[0] == "RankError"
    assert waiting[1].startswith("rank 1 failed: meshbolt.errors.StorageError")
    assert is_checkpoint(tmp_path / "checkpoints/step=2.ckpt")
    assert not is_checkpoint(tmp_path / "exception/on_exception.ckpt")
