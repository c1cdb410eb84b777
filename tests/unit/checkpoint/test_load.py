"""Loading into a single process: what does not fit or is damaged is said, and nothing is touched."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

import pytest
import torch

from meshbolt.checkpoint import TensorInfo, directory, load, load_objects, load_tensors, save_directory
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


def test_sizes_are_not_looked_at_where_verification_is_off(path: Path) -> None:
    with (path / "meta.pt").open("ab") as file:
        file.write(b"0")
    load_tensors(path, zeros(), verify=False)


def test_a_shard_that_cannot_be_read_is_named(path: Path) -> None:
    shard = path / "__0_0.distcp"
    shard.write_bytes(b"0" * shard.stat().st_size)
    with pytest.raises(CheckpointError, match=r"cannot be loaded: file __0_0\.distcp: "):
        load_tensors(path, zeros())


def test_metadata_may_not_lead_to_files_that_the_manifest_does_not_name(path: Path) -> None:
    manifest = path / "manifest.json"
    manifest.write_text(manifest.read_text().replace("__0_0.distcp", "meta.pt.copy"))
    with pytest.raises(CheckpointError, match=r"does not name: \['__0_0\.distcp'\]"):
        load_tensors(path, zeros(), verify=False)


@pytest.mark.parametrize("then", ["replaced", "removed"])
def test_a_checkpoint_that_changes_under_the_reader_is_an_error(
    path: Path, monkeypatch: pytest.MonkeyPatch, then: str
) -> None:
    def change_after(*args: object, **kwargs: object) -> None:
        read_shards(*args, **kwargs)  # type: ignore[arg-type]
        directory.remove_directory(path)
        if then == "replaced":
            save_directory(path, tensors=TENSORS, objects={})

    read_shards = load.read_shards
    monkeypatch.setattr(load, "read_shards", change_after)
    with pytest.raises(CheckpointError, match="was replaced or removed while it was read"):
        load_tensors(path, zeros())


def test_a_load_leaves_nothing_behind(path: Path) -> None:
    before = names_in(path.parent), names_in(path)
    load_tensors(path, zeros())
    load_objects(path)
    assert (names_in(path.parent), names_in(path)) == before
