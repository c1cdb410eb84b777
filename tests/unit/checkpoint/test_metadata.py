"""DCP's metadata is read as data: nothing in it runs."""

from __future__ import annotations

import io
import pickle
import pickletools
from pathlib import Path
from typing import Any

import pytest
import torch

from meshbolt.checkpoint import TensorInfo, metadata, save_directory, saved_tensors
from meshbolt.checkpoint.metadata import read_metadata
from meshbolt.errors import CheckpointError

TENSORS = {
    "w": torch.ones(2, 3),
    "scalar": torch.tensor(1, dtype=torch.int64),
    "flags": torch.ones(4, dtype=torch.bool),
    "eight": torch.ones(5).to(torch.float8_e4m3fn),
}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    save_directory(tmp_path / "a.ckpt", tensors=TENSORS, objects={})
    return tmp_path / "a.ckpt"


class Shell:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return (Path.touch, (self.marker,))


def test_shapes_and_dtypes_are_known_without_reading_a_tensor(checkpoint: Path) -> None:
    for shard in checkpoint.glob("*.distcp"):
        shard.unlink()
    assert saved_tensors(checkpoint) == {
        key: TensorInfo(shape=tuple(tensor.shape), dtype=tensor.dtype) for key, tensor in TENSORS.items()
    }


def test_code_in_the_metadata_is_refused_by_name_and_does_not_run(checkpoint: Path, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    (checkpoint / ".metadata").write_bytes(pickle.dumps(Shell(marker)))
    with pytest.raises(CheckpointError, match=r"asks for .*getattr|asks for pathlib.*Path"):
        read_metadata(checkpoint)
    assert not marker.exists()


@pytest.mark.parametrize("name", ["torch load", "torch hub.load", "torch.serialization load", "builtins eval"])
def test_functions_of_torch_are_no_metadata(checkpoint: Path, name: str) -> None:
    module, attribute = name.split(" ")
    (checkpoint / ".metadata").write_bytes(b"\x80\x02c" + f"{module}\n{attribute}\n".encode() + b".")
    with pytest.raises(CheckpointError, match=f"asks for {module}.{attribute}"):
        read_metadata(checkpoint)


@pytest.mark.parametrize("length", [0, 1, 100, -1])
def test_truncated_metadata_is_called_damaged(checkpoint: Path, length: int) -> None:
    file = checkpoint / ".metadata"
    file.write_bytes(file.read_bytes()[:length])
    with pytest.raises(CheckpointError, match=r"\.metadata is damaged"):
        saved_tensors(checkpoint)


def test_metadata_that_is_not_what_was_saved_is_not_even_looked_into(checkpoint: Path) -> None:
    (checkpoint / ".metadata").write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(CheckpointError, match=r"\.metadata is damaged: the checksum"):
        saved_tensors(checkpoint)


def test_a_pickle_of_something_else_is_called_damaged(checkpoint: Path) -> None:
    (checkpoint / ".metadata").write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(CheckpointError, match="it holds a dict"):
        read_metadata(checkpoint)


def test_the_metadata_names_no_path_of_the_machine_that_wrote_it(checkpoint: Path) -> None:
    texts = {str(argument) for _, argument, _ in pickletools.genops((checkpoint / ".metadata").read_bytes())}
    assert not [text for text in texts if "pathlib" in text or checkpoint.parent.name in text]


def test_an_enum_member_pickled_through_getattr_is_read_and_any_other_attribute_is_not():
    """Python 3.11.2 pickles enum members so; if this fails, checkpoints cannot be resumed there, or a file can run code."""
    member = next(iter(metadata._MEM_FORMAT_ENCODING))
    getter = metadata._MetadataUnpickler(io.BytesIO(b"")).find_class("builtins", "getattr")
    assert getter(metadata._MEM_FORMAT_ENCODING, member.name) is member
    with pytest.raises(CheckpointError, match="do not trust"):
        getter(torch, "load")
