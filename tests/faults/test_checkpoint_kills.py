"""Ranks killed at any moment of a save: the previous or the new checkpoint is there, whole, and the next save works."""

from __future__ import annotations

import os
import random
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tests.shelf import Shelf
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from meshbolt.checkpoint import (
    directory,
    is_checkpoint,
    load_objects,
    load_tensors,
    remove_directory,
    save_directory,
    verify_checkpoint,
)
from meshbolt.errors import CheckpointError
from meshbolt.testing import Outcome, RankFailure, ranks, run_ranks

OLD, NEW, NEXT = 1.0, 2.0, 3.0
ROWS, COLUMNS, WEIGHTS = 8, 20_000, 3
MANY = 240
# Of each way to save, one in the default run.
FEW = 6


@dataclass(frozen=True)
class Kill:
    """One case, all of it drawn from its number.

    Attributes:
        storage: "exchange", "two renames" or "shelf", which is remote.
        replacing: whether there is a checkpoint of this name already.
        ranks: who is killed.
        at: by rank, when: the fraction of what the rank calls in a whole save, or, if timed, of a time.
        timed: kill in the middle of whatever goes on, not at the beginning or the end of a call.
    """

    storage: str
    replacing: bool
    ranks: tuple[int, ...]
    at: tuple[float, float]
    timed: bool

    @classmethod
    def draw(cls, number: int) -> Kill:
        generator = random.Random(number)
        return cls(
            storage=("exchange", "two renames", "shelf")[number % 3],
            replacing=number % 4 != 3,
            ranks=((0,), (1,), (0, 1))[generator.randrange(3)],
            at=(generator.random(), generator.random()),
            timed=generator.random() < 0.35,
        )


def state(value: float) -> dict[str, torch.Tensor]:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    local = torch.full((ROWS // dist.get_world_size(), COLUMNS), value)
    sharded = DTensor.from_local(local, mesh, [Shard(0)], run_check=False)
    return {f"w{number}": sharded for number in range(WEIGHTS)} | {f"rng.{dist.get_rank()}": torch.full((3,), value)}


def save_value(path: str, value: float) -> None:
    save_directory(path, tensors=state(value), objects={"value": value})


def whole_value(path: str) -> float:
    """Load everything in this process and return the one value that it holds throughout."""
    tensors = {f"w{number}": torch.zeros(ROWS, COLUMNS) for number in range(WEIGHTS)}
    tensors |= {f"rng.{rank}": torch.zeros(3) for rank in range(2)}
    load_tensors(path, tensors)
    found = {value for tensor in tensors.values() for value in tensor.unique().tolist()} | {load_objects(path)["value"]}
    assert len(found) == 1, f"a mix of {found}"
    assert verify_checkpoint(path) == ()
    return float(found.pop())


@contextmanager
def killed_at(event: int) -> Iterator[list[int]]:
    """Kill this process when it has made so many calls, of Python's or of C; never where they are fewer."""
    seen = [0]

    def count(frame: Any, kind: str, argument: Any) -> None:
        seen[0] += 1
        if seen[0] == event:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.setprofile(count)
    try:
        yield seen
    finally:
        sys.setprofile(None)


def save_and_die(path: str, kill: Kill, calls: list[int], seconds: float) -> int:
    rank = dist.get_rank()
    if kill.storage == "two renames":
        directory.exchange = lambda first, second: False
    tensors = state(NEW)
    dist.barrier()
    event = 0
    if rank in kill.ranks and kill.timed:
        timer = threading.Timer(kill.at[rank] * seconds, os.kill, (os.getpid(), signal.SIGKILL))
        timer.daemon = True
        timer.start()
    elif rank in kill.ranks:
        event = 1 + int(0.99 * kill.at[rank] * calls[rank])
    with killed_at(event) as seen:
        save_directory(path, tensors=tensors, objects={"value": NEW})
    if rank in kill.ranks:  # the save was shorter than expected: killed when it is done
        os.kill(os.getpid(), signal.SIGKILL)
    return seen[0]


@pytest.fixture(scope="module")
def calls_of_a_save(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[int]]:
    """Return by storage how many calls each rank makes in a save that nobody ends."""
    found = {}
    for storage in ("exchange", "two renames", "shelf"):
        path = path_of(tmp_path_factory.mktemp("calls"), storage)
        run_ranks(save_value, 2, path, OLD)
        whole_value(path)  # what is done once in a process is done in this one, from which ranks are forked
        nobody = Kill(storage=storage, replacing=True, ranks=(), at=(0.0, 0.0), timed=False)
        found[storage] = run_ranks(save_and_die, 2, path, nobody, [0, 0], 0.0)
    return found


def path_of(folder: Path, storage: str) -> str:
    return f"{Shelf.protocol}://{folder}/last.ckpt" if storage == "shelf" else str(folder / "last.ckpt")


def outcomes_of(path: str, kill: Kill, calls: list[int]) -> tuple[Outcome, ...]:
    try:
        run_ranks(save_and_die, 2, path, kill, calls, 0.15)
    except RankFailure as failure:
        return failure.outcomes
    return ()


@pytest.mark.parametrize(
    "number", [*range(FEW), *(pytest.param(number, marks=pytest.mark.full) for number in range(FEW, MANY))]
)
def test_a_kill_at_any_moment_leaves_the_previous_or_the_new_checkpoint_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calls_of_a_save: dict[str, list[int]], number: int
) -> None:
    # Survivors have this long to notice: a machine that is busy with other things is no hang.
    monkeypatch.setattr(ranks, "GRACE_SECONDS", 12.0)
    kill = Kill.draw(number)
    path = path_of(tmp_path, kill.storage)
    if kill.replacing:
        run_ranks(save_value, 2, path, OLD)
    outcomes = outcomes_of(path, kill, calls_of_a_save[kill.storage])
    died = {rank for rank, outcome in enumerate(outcomes) if outcome.kind == "died"}
    assert died
    assert died <= set(kill.ranks)
    for one in outcomes:
        assert one.kind in ("died", "returned") or one.raised(CheckpointError), one.headline()
    if kill.replacing or is_checkpoint(path):
        assert whole_value(path) in {OLD, NEW}
    run_ranks(save_value, 2, path, NEXT)
    assert whole_value(path) == NEXT
    remove_directory(path)
    assert [place for place in tmp_path.rglob("*") if place.is_file()] == []


def test_the_kills_are_of_every_kind() -> None:
    drawn = [Kill.draw(number) for number in range(MANY)]
    kinds = {(kill.storage, kill.replacing, kill.ranks, kill.timed) for kill in drawn}
    assert len(kinds) == 3 * 2 * 3 * 2
    assert {kill.storage for kill in drawn[:FEW]} == {"exchange", "two renames", "shelf"}
    assert {kill.replacing for kill in drawn[:FEW]} == {True, False}
