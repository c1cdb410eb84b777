"""A checkpoint read tensor by tensor: every value right, or an error that says what is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.unit.checkpoint.formats_support import assert_equal, contents, saved, trainer_tree, weights

from meshbolt.checkpoint.reader import CheckpointReader
from meshbolt.errors import CheckpointError


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return saved(tmp_path / "run.ckpt")


def test_every_tensor_comes_whole_in_rows_and_in_its_dtype(path: Path) -> None:
    tensors, _ = contents(path)
    found = {key.removeprefix("state_dict."): value for key, value in tensors.items() if key.startswith("state_dict.")}
    assert_equal(found, weights())
    assert all(tensor.is_contiguous() for tensor in found.values())


def test_the_tree_has_lazy_tensors_in_their_places(path: Path) -> None:
    with CheckpointReader(path) as reader:
        tree = reader.tree()
        assert torch.equal(tree["state_dict"]["net.a"] + 0, weights()["net.a"])
        assert torch.equal(tree["loops"]["pair"][0] + 0, torch.ones(2))
        assert tree["loops"]["by_number"] == trainer_tree()["loops"]["by_number"]


def test_a_url_is_read_too(path: Path) -> None:
    with CheckpointReader(f"file://{path}") as reader:
        assert torch.equal(reader.read("state_dict.net.a"), weights()["net.a"])


def test_a_key_that_is_not_there_is_named(path: Path) -> None:
    with CheckpointReader(path) as reader, pytest.raises(CheckpointError, match=r"it has no tensor 'net\.gone'"):
        reader.read("net.gone")


def test_a_changed_byte_is_found_when_its_tensor_is_read(path: Path) -> None:
    shard = path / "__0_0.distcp"
    content = bytearray(shard.read_bytes())
    content[len(content) // 3] ^= 1
    shard.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"run\.ckpt' cannot be read: file __0_0\.distcp: it is damaged"):
        contents(path)


def test_a_missing_file_is_found_when_it_is_opened(path: Path) -> None:
    (path / "__0_0.distcp").unlink()
    with pytest.raises(CheckpointError, match=r"its file __0_0\.distcp is missing"):
        CheckpointReader(path)


def test_a_checkpoint_that_was_replaced_meanwhile_is_not_mixed_with_its_successor(path: Path) -> None:
    with CheckpointReader(path) as reader:
        saved(path, {"state_dict": {name: value + value for name, value in weights().items()}})
        with pytest.raises(CheckpointError, match="it was replaced while it was read; start again"):
            reader.read("state_dict.net.a")


def test_after_it_was_closed_nothing_is_read(path: Path) -> None:
    with CheckpointReader(path) as reader:
        tensor = reader.lazy("state_dict.net.a")
    with pytest.raises(CheckpointError, match="it was closed before"):
        tensor.sum()
