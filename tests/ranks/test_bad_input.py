"""What cannot work is refused on every rank before training, by a typed error with the values and a remedy; nothing hangs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import OnExceptionCheckpoint
from tests.ranks.trainer.loops_support import ADVICE, Regressor, batches, trainer
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from meshbolt import CheckpointError, ConfigError, MeshStrategy, TopologyError, UnsupportedError, Zero
from meshbolt.errors import RankError
from meshbolt.plugins import MixedPrecision
from meshbolt.testing import run_ranks, run_ranks_expecting

pytestmark = ADVICE


def fit(strategy: Any = "zero3", module: pl.LightningModule | None = None, data: Any = None, **options: Any) -> None:
    """Fit with a callback that saves on errors, where nothing can be saved: it must not hide the error."""
    options = {"callbacks": [OnExceptionCheckpoint("/dev/null/nothing")], **options}
    module, data = Regressor() if module is None else module, batches() if data is None else data
    trainer(strategy, **options).fit(module, data, batches())


def never_trains(attempt: Callable[[], None]) -> Callable[[], None]:
    """Return the attempt as a function that fails on its own account if a training step was made."""

    def watched() -> None:
        def refuse(*_: Any) -> None:
            raise AssertionError("a training step was made")

        Regressor.training_step = refuse  # type: ignore[method-assign]
        attempt()

    return watched


class Empty(pl.LightningModule):
    """A module without parameters."""

    def training_step(self, batch: Any, _index: int) -> None:
        raise AssertionError("a training step was made")

    validation_step = training_step

    def configure_optimizers(self) -> None:
        return None


class Optimized(Regressor):
    """A module with a chosen optimizer."""

    def __init__(self, make: Callable[[Any], torch.optim.Optimizer]) -> None:
        super().__init__()
        self.make = make

    def configure_optimizers(self) -> Any:
        return self.make([p for p in self.parameters() if p.dim() == 2])


def with_layer(layer: nn.Module) -> Regressor:
    module = Regressor()
    module.layer = layer
    return module


def optimizer_from_before() -> None:
    module = Regressor()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    module.configure_optimizers = lambda: optimizer  # type: ignore[method-assign]
    fit(module=module)


def same_strategy(accelerator: str) -> None:
    strategy = MeshStrategy(zero=2)
    pl.Trainer(strategy=strategy, accelerator="cpu", devices=2, logger=False, enable_checkpointing=False)
    pl.Trainer(strategy=strategy, accelerator=accelerator, devices=2, logger=False, enable_checkpointing=False)


def same_module() -> None:
    module = Regressor()
    trainer("zero2").validate(module, batches(), verbose=False)
    fit(module=module)


def other_module_on_one_rank() -> None:
    module = Regressor()
    if dist.get_rank() == 1:
        module.head = nn.Linear(10, 2)
    fit(module=module)


def other_path_on_one_rank(folder: Path) -> None:
    owner = trainer("zero3", max_epochs=1)
    owner.validate(module := Regressor(), batches(), verbose=False)
    owner.save_checkpoint(folder / "run.ckpt")
    path = folder / "run.ckpt" if dist.get_rank() == 0 else None
    owner.fit(module, batches(), batches(), ckpt_path=path)


def plugin_and_flag() -> None:
    fit(MeshStrategy(zero=2, precision_plugin=MixedPrecision("bf16-mixed", "cpu")), precision="64-true")


CASES: dict[str, tuple[int, Callable[[], None], type[Exception], str]] = {
    "axes that do not divide the world": (
        3,
        lambda: fit(MeshStrategy(zero=Zero(3, replicate=2))),
        TopologyError,
        "3 ranks",
    ),
    "more ranks than samples": (4, lambda: fit(data=batches(3, batch_size=1)), TopologyError, "3 samples for 4"),
    "a module without parameters": (2, lambda: fit(module=Empty()), ConfigError, "Empty has no parameters"),
    "a compiled module": (
        2,
        lambda: fit(module=torch.compile(Regressor(), backend="eager")),
        UnsupportedError,
        r"MeshStrategy\(compile=True\)",
    ),
    "a sparse embedding": (
        2,
        lambda: fit(module=with_layer(nn.Embedding(5, 4, sparse=True))),
        UnsupportedError,
        "'layer' of Regressor has sparse=True.*Set sparse=False",
    ),
    "a sparse embedding bag": (
        2,
        lambda: fit("zero0", module=with_layer(nn.EmbeddingBag(5, 4, sparse=True))),
        UnsupportedError,
        "'layer' of Regressor has sparse=True",
    ),
    "a lazy layer": (
        2,
        lambda: fit(module=with_layer(nn.LazyLinear(3))),
        UnsupportedError,
        r"'layer\.weight' of Regressor is not initialised.*nn\.Linear",
    ),
    "lazy statistics": (
        2,
        lambda: fit(module=with_layer(nn.LazyBatchNorm1d(affine=False)), precision="64-true"),
        UnsupportedError,
        r"'layer\.running_mean' of Regressor is not initialised",
    ),
    "a strategy used twice": (2, lambda: same_strategy("auto"), ConfigError, "Make a new one"),
    "a strategy used twice with an accelerator": (2, lambda: same_strategy("cpu"), ConfigError, "Make a new one"),
    "a module used twice": (2, same_module, ConfigError, "cannot be given to two Trainers"),
    "another module on one rank": (2, other_module_on_one_rank, TopologyError, r"head.*\(1, 10\).*\(2, 10\)"),
    "LBFGS": (2, lambda: fit(module=Optimized(torch.optim.LBFGS)), UnsupportedError, "LBFGS.*AdamW"),
    "Muon": (2, lambda: fit(module=Optimized(torch.optim.Muon)), UnsupportedError, "Muon.*AdamW"),
    "an optimizer from before": (2, optimizer_from_before, UnsupportedError, "in configure_optimizers"),
    "16-true": (2, lambda: fit(precision="16-true"), ConfigError, "16-true"),
    "a plugin and a flag": (2, plugin_and_flag, ConfigError, "precision='64-true'"),
    "sync_batchnorm on a CPU": (2, lambda: fit(sync_batchnorm=True), UnsupportedError, "sync_batchnorm=False"),
    "validation by the clock": (
        2,
        lambda: fit(val_check_interval="00:00:01:00"),
        UnsupportedError,
        "val_check_interval of 60 s",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_every_rank_refuses_before_training(case: str) -> None:
    ranks, attempt, error, match = CASES[case]

    messages = run_ranks_expecting(never_trains(attempt), ranks, error=error, match=match, timeout=10)

    assert len(messages) == ranks


def test_ranks_that_choose_different_checkpoints_say_so(tmp_path: Path) -> None:
    run_ranks_expecting(
        other_path_on_one_rank, 2, tmp_path, error=CheckpointError, match=r"run\.ckpt', None\]", timeout=10
    )


def validate_from(path: Path) -> None:
    trainer("zero2").validate(Regressor(), batches(), ckpt_path=path, verbose=False)


@pytest.mark.parametrize("kept", ["junk", "half a checkpoint"])
def test_a_file_that_is_no_checkpoint_is_said_to_be_none(tmp_path: Path, kept: str) -> None:
    file = tmp_path / "some.ckpt"
    torch.save({"state_dict": Regressor().state_dict()}, file)
    file.write_bytes(b"junk" if kept == "junk" else file.read_bytes()[: file.stat().st_size // 2])

    messages = run_ranks_expecting(
        validate_from,
        2,
        file,
        error=CheckpointError,
        match=r"some\.ckpt cannot be read .* none that torch\.save",
        timeout=10,
    )

    assert not any("_use_new_zipfile_serialization" in message for message in messages)


def gathers_what_is_foreign() -> None:
    owner, module = trainer("zero3", max_epochs=1), Regressor()
    owner.fit(module, batches(), batches())
    with owner.strategy.gathered(nn.ModuleList([module.head, module.blocks[0]])):
        assert module.head.weight.shape == (1, 10)
    with owner.strategy.gathered(module), owner.strategy.gathered(module.head):
        assert module.head.weight.shape == (1, 10)
    with owner.strategy.gathered(Regressor()):
        raise AssertionError("it was entered")


def test_another_module_than_the_one_that_is_trained_is_not_gathered() -> None:
    match = r"Regressor is not part of a module that this strategy has sharded \(Regressor\)"
    run_ranks_expecting(gathers_what_is_foreign, 2, error=ConfigError, match=match, timeout=10)


def loads_while_gathered(strategy: str) -> None:
    owner, module = trainer(strategy, max_epochs=1), Regressor()
    owner.fit(module, batches(), batches())
    wanted = {name: torch.full_like(value, 0.25) for name, value in Regressor().state_dict().items()}
    with owner.strategy.gathered(module):
        module.load_state_dict(wanted)
    with owner.strategy.gathered(module):
        torch.testing.assert_close(module.state_dict(), wanted, rtol=0, atol=0)
    owner.fit_loop.max_epochs = 2  # type: ignore[assignment]
    owner.fit(module, batches(), batches())


@pytest.mark.parametrize("strategy", ["zero0", "zero2", "zero3"])
def test_a_state_dict_can_be_loaded_into_whole_parameters(strategy: str) -> None:
    run_ranks(loads_while_gathered, 2, strategy, timeout=20)


def replaces_what_is_gathered(strategy: str, ranks: tuple[int, ...]) -> None:
    owner, module = trainer(strategy, max_epochs=1), Regressor()
    owner.fit(module, batches(), batches())
    with owner.strategy.gathered(module):
        if dist.get_rank() in ranks:
            module.head.weight = nn.Parameter(torch.zeros(1, 10))


@pytest.mark.parametrize(("strategy", "ranks"), [("zero3", (0,)), ("zero3", (0, 1)), ("zero0", (0, 1))])
def test_parameters_that_replace_gathered_ones_are_refused_on_every_rank(strategy: str, ranks: tuple[int, ...]) -> None:
    match = r"replaced by others or removed .* Change them in place"
    run_ranks_expecting(replaces_what_is_gathered, 2, strategy, ranks, error=ConfigError, match=match, timeout=10)


# Data -----------------------------------------------------------------------------------------------------------------


class Lengths(IterableDataset[Any]):
    """Yields one sample more on each rank than on the one before."""

    def __iter__(self) -> Iterator[Any]:
        yield from (batches().dataset[index] for index in range(4 + dist.get_rank()))


class Broken(Dataset[Any]):
    """Has one sample that cannot be read on rank 1."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> Any:
        if dist.get_rank() == 1 and index == 7:
            raise OSError("sample 7 is broken")
        return batches().dataset[index]


