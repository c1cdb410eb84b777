"""Tensors whose layers are divided: where each rank's part lies, and checkpoints of them, which any layout writes and reads."""

from __future__ import annotations

import functools
import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tests.rows import full
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from meshbolt.checkpoint import BackgroundSaver, load_tensors, save_directory, verify_checkpoint
from meshbolt.checkpoint.reader import CheckpointReader
from meshbolt.compat import distributed_part, distributed_tensor, divided_placement, local_tensor, own_pieces, whole_of
from meshbolt.testing import run_ranks

TENSOR = 2
# Of some, ranks hold less than others, or nothing.
SHAPES = [(6, 4), (12, 3), (18,), (2, 3)]


@functools.cache
def mesh_of(copies: int, ranks: int) -> DeviceMesh:
    return init_device_mesh("cpu", (copies, ranks, TENSOR), mesh_dim_names=("dp_replicate", "dp_shard", "tp"))


def whole(shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.arange(1, math.prod(shape) + 1).view(shape).to(dtype)


def divided(tensor: Tensor, dim: int, sections: int, mesh: DeviceMesh) -> DTensor:
    """Return a tensor divided over `tp`, by the plainest arithmetic there is."""
    runs = tensor.unflatten(dim, (sections, TENSOR, -1)).select(dim + 1, mesh.get_local_rank("tp"))
    part = runs.flatten(dim, dim + 1).contiguous()
    return distributed_part(part, mesh=mesh["tp"], placements=[divided_placement(dim, sections)], shape=tensor.shape)


def sharded(parameter: DTensor, dim: int, mesh: DeviceMesh) -> Any:
    """Return a divided parameter as FSDP2 shards it further."""
    holder = nn.Module()
    holder.weight = nn.Parameter(parameter)
    copies = mesh["dp_replicate"].size()
    fully_shard(
        holder,
        mesh=mesh["dp_replicate", "dp_shard"] if copies > 1 else mesh["dp_shard"],
        shard_placement_fn=lambda _: Shard(dim),
    )
    return holder.weight.detach()


def every_layout(mesh: DeviceMesh) -> dict[str, tuple[DTensor, Tensor]]:
    """Return, by name, tensors in every layout that a layer's parameter can have, and the same ones whole."""
    found: dict[str, tuple[DTensor, Tensor]] = {}
    ranks = mesh["dp_shard"].size()
    for shape in SHAPES:
        for dim, sections in itertools.product(range(len(shape)), (1, 3)):
            if shape[dim] % (sections * TENSOR):
                continue
            values = whole(shape)
            parameter = divided(values, dim, sections, mesh)
            found[f"{shape} {dim}/{sections}"] = parameter, values
            for other in range(len(shape)):
                if other and local_tensor(parameter).shape[other] % ranks:
                    continue  # FSDP2 divides other dims than the first evenly only
                found[f"{shape} {dim}/{sections} sharded by {other}"] = sharded(parameter, other, mesh), values
    plain = nn.Linear(3, 5, dtype=torch.float64)
    nn.init.constant_(plain.weight, 0.5)
    fully_shard(plain, mesh=mesh["dp_shard"])
    weight: Any = plain.weight.detach()
    found["not divided"] = weight, torch.full((5, 3), 0.5, dtype=torch.float64)
    return found


def wrong_parts(copies: int, ranks: int) -> list[str]:
    """Return the layouts of which our arithmetic does not say what each rank holds, or what the whole is."""
    wrong = []
    for name, (tensor, values) in every_layout(mesh_of(copies, ranks)).items():
        part = torch.full_like(local_tensor(tensor), -1)
        for here, there in own_pieces(tensor):
            part[here] = values[there]
        right = torch.equal(part, local_tensor(tensor)) and torch.equal(whole_of(tensor), values)
        wrong += [] if right else [name]
    return wrong


@pytest.mark.parametrize(("copies", "ranks"), [(1, 2), full(2, 1), full(1, 3), full(2, 2)])
def test_what_a_rank_holds_is_where_fsdp_has_put_it(copies: int, ranks: int) -> None:
    assert run_ranks(wrong_parts, copies * ranks * TENSOR, copies, ranks) == [[]] * (copies * ranks * TENSOR)


def sums() -> list[Tensor]:
    mesh = init_device_mesh("cpu", (2, 2))
    own = whole((2, 3)) * (dist.get_rank() + 1)
    like = DTensor.from_local(torch.zeros(4, 3, dtype=torch.float64), mesh, [Replicate(), Replicate()], run_check=False)
    return [
        whole_of(distributed_tensor(own, like=like, placements=[Partial(kind), Shard(0)]))
        for kind in ("sum", "avg", "max", "min")
    ]


def test_sums_that_are_not_reduced_yet_are_reduced() -> None:
    one = whole((2, 3))
    halves = [torch.cat([one * first, one * second]) for first, second in ((4, 6), (2, 3), (3, 4), (1, 2))]
    for found in run_ranks(sums, 4):
        assert all(torch.equal(*pair) for pair in zip(found, halves, strict=True))


def save(path: str, copies: int, ranks: int, in_background: bool) -> None:
    tensors = {key: tensor for key, (tensor, _) in every_layout(mesh_of(copies, ranks)).items()}
    if not in_background:
        save_directory(path, tensors=tensors, objects={})
        return
    saver = BackgroundSaver(dist.new_group(backend="gloo"))
    saver.save(path, tensors=tensors, objects={})
    for tensor in tensors.values():
        local_tensor(tensor).zero_()  # what is saved is the state at the call
    saver.free()


def differing(path: str, copies: int, ranks: int, fresh: bool) -> list[str]:
    """Load everything into another layout, and return what differs from the whole there."""
    layouts = every_layout(mesh_of(copies, ranks))
    expected = {key: local_tensor(tensor).clone() for key, (tensor, _) in layouts.items()}
    into = {key: tensor for key, (tensor, _) in layouts.items()}
    for tensor in into.values():
        local_tensor(tensor).zero_()
    load_tensors(path, into, strict=False, prefix=(), fresh=into.keys() if fresh else ())
    return [key for key in into if key in saved_keys(path) and not torch.equal(local_tensor(into[key]), expected[key])]


def saved_keys(path: str) -> set[str]:
    with CheckpointReader(path) as reader:
        return set(reader.tensors)


def expected_wholes(path: str) -> dict[str, Tensor]:
    with CheckpointReader(path) as reader:
        infos = dict(reader.tensors)
    plain = {"not divided": torch.full((5, 3), 0.5, dtype=torch.float64)}
    return {key: plain.get(key, whole(info.shape)) for key, info in infos.items()}


@pytest.mark.parametrize(
    ("saving", "loading", "in_background"),
    [
        ((1, 2), (1, 1), False),
        ((1, 2), (2, 1), True),
        full((1, 2), (1, 3), True),
        full((1, 3), (2, 2), False),
        full((2, 2), (1, 2), False),
        full((2, 1), (1, 3), False),
        full((2, 2), (2, 1), True),
    ],
)
def test_any_layout_reads_what_divided_layers_have_written(
    saving: tuple[int, int], loading: tuple[int, int], in_background: bool, tmp_path: Path
) -> None:
    path = str(tmp_path / "a.ckpt")
    run_ranks(save, math.prod(saving) * TENSOR, path, *saving, in_background)
    with CheckpointReader(path) as reader:  # one process, which knows nothing of layouts
        for key, values in expected_wholes(path).items():
            assert torch.equal(reader.read(key), values), key
    for fresh in (False, True):
        found = run_ranks(differing, math.prod(loading) * TENSOR, path, *loading, fresh)
        assert found == [[]] * len(found)
    assert verify_checkpoint(path) == ()


def test_each_run_of_a_divided_tensor_is_one_chunk_and_is_written_once(tmp_path: Path) -> None:
    path = str(tmp_path / "a.ckpt")
    run_ranks(save, 4, path, 1, 2, False)
    with CheckpointReader(path) as reader:
        entries = reader.metadata.state_dict_metadata
        chunks = {key: entry.chunks for key, entry in entries.items() if isinstance(entry, TensorStorageMetadata)}
        for key, info in reader.tensors.items():
            assert sum(math.prod(chunk.sizes) for chunk in chunks[key]) == math.prod(info.shape), key
        assert sorted(chunk.offsets[0] for chunk in chunks["(18,) 0/3"]) == [0, 3, 6, 9, 12, 15]
        assert len(chunks["(12, 3) 0/3"]) == 6
        assert len(chunks["(6, 4) 0/3 sharded by 1"]) == 12
        assert len(chunks["not divided"]) == 2
    placements = json.loads((tmp_path / "a.ckpt" / "manifest.json").read_text())["tensors"]
    assert placements["(18,) 0/3"]["placement"] == "Shard(dim=0) of each of 3 sections over tp=2"
