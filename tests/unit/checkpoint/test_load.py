"""Loading into a single process: what does not fit or is damaged is said, and nothing is touched."""

from __future__ import annotations

import itertools
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from meshbolt.checkpoint import TensorInfo, directory, load, load_objects, load_tensors, save_directory
from meshbolt.checkpoint.manifest import read_manifest
from meshbolt.checkpoint.shard_reader import ShardReader
from meshbolt.errors import CheckpointError

TENSORS = {"model.w": torch.arange(6.0).view(2, 3), "model.b": torch.ones(3), "rng.0": torch.ones(4)}


class OwnClass:
    """A class of the user's own, as hyper-parameters may hold."""

    def __init__(self, value: int) -> None:
        self.value = value


def names_in(folder: Path) -> list[str]:
    return sorted(place.name for place in folder.iterdir())


@pytest.fixture
def path(tmp_path: Path) -> Path:
    save_directory(tmp_path / "a.ckpt", tensors=TENSORS, objects={"epoch": 1})
    return tmp_path / "a.ckpt"


def zeros(**changes: torch.Tensor) -> dict[str, torch.Tensor]:
    return {**{key: torch.zeros_like(value) for key, value in TENSORS.items()}, **changes}


def untouched(into: dict[str, torch.Tensor]) -> bool:
    return all(not value.any() for value in into.values())


def test_all_differences_are_listed_before_a_tensor_is_touched(path: Path) -> None:
    into = {"model.w": torch.zeros(3, 2), "model.new": torch.zeros(1), "model.b": torch.zeros(3)}
    with pytest.raises(CheckpointError) as error:
        load_tensors(path, into)
    for line in ("    model.new\n", "    rng.0\n", "    model.w: saved float32[2, 3], asked for float32[3, 2]"):
        assert line in str(error.value)
    assert untouched(into)


def test_a_prefix_limits_what_may_be_absent(path: Path) -> None:
    model = {key: value for key, value in zeros().items() if key.startswith("model.")}
    assert load_tensors(path, model, prefix="model.").unexpected == ()
    assert torch.equal(model["model.w"], TENSORS["model.w"])
    with pytest.raises(CheckpointError, match="1 in the checkpoint and not asked for"):
        load_tensors(path, {"model.w": torch.zeros(2, 3)}, prefix="model.")


def test_a_load_that_is_not_strict_fills_what_fits_and_reports_the_rest(path: Path) -> None:
    into = {"model.w": torch.zeros(3, 2), "model.new": torch.zeros(1), "model.b": torch.zeros(3)}
    report = load_tensors(path, into, strict=False)
    assert (report.missing, report.unexpected) == (("model.new",), ("rng.0",))
    float32 = torch.float32
    assert report.mismatched == {"model.w": (TensorInfo((2, 3), float32), TensorInfo((3, 2), float32))}
    assert torch.equal(into["model.b"], torch.ones(3))
    assert untouched({key: into[key] for key in ("model.w", "model.new")})


def test_a_cast_is_done_and_reported(path: Path) -> None:
    into = zeros(**{"model.w": torch.zeros(2, 3, dtype=torch.bfloat16)})
    report = load_tensors(path, into)
    assert list(report.cast) == ["model.w"]
    assert torch.equal(into["model.w"], TENSORS["model.w"].bfloat16())


def test_numbers_are_not_cut_to_integers_silently(path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"saved float32\[2, 3\], asked for int64\[2, 3\]"):
        load_tensors(path, zeros(**{"model.w": torch.zeros(2, 3, dtype=torch.int64)}))


def test_a_parameter_that_requires_grad_is_filled_in_place(path: Path) -> None:
    param = torch.nn.Parameter(torch.zeros(2, 3))
    load_tensors(path, zeros(**{"model.w": param}))
    assert torch.equal(param.data, TENSORS["model.w"])
    assert param.requires_grad


def test_a_tensor_on_the_meta_device_is_refused(path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"'model\.w' is on the meta device"):
        load_tensors(path, zeros(**{"model.w": torch.zeros(2, 3, device="meta")}))


