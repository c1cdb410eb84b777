"""Verification of a whole checkpoint: every fault is told, in words that name the file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from meshbolt.checkpoint import save_directory, verify_checkpoint
from meshbolt.checkpoint.manifest import Chunk, FileRecord, Manifest, read_manifest

TENSORS = {"w": torch.arange(60_000.0), "b": torch.ones(3)}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    save_directory(tmp_path / "a.ckpt", tensors=TENSORS, objects={"epoch": 1})
    return tmp_path / "a.ckpt"


def rewrite(path: Path, **changes: Any) -> None:
    manifest: Manifest = read_manifest(path / "manifest.json")
    (path / "manifest.json").write_text(replace(manifest, **changes).to_json())


def without(path: Path, name: str) -> dict[str, FileRecord]:
    return {other: record for other, record in read_manifest(path / "manifest.json").files.items() if other != name}


def flip(file: Path, position: int) -> None:
    content = bytearray(file.read_bytes())
    content[position] ^= 1
    file.write_bytes(content)


def test_a_whole_checkpoint_has_no_faults_and_is_left_as_it_was(path: Path) -> None:
    before = {file.name: file.read_bytes() for file in path.iterdir()}
    assert verify_checkpoint(path) == ()
    assert {file.name: file.read_bytes() for file in path.iterdir()} == before


def test_every_damaged_part_is_told(path: Path) -> None:
    first, second = read_manifest(path / "manifest.json").files["__0_0.distcp"].chunks
    flip(path / "__0_0.distcp", first.offset + 10)
    flip(path / "__0_0.distcp", second.offset + second.length - 1)
    flip(path / "meta.pt", 50)
    (path / ".metadata").unlink()
    assert sorted(verify_checkpoint(path)) == [
        ".metadata is missing",
        f"__0_0.distcp is damaged in its bytes 0 to {first.length - 1}",
        f"__0_0.distcp is damaged in its bytes {second.offset} to {second.offset + second.length - 1}",
        f"meta.pt is damaged in its bytes 0 to {(path / 'meta.pt').stat().st_size - 1}",
    ]


def test_bytes_beyond_what_was_saved_are_told(path: Path) -> None:
    size = (path / "meta.pt").stat().st_size
    with (path / "meta.pt").open("ab") as file:
        file.write(b"0")
    assert verify_checkpoint(path) == (f"meta.pt has {size + 1} bytes instead of {size}",)


@pytest.mark.parametrize("cut", ["first", "last"])
def test_parts_without_a_checksum_are_told(path: Path, cut: str) -> None:
    record = read_manifest(path / "manifest.json").files["__0_0.distcp"]
    chunks = record.chunks[1:] if cut == "first" else record.chunks[:-1]
    rewrite(path, files={**without(path, "__0_0.distcp"), "__0_0.distcp": FileRecord(record.num_bytes, chunks)})
    assert "manifest.json has no checksums for parts of __0_0.distcp" in verify_checkpoint(path)


@pytest.mark.parametrize("name", ["meta.pt", ".metadata"])
def test_a_file_that_every_checkpoint_has_must_be_named(path: Path, name: str) -> None:
    rewrite(path, files=without(path, name))
    assert verify_checkpoint(path) == (f"manifest.json does not name {name}",)


def test_whole_files_that_contradict_each_other_are_told(path: Path) -> None:
    """A shard of another save, with the manifest to it: only the metadata knows better."""
    other = b"x" * 100
    (path / "__0_0.distcp").write_bytes(other)
    rewrite(path, files={**without(path, "__0_0.distcp"), "__0_0.distcp": FileRecord.of(other)})
    faults = verify_checkpoint(path)
    assert len(faults) == 2
    assert all(".metadata leads to bytes" in fault and "__0_0.distcp" in fault for fault in faults)


def test_a_checkpoint_that_is_replaced_meanwhile_is_looked_at_anew(path: Path) -> None:
    replaced: list[int] = []

    def replace_once(num_bytes: int) -> None:
        if not replaced:
            save_directory(path, tensors={"w": TENSORS["w"] + 1}, objects={})
        replaced.append(num_bytes)

    assert verify_checkpoint(path, on_bytes=replace_once) == ()
    assert len(replaced) > 3


def test_what_is_no_checkpoint_is_told(tmp_path: Path) -> None:
    assert verify_checkpoint(tmp_path / "a.ckpt") == ("there is nothing at this path",)


def test_a_chunk_says_where_its_values_are(path: Path) -> None:
    chunk: Chunk = read_manifest(path / "manifest.json").files["__0_0.distcp"].chunks[0]
    content = (path / "__0_0.distcp").read_bytes()[chunk.offset : chunk.offset + chunk.length]
    assert any(content[chunk.values :].startswith(tensor.numpy().tobytes()) for tensor in TENSORS.values())
