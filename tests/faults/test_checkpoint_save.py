"""Saves that are cut short: afterwards the old or the new checkpoint loads whole, and the next save works."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from meshbolt.checkpoint import (
    directory,
    is_checkpoint,
    load_objects,
    load_tensors,
    local,
    save,
    save_directory,
)
from meshbolt.checkpoint.local import LocalFiles, LocalPlace
from meshbolt.errors import CheckpointError
from meshbolt.testing import Outcome, RankFailure, run_ranks, run_ranks_expecting

OLD, NEW = 1.0, 2.0
# Each rank's part is larger than the buffers of its file.
ROWS, COLUMNS = 64, 512

Cut = Callable[[], None]


def names_in(folder: Path) -> list[str]:
    return sorted(place.name for place in folder.iterdir())


def state(value: float) -> dict[str, torch.Tensor]:
    """Return what a rank saves: its part of tensors that hold one value everywhere, and something of its own."""
    world = dist.get_world_size()
    mesh = init_device_mesh("cpu", (world,))
    parts = [torch.full((ROWS // world, COLUMNS), value) for _ in range(4)]
    tensors: dict[str, torch.Tensor] = {
        f"w{number}": DTensor.from_local(part, mesh, [Shard(0)], run_check=False) for number, part in enumerate(parts)
    }
    return tensors | {f"rng.{dist.get_rank()}": torch.full((3,), value)}


def save_value(path: Path, value: float, **options: Any) -> None:
    save_directory(path, tensors=state(value), objects={"value": value}, **options)


def saved_value(path: Path) -> float:
    """Load everything on every rank and return the one value that it holds throughout."""
    tensors = state(-1.0)
    load_tensors(path, tensors)
    local = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors.values()]
    found = {value for tensor in local for value in tensor.unique().tolist()} | {load_objects(path)["value"]}
    assert len(found) == 1, f"a mix of {found}"
    return found.pop()


def value_there_and_after_a_save(path: Path) -> tuple[float, float]:
    there = saved_value(path)
    save_value(path, 3.0)
    return there, saved_value(path)


def with_old(folder: Path, *, ranks: int = 2) -> Path:
    path = folder / "last.ckpt"
    run_ranks(save_value, ranks, path, OLD)
    return path


def outcomes_of(path: Path, cut: Cut, *, on: int | None, ranks: int = 2) -> tuple[Outcome, ...]:
    """Save the new value on ranks of which one (None: each) has prepared its own end, and return how they ended."""

    def save_with_a_cut() -> None:
        tensors = state(NEW)
        if on in (None, dist.get_rank()):
            cut()
        save_directory(path, tensors=tensors, objects={"value": NEW})

    with pytest.raises(RankFailure) as failure:
        run_ranks(save_with_a_cut, ranks)
    return failure.value.outcomes


def end_at(owner: Any, name: str, *, after: bool = False) -> None:
    """Have this process end, as by a crash, when it calls a function; `after`: when that has returned."""
    original = getattr(owner, name)

    def ending(*args: Any, **kwargs: Any) -> None:
        if after:
            original(*args, **kwargs)
        os._exit(9)

    setattr(owner, name, ending)


class HalfWritten:
    """A file that takes one large write, and then something happens."""

    def __init__(self, stream: Any, happening: Callable[[], None]) -> None:
        self.stream, self.happening, self.seen = stream, happening, False

    def write(self, data: Any) -> Any:
        if self.seen:
            self.stream.flush()
            self.happening()
        self.seen = self.seen or len(data) > 10_000
        return self.stream.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def break_shards(happening: Callable[[], None]) -> None:
    """Let something happen to this rank in the middle of its shard, below all that is ours."""

    @contextlib.contextmanager
    def open_file(self: Any, name: str, mode: Any) -> Iterator[Any]:
        with original(self, name, mode) as stream:
            yield HalfWritten(stream, happening) if mode == "wb" and name.endswith("distcp") else stream

    original = LocalFiles.open
    LocalFiles.open = open_file  # type: ignore[method-assign]


def no_exchange() -> None:
    directory.exchange = lambda first, second: False


def between_renames() -> None:
    no_exchange()
    end_at(Path, "rename", after=True)


def after_both_renames() -> None:
    no_exchange()
    end_at(directory, "commit", after=True)


CUTS: dict[str, tuple[Cut, int, float]] = {
    # name: (what ends the rank, which rank, the value that is there afterwards)
    "before anything is written": (lambda: end_at(save, "write_objects"), 0, OLD),
    "before its shard": (lambda: end_at(save, "write_shards"), 1, OLD),
    "in the middle of its shard": (lambda: break_shards(lambda: os._exit(9)), 1, OLD),
    "in the middle of the first rank's shard": (lambda: break_shards(lambda: os._exit(9)), 0, OLD),
    "when all shards are written": (lambda: end_at(LocalPlace, "settle"), 1, OLD),
    "before the manifest": (lambda: end_at(local, "check_sizes", after=True), 0, OLD),
    "after the manifest": (lambda: end_at(directory, "commit"), 0, OLD),
    "between two renames": (between_renames, 0, OLD),
    "after the exchange": (lambda: end_at(directory, "exchange", after=True), 0, NEW),
    "after both renames": (after_both_renames, 0, NEW),
    "while the old one is deleted": (lambda: end_at(directory, "discard"), 0, NEW),
}


@pytest.mark.parametrize("name", CUTS)
def test_a_rank_that_dies_leaves_a_whole_checkpoint_and_the_next_save_cleans_up(tmp_path: Path, name: str) -> None:
    cut, rank, expected = CUTS[name]
    path = with_old(tmp_path)
    outcomes = outcomes_of(path, cut, on=rank)
    assert outcomes[rank].kind == "died"
    assert outcomes[rank].exit_code == 9
    survivor = outcomes[1 - rank]
    # What the first rank does after the last exchange concerns nobody else.
    assert survivor.kind == "returned" or survivor.raised(CheckpointError)
    assert is_checkpoint(path)
    assert run_ranks(value_there_and_after_a_save, 2, path) == [(expected, 3.0)] * 2
    assert names_in(tmp_path) == ["last.ckpt"]


@pytest.mark.parametrize("name", ["in the middle of its shard", "between two renames", "after the exchange"])
def test_the_same_holds_where_all_ranks_die(tmp_path: Path, name: str) -> None:
    cut, _, expected = CUTS[name]
    path = with_old(tmp_path)
    outcomes = outcomes_of(path, cut, on=None)
    assert {one.kind for one in outcomes} <= {"died", "raised", "stopped"}
    assert outcomes[0].kind == "died"
    assert run_ranks(value_there_and_after_a_save, 2, path) == [(expected, 3.0)] * 2
    assert names_in(tmp_path) == ["last.ckpt"]


def test_the_survivors_of_a_dead_rank_are_told_that_they_lost_it(tmp_path: Path) -> None:
    path = with_old(tmp_path, ranks=4)
    outcomes = outcomes_of(path, lambda: break_shards(lambda: os._exit(9)), on=2, ranks=4)
    assert outcomes[2].kind == "died"
    survivors = [outcomes[rank] for rank in (0, 1, 3)]
    assert all(one.raised(CheckpointError) for one in survivors), [one.headline() for one in survivors]
    assert all("the contact with another rank was lost" in one.message for one in survivors)
    assert run_ranks(saved_value, 4, path) == [OLD] * 4


def test_a_first_save_that_dies_leaves_nothing_that_looks_like_a_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    outcomes_of(path, lambda: end_at(directory, "commit"), on=0)
    assert not is_checkpoint(path)
    run_ranks_expecting(load_objects, 2, path, error=CheckpointError, match="nothing at this path")


def no_space() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def file_limit(limit_bytes: int) -> Cut:
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, resource.RLIM_INFINITY))


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    ("cut", "reason"),
    [
        (file_limit(0), "File too large"),
        (file_limit(40_000), "File too large"),
        (file_limit(100_000), "File too large"),
        (lambda: break_shards(no_space), "No space left on device"),
    ],
    ids=["no room at all", "room for a header", "room for half", "no space in between"],
)
def test_a_rank_that_cannot_write_fails_all_with_its_words_and_nothing_is_left(
    tmp_path: Path, cut: Cut, reason: str, rank: int
) -> None:
    path = with_old(tmp_path)
    outcomes = outcomes_of(path, cut, on=rank)
    assert all(one.raised(CheckpointError) for one in outcomes)
    assert outcomes[0].message == outcomes[1].message
    assert f"rank {rank}: " in outcomes[0].message
    assert reason in outcomes[0].message
    assert names_in(tmp_path) == ["last.ckpt"]
    assert run_ranks(saved_value, 2, path) == [OLD] * 2


def test_an_interrupt_in_the_middle_of_a_shard_stays_one_and_fails_the_other_ranks(tmp_path: Path) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    path = with_old(tmp_path)
    first, second = outcomes_of(path, lambda: break_shards(interrupt), on=1)
    assert first.raised(CheckpointError)
    assert first.message.endswith("rank 1: KeyboardInterrupt")
    assert second.raised(KeyboardInterrupt)
    assert names_in(tmp_path) == ["last.ckpt"]


def test_ranks_go_on_after_a_failed_save(tmp_path: Path) -> None:
    def save_again() -> tuple[float, float]:
        if dist.get_rank() == 1:
            file_limit(0)()
        with pytest.raises(CheckpointError, match=r"rank 1: file __1_0\.distcp: OSError"):
            save_value(path, NEW)
        file_limit(resource.RLIM_INFINITY)()
        return value_there_and_after_a_save(path)

    path = with_old(tmp_path)
    assert run_ranks(save_again, 2) == [(OLD, 3.0)] * 2


def test_an_error_that_was_handled_before_the_save_is_not_blamed(tmp_path: Path) -> None:
    def save_while_handling() -> None:
        try:
            raise TimeoutError("of the training")
        except TimeoutError:
            if dist.get_rank() == 1:
                file_limit(40_000)()
            save_value(tmp_path / "last.ckpt", NEW)

    run_ranks_expecting(save_while_handling, 2, error=CheckpointError, match="rank 1: .*OSError: .*File too large")


def test_a_failure_of_the_commit_fails_all_ranks_and_the_old_checkpoint_stays(tmp_path: Path) -> None:
    def refuse_to_commit() -> None:
        def commit(partial: Path, *, target: Path) -> None:
            no_space()

        directory.commit = commit

    path = with_old(tmp_path)
    outcomes = outcomes_of(path, refuse_to_commit, on=0)
    assert all(one.raised(CheckpointError) for one in outcomes)
    assert "rank 0: OSError: [Errno 28] No space left" in outcomes[1].message
    assert names_in(tmp_path) == ["last.ckpt"]
    assert run_ranks(saved_value, 2, path) == [OLD] * 2


def test_the_files_of_a_failed_save_are_kept_where_that_is_asked(tmp_path: Path) -> None:
    def save_on_a_full_disk() -> None:
        tensors = state(NEW)
        if dist.get_rank() == 1:
            file_limit(0)()
        save_directory(path, tensors=tensors, objects={}, keep_partial=True)

    path = with_old(tmp_path)
    run_ranks_expecting(save_on_a_full_disk, 2, error=CheckpointError)
    (kept,) = [name for name in names_in(tmp_path) if name != "last.ckpt"]
    assert kept.startswith(".last.ckpt.partial-")
    assert names_in(tmp_path / kept) == ["__0_0.distcp", "__1_0.distcp", "meta.pt"]
    assert not is_checkpoint(tmp_path / kept)
    assert run_ranks(saved_value, 2, path) == [OLD] * 2


def test_an_error_that_cannot_travel_between_processes_still_reaches_all_ranks(tmp_path: Path) -> None:
    class UnpicklableError(Exception):
        def __init__(self, one: object, two: object) -> None:
            super().__init__("no pickle takes me")
            self.lock = contextlib.suppress

    def fail() -> None:
        raise UnpicklableError(1, 2)

    path = with_old(tmp_path)
    outcomes = outcomes_of(path, lambda: break_shards(fail), on=1)
    assert all(one.raised(CheckpointError) for one in outcomes)
    assert "rank 1: file __1_0.distcp: UnpicklableError: no pickle takes me" in outcomes[0].message
