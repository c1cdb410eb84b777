"""Damage of every kind, to every file: all of it is found, on every rank, in the same words, which name the file."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from meshbolt.checkpoint import load_objects, load_tensors, save_directory, verify_checkpoint
from meshbolt.checkpoint.manifest import seal
from meshbolt.errors import CheckpointError
from meshbolt.testing import run_ranks, run_ranks_expecting

FILES = ("__0_0.distcp", "__1_0.distcp", ".metadata", "meta.pt", "manifest.json")
# (seed, number of flipped bytes)
FLIPS = [(1, 20), *(pytest.param(seed, 60, marks=pytest.mark.full) for seed in range(2, 8))]


def parts(**more: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return tensors with more than a row of the checksum's on each rank, small ones, and one that a rank has alone."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    rank = dist.get_rank()
    generator = torch.Generator().manual_seed(rank)
    sharded = {
        key: DTensor.from_local(torch.randn(4, width, generator=generator), mesh, [Shard(0)], run_check=False)
        for key, width in (("w", 5000), ("b", 3))
    }
    return {**sharded, f"rng.{rank}": torch.arange(9), "step": torch.tensor(3.0), **more}


def save_parts(path: Path) -> None:
    save_directory(path, tensors=parts(), objects={"epoch": 1}, plan={"zero.stage": 3})


@pytest.fixture
def path(tmp_path: Path) -> Path:
    run_ranks(save_parts, 2, tmp_path / "a.ckpt")
    return tmp_path / "a.ckpt"


def load_all(path: Path) -> str:
    """Load everything and return the error; tensors may not have changed then."""
    tensors = {key: tensor.zero_() for key, tensor in parts().items()}
    try:
        load_objects(path)
        load_tensors(path, tensors)
    except CheckpointError as error:
        local = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors.values()]
        assert not any(tensor.any() for tensor in local), "a failed load has changed a tensor"
        return str(error)
    return ""


def messages(path: Path, damages: list[tuple[str, bytes]]) -> list[tuple[str, str, tuple[str, ...]]]:
    """Damage files one after the other; return for each the file, the error of the load, and what is verified."""
    found = []
    for name, content in damages:
        file = path / name
        whole = file.read_bytes()
        dist.barrier()
        if dist.get_rank() == 0:
            file.write_bytes(content)
        dist.barrier()
        found.append((name, load_all(path), verify_checkpoint(path)))
        dist.barrier()
        if dist.get_rank() == 0:
            file.write_bytes(whole)
    dist.barrier()
    assert load_all(path) == ""
    assert verify_checkpoint(path) == ()
    return found


def check_found(path: Path, damages: list[tuple[str, bytes]]) -> None:
    one, other = run_ranks(messages, 2, path, damages, timeout=150)
    assert one == other
    for name, loading, verifying in one:
        assert "cannot be loaded: " in loading
        assert name in loading, (name, loading)
        assert any(name in fault for fault in verifying), (name, verifying)


@pytest.mark.parametrize(("seed", "count"), FLIPS)
def test_every_changed_byte_is_found(path: Path, seed: int, count: int) -> None:
    generator = random.Random(seed)
    damages = []
    for number in range(count):
        name = FILES[number % len(FILES)]
        content = bytearray((path / name).read_bytes())
        content[generator.randrange(len(content))] ^= generator.randrange(1, 256)
        damages.append((name, bytes(content)))
    check_found(path, damages)


def test_every_truncated_and_lengthened_file_is_found(path: Path) -> None:
    damages = []
    for name in FILES:
        content = (path / name).read_bytes()
        lengths = [0, 1, len(content) // 3, len(content) - 1]
        damages += [(name, content[:length]) for length in lengths] + [(name, content + b"\0")]
    check_found(path, damages)


def test_parts_that_changed_places_are_found(path: Path) -> None:
    one, other = ((path / name).read_bytes() for name in FILES[:2])
    half = len(one) // 2
    check_found(path, [("__0_0.distcp", other[: len(one)].ljust(len(one))), ("__0_0.distcp", one[half:] + one[:half])])


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_found(path: Path, name: str) -> None:
    (path / name).unlink()
    one, other = run_ranks(load_all, 2, path)
    assert one == other
    assert name in one
    assert any(name in fault for fault in verify_checkpoint(path))


def test_all_that_is_read_is_counted_while_a_checkpoint_is_verified(path: Path) -> None:
    read: list[int] = []
    assert verify_checkpoint(path, on_bytes=read.append) == ()
    assert sum(read) == sum((path / name).stat().st_size for name in FILES if name != "manifest.json")


def other_model() -> dict[str, torch.Tensor]:
    new = {f"new.{number:02}": torch.zeros(1) for number in range(12)}
    return {**new, "w": torch.zeros(3, 5000), "step": torch.tensor(0.0)}


def a_file(path: Path) -> Path:
    return path / "meta.pt"


def no_checkpoint(path: Path) -> Path:
    (path.parent / "other").mkdir()
    (path.parent / "other" / "notes.txt").write_text("...")
    return path.parent / "other"


def partial(path: Path) -> Path:
    (path / "manifest.json").unlink()
    return path.rename(path.with_name(".a.ckpt.partial-0123456789ab"))


def of_version(path: Path, version: Any) -> Path:
    content = json.loads((path / "manifest.json").read_text())
    content = {**content, "format_version": version, "versions": {"meshbolt": "9.1"}}
    del content["checksum"]
    (path / "manifest.json").write_text(seal(json.dumps(content, indent=2).removesuffix("\n}")))
    return path


BAD: dict[str, tuple[Callable[[Path], Path], tuple[str, ...]]] = {
    # name: (what is loaded instead of the checkpoint, what every rank says)
    "nothing": (lambda path: path.with_name("b.ckpt"), ("there is nothing at this path",)),
    "a file": (a_file, ("it is a file",)),
    "a directory that is no checkpoint": (no_checkpoint, ("it has no manifest.json",)),
    "a save that never finished": (partial, ("it has no manifest.json", "Take an earlier checkpoint")),
    "a newer format": (lambda path: of_version(path, 99), ("version 99", "meshbolt 9.1", "Upgrade meshbolt")),
    "a format of the future": (lambda path: of_version(path, "next"), ("version 'next'", "Upgrade meshbolt")),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_checkpoint_for_us_is_the_same_error_on_every_rank(path: Path, name: str) -> None:
    make, words = BAD[name]
    bad = make(path)
    one, other = run_ranks(load_all, 2, bad)
    assert one == other
    assert f"Checkpoint {str(bad)!r} cannot be loaded: " in one
    assert all(word in one for word in words)
    faults = verify_checkpoint(bad)
    assert any(words[0] in fault for fault in faults)


def test_the_checkpoint_of_another_model_is_told_by_the_first_ten_keys_of_each_kind(path: Path) -> None:
    def load() -> None:
        load_tensors(path, other_model())

    one, other = run_ranks_expecting(load, 2, error=CheckpointError, match="does not fit what it is loaded into")
    assert one == other
    assert "12 not in the checkpoint:" in one
    assert "    new.09\n    and 2 more" in one
    assert "new.10" not in one
    assert "3 in the checkpoint and not asked for:\n    b\n    rng.0\n    rng.1\n" in one
    assert "1 of another shape or kind:\n    w: saved float32[8, 5000], asked for float32[3, 5000]" in one


def test_a_load_that_fails_on_one_rank_only_changes_no_rank(path: Path) -> None:
    """The other rank has read all that it needs, and may not use it."""

    def load() -> str:
        first, second = (
            {f"rng.{number}": torch.zeros(9, dtype=torch.int64), "step": torch.tensor(0.0)} for number in (0, 1)
        )
        own = first if dist.get_rank() == 0 else second
        with pytest.raises(CheckpointError) as error:
            load_tensors(path, own, prefix=())
        assert not any(tensor.any() for tensor in own.values())
        return str(error.value)

    content = bytearray((path / "__1_0.distcp").read_bytes())
    at = content.index(torch.arange(9).numpy().tobytes())
    content[at + 1] ^= 1
    (path / "__1_0.distcp").write_bytes(content)
    one, other = run_ranks(load, 2)
    assert one == other
    assert "rank 1: file __1_0.distcp: " in one


def test_a_directory_that_cannot_be_written_is_the_same_error_on_every_rank(tmp_path: Path) -> None:
    def save() -> None:
        if os.geteuid() == 0:  # nothing is read-only for root
            os.seteuid(65534)
        save_parts(tmp_path / "a.ckpt")

    one, other = run_ranks_expecting(save, 2, error=CheckpointError, match="was not saved, .*Permission denied")
    assert one == other
    assert list(tmp_path.iterdir()) == []