def test_there_is_nothing_to_load_where_there_is_no_checkpoint(tmp_path: Path) -> None:
    for load_it in (load_objects, lambda path: load_tensors(path, {})):
        with pytest.raises(CheckpointError, match=r"a\.ckpt' cannot be loaded: there is nothing at this path"):
            load_it(tmp_path / "a.ckpt")


@pytest.mark.parametrize("weights_only", [None, True])
def test_a_class_of_the_users_own_is_named_with_the_way_to_allow_it(tmp_path: Path, weights_only: bool | None) -> None:
    objects = {"hyper_parameters": {"own": OwnClass(3), "plain": OrderedDict(a=1)}}
    save_directory(tmp_path / "a.ckpt", tensors={}, objects=objects)
    with pytest.raises(CheckpointError, match=r"classes \S*OwnClass, .*weights_only=False") as error:
        load_objects(tmp_path / "a.ckpt", weights_only=weights_only)
    assert "OrderedDict" not in str(error.value)
    assert load_objects(tmp_path / "a.ckpt", weights_only=False)["hyper_parameters"]["own"].value == 3


def test_a_class_that_torch_was_told_to_trust_is_loaded(tmp_path: Path) -> None:
    save_directory(tmp_path / "a.ckpt", tensors={}, objects={"own": OwnClass(3)})
    with torch.serialization.safe_globals([OwnClass]):
        assert load_objects(tmp_path / "a.ckpt")["own"].value == 3


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "meta.pt"])
@pytest.mark.parametrize("change", ["missing", "empty", "one byte short", "one byte long"])
def test_a_file_of_another_size_is_found_and_named_before_a_tensor_is_touched(
    path: Path, name: str, change: str
) -> None:
    content = (path / name).read_bytes()
    if change == "missing":
        (path / name).unlink()
    else:
        (path / name).write_bytes({"empty": b"", "one byte short": content[:-1]}.get(change, content + b"0"))
    into = zeros()
    for load_it in (load_objects, lambda path: load_tensors(path, into)):
        with pytest.raises(CheckpointError, match=rf"cannot be loaded: its file {name}"):
            load_it(path)
    assert untouched(into)


def test_sizes_are_compared_in_any_case(path: Path) -> None:
    with (path / "meta.pt").open("ab") as file:
        file.write(b"0")
    for load_it in (load_objects, lambda path, verify: load_tensors(path, zeros(), verify=verify)):
        with pytest.raises(CheckpointError, match=r"meta\.pt has"):
            load_it(path, verify=False)


def test_a_shard_that_cannot_be_read_is_named(path: Path) -> None:
    shard = path / "__0_0.distcp"
    shard.write_bytes(b"0" * shard.stat().st_size)
    with pytest.raises(CheckpointError, match=r"cannot be loaded: file __0_0\.distcp: "):
        load_tensors(path, zeros())


def test_metadata_may_not_lead_to_files_that_the_manifest_does_not_name(path: Path) -> None:
    manifest = read_manifest(path / "manifest.json")
    files = {name: record for name, record in manifest.files.items() if name != "__0_0.distcp"}
    (path / "manifest.json").write_text(replace(manifest, files=files).to_json())
    with pytest.raises(CheckpointError, match=r"does not name: \['__0_0\.distcp'\]"):
        load_tensors(path, zeros())


@pytest.mark.parametrize("name", ["meta.pt", ".metadata"])
def test_a_manifest_has_to_name_what_is_read(path: Path, name: str) -> None:
    manifest = read_manifest(path / "manifest.json")
    files = {other: record for other, record in manifest.files.items() if other != name}
    (path / "manifest.json").write_text(replace(manifest, files=files).to_json())
    with pytest.raises(CheckpointError, match=f"does not name {name}"):
        load_objects(path) if name == "meta.pt" else load_tensors(path, zeros())


