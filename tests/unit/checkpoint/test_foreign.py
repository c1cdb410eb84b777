"""Directories of torch's distributed checkpoint, as anybody writes them."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch.distributed.checkpoint as dcp
from tests.unit.checkpoint.formats_support import assert_equal, weights

from meshbolt.checkpoint.foreign import DcpReader
from meshbolt.errors import CheckpointError

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    dcp.save({**weights(), "epoch": 3, "names": ["a", "b"]}, checkpoint_id=tmp_path / "dcp")
    return tmp_path / "dcp"


def changed_metadata(directory: Path, change: Any) -> None:
    file = directory / ".metadata"
    metadata = pickle.loads(file.read_bytes())
    change(metadata)
    file.write_bytes(pickle.dumps(metadata))


def test_tensors_and_objects_are_what_torch_saved(directory: Path) -> None:
    with DcpReader(directory) as reader:
        assert_equal({key: reader.read(key) for key in reader.tensors}, weights())
        assert reader.objects() == {"epoch": 3, "names": ["a", "b"]}


def test_a_truncated_file_is_an_error_that_names_the_tensor(directory: Path) -> None:
    shard = next(directory.glob("*.distcp"))
    shard.write_bytes(shard.read_bytes()[:2000])
    with DcpReader(directory) as reader, pytest.raises(CheckpointError, match=r"'net\.\w+' cannot be read"):
        [reader.read(key) for key in reader.tensors]


def test_a_file_outside_of_the_directory_is_not_opened(directory: Path) -> None:
    def lead_away(metadata: Any) -> None:
        for place in metadata.storage_data.values():
            place.relative_path = f"../{place.relative_path}"

    changed_metadata(directory, lead_away)
    with DcpReader(directory) as reader, pytest.raises(CheckpointError, match=r"outside of it: do not trust it"):
        reader.read("net.a")


def test_a_tensor_with_parts_missing_is_not_returned(directory: Path) -> None:
    changed_metadata(directory, lambda metadata: metadata.state_dict_metadata["net.a"].chunks.clear())
    with DcpReader(directory) as reader, pytest.raises(CheckpointError, match=r"does not know all of 'net\.a'"):
        reader.read("net.a")


def test_a_directory_without_metadata_is_none(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be read"):
        DcpReader(tmp_path)
