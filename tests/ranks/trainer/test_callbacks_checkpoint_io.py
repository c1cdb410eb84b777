"""CheckpointIO plugins of the user around meshbolt's, in the Trainer."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.callbacks import ModelCheckpoint
from tests.ranks.trainer.loops_support import ADVICE, Regressor, alone, batches, difference, trainer, weights

from meshbolt import Checkpoint, CheckpointError, MeshStrategy
from meshbolt.checkpoint import is_checkpoint
from meshbolt.plugins import MeshCheckpointIO
from meshbolt.strategies.compat import WrappingCheckpointIO
from meshbolt.testing import run_ranks

pytestmark = ADVICE


class Recording(WrappingCheckpointIO):
    """Notes who calls it with what."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.seen: list[Any] = []

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        sharded = any(hasattr(value, "full_tensor") for value in checkpoint["state_dict"].values())
        self.seen.append(("save", Path(path).name, sharded, "optimizer_states" in checkpoint))
        checkpoint["note"] = "of the plugin"
        super().save_checkpoint(checkpoint, path, storage_options=storage_options)

    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        found = super().load_checkpoint(path, *args, **kwargs)
        self.seen.append(("load", Path(path).name, found["note"]))
        return found

    def remove_checkpoint(self, path: Any) -> None:
        self.seen.append(("remove", Path(path).name))
        super().remove_checkpoint(path)

    def teardown(self) -> None:
        self.seen.append("teardown")


def fit_through(folder: Path, asynchronous: bool, on_strategy: bool) -> tuple[list[Any], float]:
    io = Recording(MeshCheckpointIO()) if on_strategy else Recording()
    given: dict[str, Any] = {"checkpoint": Checkpoint(asynchronous=asynchronous)}
    strategy = MeshStrategy(**given, checkpoint_io=io) if on_strategy else MeshStrategy(**given)
    options = {} if on_strategy else {"plugins": [io]}
    saving = ModelCheckpoint(folder, "{epoch}")
    owner = trainer(strategy, callbacks=[saving], **options)
    owner.fit(module := Regressor(), batches())
    assert owner.strategy.checkpoint_io is io
    trained = weights(module)
    owner.validate(module, batches(), ckpt_path="best", verbose=False)
    return io.seen, difference(trained, weights(module))


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("on_strategy", [False, True])
def test_a_plugin_around_it_is_called_on_every_rank(tmp_path: Path, asynchronous: bool, on_strategy: bool) -> None:
    ranks = run_ranks(fit_through, 2, tmp_path, asynchronous, on_strategy)
    for rank, (seen, apart) in enumerate(ranks):
        assert seen == [
            ("save", "epoch=0.ckpt", True, True),
            ("save", "epoch=1.ckpt", True, True),
            *([("remove", "epoch=0.ckpt")] if rank == 0 else []),  # deleted once, as Lightning has it
            "teardown",
            ("load", "epoch=1.ckpt", "of the plugin"),
            "teardown",
        ]
        assert apart == 0
    assert [place.name for place in tmp_path.iterdir()] == ["epoch=1.ckpt"]


class Withholding(WrappingCheckpointIO):
    """Saves nothing."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Do nothing, on any rank."""


def save_nothing(folder: Path) -> None:
    owner = trainer("zero3", plugins=[Withholding()], callbacks=[ModelCheckpoint(folder, "{epoch}", save_top_k=-1)])
    owner.fit(Regressor(), batches())


def test_a_plugin_may_save_nothing_on_all_ranks(tmp_path: Path) -> None:
    run_ranks(save_nothing, 2, tmp_path)
    assert list(tmp_path.iterdir()) == []


class Renaming(WrappingCheckpointIO):
    """Saves weights under other names, and takes them back under a third where it is told to."""

    def __init__(self, back: str = "") -> None:
        super().__init__()
        self.back, self.seen = back, []  # type: ignore[var-annotated]

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        checkpoint["state_dict"] = {f"theirs.{name}": value for name, value in checkpoint["state_dict"].items()}
        super().save_checkpoint(checkpoint, path)

    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        found = super().load_checkpoint(path, *args, **kwargs)
        self.seen.append(Path(path).name)
        names = {name: self.back + name.removeprefix("theirs.") for name in found["state_dict"]}
        return {**found, "state_dict": {names[name]: value for name, value in found["state_dict"].items()}}


def renamed(path: Path) -> float:
    owner = trainer("zero3", plugins=[Renaming()])
    owner.fit(module := Regressor(), batches())
    owner.save_checkpoint(path)
    again = trainer("zero2", plugins=[Renaming()], max_epochs=2)
    again.fit(other := Regressor(), batches(), ckpt_path=path)
    return difference(weights(module), weights(other))


