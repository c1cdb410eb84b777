"""Saving from a single process, without a process group."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from meshbolt.checkpoint import load_objects, load_tensors, remove_directory, save_directory, saved_tensors
from meshbolt.errors import CheckpointError

TENSORS = {"model.w": torch.arange(6.0).view(2, 3)}


def names_in(folder: Path) -> list[str]:
    return sorted(place.name for place in folder.iterdir())


def hidden(folder: Path) -> list[str]:
    return [name for name in names_in(folder) if name.startswith(".")]


def test_what_is_saved_is_what_is_loaded(tmp_path: Path) -> None:
    path = tmp_path / "runs" / "a.ckpt"
    save_directory(path, tensors=TENSORS, objects={"epoch": 3, "scores": torch.ones(2)})
    into = {"model.w": torch.zeros(2, 3)}
    assert load_tensors(path, into).faults() == ""
    assert torch.equal(into["model.w"], TENSORS["model.w"])
    objects = load_objects(path)
    assert objects["epoch"] == 3
    assert torch.equal(objects["scores"], torch.ones(2))


def test_a_checkpoint_is_shards_and_objects_and_a_manifest_that_knows_them_all(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    save_directory(path, tensors=TENSORS, objects={}, plan={"zero.stage": 3}, versions={"lightning": "2.6.6"})
    manifest = json.loads((path / "manifest.json").read_text())
    sizes = {name: (path / name).stat().st_size for name in names_in(path) if name != "manifest.json"}
    assert set(sizes) == {".metadata", "__0_0.distcp", "meta.pt"}
    assert {name: entry["bytes"] for name, entry in manifest["files"].items()} == sizes
    assert {name: sum(chunk[1] for chunk in entry["chunks"]) for name, entry in manifest["files"].items()} == sizes
    assert manifest["tensors"] == {"model.w": {"shape": [2, 3], "dtype": "float32", "placement": "whole"}}
    assert (manifest["format_version"], manifest["world_size"], manifest["plan"]) == (3, 1, {"zero.stage": 3})
    assert manifest["versions"]["lightning"] == "2.6.6"
    assert set(manifest["versions"]) == {"lightning", "meshbolt", "torch"}


def test_a_save_replaces_and_leaves_nothing_beside(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    for epoch in range(3):
        save_directory(path, tensors={"w": torch.full((2,), float(epoch))}, objects={"epoch": epoch})
        assert load_objects(path)["epoch"] == epoch
        assert names_in(tmp_path) == ["last.ckpt"]


def test_the_next_save_removes_what_crashed_ones_of_its_name_left(tmp_path: Path) -> None:
    (tmp_path / ".last.ckpt.partial-123").mkdir()
    (tmp_path / ".last.ckpt.partial-123" / "__0_0.distcp").write_text("half")
    (tmp_path / ".other.ckpt.partial-123").mkdir()
    save_directory(tmp_path / "last.ckpt", tensors=TENSORS, objects={})
    assert hidden(tmp_path) == [".other.ckpt.partial-123"]


@pytest.mark.parametrize("keep_partial", [False, True])
def test_a_failed_save_keeps_its_files_only_if_asked(tmp_path: Path, keep_partial: bool) -> None:
    def save() -> None:
        save_directory(tmp_path / "a.ckpt", tensors=TENSORS, objects={"f": lambda: None}, keep_partial=keep_partial)

    for failures in (1, 2):
        with pytest.raises(CheckpointError, match=r"was not saved, .*objects\['f'\] cannot be pickled"):
            save()
        assert len(hidden(tmp_path)) == (failures if keep_partial else 0)
    assert not (tmp_path / "a.ckpt").exists()


def test_a_plan_that_cannot_be_written_is_found_before_anything_is(tmp_path: Path) -> None:
    plan = {"dtype": torch.float32}
    with pytest.raises(CheckpointError, match="the plan cannot be written"):
        save_directory(tmp_path / "a.ckpt", tensors=TENSORS, objects={}, plan=plan, keep_partial=True)
    assert names_in(tmp_path) == []


def test_a_kept_partial_outlives_a_good_save_that_keeps_too(tmp_path: Path) -> None:
    (tmp_path / ".a.ckpt.partial-1").mkdir()
    for epoch in range(2):
        save_directory(tmp_path / "a.ckpt", tensors=TENSORS, objects={"epoch": epoch}, keep_partial=True)
    assert hidden(tmp_path) == [".a.ckpt.partial-1"]


def test_a_directory_of_another_kind_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("...")
    with pytest.raises(CheckpointError, match="not a checkpoint of meshbolt"):
        save_directory(tmp_path / "mine", tensors=TENSORS, objects={})
    assert names_in(tmp_path / "mine") == ["notes.txt"]
    assert names_in(tmp_path) == ["mine"]


def test_a_parent_that_is_a_file_is_an_error_of_ours(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="was not saved"):
        save_directory(tmp_path / "file" / "a.ckpt", tensors=TENSORS, objects={})


def test_tensors_without_values_and_things_that_are_no_tensors_are_named(tmp_path: Path) -> None:
    for value, message in (
        (torch.empty(2, device="meta"), "'w' is on the meta device"),
        (3, "'w' is a int"),
        (torch.eye(2).to_sparse(), "'w' is torch.sparse_coo"),
    ):
        with pytest.raises(CheckpointError, match=message):
            save_directory(tmp_path / "a.ckpt", tensors={"w": value}, objects={})  # type: ignore[dict-item]
    assert not names_in(tmp_path)


def test_only_the_part_of_a_storage_that_a_tensor_shows_is_written(tmp_path: Path) -> None:
    large = torch.arange(1_000_000.0)
    views = {"row": large[10:20], "wide": torch.ones(1).expand(1000), "turned": large[:6].view(2, 3).t()}
    save_directory(tmp_path / "a.ckpt", tensors=views, objects={})
    assert (tmp_path / "a.ckpt" / "__0_0.distcp").stat().st_size < 20_000
    into = {key: torch.zeros(value.shape) for key, value in views.items()}
    load_tensors(tmp_path / "a.ckpt", into)
    assert all(torch.equal(into[key], value) for key, value in views.items())


def test_values_are_saved_and_not_the_flags_of_a_view(tmp_path: Path) -> None:
    values = torch.tensor([1 + 2j, 3 - 4j])
    views = {"conjugate": values.conj(), "negative": values.conj().imag, "parameter": torch.nn.Parameter(torch.ones(3))}
    save_directory(tmp_path / "a.ckpt", tensors=views, objects={})
    into = {key: torch.zeros(value.shape, dtype=value.dtype) for key, value in views.items()}
    load_tensors(tmp_path / "a.ckpt", into)
    assert into["conjugate"].tolist() == [1 - 2j, 3 + 4j]
    assert into["negative"].tolist() == [-2.0, 4.0]
    assert into["parameter"].tolist() == [1.0] * 3


def test_a_save_leaves_the_settings_of_torch_as_they_were(tmp_path: Path) -> None:
    before = torch.serialization.get_crc32_options()
    save_directory(tmp_path / "a.ckpt", tensors=TENSORS, objects={})
    assert torch.serialization.get_crc32_options() == before


def test_a_checkpoint_without_tensors_is_one(tmp_path: Path) -> None:
    save_directory(tmp_path / "a.ckpt", tensors={}, objects={"epoch": 1})
    assert saved_tensors(tmp_path / "a.ckpt") == {}
    assert load_tensors(tmp_path / "a.ckpt", {}).faults() == ""
    remove_directory(tmp_path / "a.ckpt")
    assert not names_in(tmp_path)


def test_torch_alone_can_read_the_tensors(tmp_path: Path) -> None:
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    save_directory(tmp_path / "a.ckpt", tensors=TENSORS, objects={})
    dcp_to_torch_save(tmp_path / "a.ckpt", tmp_path / "plain.pt")
    plain = torch.load(tmp_path / "plain.pt", weights_only=True)
    assert torch.equal(plain["model.w"], TENSORS["model.w"])
