"""If these fail, tensors that never are in memory as a whole are written as others, or read as others, than those that are."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from tests import shelf
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from meshbolt.checkpoint import BackgroundSaver, load_tensors, open_tensors, save_directory, verify_checkpoint
from meshbolt.compat import StoredTensor, distributed_part, divided_placement, local_tensor, own_pieces
from meshbolt.errors import CheckpointError
from meshbolt.testing import run_ranks

# By name: the whole shape, the dim that is divided (-1: none), and into how many sections.
LAYOUTS = {
    "rows": ((9, 5), 0, 1),
    "columns": ((6, 8), 1, 1),
    "sections of rows": ((12, 3), 0, 3),
    "sections of columns": ((2, 12), 1, 2),
    "fewer than ranks": ((1, 7), 0, 1),
    "nothing": ((0, 4), 0, 1),
    "whole": ((4, 4), -1, 1),
}
SMALL_RUN_BYTES = 28  # seven numbers


class FewAtATime:
    """Gives values in runs of five."""

    def __init__(self, values: torch.Tensor) -> None:
        self.values = values

    def read(self, start: int, stop: int) -> Iterator[torch.Tensor]:
        for first in range(start, stop, 5):
            yield self.values.reshape(-1)[first : min(first + 5, stop)].clone()


def parts(*, along: int = 0, empty: bool = False) -> dict[str, torch.Tensor]:
    """Return this rank's tensors.

    Args:
        along: other than 0: those that are divided are so along another dim, all in one section.
        empty: zeros in the place of values.
    """
    world = dist.get_world_size()
    mesh = init_device_mesh("cpu", (world,))
    made: dict[str, torch.Tensor] = {}
    for name, (shape, dim, sections) in LAYOUTS.items():
        whole = torch.arange(float(math.prod(shape))).view(shape) * (not empty)
        if dim < 0:
            made[name] = whole
            continue
        placement = divided_placement((dim + along) % 2, 1 if along else sections)
        own = distributed_part(torch.empty(0), mesh=mesh, placements=[placement], shape=shape)
        pieces = [whole[there] for _, there in own_pieces(own)]
        part = torch.cat(pieces, placement.dim) if pieces else whole.narrow(placement.dim, 0, 0)  # type: ignore[attr-defined]
        made[name] = distributed_part(part.contiguous(), mesh=mesh, placements=[placement], shape=shape)
    return made


def stored(tensor: torch.Tensor) -> torch.Tensor:
    local = local_tensor(tensor)
    made = StoredTensor(FewAtATime(local), shape=local.shape, dtype=local.dtype)
    if not isinstance(tensor, DTensor):
        return made
    return distributed_part(made, mesh=tensor.device_mesh, placements=tensor.placements, shape=tensor.shape)


def save(path: str, kind: str) -> None:
    tensors = parts()
    given = tensors if kind == "memory" else {name: stored(tensor) for name, tensor in tensors.items()}
    if kind == "background":
        saver = BackgroundSaver(dist.new_group(backend="gloo"))
        saver.save(path, tensors=given, objects={})
        for tensor in given.values():  # what was not in memory is written by now
            local_tensor(tensor).store.values.fill_(-1)  # type: ignore[attr-defined]
        saver.wait()
    else:
        save_directory(path, tensors=given, objects={})


def digests(path: Path) -> dict[str, str]:
    files = (file for file in path.iterdir() if file.name.endswith(".distcp"))
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


@pytest.mark.parametrize("kind", ["stored", "background"])
def test_files_are_the_same_bytes_as_of_tensors_in_memory(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("meshbolt.compat.stored.RUN_BYTES", SMALL_RUN_BYTES)
    for each in ("memory", kind):
        run_ranks(save, 2, str(tmp_path / each), each)
    assert digests(tmp_path / kind) == digests(tmp_path / "memory")
    assert verify_checkpoint(tmp_path / kind) == ()


def opened(path: str, along: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Return what is opened and what is loaded, part by part."""
    tensors = parts(along=along, empty=True)
    found = open_tensors(path, {k: v if isinstance(v, DTensor) else None for k, v in tensors.items()})
    assert all(isinstance(local_tensor(found[name]), StoredTensor) for name in tensors)
    load_tensors(path, tensors)
    values = [local_tensor(found[name]).value() for name in tensors]  # type: ignore[attr-defined]
    flat = [[run.clone() for run in local_tensor(found[name]).runs(2, 6)] for name in ("rows", "columns")]  # type: ignore[attr-defined]
    expected = [local_tensor(tensor) for tensor in tensors.values()]
    values += [torch.cat(runs) for runs in flat]
    expected += [local_tensor(tensors[name]).reshape(-1)[2:6] for name in ("rows", "columns")]
    return values, expected


@pytest.mark.parametrize("storage", ["directory", "url"])
@pytest.mark.parametrize(("saving", "loading", "along"), [(2, 2, 0), (2, 3, 0), (3, 2, 1), (1, 2, 1)])
def test_any_layout_is_opened_in_any_other(
    storage: str, saving: int, loading: int, along: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("meshbolt.compat.stored.RUN_BYTES", SMALL_RUN_BYTES)
    monkeypatch.setattr("meshbolt.checkpoint.stored.RUN_BYTES", SMALL_RUN_BYTES)
    path = str(tmp_path / "a") if storage == "directory" else f"{shelf.Shelf.protocol}://{tmp_path}/a"
    run_ranks(save, saving, path, "stored")
    for values, expected in run_ranks(opened, loading, path, along):
        assert all(torch.equal(*pair) for pair in zip(values, expected, strict=True))
        assert sum(value.numel() for value in values)


def opened_after(path: str, damage: str) -> str:
    tensors = parts()
    wanted = {name: tensor for name, tensor in tensors.items() if isinstance(tensor, DTensor)}
    try:
        found = open_tensors(path, wanted, verify=damage != "unverified")
    except CheckpointError as error:
        return str(error)
    if damage == "replaced":  # by another one, whose files have the same names
        dist.barrier()
        save_directory(path, tensors={name: tensor * 0 for name, tensor in tensors.items()}, objects={})
    return str(all(torch.equal(local_tensor(found[k]).value(), local_tensor(v)) for k, v in wanted.items()))  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("damage", "words"), [("none", "True"), ("replaced", "True"), ("bits", "is damaged"), ("unverified", "False")]
)
def test_damage_is_found_when_they_are_opened_and_a_checkpoint_may_be_replaced_after_it(
    damage: str, words: str, tmp_path: Path
) -> None:
    path = tmp_path / "a"
    run_ranks(save, 2, str(path), "memory")
    if damage in ("bits", "unverified"):
        file = path / "__1_0.distcp"
        content = bytearray(file.read_bytes())
        at = content.index(torch.arange(25.0, 45.0).numpy().tobytes())  # this rank's rows
        content[at + 7] ^= 0x40
        file.write_bytes(content)
    said = run_ranks(opened_after, 2, str(path), damage)
    assert words in said[1]
    assert words in said[0] or damage == "unverified"
    if damage == "bits":
        assert "rank 1: file __1_0.distcp" in said[0]
