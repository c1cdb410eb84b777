"""Loads of damaged checkpoints and loads that lose a rank: one error for all, or none."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from meshbolt.checkpoint import directory, load, load_objects, load_tensors, remove_directory, save_directory
from meshbolt.checkpoint.local import LocalPlace
from meshbolt.checkpoint.shard_reader import ShardReader
from meshbolt.errors import CheckpointError
from meshbolt.testing import RankFailure, run_ranks, run_ranks_expecting


def parts(value: float = 1.0) -> dict[str, torch.Tensor]:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return {"w": DTensor.from_local(torch.full((4, 8), value), mesh, [Shard(0)], run_check=False)}


def save_parts(path: Path, value: float = 1.0) -> None:
    save_directory(path, tensors=parts(value), objects={"epoch": 1})


@pytest.fixture
def path(tmp_path: Path) -> Path:
    run_ranks(save_parts, 2, tmp_path / "a.ckpt")
    return tmp_path / "a.ckpt"


def load_parts(path: Path) -> None:
    load_tensors(path, parts())


def overwrite(file: Path) -> None:
    file.write_bytes(b"\0" * file.stat().st_size)


DAMAGES: dict[str, tuple[Callable[[Path], None], Callable[[Path], Any], str]] = {
    # name: (what happens to the checkpoint, who finds it, what every rank says)
    "shard truncated": (lambda path: os.truncate(path / "__1_0.distcp", 100), load_parts, "__1_0.distcp has 100 bytes"),
    "shard of one rank overwritten": (lambda path: overwrite(path / "__1_0.distcp"), load_parts, "file __1_0.distcp: "),
    "shard missing": (lambda path: (path / "__0_0.distcp").unlink(), load_objects, "__0_0.distcp is missing"),
    "metadata overwritten": (lambda path: overwrite(path / ".metadata"), load_parts, "its file .metadata is damaged"),
    "objects overwritten": (lambda path: overwrite(path / "meta.pt"), load_objects, "meta.pt"),
    "manifest truncated": (
        lambda path: os.truncate(path / "manifest.json", 9),
        load_objects,
        "manifest.json is damaged",
    ),
    "manifest missing": (lambda path: (path / "manifest.json").unlink(), load_parts, "no manifest.json"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_checkpoint_is_the_same_error_on_every_rank(path: Path, name: str) -> None:
    damage, load_it, words = DAMAGES[name]
    damage(path)
    one, other = run_ranks_expecting(load_it, 2, path, error=CheckpointError, match="cannot be loaded: ")
    assert one == other
    assert words in one


def test_ranks_go_on_after_a_failed_load(path: Path) -> None:
    def load_twice() -> float:
        with pytest.raises(CheckpointError, match="nothing at this path"):
            load_parts(path.with_name("other.ckpt"))
        tensors = parts()
        load_tensors(path, tensors)
        return float(tensors["w"].full_tensor().sum())

    assert run_ranks(load_twice, 2) == [64.0, 64.0]


@pytest.mark.parametrize("moment", ["check_sizes", "read_metadata", "read_shards"])
@pytest.mark.parametrize("times", [1, 2])
def test_ranks_read_anew_together_when_the_checkpoint_is_replaced_under_them(
    path: Path, moment: str, times: int
) -> None:
    """Two checkpoints change places, and the one that was there is removed at once, as a save does it."""

    def load_while_it_is_replaced() -> tuple[list[float], str]:
        original, left = getattr(load, moment), iter(names[:times])

        def replace(*args: Any, **kwargs: Any) -> Any:
            if dist.get_rank() == 0 and (other := next(left, None)) is not None:
                directory.exchange(path.with_name(other), path)
                remove_directory(path.with_name(other))
            return original(*args, **kwargs)

        setattr(load, moment, replace)
        tensors, error = parts(0.0), ""
        try:
            load_tensors(path, tensors)
        except CheckpointError as failure:
            error = str(failure)
        return tensors["w"].to_local().unique().tolist(), error  # type: ignore[attr-defined]

    names = ["b.ckpt", "c.ckpt"]
    for number, name in enumerate(names):
        run_ranks(save_parts, 2, path.with_name(name), 2.0 + number)
    one, other = run_ranks(load_while_it_is_replaced, 2)
    assert one == other
    values, error = one
    if times == 1:
        assert (values, error) == ([2.0], "")
    else:
        assert values == [0.0]
        assert "was replaced" in error


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (LocalPlace, "find"),
        (load, "check_sizes"),
        (load, "read_metadata"),
        (load, "read_shards"),
        (ShardReader, "read_data"),
        (ShardReader, "fill"),
    ],
)
def test_the_survivors_of_a_rank_that_dies_while_loading_raise_an_error_of_ours(
    path: Path, owner: Any, name: str
) -> None:
    def load_with_a_death() -> None:
        dist.barrier()  # both are connected
        if dist.get_rank() == 1:
            setattr(owner, name, lambda *args, **kwargs: os._exit(9))
        load_parts(path)
        dist.barrier()

    with pytest.raises(RankFailure) as failure:
        run_ranks(load_with_a_death, 2)
    survivor, dead = failure.value.outcomes
    assert dead.exit_code == 9
    if name == "fill":  # all is agreed by then: the survivor has loaded, and meets the death afterwards
        assert survivor.raised(RuntimeError)
        assert not survivor.raised(CheckpointError)
        return
    assert survivor.raised(CheckpointError)
    assert "the contact with another rank was lost" in survivor.message
