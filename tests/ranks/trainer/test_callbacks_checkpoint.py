"""ModelCheckpoint and its kin with checkpoint directories: what appears, what is deleted, what is loaded again, and how exactly."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from meshbolt import CheckpointError, MeshStrategy, UnsupportedError, Zero
from meshbolt.plugins import MixedPrecision
from meshbolt.testing import run_ranks, run_ranks_expecting
from tests.ranks.trainer.loops_support import (
    ADVICE,
    BATCH,
    Regressor,
    alone,
    batches,
    difference,
    in_order,
    metrics,
    strategy_of,
    trainer,
    weights,
    whole,
)

pytestmark = ADVICE


def names_in(folder: Path) -> list[str]:
    return sorted(place.name for place in folder.iterdir())


def kept_by_top_k(folder: Path) -> dict[str, Any]:
    best = ModelCheckpoint(folder / "best", "{epoch}", monitor="val", save_top_k=2, save_last=True)
    steps = ModelCheckpoint(folder / "steps", "{step}", every_n_train_steps=3, save_top_k=-1)
    module, seen = Regressor(), []

    class Scores(pl.Callback):
        def on_validation_end(self, owner: pl.Trainer, _module: pl.LightningModule) -> None:
            if not owner.sanity_checking:
                seen.append(metrics(owner)["val"])

    owner = trainer("zero3", max_epochs=4, callbacks=[best, steps, Scores()])
    owner.fit(module, batches(), batches())
    data = batches()
    trained = weights(module)
    tested = {
        "best": owner.test(module, data, ckpt_path="best", verbose=False)[0]["test"],
        "last": owner.test(module, data, ckpt_path="last", verbose=False)[0]["test"],
        "path": owner.test(module, data, ckpt_path=folder / "best/last.ckpt", verbose=False)[0]["test"],
        "validate": owner.validate(module, data, ckpt_path="best", verbose=False)[0]["val"],
    }
    return {
        "scores": seen,
        "tested": tested,
        "paths": (best.best_model_path, best.last_model_path, sorted(best.best_k_models), steps.best_model_path),
        "score": float(best.best_model_score),
        "predicted": [float(x.sum()) for x in owner.predict(module, data, ckpt_path="best")],
        "last is trained": difference(trained, loaded_weights(module, best.last_model_path, owner)),
    }


def loaded_weights(module: pl.LightningModule, path: str, owner: pl.Trainer) -> dict[str, torch.Tensor]:
    owner.validate(module, batches(), ckpt_path=path, verbose=False)
    return weights(module)


def test_the_best_and_the_last_checkpoint_are_kept_and_found_again(tmp_path: Path) -> None:
    first, second = run_ranks(kept_by_top_k, 2, tmp_path)

    assert first["paths"] == second["paths"]
    assert first["scores"] == second["scores"]
    ranked = sorted(range(4), key=first["scores"].__getitem__)
    kept = sorted(f"epoch={epoch}.ckpt" for epoch in ranked[:2])
    assert names_in(tmp_path / "best") == [*kept, "last.ckpt"]
    assert names_in(tmp_path / "steps") == [f"step={step}.ckpt" for step in (12, 15, 3, 6, 9)]
    assert first["paths"][0] == str(tmp_path / "best" / f"epoch={ranked[0]}.ckpt")
    assert all((tmp_path / "best" / name).is_dir() for name in kept)

    for rank in (first, second):
        assert rank["score"] == pytest.approx(min(first["scores"]))
        assert rank["tested"]["best"] == rank["tested"]["validate"] == pytest.approx(min(first["scores"]))
        assert rank["tested"]["last"] == rank["tested"]["path"] == pytest.approx(first["scores"][-1])
        assert rank["last is trained"] == 0


def state_of(owner: pl.Trainer) -> dict[str, Any]:
    """Return whatever a step depends on, whole and on every rank; and numbers drawn next."""
    module = owner.lightning_module
    names = {parameter: name for name, parameter in module.named_parameters()}
    found: dict[str, Any] = {f"weight {name}": value for name, value in weights(module).items()}
    with strategy_of(owner).gathered(module, optimizer=owner.optimizers[0]) as state:
        for name in names.values():
            found |= {f"{key} {name}": torch.as_tensor(value).clone() for key, value in state[name].items()}
    scheduler = owner.lr_scheduler_configs[0].scheduler.state_dict()
    found["scheduler"] = torch.tensor([scheduler["last_epoch"], *scheduler["_last_lr"]], dtype=torch.float64)
    scaling = owner.precision_plugin.state_dict()
    found |= {f"scaling {key}": torch.tensor(float(value)) for key, value in scaling.items()}
    found["drawn next"] = torch.rand(4)
    found["progress"] = torch.tensor([owner.global_step, owner.current_epoch])
    return found


def fit_some_epochs(folder: Path, setting: dict[str, Any], epochs: int, resume: bool) -> dict[str, Any]:
    pl.seed_everything(0, workers=True, verbose=False)
    if resume:
        torch.manual_seed(99)  # the samplers' order comes from the seed above, all other numbers from the checkpoint
    module = Regressor(dropout=0.3)
    plugin = {"plugins": [MixedPrecision("16-mixed", "cpu", growth_interval=5)]} if setting["half"] else {}
    owner = trainer(MeshStrategy(zero=setting["zero"]), max_epochs=epochs, gradient_clip_val=1.0, **plugin)
    owner.fit(module, batches(), batches(), ckpt_path=folder / "half.ckpt" if resume else None)
    if not resume:
        owner.save_checkpoint(folder / "half.ckpt")
    return {**state_of(owner), "losses": torch.tensor(module.losses)}


SETTINGS = [
    (2, {"zero": 0, "half": False}),
    (2, {"zero": 2, "half": True}),
    (2, {"zero": 3, "half": False}),
    (4, {"zero": Zero(3, replicate=2), "half": False}),
]


@pytest.mark.parametrize(("ranks", "setting"), SETTINGS, ids=str)
def test_two_epochs_and_two_more_are_bit_for_bit_four(tmp_path: Path, ranks: int, setting: dict[str, Any]) -> None:
    run_ranks(fit_some_epochs, ranks, tmp_path, setting, 2, False)
    resumed = run_ranks(fit_some_epochs, ranks, tmp_path, setting, 4, True)
    through = run_ranks(fit_some_epochs, ranks, tmp_path / "other", setting, 4, False)

    for ours, expected in zip(resumed, through, strict=True):
        count = len(ours.pop("losses"))
        assert 0 < count < len(expected.pop("losses"))
        assert ours.keys() == expected.keys()
        assert [key for key in ours if not torch.equal(ours[key], expected[key])] == []
        assert ("scaling scale" in ours) == setting["half"]
    assert not torch.equal(resumed[0]["drawn next"], resumed[1]["drawn next"])
