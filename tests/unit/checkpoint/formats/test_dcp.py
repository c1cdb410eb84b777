"""Directories of torch's distributed checkpoint, written for torch's own tools and read from Lightning's strategies."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from tests.unit.checkpoint.formats_support import assert_equal, contents, saved, trainer_tree, weights

from meshbolt.checkpoint.formats import export_checkpoint, import_checkpoint
from meshbolt.errors import CheckpointError

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def test_torch_loads_single_tensors_from_an_export(tmp_path: Path) -> None:
    export_checkpoint(saved(tmp_path / "run.ckpt"), tmp_path / "dcp", to="dcp")
    state = {"state_dict": {name: torch.zeros_like(value) for name, value in weights().items()}}
    dcp.load(state, checkpoint_id=tmp_path / "dcp")
    assert_equal(state["state_dict"], weights())


def test_what_was_exported_comes_back_with_its_empty_dictionaries_numbers_and_tuples(tmp_path: Path) -> None:
    path = saved(tmp_path / "run.ckpt")
    export_checkpoint(path, tmp_path / "dcp", to="dcp")
    import_checkpoint(tmp_path / "dcp", tmp_path / "again.ckpt")
    again, expected = contents(tmp_path / "again.ckpt"), contents(path)
    assert_equal(again[0], expected[0])
    assert again[1] == expected[1]


def test_the_layout_of_lightnings_strategies_is_known(tmp_path: Path) -> None:
    tree = trainer_tree()
    state = {"state": tree["optimizer_states"][0]["state"], "param_groups": [{"lr": 0.1, "params": ["net.b", "net.a"]}]}
    dcp.save({"state_dict": weights(), "optimizer_0": state}, checkpoint_id=tmp_path / "dcp")
    torch.save({"epoch": 1, "global_step": 3, "callbacks": {}}, tmp_path / "dcp/meta.pt")
    done = import_checkpoint(tmp_path / "dcp", tmp_path / "again.ckpt")
    tensors, objects = contents(tmp_path / "again.ckpt")
    assert done.notes == ()
    assert (objects["epoch"], objects["global_step"], objects["callbacks"]) == (1, 3, {})
    assert objects["optimizer_states"][0]["param_groups"] == [{"lr": 0.1, "params": ["net.b", "net.a"]}]
    assert torch.equal(tensors["optimizer_states.0.state.net.b.exp_avg"], torch.full((3, 4), 0.5))
    assert "optimizer_0" not in objects


def test_state_by_number_keeps_its_numbers(tmp_path: Path) -> None:
    state = {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": [{"params": [0]}]}
    dcp.save({"state_dict": {"w": torch.ones(2)}, "optimizer_0": state}, checkpoint_id=tmp_path / "dcp")
    done = import_checkpoint(tmp_path / "dcp", tmp_path / "again.ckpt")
    _, objects = contents(tmp_path / "again.ckpt")
    assert list(objects["optimizer_states"][0]["state"]) == [0]
    assert "by number" in done.notes[0]


@pytest.mark.parametrize("entry", ["model", None])
def test_weights_are_found_under_model_or_at_the_top(tmp_path: Path, entry: str | None) -> None:
    dcp.save({entry: weights()} if entry else weights(), checkpoint_id=tmp_path / "dcp")
    import_checkpoint(tmp_path / "dcp", tmp_path / "again.ckpt", prefix="model.")
    tensors, _ = contents(tmp_path / "again.ckpt")
    assert_equal(tensors, {f"state_dict.model.{name}": value for name, value in weights().items()})


def test_a_directory_without_weights_is_refused_with_its_entries(tmp_path: Path) -> None:
    dcp.save({"epoch": 3, "inner": {"w": torch.ones(2)}}, checkpoint_id=tmp_path / "dcp")
    with pytest.raises(CheckpointError, match=r"no weights where they are looked for.*Its entries: epoch, inner"):
        import_checkpoint(tmp_path / "dcp", tmp_path / "again.ckpt")
