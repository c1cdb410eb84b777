"""The manifest: what it says survives the file, and a file that says less is no manifest."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from meshbolt.checkpoint.local import LocalFiles
from meshbolt.checkpoint.manifest import (
    FORMAT_VERSION,
    FileRecord,
    Manifest,
    is_manifest,
    own_versions,
    read_manifest,
    seal,
)
from meshbolt.checkpoint.storage import Found, check_sizes
from meshbolt.errors import CheckpointError

MANIFEST = Manifest(
    save_id="0123456789ab",
    world_size=4,
    versions={"meshbolt": "0.1.0", "torch": "2.13.0"},
    plan={"zero.stage": 3, "zero.unit": ["Block"], "compile": False},
    files={"__0_0.distcp": FileRecord.of(b"0123456789"), "meta.pt": FileRecord.of(b"abc")},
    tensors={"w": {"shape": [2, 5], "dtype": "uint8", "placement": "whole"}},
    folder="data-0123456789ab",
)


def written(place: Path, /, **changes: Any) -> Path:
    """Write a manifest with entries changed, added or (None) left out, and the checksum of that."""
    content = {**json.loads(MANIFEST.to_json()), "checksum": None, **changes}
    plain = json.dumps({key: value for key, value in content.items() if value is not None}, indent=2)
    file = place / "manifest.json"
    file.write_text(seal(plain.removesuffix("\n}")))
    return file


def test_a_manifest_comes_back_as_it_was_written(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(MANIFEST.to_json())
    assert read_manifest(tmp_path / "manifest.json") == MANIFEST


def test_what_a_later_meshbolt_adds_under_the_same_version_is_no_obstacle(tmp_path: Path) -> None:
    files = {name: {**entry, "colour": "blue"} for name, entry in json.loads(MANIFEST.to_json())["files"].items()}
    assert read_manifest(written(tmp_path, files=files, signature="X")) == MANIFEST


def test_a_newer_format_is_a_checkpoint_that_this_version_refuses_by_name(tmp_path: Path) -> None:
    file = written(tmp_path, format_version=FORMAT_VERSION + 1, versions={"meshbolt": "9.0"})
    assert is_manifest(file)
    with pytest.raises(CheckpointError, match=r"format is version 4 .* by meshbolt 9\.0, .* Upgrade meshbolt"):
        read_manifest(file)


def test_other_checksums_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"checksums 'crc64', .* reads version 3 with 'words64-blake2b64'"):
        read_manifest(written(tmp_path, algorithm="crc64"))


def test_an_older_format_is_refused_with_the_way_to_read_it(tmp_path: Path) -> None:
    file = tmp_path / "manifest.json"
    file.write_text(
        json.dumps({"format": "meshbolt.checkpoint", "format_version": 1, "versions": {"meshbolt": "0.0.9"}})
    )
    assert is_manifest(file)
    with pytest.raises(CheckpointError, match=r"version 1 .* by meshbolt 0\.0\.9, .* Use the older one to read it"):
        read_manifest(file)


def test_a_change_of_any_byte_is_found(tmp_path: Path) -> None:
    whole = MANIFEST.to_json().encode()
    file = tmp_path / "manifest.json"
    for position in range(len(whole)):
        for bit in (0, 3, 5, 7):
            changed = bytearray(whole)
            changed[position] ^= 1 << bit
            file.write_bytes(changed)
            with pytest.raises(CheckpointError, match=r"manifest\.json"):
                read_manifest(file)


@pytest.mark.parametrize("key", ["save_id", "world_size", "versions", "plan", "files", "tensors", "folder"])
def test_a_manifest_without_one_of_its_parts_is_damaged(tmp_path: Path, key: str) -> None:
    with pytest.raises(CheckpointError, match=r"manifest\.json is damaged"):
        read_manifest(written(tmp_path, **{key: None}))


@pytest.mark.parametrize("length", [0, 1, 40, -2])
def test_a_truncated_manifest_is_none(tmp_path: Path, length: int) -> None:
    file = written(tmp_path)
    file.write_bytes(file.read_bytes()[:length])
    assert not is_manifest(file)
    with pytest.raises(CheckpointError, match="damaged"):
        read_manifest(file)


@pytest.mark.parametrize("content", [b"[]", b'{"format": "other"}', b"\xff\xfe"])
def test_another_file_of_that_name_is_no_manifest(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "manifest.json"
    file.write_bytes(content)
    assert not is_manifest(file)
    with pytest.raises(CheckpointError, match=r"manifest\.json"):
        read_manifest(file)


def test_a_file_of_another_size_is_found_with_both_sizes(tmp_path: Path) -> None:
    (tmp_path / "__0_0.distcp").write_bytes(b"0" * 9)
    with pytest.raises(CheckpointError, match=r"__0_0\.distcp has 9 bytes instead of 10"):
        check_sizes(Found(MANIFEST, LocalFiles(tmp_path)), names=["__0_0.distcp"])


def test_a_missing_file_is_found(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"meta\.pt is missing"):
        check_sizes(Found(MANIFEST, LocalFiles(tmp_path)), names=["meta.pt"])


def test_the_content_of_a_small_file_is_compared() -> None:
    MANIFEST.files["meta.pt"].check(b"abc", name="meta.pt")
    with pytest.raises(CheckpointError, match=r"meta\.pt is damaged"):
        MANIFEST.files["meta.pt"].check(b"abd", name="meta.pt")


def test_a_plan_that_is_no_plain_data_is_refused() -> None:
    broken = Manifest(save_id="a", world_size=1, versions={}, plan={"dtype": torch.float32}, files={})
    with pytest.raises(CheckpointError, match="plan cannot be written"):
        broken.to_json()


def test_the_versions_are_those_that_run() -> None:
    assert own_versions()["torch"] == torch.__version__
