"""Files of safetensors, against the library that defines them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tests.unit.checkpoint.formats_support import assert_equal, contents, saved, weights

from meshbolt.checkpoint import TensorInfo
from meshbolt.checkpoint.formats import ExportOptions, export_checkpoint, import_checkpoint
from meshbolt.checkpoint.formats.safetensors import _NAMES, divide, shard_names
from meshbolt.errors import CheckpointError, UnsupportedError


def every_dtype() -> dict[str, torch.Tensor]:
    return {f"w.{name}": torch.tensor([[0.0, 1.0, 2.0]]).to(dtype) for dtype, name in _NAMES.items()}


def test_the_library_reads_every_dtype_as_it_was_and_so_do_we(tmp_path: Path) -> None:
    saved(tmp_path / "run.ckpt", {"state_dict": every_dtype()})
    export_checkpoint(tmp_path / "run.ckpt", tmp_path / "one.safetensors", to="safetensors")
    assert_equal(load_file(tmp_path / "one.safetensors"), every_dtype())
    with safe_open(tmp_path / "one.safetensors", framework="pt") as opened:
        assert opened.metadata() == {"format": "pt"}
    import_checkpoint(tmp_path / "one.safetensors", tmp_path / "again.ckpt")
    tensors, _ = contents(tmp_path / "again.ckpt")
    assert_equal({key.removeprefix("state_dict."): value for key, value in tensors.items()}, every_dtype())


def test_a_dtype_that_the_format_does_not_have_is_refused(tmp_path: Path) -> None:
    saved(tmp_path / "run.ckpt", {"state_dict": {"w": torch.ones(2, dtype=torch.complex128)}})
    with pytest.raises(UnsupportedError, match=r"safetensors has no dtype for w: complex128\[2\]"):
        export_checkpoint(tmp_path / "run.ckpt", tmp_path / "out", to="safetensors")


def test_casting_changes_floating_point_weights_only(tmp_path: Path) -> None:
    saved(tmp_path / "run.ckpt")
    options = ExportOptions(dtype="float16")
    export_checkpoint(tmp_path / "run.ckpt", tmp_path / "one.safetensors", to="safetensors", options=options)
    expected = {name: value.half() if value.is_floating_point() else value for name, value in weights().items()}
    assert_equal(load_file(tmp_path / "one.safetensors"), expected)


def test_everything_has_full_keys(tmp_path: Path) -> None:
    path = saved(tmp_path / "run.ckpt")
    options = ExportOptions(everything=True)
    export_checkpoint(path, tmp_path / "all.safetensors", to="safetensors", options=options)
    assert_equal(load_file(tmp_path / "all.safetensors"), contents(path)[0])


def test_shards_are_filled_in_order_and_a_large_tensor_has_one_of_its_own() -> None:
    infos = {
        name: TensorInfo(shape=(size,), dtype=torch.uint8) for name, size in {"a": 3, "b": 4, "c": 9, "d": 1}.items()
    }
    assert divide(infos, max_shard_bytes=7) == [["a", "b"], ["c"], ["d"]]
    assert divide({}, max_shard_bytes=7) == [[]]
    assert shard_names(1) == ["model.safetensors"]
    assert shard_names(2) == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]


def test_the_index_names_the_shard_of_every_weight(tmp_path: Path) -> None:
    saved(tmp_path / "run.ckpt")
    done = export_checkpoint(
        tmp_path / "run.ckpt", tmp_path / "many", to="safetensors", options=ExportOptions(max_shard_bytes=100)
    )
    index = json.loads((tmp_path / "many/model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": done.num_bytes}
    found = {name: load_file(tmp_path / "many" / file)[name] for name, file in index["weight_map"].items()}
    assert_equal(found, {name: weights()[name] for name in found})
    assert found.keys() == weights().keys()


def test_tied_weights_saved_once_or_twice_are_what_the_file_has(tmp_path: Path) -> None:
    shared = torch.randn(3)
    save_file({"head": shared}, tmp_path / "once.safetensors")
    saved(tmp_path / "twice.ckpt", {"state_dict": {"head": shared, "tokens": shared}})
    import_checkpoint(tmp_path / "once.safetensors", tmp_path / "once.ckpt")
    export_checkpoint(tmp_path / "twice.ckpt", tmp_path / "twice.safetensors", to="safetensors")
    assert contents(tmp_path / "once.ckpt")[0].keys() == {"state_dict.head"}
    assert_equal(load_file(tmp_path / "twice.safetensors"), {"head": shared, "tokens": shared})


def test_an_import_puts_a_prefix_before_names_and_makes_a_checkpoint_of_weights(tmp_path: Path) -> None:
    save_file({"w": torch.ones(2)}, tmp_path / "w.safetensors")
    import_checkpoint(tmp_path / "w.safetensors", tmp_path / "run.ckpt", prefix="model.")
    tensors, objects = contents(tmp_path / "run.ckpt")
    assert tensors.keys() == {"state_dict.model.w"}
    assert objects["state_dict"] == {"model.w": {"__tensor__": "state_dict.model.w"}}
    assert objects["meshbolt"] == {"sharded": ["state_dict.model.w"]}
    assert objects["global_step"] == 0
    assert "optimizer_states" not in objects


def test_a_damaged_file_an_incomplete_directory_and_a_weight_in_two_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "bad.safetensors").write_bytes(b"no header")
    with pytest.raises(CheckpointError, match=r"bad\.safetensors cannot be read as safetensors"):
        import_checkpoint(tmp_path / "bad.safetensors", tmp_path / "out")
    twice = tmp_path / "twice"
    twice.mkdir()
    for name in ("a", "b"):
        save_file({"w": torch.ones(2)}, twice / f"{name}.safetensors")
    with pytest.raises(CheckpointError, match="has 'w' in two files"):
        import_checkpoint(twice, tmp_path / "out")
    (twice / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": "gone.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"the index names .*gone\.safetensors"):
        import_checkpoint(twice, tmp_path / "out")
