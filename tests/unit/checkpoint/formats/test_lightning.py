"""Lightning's file, written from an outline and filled; `torch.save` of the same tree is the reference."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest
import torch
from tests.unit.checkpoint.formats_support import assert_equal, contents, saved, trainer_tree, weights

from meshbolt.checkpoint.formats import ExportOptions, export_checkpoint, import_checkpoint
from meshbolt.checkpoint.reader import CheckpointReader
from meshbolt.errors import CheckpointError


class Holder:
    """An object that a user has put into a checkpoint, with a tensor in it."""

    def __init__(self) -> None:
        self.tensor = torch.arange(4.0)


def test_the_records_are_those_that_torch_writes_bytes_and_checksums(tmp_path: Path) -> None:
    path = saved(tmp_path / "run.ckpt")
    export_checkpoint(path, tmp_path / "ours.ckpt", to="lightning")
    torch.save(torch.load(tmp_path / "ours.ckpt", weights_only=True), tmp_path / "theirs.ckpt")
    with zipfile.ZipFile(tmp_path / "ours.ckpt") as ours, zipfile.ZipFile(tmp_path / "theirs.ckpt") as theirs:
        assert ours.testzip() is None

        def listed(archive: zipfile.ZipFile) -> list[tuple[str, int, int]]:
            records = archive.infolist()
            return [
                (each.filename.split("/", 1)[1], each.file_size, each.CRC)
                for each in records
                if "/data/" in each.filename
            ]

        assert listed(ours) == listed(theirs)


def test_everything_is_there_but_random_states_and_what_is_our_own(tmp_path: Path) -> None:
    export_checkpoint(saved(tmp_path / "run.ckpt"), tmp_path / "whole.ckpt", to="lightning")
    found = torch.load(tmp_path / "whole.ckpt", weights_only=True)
    expected = trainer_tree()
    assert found.keys() == expected.keys()
    assert_equal(found["state_dict"], weights())
    assert found["loops"]["by_number"] == {1: "one"}
    assert torch.equal(found["loops"]["pair"][0], torch.ones(2))
    state = found["optimizer_states"][0]
    assert state["param_groups"] == [{"lr": 0.1, "params": [0, 1]}]
    assert state["state"][0]["exp_avg"].shape == weights()["net.b"].shape
    assert state.keys() == {"state", "param_groups"}


def test_tensors_inside_of_objects_are_filled_too(tmp_path: Path) -> None:
    saved(tmp_path / "run.ckpt", trainer_tree(aaa=Holder(), zzz=Holder()))
    options = ExportOptions(weights_only=False)
    export_checkpoint(tmp_path / "run.ckpt", tmp_path / "whole.ckpt", to="lightning", options=options)
    found = torch.load(tmp_path / "whole.ckpt", weights_only=False)
    assert torch.equal(found["aaa"].tensor, torch.arange(4.0))
    assert torch.equal(found["zzz"].tensor, torch.arange(4.0))
    assert_equal(found["state_dict"], weights())


def test_a_file_comes_back_with_all_that_it_held(tmp_path: Path) -> None:
    torch.save(trainer_tree(), tmp_path / "plain.ckpt")
    done = import_checkpoint(tmp_path / "plain.ckpt", tmp_path / "again.ckpt")
    assert done.notes == (), "state by name stays so"
    with CheckpointReader(tmp_path / "again.ckpt") as reader:
        tree = reader.tree()
        assert reader.manifest.plan == {"imported.format": "lightning", "imported.from": str(tmp_path / "plain.ckpt")}
        assert torch.equal(tree["optimizer_states"][0]["state"]["net.b"]["exp_avg"] + 0, torch.full((3, 4), 0.5))
        assert_equal(
            {name: value + torch.zeros((), dtype=value.dtype) for name, value in tree["state_dict"].items()}, weights()
        )
    assert tree["callbacks"] == {}


def test_weights_that_share_memory_are_saved_under_both_names(tmp_path: Path) -> None:
    whole = torch.arange(6.0)
    torch.save({"state_dict": {"a": whole, "b": whole, "part": whole[2:4]}}, tmp_path / "plain.ckpt")
    import_checkpoint(tmp_path / "plain.ckpt", tmp_path / "again.ckpt")
    tensors, _ = contents(tmp_path / "again.ckpt")
    expected = {"state_dict.a": whole, "state_dict.b": whole, "state_dict.part": whole[2:4]}
    assert_equal(tensors, expected)


def test_a_bare_state_dict_becomes_a_checkpoint_of_weights(tmp_path: Path) -> None:
    torch.save(weights(), tmp_path / "bare.pt")
    done = import_checkpoint(tmp_path / "bare.pt", tmp_path / "again.ckpt", prefix="model.")
    assert done.notes == ("The file is a bare state dict: the checkpoint holds weights only.",)
    tensors, _ = contents(tmp_path / "again.ckpt")
    assert_equal(tensors, {f"state_dict.model.{name}": value for name, value in weights().items()})


def test_other_files_of_torch_are_refused(tmp_path: Path) -> None:
    torch.save({"loss": 3.0, "w": torch.ones(2)}, tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match=r"neither a checkpoint of Lightning's .* nor a bare state dict.*loss, w"):
        import_checkpoint(tmp_path / "other.pt", tmp_path / "out")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(CheckpointError, match="holds a list"):
        import_checkpoint(tmp_path / "list.pt", tmp_path / "out")
    content = (tmp_path / "other.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(content[:200] + content[400:])
    with pytest.raises(CheckpointError, match="cannot be read"):
        import_checkpoint(tmp_path / "cut.pt", tmp_path / "out")
