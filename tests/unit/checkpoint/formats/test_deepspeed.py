"""Importing what DeepSpeed has saved: everything that was there, as a checkpoint of ours."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.deepspeed_fixtures import Trained, trained, write_plain, write_rows, write_shards
from tests.unit.checkpoint.formats_support import contents

from meshbolt.checkpoint import lazy
from meshbolt.checkpoint.formats import import_checkpoint
from meshbolt.checkpoint.formats.convert import recognise
from meshbolt.compat import StoredTensor
from meshbolt.errors import ConfigError
from meshbolt.precision import LossScaler

SHAPES = [{"a.weight": (5, 3), "a.bias": (5,)}, {"b.weight": (7,)}]
LIGHTNINGS = {
    "epoch": 2,
    "global_step": 9,
    "pytorch-lightning_version": "2.6.0",
    "loops": {"fit_loop": {"epoch_progress": 1}},
    "lr_schedulers": [{"last_epoch": 5}],
    "callbacks": {"EarlyStopping": {"best_score": torch.tensor(0.5)}},
    "hyper_parameters": {"width": 3},
}


def tensors_of(run: Trained, *, prefix: str = "") -> dict[str, torch.Tensor]:
    """Return what an import should have."""
    found = {f"state_dict.{prefix}{name}": value for name, value in run.weights().items()}
    for name in run.masters:
        entry = f"optimizer_states.0.state.{prefix}{name}"
        found |= {f"{entry}.{key}": run.moments[key][name] for key in run.moments}
        found[f"{entry}.step"] = torch.tensor(float(run.step))
    return found


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Check that two groups of tensors are the same."""
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("prefix", ["", "model."])
def test_a_save_of_its_engine_becomes_one_of_a_trainer(stage: int, prefix: str, tmp_path: Path) -> None:
    run = trained(SHAPES, frozen={"old": torch.randn(3)}, client={"mine": {"at": 3}}, loss_scale=64.0, world=3)
    if stage == 3:
        write_shards(tmp_path / "ds", run)
    else:
        write_rows(tmp_path / "ds", run, stage=stage)
    done = import_checkpoint(tmp_path / "ds", tmp_path / "out", format="deepspeed", prefix=prefix)
    tensors, objects = contents(tmp_path / "out")
    assert_equal(tensors, tensors_of(run, prefix=prefix))
    assert done.num_tensors == len(tensors)
    assert done.notes == (
        f"Tag 'global_step10': ZeRO stage {stage}, written by 3 data-parallel ranks of DeepSpeed 0.19.8 after 10 steps.",
    )
    assert (objects["global_step"], objects["epoch"], objects["client_state"]) == (10, 0, {"mine": {"at": 3}})
    assert (objects["deepspeed"]["global_samples"], objects["deepspeed"]["ds_config"]["train_batch_size"]) == (40, 4)
    assert objects["lr_schedulers"] == [{"last_epoch": 7}]
    group = objects["optimizer_states"][0]["param_groups"][0]
    assert (group["params"], group["lr"]) == ([f"{prefix}a.weight", f"{prefix}a.bias"], 0.1)
    assert objects["optimizer_states"][0]["class"] == "AdamW"
    scaler = LossScaler(growth_interval=100, hysteresis=2)
    scaler.load_state_dict(objects["MixedPrecision"])
    assert scaler.current_scale == 64.0


def test_a_save_under_lightning_keeps_its_loops_callbacks_and_hyperparameters(tmp_path: Path) -> None:
    run = trained(SHAPES, client=LIGHTNINGS)
    write_rows(tmp_path / "run.ckpt", run, tag="checkpoint")
    import_checkpoint(tmp_path / "run.ckpt", tmp_path / "out")
    tensors, objects = contents(tmp_path / "out")
    assert_equal(tensors, {**tensors_of(run), "callbacks.EarlyStopping.best_score": torch.tensor(0.5)})
    assert {key: objects[key] for key in ("epoch", "global_step", "loops", "lr_schedulers", "hyper_parameters")} == {
        key: LIGHTNINGS[key] for key in ("epoch", "global_step", "loops", "lr_schedulers", "hyper_parameters")
    }
    assert "deepspeed" not in objects


def test_weights_alone_are_said_to_be_alone(tmp_path: Path) -> None:
    write_plain(tmp_path / "ds", trained(SHAPES), kind="none")
    done = import_checkpoint(tmp_path / "ds", tmp_path / "out")
    assert any("the checkpoint holds weights, and a run can begin with them" in note for note in done.notes)
    tensors, objects = contents(tmp_path / "out")
    assert all(key.startswith("state_dict.") for key in tensors)
    assert "optimizer_states" not in objects


def test_the_tag_and_the_format_are_what_is_asked_for(tmp_path: Path) -> None:
    first, second = trained([{"one": (2,)}]), trained([{"two": (3,)}])
    write_rows(tmp_path / "ds", first, tag="one")
    write_rows(tmp_path / "ds", second, tag="two")
    assert recognise(tmp_path / "ds") == "deepspeed"
    import_checkpoint(tmp_path / "ds", tmp_path / "out", tag="one")
    assert_equal(contents(tmp_path / "out")[0], tensors_of(first))
    with pytest.raises(ConfigError, match=r"is a directory of DeepSpeed's .* and not of the format 'dcp'"):
        import_checkpoint(tmp_path / "ds", tmp_path / "again", format="dcp")
    with pytest.raises(ConfigError, match=r"'deepsped' is not a format .*did you mean 'deepspeed'"):
        import_checkpoint(tmp_path / "ds", tmp_path / "again", format="deepsped")
    torch.save({"a": torch.ones(2)}, tmp_path / "weights.pt")
    with pytest.raises(ConfigError, match=r"tag='one' chooses among several saves, and .* Leave it out"):
        import_checkpoint(tmp_path / "weights.pt", tmp_path / "again", tag="one")


def test_an_import_holds_one_tensor_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_shards(tmp_path / "ds", trained([{f"layers.{number}.weight": (4, 4) for number in range(8)}]))
    alive: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()
    most, given, value = [0], [0], StoredTensor.value

    def counted(tensor: Any) -> torch.Tensor:
        most.append(len(list(alive)))
        found = value(tensor)
        if not isinstance(tensor, lazy.LazyTensor):
            given[0] += 1
            alive.add(found)
        return found

    monkeypatch.setattr(StoredTensor, "value", counted)
    done = import_checkpoint(tmp_path / "ds", tmp_path / "out")
    assert given[0] >= done.num_tensors - 8, "all but the counts of steps"
    assert max(most) <= 1
