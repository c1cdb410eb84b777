"""Values that wait to be loaded: in the page cache where a file can be mapped, and lost with an error, not a crash."""

from __future__ import annotations

import io
import os
from pathlib import Path

import pytest
import torch

from meshbolt.checkpoint import load_tensors, save_directory, staging
from meshbolt.checkpoint.staging import mapped, mapping_of

VALUES = torch.arange(6.0).view(2, 3)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Return a file with the values at an odd offset."""
    (tmp_path / "a").write_bytes(b"abc" + VALUES.numpy().tobytes() + b"xyz")
    return tmp_path / "a"


@pytest.mark.parametrize("populate", [22, 9999], ids=["this Linux", "an older one"])
@pytest.mark.parametrize("kind", ["alike", "a part", "other dtype", "not contiguous"])
def test_values_are_copied_from_the_file_to_any_tensor(
    file: Path, monkeypatch: pytest.MonkeyPatch, kind: str, populate: int
) -> None:
    monkeypatch.setattr(staging, "_MADV_POPULATE_READ", populate)
    target, part = {
        "alike": (torch.zeros(2, 3), (slice(0, 2), slice(0, 3))),
        "a part": (torch.zeros(1, 2), (slice(1, 2), slice(1, 3))),
        "other dtype": (torch.zeros(2, 3, dtype=torch.bfloat16), (slice(0, 2), slice(0, 3))),
        "not contiguous": (torch.zeros(3, 2).t(), (slice(0, 2), slice(0, 3))),
    }[kind]
    with file.open("rb") as stream:
        mapping = mapping_of(stream)
    assert mapping is not None
    mapped(mapping, offset=3, shape=VALUES.shape, dtype=VALUES.dtype).fill(target, part)
    assert torch.equal(target.float(), VALUES[part])


def test_a_scalar_and_no_values_at_all_are_values(file: Path) -> None:
    with file.open("rb") as stream:
        mapping = mapping_of(stream)
    assert mapping is not None
    scalar, nothing = torch.zeros(()), torch.zeros(0, 3)
    mapped(mapping, offset=7, shape=scalar.shape, dtype=torch.float32).fill(scalar, ())
    mapped(mapping, offset=3, shape=nothing.shape, dtype=torch.float32).fill(nothing, (slice(0, 0), slice(0, 3)))
    assert scalar.item() == 1.0


def test_what_is_no_file_of_the_system_is_not_mapped(tmp_path: Path) -> None:
    assert mapping_of(io.BytesIO(b"abc")) is None
    (tmp_path / "empty").touch()
    with (tmp_path / "empty").open("rb") as stream:
        assert mapping_of(stream) is None


def test_a_file_that_was_cut_meanwhile_is_an_error_and_not_the_end_of_the_process(file: Path) -> None:
    with file.open("rb") as stream:
        mapping = mapping_of(stream)
    assert mapping is not None
    os.truncate(file, 0)
    with pytest.raises(OSError, match="Bad address"):
        mapped(mapping, offset=3, shape=VALUES.shape, dtype=VALUES.dtype)


@pytest.mark.parametrize("maps", [True, False])
def test_a_load_is_the_same_with_and_without_maps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, maps: bool) -> None:
    saved = {
        "w": torch.randn(300, 200),
        "half": torch.randn(7).half(),
        "flag": torch.tensor(True),
        "no": torch.zeros(0),
    }
    save_directory(tmp_path / "a.ckpt", tensors=saved, objects={})
    if not maps:
        monkeypatch.setattr("meshbolt.checkpoint.shard_reader.mapping_of", lambda stream: None)
    into = {key: torch.zeros_like(tensor) for key, tensor in saved.items()}
    load_tensors(tmp_path / "a.ckpt", into)
    assert all(torch.equal(into[key], tensor) for key, tensor in saved.items())
