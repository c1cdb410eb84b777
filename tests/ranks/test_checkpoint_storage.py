"""Several ranks that save to and load from a storage of fsspec's, which nobody can rename on."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tests import shelf
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from meshbolt.checkpoint import load_objects, load_tensors, remote, save_directory, shards, verify_checkpoint
from meshbolt.errors import CheckpointError
from meshbolt.testing import RankFailure, run_ranks, run_ranks_expecting

ROWS = 12


def parts(value: float) -> dict[str, torch.Tensor]:
    world = dist.get_world_size()
    mesh = init_device_mesh("cpu", (world,))
    sharded = DTensor.from_local(torch.full((ROWS // world, 50), value), mesh, [Shard(0)], run_check=False)
    return {"w": sharded, "step": torch.tensor(value)}


def url_of(folder: Path) -> str:
    return f"{shelf.Shelf.protocol}://{folder}/last.ckpt"


def save_value(url: str, value: float, **options: Any) -> None:
    save_directory(url, tensors=parts(value), objects={"value": value}, **options)


def saved_value(url: str) -> float:
    tensors = parts(-1.0)
    load_tensors(url, tensors)
    local = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors.values()]
    found = {value for tensor in local for value in tensor.unique().tolist()} | {load_objects(url)["value"]}
    assert len(found) == 1, f"a mix of {found}"
    return found.pop()


def test_any_number_of_ranks_loads_what_another_number_saved_and_a_save_replaces(tmp_path: Path) -> None:
    url = url_of(tmp_path)
    for value, saving, loading in ((1.0, 4, 2), (2.0, 2, 3), (3.0, 3, 4)):
        run_ranks(save_value, saving, url, value)
        assert run_ranks(saved_value, loading, url) == [value] * loading
        assert verify_checkpoint(url) == ()
        assert len(list((tmp_path / "last.ckpt").iterdir())) == 2


def test_a_rank_that_dies_leaves_the_old_checkpoint_and_the_next_save_cleans_up(tmp_path: Path) -> None:
    def save_with_a_death() -> None:
        tensors = parts(2.0)
        if dist.get_rank() == 1:
            shards.dcp_save = lambda *args, **kwargs: os._exit(9)
        save_directory(url, tensors=tensors, objects={"value": 2.0})

    url = url_of(tmp_path)
    run_ranks(save_value, 2, url, 1.0)
    with pytest.raises(RankFailure) as failure:
        run_ranks(save_with_a_death, 2)
    assert failure.value.outcomes[0].raised(CheckpointError)
    assert run_ranks(saved_value, 2, url) == [1.0, 1.0]
    run_ranks(save_value, 2, url, 3.0)
    assert run_ranks(saved_value, 2, url) == [3.0, 3.0]
    assert len(list((tmp_path / "last.ckpt").iterdir())) == 2


@pytest.mark.parametrize("moment", ["before the manifest", "while it is put", "after it"])
def test_a_first_rank_that_dies_around_the_commit_leaves_one_of_the_two(tmp_path: Path, moment: str) -> None:
    def save_with_a_death() -> None:
        tensors = parts(2.0)
        if dist.get_rank() == 0:
            pipe_file = shelf.Shelf.pipe_file

            def die(self: Any, path: str, content: bytes) -> None:
                part = {"before the manifest": None, "while it is put": len(content) // 2, "after it": len(content)}
                if part[moment] is not None:
                    pipe_file(self, path, content[: part[moment]])
                os._exit(9)

            shelf.Shelf.pipe_file = die  # type: ignore[method-assign]
        save_directory(url, tensors=tensors, objects={"value": 2.0})

    url = url_of(tmp_path)
    run_ranks(save_value, 2, url, 1.0)
    with pytest.raises(RankFailure):
        run_ranks(save_with_a_death, 2)
    one, other = run_ranks(saved_value, 2, url)
    assert one == other
    assert one in {"before the manifest": {1.0}, "while it is put": {1.0, 2.0}, "after it": {2.0}}[moment]
    run_ranks(save_value, 2, url, 3.0)
    assert run_ranks(saved_value, 2, url) == [3.0, 3.0]
    assert len(list((tmp_path / "last.ckpt").iterdir())) == 2


def test_a_storage_that_ranks_do_not_share_is_found_before_the_commit(tmp_path: Path) -> None:
    """The memory of a process is such a storage."""
    message = r"its file (__1_0\.distcp|\.metadata) is missing"
    run_ranks_expecting(save_value, 2, "memory://last.ckpt", 1.0, error=CheckpointError, match=message)


def test_a_failure_of_one_rank_is_told_to_all_and_the_old_checkpoint_stays(tmp_path: Path) -> None:
    def save_without_room() -> None:
        tensors = parts(2.0)
        if dist.get_rank() == 1:
            remote.RemoteFiles.open = lambda *args: (_ for _ in ()).throw(PermissionError("read only"))
        save_directory(url, tensors=tensors, objects={})

    url = url_of(tmp_path)
    run_ranks(save_value, 2, url, 1.0)
    one, other = run_ranks_expecting(save_without_room, 2, error=CheckpointError, match="rank 1: .*read only")
    assert one == other
    assert run_ranks(saved_value, 2, url) == [1.0, 1.0]
    assert len(list((tmp_path / "last.ckpt").iterdir())) == 2