def change_while_it_is_read(path: Path, monkeypatch: pytest.MonkeyPatch, *, then: str, times: int) -> None:
    """Have another process replace or remove the checkpoint while its tensors are read, the first few times."""

    def change_before(*args: object, **kwargs: object) -> None:
        if next(left) > 0:
            directory.remove(path)
            if then == "replaced":
                save_directory(path, tensors={key: value + 1 for key, value in TENSORS.items()}, objects={})
        read_shards(*args, **kwargs)  # type: ignore[arg-type]

    left = itertools.count(times, -1)
    read_shards = load.read_shards
    monkeypatch.setattr(load, "read_shards", change_before)


def test_a_checkpoint_that_is_replaced_under_the_reader_is_read_anew(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change_while_it_is_read(path, monkeypatch, then="replaced", times=1)
    into = zeros()
    load_tensors(path, into)
    assert all(torch.equal(into[key], value + 1) for key, value in TENSORS.items())


def test_one_that_is_replaced_again_and_again_is_an_error(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    change_while_it_is_read(path, monkeypatch, then="replaced", times=2)
    into = zeros()
    with pytest.raises(CheckpointError, match="was replaced or removed while it was read"):
        load_tensors(path, into)
    assert untouched(into)


def test_one_that_is_removed_under_the_reader_is_gone(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    change_while_it_is_read(path, monkeypatch, then="removed", times=1)
    with pytest.raises(CheckpointError, match="nothing at this path"):
        load_tensors(path, zeros())


@pytest.mark.parametrize("then", ["replaced", "removed"])
def test_a_change_after_the_last_byte_was_read_counts_as_well(
    path: Path, monkeypatch: pytest.MonkeyPatch, then: str
) -> None:
    def fill_late(self: ShardReader, plan: Any, planner: Any) -> Any:
        done = read_data(self, plan, planner)
        directory.remove(path)
        if then == "replaced":
            save_directory(path, tensors=TENSORS, objects={})
        return done

    read_data = ShardReader.read_data
    monkeypatch.setattr(ShardReader, "read_data", fill_late)
    into = zeros()
    with pytest.raises(CheckpointError, match="while it was read" if then == "replaced" else "nothing at this path"):
        load_tensors(path, into)
    assert untouched(into)


def flip(file: Path, position: int) -> None:
    content = bytearray(file.read_bytes())
    content[position] ^= 16
    file.write_bytes(content)


def test_a_flipped_bit_is_found_by_the_load_and_nothing_is_touched(path: Path) -> None:
    flip(path / "__0_0.distcp", (path / "__0_0.distcp").read_bytes().index(TENSORS["model.w"].numpy().tobytes()))
    into = zeros()
    with pytest.raises(CheckpointError, match=r"file __0_0\.distcp: it is damaged: the checksum"):
        load_tensors(path, into)
    assert untouched(into)
    load_tensors(path, into, verify=False)
    assert not torch.equal(into["model.w"], TENSORS["model.w"])


def test_fresh_tensors_are_filled_in_their_own_memory_and_the_others_after_all_is_read(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    into = zeros()
    seen: dict[str, bool] = {}

    def look(self: ShardReader) -> None:
        seen.update({key: bool(value.any()) for key, value in into.items()})
        fill(self)

    fill = ShardReader.fill
    monkeypatch.setattr(ShardReader, "fill", look)
    load_tensors(path, into, fresh={"model.b", "rng.0"})
    assert seen == {"model.w": False, "model.b": True, "rng.0": True}
    assert all(torch.equal(into[key], value) for key, value in TENSORS.items())


@pytest.mark.parametrize("kind", ["other dtype", "not contiguous", "requires grad"])
def test_a_fresh_tensor_of_any_kind_is_filled(path: Path, kind: str) -> None:
    fresh = {
        "other dtype": torch.zeros(2, 3, dtype=torch.float64),
        "not contiguous": torch.zeros(3, 2).t(),
        "requires grad": torch.zeros(2, 3, requires_grad=True),
    }[kind]
    load_tensors(path, zeros(**{"model.w": fresh}), fresh={"model.w"})
    assert torch.equal(fresh.detach().float(), TENSORS["model.w"])


def test_a_load_leaves_nothing_behind(path: Path) -> None:
    before = names_in(path.parent), names_in(path)
    load_tensors(path, zeros())
    load_objects(path)
    assert (names_in(path.parent), names_in(path)) == before