class BrokenStream(IterableDataset[Any]):
    """Breaks off on rank 1."""

    def __iter__(self) -> Iterator[Any]:
        for index in range(8):
            if dist.get_rank() == 1 and index == 5:
                raise OSError("sample 5 is broken")
            yield batches().dataset[index]


def uneven_sized(workers: int) -> None:
    data = batches(6 + 2 * dist.get_rank(), batch_size=2, num_workers=workers)
    fit(data=data, use_distributed_sampler=False)


def test_sized_loaders_of_different_lengths_are_refused_before_training() -> None:
    run_ranks_expecting(never_trains(lambda: uneven_sized(0)), 3, error=TopologyError, match=r"\[3, 4, 5\] by rank")


def test_iterables_of_different_lengths_end_in_one_error_at_that_batch() -> None:
    run_ranks_expecting(
        lambda: fit(data=DataLoader(Lengths(), batch_size=1)),
        3,
        error=TopologyError,
        match=r"Ranks \[0\] have no batch 4",
    )


def broken_data(loader: Callable[[], Any], loop: str) -> tuple[str, str]:
    owner, module, data = trainer("zero2", max_epochs=1, use_distributed_sampler=False), Regressor(), loader()
    with pytest.raises((OSError, RankError)) as raised:
        owner.fit(module, data) if loop == "fit" else owner.validate(module, data, verbose=False)
    return raised.type.__name__, str(raised.value)


