"""What all conversions have in common: what they refuse before anything is written, and that nothing half is left."""

from __future__ import annotations

import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.unit.checkpoint.formats_support import contents, saved, trainer_tree

from meshbolt.checkpoint.formats import FORMATS, ExportOptions, Watch, export_checkpoint, import_checkpoint
from meshbolt.errors import CheckpointError, ConfigError, UnsupportedError

Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return saved(tmp_path / "run.ckpt")


def left_in(folder: Path) -> list[str]:
    return sorted(place.name for place in folder.iterdir() if place.name != "run.ckpt")


def test_an_unknown_format_is_refused_and_the_closest_is_suggested(path: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"'safetensor' is not a format .*did you mean 'safetensors'\? known: dcp, hf"
    ):
        export_checkpoint(path, tmp_path / "out", to="safetensor")


@pytest.mark.parametrize("to", FORMATS)
def test_an_output_that_exists_is_kept_unless_replacing_it_is_asked_for(path: Path, tmp_path: Path, to: str) -> None:
    export_checkpoint(path, tmp_path / "out", to="safetensors")
    with pytest.raises(ConfigError, match=r"out' exists\. Give another path, or --force"):
        export_checkpoint(path, tmp_path / "out", to=to)
    assert left_in(tmp_path / "out") == ["model.safetensors"]
    export_checkpoint(path, tmp_path / "out", to=to, overwrite=True)
    assert left_in(tmp_path) == ["out"]
    assert (tmp_path / "out").is_file() == (to == "lightning")


def test_a_directory_of_something_else_is_never_replaced(path: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "letter.txt").write_text("dear")
    export_checkpoint(path, tmp_path / "one.safetensors", to="safetensors")
    with pytest.raises(ConfigError, match="holds no checkpoint and no weights, so it is not replaced"):
        export_checkpoint(path, home, to="hf", overwrite=True)
    with pytest.raises(ConfigError, match="holds no checkpoint and no weights, so it is not replaced"):
        import_checkpoint(tmp_path / "one.safetensors", home, overwrite=True)
    assert left_in(home) == ["letter.txt"]


@pytest.mark.parametrize("out", ["run.ckpt", "run.ckpt/weights", "."])
def test_an_output_in_its_source_or_around_it_is_refused(path: Path, tmp_path: Path, out: str) -> None:
    with pytest.raises(ConfigError, match="lie in each other"):
        export_checkpoint(path, tmp_path / out, to="hf", overwrite=True)


def test_too_little_room_is_found_before_anything_is_written(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**9, 10**9 - 1000, 1000))
    with pytest.raises(
        CheckpointError, match=r"new/out' needs 1\.0 MiB, and '.*' has 1000 B free\. Nothing was written"
    ):
        export_checkpoint(path, tmp_path / "new/out", to="lightning")
    assert left_in(tmp_path) == []


@pytest.mark.parametrize("to", FORMATS)
def test_an_export_that_fails_leaves_nothing_but_what_was_there(path: Path, tmp_path: Path, to: str) -> None:
    export_checkpoint(path, tmp_path / "out", to="safetensors")
    shard = path / "__0_0.distcp"
    content = bytearray(shard.read_bytes())
    content[1000::1000] = bytes(byte ^ 1 for byte in content[1000::1000])
    shard.write_bytes(content)
    with pytest.raises(CheckpointError, match="it is damaged"):
        export_checkpoint(path, tmp_path / "out", to=to, overwrite=True)
    assert left_in(tmp_path) == ["out"]
    assert left_in(tmp_path / "out") == ["model.safetensors"]


def test_what_a_killed_export_left_is_removed_by_the_next_one(path: Path, tmp_path: Path) -> None:
    (tmp_path / ".out.partial-0123").mkdir()
    (tmp_path / ".out.partial-0123/half").write_text("half")
    export_checkpoint(path, tmp_path / "out", to="hf")
    assert left_in(tmp_path) == ["out"]


@pytest.mark.parametrize(
    ("to", "options", "what"),
    [
        ("dcp", {"max_shard_bytes": 100}, "max_shard_bytes=100"),
        ("lightning", {"dtype": "bfloat16"}, "dtype='bfloat16'"),
        ("safetensors", {"config": "config.json"}, "config='config.json'"),
        ("hf", {"everything": True}, "everything=True"),
    ],
)
def test_an_option_that_a_format_has_no_use_for_is_refused(
    path: Path, tmp_path: Path, to: str, options: dict[str, Any], what: str
) -> None:
    with pytest.raises(ConfigError, match=f"The format {to!r} has no use for {what}"):
        export_checkpoint(path, tmp_path / "out", to=to, options=ExportOptions(**options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_shard_bytes": 0}, "A shard of 0 bytes holds nothing"),
        ({"dtype": "bf16"}, "dtype='bf16' is not one that weights are cast to.*did you mean 'bfloat16'"),
        ({"everything": True, "strip_prefix": "net."}, "contradict each other"),
    ],
)
def test_an_option_that_is_wrong_by_itself_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ExportOptions(**options)


