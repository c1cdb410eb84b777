"""ModelCheckpoint and its kin with checkpoint directories: what appears, is deleted, is loaded again, and how exactly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint
from tests.ranks.trainer.loops_support import (
    ADVICE,
    Regressor,
    alone,
    batches,
    difference,
    metrics,
    strategy_of,
    trainer,
    weights,
    whole,
)
from tests.rows import full
from torch import nn

from meshbolt import CheckpointError, MeshStrategy, UnsupportedError, Zero
from meshbolt.plugins import MixedPrecision
from meshbolt.testing import run_ranks, run_ranks_expecting

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


class Scattered(Regressor):
    """Begins with other random numbers on every rank, and in every run."""

    def __init__(self, seed: int) -> None:
        super().__init__(dropout=0.3)
        self.seed = seed

    def on_fit_start(self) -> None:
        torch.manual_seed(self.seed + dist.get_rank())


def fit_some_epochs(folder: Path, setting: dict[str, Any], epochs: int, resume: bool) -> dict[str, Any]:
    pl.seed_everything(0, workers=True, verbose=False)
    module = Scattered(seed=99 if resume else 1)
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
    full(4, {"zero": Zero(3, replicate=2), "half": False}),
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


class Classes:
    """A value that plain data cannot hold."""


def save_plain(path: Path, hparams: Any) -> float:
    """Save a file as Lightning does on one device, and return the validation loss of its weights."""
    pl.seed_everything(3, verbose=False)
    module, owner = Regressor(), alone(max_epochs=1)
    module.hparams["note"] = hparams
    owner.fit(module, batches(), batches())
    owner.save_checkpoint(path)
    return float(owner.validate(module, batches(), verbose=False)[0]["val"])


def load_plain(path: Path) -> tuple[float, float]:
    module, owner = Regressor(), trainer("zero3")
    found = owner.validate(module, batches(), ckpt_path=path, verbose=False)[0]["val"]
    return found, owner.test(module, batches(), ckpt_path=path, verbose=False)[0]["test"]


def test_the_weights_of_a_plain_lightning_file_are_divided_among_the_ranks(tmp_path: Path) -> None:
    (expected,) = run_ranks(save_plain, 1, tmp_path / "plain.ckpt", 1)
    assert (tmp_path / "plain.ckpt").is_file()

    for found, tested in run_ranks(load_plain, 2, tmp_path / "plain.ckpt"):
        assert found == pytest.approx(expected, rel=1e-6)
        assert tested == pytest.approx(expected, rel=1e-6)


def loads_of_classes(folder: Path) -> list[Any]:
    """Load a directory and a file, both with an object of a class in their hyperparameters."""
    module, owner = Regressor(), trainer("zero2", max_epochs=1)
    module.hparams["note"] = Classes()
    owner.fit(module, batches(), batches())
    owner.save_checkpoint(folder / "own.ckpt")
    said = []
    for path in (folder / "own.ckpt", folder / "plain.ckpt"):
        with pytest.raises(CheckpointError) as refused:
            owner.validate(module, batches(), ckpt_path=path, verbose=False)
        said.append(str(refused.value))
        owner.validate(module, batches(), ckpt_path=path, weights_only=False, verbose=False)
    owner.fit_loop.max_epochs = 2
    owner.fit(module, batches(), batches(), ckpt_path=folder / "own.ckpt", weights_only=False)
    return [*said, owner.current_epoch]


def test_objects_of_classes_are_built_only_where_weights_only_is_false(tmp_path: Path) -> None:
    run_ranks(save_plain, 1, tmp_path / "plain.ckpt", Classes())

    for own, plain, epochs in run_ranks(loads_of_classes, 2, tmp_path):
        for said in (own, plain):
            assert "weights_only=False to what loads it (trainer.fit" in said
            assert "torch.serialization.add_safe_globals" in said
            assert "Classes" in said
        assert epochs == 2


def save_weights_only(folder: Path) -> list[Any]:
    saving = ModelCheckpoint(folder, "{epoch}", monitor="val", save_weights_only=True)
    module, owner = Regressor(lr=0.02), trainer("zero3", callbacks=[saving], max_epochs=1)
    owner.fit(module, batches(), batches())
    again = Regressor()
    other = trainer("zero1")
    tested = other.test(again, batches(), ckpt_path=saving.best_model_path, verbose=False)[0]["test"]
    with pytest.raises(CheckpointError, match=r"no optimizer_states, no lr_schedulers.*load_weights_only=True"):
        other.fit(again, batches(), batches(), ckpt_path=saving.best_model_path)
    return [tested, float(saving.best_model_score), difference(weights(module), weights(again))]


def test_a_checkpoint_of_weights_only_is_read_by_another_stage_and_refused_for_training(tmp_path: Path) -> None:
    for tested, score, apart in run_ranks(save_weights_only, 2, tmp_path):
        assert tested == pytest.approx(score, rel=1e-6)
        assert apart == 0


class Other(Regressor):
    """A module whose head has another name."""

    def __init__(self, *, strict: bool) -> None:
        super().__init__()
        self.tail, self.strict_loading = self.head, strict
        del self.head

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.__dict__["head"] = self.tail
        return super().forward(x)


class Wider(Regressor):
    """A module with an input of another size."""

    def __init__(self) -> None:
        super().__init__()
        self.inp = nn.Linear(9, 10)


def load_into_another(folder: Path) -> list[str]:
    module = Regressor()
    owner = trainer("zero3", max_epochs=1)
    owner.fit(module, batches(), batches())
    owner.save_checkpoint(folder / "run.ckpt")
    if dist.get_rank() == 0:
        zeros = {name: torch.zeros(2) for name in module.state_dict()}
        torch.save({"state_dict": zeros, "pytorch-lightning_version": pl.__version__}, folder / "zeros.ckpt")
        torch.save(zeros, folder / "bare.ckpt")
    dist.barrier()
    said = []
    for stranger, path in (
        (Other(strict=True), "run.ckpt"),
        (Wider(), "run.ckpt"),
        (Regressor(), "zeros.ckpt"),
        (Regressor(), "bare.ckpt"),
        (Regressor(), "absent.ckpt"),
    ):
        with pytest.raises(CheckpointError) as refused:
            trainer("zero3").validate(stranger, batches(), ckpt_path=folder / path, verbose=False)
        said.append(str(refused.value))
    lenient = Other(strict=False)
    head = whole(lenient.tail.weight)
    trainer("zero3").validate(lenient, batches(), ckpt_path=folder / "run.ckpt", verbose=False)
    assert torch.equal(whole(lenient.tail.weight), head)
    assert torch.equal(whole(lenient.inp.weight), whole(module.inp.weight))
    return said


def test_weights_that_do_not_fit_are_refused_with_their_names_and_skipped_where_asked(tmp_path: Path) -> None:
    for names, sizes, zeros, bare, absent in run_ranks(load_into_another, 2, tmp_path):
        assert "tail.weight" in names
        assert "head.weight" in names
        assert "strict_loading=False" in names
        assert "inp.weight" in sizes
        assert "[10, 9]" in sizes
        assert "inp.weight" in zeros
        assert "load_state_dict" in bare
        assert "absent.ckpt" in absent


def hparams_saved(folder: Path) -> Any:
    module, owner = Regressor(lr=0.25, dropout=0.5), trainer("zero2", max_epochs=1)
    owner.fit(module, batches(), batches())
    owner.save_checkpoint(folder / "run.ckpt")
    seen = {}

    class Reading(Regressor):
        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            seen.update(checkpoint["hyper_parameters"])

    trainer("zero3").validate(Reading(), batches(), ckpt_path=folder / "run.ckpt", verbose=False)
    return seen


def test_hyperparameters_are_saved_and_handed_to_the_hook(tmp_path: Path) -> None:
    assert run_ranks(hparams_saved, 2, tmp_path) == [{"lr": 0.25, "dropout": 0.5}] * 2


def linked(folder: Path) -> list[float]:
    saving = ModelCheckpoint(folder, "{epoch}", monitor="val", save_top_k=-1, save_last="link")
    module, owner = Regressor(), trainer("zero3", callbacks=[saving])
    owner.fit(module, batches(), batches())
    trained = weights(module)
    owner.validate(module, batches(), ckpt_path=folder / "epoch=0.ckpt", verbose=False)
    apart = difference(trained, weights(module))
    owner.validate(module, batches(), ckpt_path="last", verbose=False)
    return [apart, difference(trained, weights(module))]


def test_a_last_checkpoint_that_is_a_link_is_followed(tmp_path: Path) -> None:
    for apart, again in run_ranks(linked, 2, tmp_path):
        assert apart > 1e-3
        assert again == 0
    assert (tmp_path / "last.ckpt").is_symlink()


def save_with_options(folder: Path) -> None:
    owner = trainer("zero2")
    owner.validate(Regressor(), batches(), verbose=False)
    owner.save_checkpoint(folder / "run.ckpt", storage_options={"key": "value"})


def test_storage_options_are_refused(tmp_path: Path) -> None:
    run_ranks_expecting(save_with_options, 2, tmp_path, error=UnsupportedError, match="Leave them out")
    assert names_in(tmp_path) == []
