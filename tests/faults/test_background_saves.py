"""Ranks that are killed at random moments while checkpoints are written in the background: what is left is whole.

Each run trains, and saves after every step: `last.ckpt`, replaced each time, and the latest under a name of its own. What a
checkpoint of each step must hold is noted before it is saved. Afterwards every checkpoint that is there must load, on another
number of ranks too, and hold what was noted for its step; and nothing may be lost that was committed.
"""

from __future__ import annotations

import hashlib
import os
import random
import signal
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint
from tests.ranks.trainer.background_support import At, before_writing, strategy
from tests.ranks.trainer.loops_support import ADVICE, Regressor, batches, strategy_of, trainer, weights

from meshbolt.checkpoint import directory, is_checkpoint
from meshbolt.testing import RankFailure, run_ranks

pytestmark = ADVICE

MOMENTS, MOMENTS_OF_ALL = 2, 64
KILLED = -signal.SIGKILL


def digest(owner: pl.Trainer) -> str:
    """Return a digest of weights and optimizer state; a collective."""
    found = hashlib.sha256()
    module = owner.lightning_module
    for name, value in sorted(weights(module).items()):
        found.update(name.encode() + value.numpy().tobytes())
    with strategy_of(owner).gathered(module, optimizer=owner.optimizers[0]) as state:
        for name, values in sorted(state.items()):
            for key, value in sorted(values.items()):
                found.update(f"{name}.{key}".encode() + torch.as_tensor(value).numpy().tobytes())
    return found.hexdigest()


class Noting(pl.Callback):
    """Notes what the checkpoint of each step must hold, before it is saved."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        found = digest(trainer)
        if trainer.is_global_zero:
            (self.folder / f"{trainer.global_step}.notes").open("a").write(f"{found}\n")


def train_until_killed(folder: Path, seed: int, victims: tuple[int, ...], resumes: bool) -> None:
    """Train, with a clock that kills this rank after a random part of a second of writing."""
    chance = random.Random(seed * 10 + dist.get_rank() * (len(victims) == 1))
    delay, until = chance.uniform(0.0, 0.5), chance.randint(1, 4)
    writes: list[Path] = []

    def set_the_clock(path: Path) -> None:
        writes.append(path)
        if dist.get_rank() in victims and len(writes) == until:
            threading.Timer(delay, os.kill, (os.getpid(), signal.SIGKILL)).start()

    def commit_noted(partial: Path, *, target: Path) -> None:
        commit(partial, target=target)
        (folder / "committed").open("a").write(f"{target.name}\n")

    commit, directory.commit = directory.commit, commit_noted
    before_writing(set_the_clock)
    path = folder / "saved/last.ckpt"
    savers: list[pl.Callback] = [
        At(*range(400), do=lambda owner: owner.save_checkpoint(path)),
        ModelCheckpoint(folder / "saved", "{step}", every_n_train_steps=1, save_top_k=1),
    ]
    owner = trainer(
        strategy(timeout=timedelta(seconds=15)), callbacks=[Noting(folder), *savers], max_epochs=1000, max_steps=400
    )
    owner.fit(Regressor(), batches(), ckpt_path=path if resumes and is_checkpoint(path) else None)
    time.sleep(1)


def loads(folder: Path) -> dict[str, tuple[int, bool]]:
    """Load every checkpoint and compare it with what was noted for its step."""
    found = {}

    class Begin(pl.Callback):
        def on_train_start(self, trainer: pl.Trainer, _module: pl.LightningModule) -> None:
            noted = (folder / f"{trainer.global_step}.notes").read_text().split()  # of each run
            found[name] = (trainer.global_step, digest(trainer) in noted)
            trainer.should_stop = True

    for name in sorted(place.name for place in (folder / "saved").glob("*.ckpt")):
        trainer("zero2", callbacks=[Begin()], max_steps=400).fit(
            Regressor(), batches(), ckpt_path=folder / "saved" / name
        )
    return found


def committed(folder: Path) -> list[str]:
    return (folder / "committed").read_text().split() if (folder / "committed").exists() else []


def kill_and_look(folder: Path, seed: int) -> None:
    chance = random.Random(seed)
    victims = chance.choice([(0,), (1,), (0, 1)])
    (folder / "saved").mkdir()
    for resumes in (False, True):  # the second run finds what the first has left, and is killed as well
        with pytest.raises(RankFailure) as raised:
            run_ranks(train_until_killed, 2, folder, seed, victims, resumes)
        outcomes = raised.value.outcomes
        assert any(outcomes[rank].kind == "died" for rank in victims), [one.headline() for one in outcomes]
        names = set(committed(folder))
        there = sorted(place.name for place in (folder / "saved").glob("*.ckpt"))
        assert all(is_checkpoint(folder / "saved" / name) for name in there), there
        assert ("last.ckpt" in there) == ("last.ckpt" in names)
        steps = [name for name in there if name != "last.ckpt"]
        # One by one: its predecessor is deleted after it was committed, and a kill may come in between.
        assert len(steps) <= (4 if resumes else 2)
        assert bool(steps) == bool(names - {"last.ckpt"})
        if not there:
            continue
        ranks = chance.choice([1, 2, 3])
        for found in run_ranks(loads, ranks, folder):
            assert all(same for _, same in found.values()), (seed, victims, found)
            assert set(found) == set(there)


@pytest.mark.parametrize(
    "seed", [seed if seed < MOMENTS else pytest.param(seed, marks=pytest.mark.full) for seed in range(MOMENTS_OF_ALL)]
)
def test_whatever_a_kill_interrupts_what_is_there_is_whole_and_what_was_committed_stays(
    tmp_path: Path, seed: int
) -> None:
    kill_and_look(tmp_path, seed)
