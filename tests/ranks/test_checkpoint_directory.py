"""Checkpoints saved by several ranks: any layout of them loads, each value is stored once, errors are everyone's."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tests.rows import full
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor

from meshbolt.checkpoint import load_objects, load_tensors, save_directory, saved_tensors
from meshbolt.checkpoint.chunks import flat_bytes
from meshbolt.errors import CheckpointError, UnsupportedError
from meshbolt.testing import RankFailure, run_ranks, run_ranks_expecting

DTYPES = [
    torch.float64,
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.complex64,
    torch.int64,
    torch.uint8,
    torch.bool,
]
# Dimensions above, at and below the number of ranks, so that some ranks hold less than others, or nothing.
SHAPES = [(5, 3), (8,), (4, 2, 2), (1, 5), (2,), (0, 3), ()]


def names_in(folder: Path) -> list[str]:
    return sorted(place.name for place in folder.iterdir())


def whole_tensors() -> dict[str, Tensor]:
    """Return a tensor of every dtype and shape, whose bytes tell them and their elements apart."""
    generator = torch.Generator().manual_seed(7)
    found = {}
    for dtype in DTYPES:
        for shape in SHAPES:
            values = torch.randint(0, 2 if dtype == torch.bool else 120, shape, generator=generator)
            found[f"{str(dtype).removeprefix('torch.')}.{'x'.join(map(str, shape))}"] = values.to(dtype)
    found["one element, far from the next"] = torch.ones(1, 5)[:, 0]
    found["every other"] = torch.arange(10.0)[::2]
    return found


@functools.cache
def mesh_of(shape: tuple[int, ...]) -> DeviceMesh:
    """Return one mesh for all tensors of a rank: to make one is to make process groups."""
    return init_device_mesh("cpu", shape)


def laid_out(tensor: Tensor, layout: str) -> Tensor:
    """Return a tensor as a rank of the layout holds it; a 0-dim one, which cannot be sharded, stays whole."""
    world = dist.get_world_size()
    meshes: dict[str, tuple[tuple[int, ...], list[Placement]]] = {
        "sharded": ((world,), [Shard(0)]),
        "last dim": ((world,), [Shard(max(tensor.dim() - 1, 0))]),
        "replicated": ((world,), [Replicate()]),
        "hybrid": ((2, world // 2), [Replicate(), Shard(0)]),
        "both dims": ((2, world // 2), [Shard(0), Shard(max(tensor.dim() - 1, 0))]),
    }
    if layout == "plain" or (layout != "replicated" and not tensor.dim()):
        return tensor.clone()
    shape, placements = meshes[layout]
    mesh = mesh_of(shape)
    # Without a collective: gloo has none for some of the dtypes.
    replicated = DTensor.from_local(tensor.clone(), mesh, [Replicate()] * len(shape), run_check=False)
    return replicated.redistribute(mesh, placements)


def same_bytes(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(*(flat_bytes(each.contiguous()) for each in (one, other)))


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def save_all(path: str, layout: str) -> None:
    tensors = {key: laid_out(tensor, layout) for key, tensor in whole_tensors().items()}
    save_directory(path, tensors=tensors, objects={"saved by": dist.get_rank()})


def differing_keys(path: str, layout: str, **options: Any) -> list[str]:
    """Load everything in a layout and return the keys whose local bytes differ from the layout of the originals."""
    expected = {key: laid_out(tensor, layout) for key, tensor in whole_tensors().items()}
    into = {key: laid_out(torch.zeros_like(tensor), layout) for key, tensor in whole_tensors().items()}
    load_tensors(path, into, **options)
    return [key for key in into if not same_bytes(local(into[key]), local(expected[key]))]


@pytest.mark.parametrize(
    ("saving", "save_layout", "loading", "load_layout"),
    [
        full(4, "sharded", 4, "sharded"),
        (4, "sharded", 2, "sharded"),
        (4, "sharded", 1, "plain"),
        full(4, "sharded", 3, "sharded"),
        (1, "plain", 3, "sharded"),
        (2, "replicated", 3, "last dim"),
        (4, "hybrid", 3, "sharded"),
        full(3, "sharded", 4, "hybrid"),
        full(4, "both dims", 2, "replicated"),
        (2, "last dim", 4, "both dims"),
    ],
)
def test_every_dtype_and_shape_comes_back_bit_equal_in_any_layout(
    tmp_path: Path, saving: int, save_layout: str, loading: int, load_layout: str
) -> None:
    path = str(tmp_path / "a.ckpt")
    run_ranks(save_all, saving, path, save_layout)
    assert run_ranks(differing_keys, loading, path, load_layout) == [[]] * loading
    fresh = functools.partial(differing_keys, fresh=set(whole_tensors()))
    assert run_ranks(fresh, loading, path, load_layout) == [[]] * loading


def test_the_comparison_finds_a_single_flipped_bit(tmp_path: Path) -> None:
    path = str(tmp_path / "a.ckpt")
    run_ranks(save_all, 2, path, "sharded")
    shard = tmp_path / "a.ckpt" / "__0_0.distcp"
    content = bytearray(shard.read_bytes())
    values = whole_tensors()["float64.5x3"][:3].numpy().tobytes()
    content[content.index(values)] ^= 1
    shard.write_bytes(content)
    assert run_ranks(functools.partial(differing_keys, verify=False), 2, path, "sharded") == [["float64.5x3"], []]
    one, other = run_ranks_expecting(differing_keys, 2, path, "sharded", error=CheckpointError, match="is damaged")
    assert one == other
    assert "rank 0: file __0_0.distcp: " in one


def test_a_process_without_a_group_loads_what_ranks_saved(tmp_path: Path) -> None:
    run_ranks(save_all, 3, str(tmp_path / "a.ckpt"), "sharded")
    into = {key: torch.zeros_like(tensor) for key, tensor in whole_tensors().items()}
    load_tensors(tmp_path / "a.ckpt", into)
    assert [key for key, tensor in whole_tensors().items() if not same_bytes(tensor, into[key])] == []
    assert load_objects(tmp_path / "a.ckpt") == {"saved by": 0}


@pytest.mark.parametrize("layout", ["plain", "replicated", "hybrid", "sharded"])
def test_each_value_is_stored_once_and_every_rank_writes_a_share(tmp_path: Path, layout: str) -> None:
    def save() -> int:
        tensors = {f"w{number}": laid_out(torch.randn(128, 64), layout) for number in range(8)}
        save_directory(tmp_path / "a.ckpt", tensors=tensors, objects={})
        return sum(tensor.numel() * 4 for tensor in tensors.values())

    whole_bytes = run_ranks(save, 4)[0]
    sizes = [file.stat().st_size for file in (tmp_path / "a.ckpt").glob("*.distcp")]
    assert whole_bytes < sum(sizes) < 1.3 * whole_bytes
    assert max(sizes) < 0.3 * sum(sizes)


def test_a_key_of_one_rank_is_saved_and_each_rank_may_ask_for_its_own(tmp_path: Path) -> None:
    def save() -> None:
        rank = dist.get_rank()
        save_directory(
            tmp_path / "a.ckpt", tensors={f"rng.{rank}": torch.full((2,), rank), "w": torch.ones(3)}, objects={}
        )

    def load() -> tuple[list[int], tuple[str, ...]]:
        own = {f"rng.{dist.get_rank()}": torch.zeros(2, dtype=torch.int64)}
        report = load_tensors(tmp_path / "a.ckpt", own, prefix="rng.", strict=False)
        return [int(tensor[0]) for tensor in own.values()], report.unexpected

    run_ranks(save, 3)
    assert sorted(saved_tensors(tmp_path / "a.ckpt")) == ["rng.0", "rng.1", "rng.2", "w"]
    assert run_ranks(load, 2) == [([0], ("rng.2",)), ([1], ("rng.2",))]


def test_a_trained_model_and_its_optimizer_come_back_on_another_number_of_ranks(tmp_path: Path) -> None:
    def build() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3))
        for module in (*model, model):
            fully_shard(module, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        model(torch.ones(2, 6)).sum().backward()
        optimizer.step()
        return model, optimizer

    def state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {f"model.{key}": tensor for key, tensor in model.state_dict().items()}
        for key, param in model.named_parameters():
            found |= {f"optimizer.0.{key}.{name}": tensor for name, tensor in optimizer.state[param].items()}
        return found

    def whole(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {key: one.full_tensor() if isinstance(one, DTensor) else one for key, one in tensors.items()}

    def save() -> dict[str, Tensor]:
        tensors = state(*build())
        save_directory(tmp_path / "a.ckpt", tensors=tensors, objects={})
        return whole(tensors)

    def load() -> dict[str, Tensor]:
        tensors = state(*build())
        with torch.no_grad():
            for tensor in tensors.values():
                tensor.zero_()
        load_tensors(tmp_path / "a.ckpt", tensors)
        return whole(tensors)

    saved, loaded = run_ranks(save, 3)[0], run_ranks(load, 2)[1]
    assert "optimizer.0.1.weight.exp_avg" in saved
    assert saved.keys() == loaded.keys()
    assert all(torch.equal(saved[key], loaded[key]) for key in saved)


def test_the_manifest_says_how_each_tensor_was_laid_out(tmp_path: Path) -> None:
    def save() -> None:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp_shard", "tp"))
        whole = DTensor.from_local(torch.ones(8, 4), mesh, [Replicate(), Replicate()], run_check=False)
        own = {f"rng.{dist.get_rank()}": torch.ones(2, dtype=torch.uint8)}
        tensors = {"w": whole.redistribute(mesh, [Shard(0), Shard(1)]), "b": whole, **own}
        save_directory(tmp_path / "a.ckpt", tensors=tensors, objects={})

    run_ranks(save, 4)
    tensors = json.loads((tmp_path / "a.ckpt" / "manifest.json").read_text())["tensors"]
    assert list(tensors) == ["b", "rng.0", "rng.1", "rng.2", "rng.3", "w"]
    placement = "Shard(dim=0) over dp_shard=2, Shard(dim=1) over tp=2"
    assert tensors["w"] == {"shape": [8, 4], "dtype": "float32", "placement": placement}
    assert tensors["b"]["placement"] == "Replicate() over dp_shard=2, Replicate() over tp=2"
    assert tensors["rng.3"] == {"shape": [2], "dtype": "uint8", "placement": "whole"}


def test_a_subgroup_saves_and_loads_while_the_others_go_on(tmp_path: Path) -> None:
    def save_in_a_pair() -> list[float]:
        pair = dist.new_group([1, 2], backend="gloo")
        if dist.get_rank() == 0:
            return []
        path, value = tmp_path / "a.ckpt", torch.full((2,), 5.0)
        save_directory(path, tensors={"w": value}, objects={"a": 1}, group=pair)
        into = {"w": torch.zeros(2)}
        load_tensors(path, into, group=pair)
        return [*into["w"].tolist(), load_objects(path, group=pair)["a"]]

    assert run_ranks(save_in_a_pair, 3) == [[], [5.0, 5.0, 1], [5.0, 5.0, 1]]


def test_a_group_that_cannot_plan_on_the_cpu_is_refused_with_the_way_out(tmp_path: Path) -> None:
    def save() -> None:
        group = dist.new_group(backend="cuda:gloo")
        save_directory(tmp_path / "a.ckpt", tensors={"w": torch.ones(1)}, objects={}, group=group)

    run_ranks_expecting(save, 2, error=UnsupportedError, match=r'new_group\(backend="gloo"\)')


def test_a_load_that_does_not_fit_tells_every_rank_the_same_and_touches_nothing(tmp_path: Path) -> None:
    run_ranks(save_all, 2, str(tmp_path / "a.ckpt"), "sharded")

    def load() -> None:
        own = {f"missing on rank {dist.get_rank()}": torch.zeros(1), "bool.8": torch.zeros(8, dtype=torch.bool)}
        if dist.get_rank() == 1:
            own["float32.5x3"] = torch.zeros(3, 5)
        try:
            load_tensors(tmp_path / "a.ckpt", own, prefix=())
        finally:
            assert not own["bool.8"].any()

    one, other = run_ranks_expecting(load, 2, error=CheckpointError, match="does not fit what it is loaded into")
    assert one == other
    for line in ("missing on rank 0", "missing on rank 1", "float32.5x3: saved float32[5, 3], asked for float32[3, 5]"):
        assert f"    {line}" in one


def test_a_bad_tensor_on_one_rank_stops_every_rank_before_anything_is_written(tmp_path: Path) -> None:
    def save() -> None:
        mesh = init_device_mesh("cpu", (2,))
        placement = Partial() if dist.get_rank() == 1 else Replicate()
        own = DTensor.from_local(torch.ones(2), mesh, [placement], run_check=False)
        save_directory(tmp_path / "a.ckpt", tensors={"w": own}, objects={})

    one, other = run_ranks_expecting(save, 2, error=CheckpointError, match="rank 1: 'w' is a sum that is not reduced")
    assert one == other
    assert names_in(tmp_path) == []


def test_a_sharded_tensor_among_the_objects_is_named(tmp_path: Path) -> None:
    def save() -> None:
        average = distribute_tensor(torch.ones(4), init_device_mesh("cpu", (2,)), [Shard(0)])
        save_directory(tmp_path / "a.ckpt", tensors={}, objects={"callbacks": {"EMA": [average]}})

    run_ranks_expecting(save, 2, error=CheckpointError, match=r"objects\['callbacks'\]\['EMA'\]\[0\] is a sharded")


def test_ranks_that_find_different_checkpoints_all_refuse(tmp_path: Path) -> None:
    for rank in range(2):
        save_directory(tmp_path / str(rank) / "a.ckpt", tensors={"w": torch.ones(1)}, objects={})

    def load(load_it: Any) -> None:
        os.chdir(tmp_path / str(dist.get_rank()))
        load_it("a.ckpt")

    def load_w(path: str) -> None:
        load_tensors(path, {"w": torch.zeros(1)})

    for load_it in (load_objects, load_w):
        run_ranks_expecting(load, 2, load_it, error=CheckpointError, match="different ranks find different checkpoints")


def test_a_file_system_that_is_not_shared_is_found_before_anything_large_is_written(tmp_path: Path) -> None:
    def save() -> None:
        own = tmp_path / str(dist.get_rank())
        own.mkdir()
        os.chdir(own)
        save_directory("a.ckpt", tensors={"w": torch.ones(2)}, objects={})

    run_ranks_expecting(save, 2, error=CheckpointError, match="rank 1: .* is not there for this one")
    assert [names_in(tmp_path / name) for name in ("0", "1")] == [[], []]


def test_an_interrupt_stays_an_interrupt_and_stops_the_other_ranks(tmp_path: Path) -> None:
    class Interrupting(dict[str, Tensor]):
        def items(self) -> Iterator[Any]:  # type: ignore[override]
            raise KeyboardInterrupt

    def save() -> None:
        tensors = Interrupting() if dist.get_rank() == 1 else {"w": torch.ones(1)}
        save_directory(tmp_path / "a.ckpt", tensors=tensors, objects={})

    with pytest.raises(RankFailure) as failure:
        run_ranks(save, 2)
    first, second = failure.value.outcomes
    assert first.raised(CheckpointError)
    assert first.message.endswith("rank 1: KeyboardInterrupt")
    assert second.raised(KeyboardInterrupt)
    assert names_in(tmp_path) == []