def test_what_is_no_checkpoint_is_refused_with_its_path(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nowhere' cannot be read: there is nothing at this path"):
        export_checkpoint(tmp_path / "nowhere", tmp_path / "out", to="hf")
    with pytest.raises(CheckpointError, match=r"nowhere' cannot be imported: there is nothing at this path"):
        import_checkpoint(tmp_path / "nowhere", tmp_path / "out")


def test_sources_that_are_not_imported_are_refused(path: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is a checkpoint of meshbolt's already"):
        import_checkpoint(path, tmp_path / "out")
    (tmp_path / "notes.txt").write_text("no checkpoint")
    with pytest.raises(ConfigError, match=r"is of no format that is imported\. Known: a directory of DeepSpeed's"):
        import_checkpoint(tmp_path / "notes.txt", tmp_path / "out")


def test_urls_are_refused_for_outputs(path: Path) -> None:
    with pytest.raises(UnsupportedError, match="only local paths"):
        export_checkpoint(path, "memory://out", to="hf")


def test_only_a_checkpoint_is_replaced_by_an_import(path: Path, tmp_path: Path) -> None:
    export_checkpoint(path, tmp_path / "weights", to="safetensors")
    export_checkpoint(path, tmp_path / "other", to="safetensors")
    with pytest.raises(ConfigError, match="only such is replaced"):
        import_checkpoint(tmp_path / "weights", tmp_path / "other", overwrite=True)
    with pytest.raises(ConfigError, match=r"run\.ckpt' exists"):
        import_checkpoint(tmp_path / "weights", path)
    import_checkpoint(tmp_path / "weights", path, overwrite=True)
    assert "optimizer_states" not in contents(path)[1]


@pytest.mark.parametrize("to", FORMATS)
def test_a_watch_is_told_the_bytes_of_all_tensors_in_the_end(path: Path, tmp_path: Path, to: str) -> None:
    total, parts = [], []
    done = export_checkpoint(path, tmp_path / "out", to=to, watch=Watch(on_total=total.append, on_bytes=parts.append))
    assert total == [done.num_bytes] == [sum(parts)]
    parts.clear()
    done = import_checkpoint(tmp_path / "out", tmp_path / "again.ckpt", watch=Watch(on_bytes=parts.append))
    assert sum(parts) == done.num_bytes


def test_weights_of_fabric_are_exported_under_the_name_that_the_user_gave_them(tmp_path: Path) -> None:
    saved(tmp_path / "fabric.ckpt", {"model": trainer_tree()["state_dict"], "step": 3})
    with pytest.raises(ConfigError, match=r"no tensors under weights='state_dict'.*known: model"):
        export_checkpoint(tmp_path / "fabric.ckpt", tmp_path / "out", to="safetensors")
    options = ExportOptions(weights="model", strip_prefix="net.")
    assert (
        export_checkpoint(tmp_path / "fabric.ckpt", tmp_path / "out", to="safetensors", options=options).num_tensors
        == 7
    )
    with pytest.raises(ConfigError, match=r"strip_prefix='nets\.': no weight .*did you mean 'net\.'"):
        export_checkpoint(
            tmp_path / "fabric.ckpt",
            tmp_path / "more",
            to="safetensors",
            options=ExportOptions(weights="model", strip_prefix="nets."),
        )


def test_objects_of_classes_are_refused_until_they_are_allowed(tmp_path: Path) -> None:
    saved(tmp_path / "classes.ckpt", trainer_tree(hyper_parameters={"usage": Usage(1, 2, 3)}))
    for to in ("lightning", "dcp"):
        with pytest.raises(CheckpointError, match=r"objects of the classes .*Usage"):
            export_checkpoint(tmp_path / "classes.ckpt", tmp_path / to, to=to)
        export_checkpoint(tmp_path / "classes.ckpt", tmp_path / to, to=to, options=ExportOptions(weights_only=False))
        with pytest.raises(CheckpointError, match="Usage"):
            import_checkpoint(tmp_path / to, tmp_path / "again.ckpt")
        import_checkpoint(tmp_path / to, tmp_path / f"again-{to}.ckpt", weights_only=False)
    content = torch.load(tmp_path / "lightning", weights_only=False)
    assert content["hyper_parameters"]["usage"] == Usage(1, 2, 3)