LOADERS: dict[str, tuple[Callable[[], Any], int]] = {
    "a dataset": (lambda: DataLoader(Broken(), batch_size=2), 3),
    "a dataset read by a worker": (lambda: DataLoader(Broken(), batch_size=2, num_workers=1), 3),
    "a stream": (lambda: DataLoader(BrokenStream(), batch_size=2), 2),
}


@pytest.mark.parametrize("loop", ["fit", "validate"])
@pytest.mark.parametrize("which", LOADERS)
def test_a_sample_that_cannot_be_read_on_one_rank_stops_all_at_that_batch(which: str, loop: str) -> None:
    loader, batch = LOADERS[which]

    sound, broken = run_ranks(broken_data, 2, loader, loop, timeout=10)

    assert broken[0] == "OSError"
    assert "is broken" in broken[1]
    assert sound == ("RankError", sound[1])
    assert sound[1].startswith("rank 1 failed: OSError: ")
    assert f"in loading batch {batch};" in sound[1]
    assert "is broken" in sound[1]


# What Lightning itself refuses ----------------------------------------------------------------------------------------


def the_other_lightning() -> None:
    import pytorch_lightning

    pytorch_lightning.Trainer(strategy=MeshStrategy(zero=2), accelerator="cpu", devices=2)


def test_the_trainer_of_pytorch_lightning_shows_what_to_import() -> None:
    hint = r"meshbolt\.MeshStrategy\(zero=2\) for lightning\.pytorch\.Trainer \(`import lightning\.pytorch`"
    run_ranks_expecting(the_other_lightning, 2, error=ValueError, match=hint)


def test_an_unknown_preset_is_refused_by_lightning() -> None:
    run_ranks_expecting(
        lambda: trainer("zero9"), 2, error=ValueError, match="invalid strategy name: `strategy='zero9'`"
    )


def fits_nevertheless(folder: Path) -> int:
    """After a refusal, the same process fits with what is right."""
    for wrong in (lambda: fit(precision="16-true"), lambda: fit(data=batches(1))):
        with pytest.raises((ConfigError, TopologyError)):
            wrong()
    owner = trainer(MeshStrategy(zero=2, timeout=timedelta(seconds=10)), default_root_dir=folder, max_epochs=1)
    owner.fit(Regressor(), batches(), batches())
    return owner.global_step


def test_a_process_that_was_refused_can_fit_with_what_is_right(tmp_path: Path) -> None:
    assert run_ranks(fits_nevertheless, 2, tmp_path) == [4, 4]


def one_rank() -> int:
    owner = trainer("zero3", max_epochs=1)
    owner.fit(Regressor(), batches(), batches())
    return owner.global_step


def test_one_rank_is_a_world_too() -> None:
    assert run_ranks(one_rank, 1) == [8]