def misfit(path: Path) -> tuple[str, float]:
    module = Regressor()
    owner = trainer("zero3", plugins=[Renaming("mine.")], max_epochs=3)
    before = {name: value.detach().clone() for name, value in module.named_parameters()}
    with pytest.raises(CheckpointError) as raised:
        owner.fit(module, batches(), ckpt_path=path)
    return str(raised.value), difference(before, weights(module))


def test_what_a_plugin_returns_is_what_has_to_fit(tmp_path: Path) -> None:
    assert run_ranks(renamed, 2, tmp_path / "a.ckpt") == [0.0, 0.0]
    first, second = run_ranks(misfit, 2, tmp_path / "a.ckpt")
    assert first == second
    assert "unknown here:\n    mine.blocks.0.0.bias" in first[0]
    assert first[1] == 0.0


def write_plain(path: Path) -> dict[str, Any]:
    owner = alone(max_epochs=1)
    owner.fit(module := Regressor(), batches())
    owner.save_checkpoint(path)
    return weights(module)


def read_plain(path: Path) -> tuple[list[str], dict[str, Any]]:
    io = Renaming()
    trainer("zero3", plugins=[io], max_epochs=1).fit(module := Regressor(), batches(), ckpt_path=path)
    return io.seen, weights(module)


def test_a_single_file_comes_through_the_plugin_as_well(tmp_path: Path) -> None:
    expected = run_ranks(write_plain, 1, tmp_path / "plain.ckpt")[0]
    for seen, found in run_ranks(read_plain, 2, tmp_path / "plain.ckpt"):
        assert seen == ["plain.ckpt"]
        assert difference(found, expected) == 0.0


FORKED = """
    import sys, time, warnings
    import lightning.pytorch as pl
    import torch
    from lightning.pytorch.callbacks import ModelCheckpoint
    from lightning.pytorch.plugins.io.wrapper import _WrappingCheckpointIO
    from meshbolt import Checkpoint, CheckpointError, MeshStrategy
    from meshbolt.checkpoint import background, is_checkpoint
    from meshbolt.plugins import MeshCheckpointIO

    warnings.simplefilter("ignore")
    original = background.save_directory

    def slow(*args, **kwargs):
        time.sleep(0.5)
        original(*args, **kwargs)

    background.save_directory = slow


    class Plugin(_WrappingCheckpointIO):
        def save_checkpoint(self, checkpoint, path, storage_options=None):
            print(f"saved {path}\\n", end="", flush=True)
            super().save_checkpoint(checkpoint, path)


    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(6, 1)

        def training_step(self, batch, _index):
            return self.layer(batch).square().mean()

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), lr=1e-2)


    if __name__ == "__main__":
        folder, start_method = sys.argv[1:]
        module = Module()
        before = module.layer.weight.detach().clone()
        strategy = MeshStrategy(start_method=start_method, checkpoint=Checkpoint(asynchronous=True))
        saving = ModelCheckpoint(folder, "{step}", every_n_train_steps=2, save_top_k=-1)
        trainer = pl.Trainer(strategy=strategy, accelerator="cpu", devices=2, max_epochs=1, logger=False,
            callbacks=[saving], plugins=[Plugin(MeshCheckpointIO())], enable_progress_bar=False,
            enable_model_summary=False)
        trainer.fit(module, torch.utils.data.DataLoader(torch.randn(16, 6), batch_size=2))
        assert not torch.equal(module.layer.weight, before)
        assert is_checkpoint(saving.best_model_path), saving.best_model_path
        print("all is well")
"""


@pytest.mark.parametrize("start_method", ["fork", pytest.param("spawn", marks=pytest.mark.full)])
def test_ranks_that_were_started_as_functions_save_in_the_background(tmp_path: Path, start_method: str) -> None:
    script, folder = tmp_path / "script.py", tmp_path / "checkpoints"
    script.write_text(textwrap.dedent(FORKED))
    command = [sys.executable, str(script), str(folder), start_method]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=150)

    assert done.returncode == 0, done.stderr[-3000:]
    assert "all is well" in done.stdout
    # The file that carries the weights back is no checkpoint, and no business of the plugin's.
    assert sorted(set(done.stdout.splitlines()) - {"all is well"}) == [f"saved {folder}/step={n}.ckpt" for n in (2, 4)]
    assert all(is_checkpoint(place) for place in folder.iterdir())
