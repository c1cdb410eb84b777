from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
from lightning.fabric import Fabric
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.fabric.plugins.io.xla import XLACheckpointIO
from lightning.pytorch.plugins.io import AsyncCheckpointIO

from meshbolt import ConfigError, MeshStrategy, UnsupportedError
from meshbolt.fabric import MeshStrategy as FabricMeshStrategy
from meshbolt.plugins import MeshCheckpointIO
from meshbolt.strategies.checks import mesh_io_inside
from meshbolt.strategies.compat import WrappingCheckpointIO


class Wrapping(WrappingCheckpointIO):
    """A user's plugin."""


class Own(TorchCheckpointIO):
    """A user's plugin that is no wrapper."""


def trainer_with(io: Any) -> pl.Trainer:
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return pl.Trainer(accelerator="cpu", devices=1, strategy=MeshStrategy(), plugins=[io], **quiet)


def fabric_with(io: Any) -> Fabric:
    return Fabric(accelerator="cpu", devices=1, strategy=FabricMeshStrategy(), plugins=[io])


WAYS = [lambda io: MeshStrategy(checkpoint_io=io), lambda io: FabricMeshStrategy(checkpoint_io=io)]
WAYS += [lambda io: trainer_with(io).strategy, lambda io: fabric_with(io).strategy]
NAMES = ["strategy", "Fabric's strategy", "Trainer", "Fabric"]


@pytest.mark.parametrize("way", WAYS, ids=NAMES)
@pytest.mark.parametrize(
    ("make", "said"),
    [
        (TorchCheckpointIO, "TorchCheckpointIO.*all ranks write together.*MeshCheckpointIO"),
        (Own, "Own.*all ranks write together"),
        (lambda: object.__new__(XLACheckpointIO), "XLACheckpointIO.*all ranks write together"),
        (AsyncCheckpointIO, r"AsyncCheckpointIO.*Checkpoint\(asynchronous=True\)"),
        (lambda: Wrapping(AsyncCheckpointIO()), r"AsyncCheckpointIO.*Checkpoint\(asynchronous=True\)"),
        (lambda: Wrapping(TorchCheckpointIO()), "TorchCheckpointIO"),
    ],
    ids=["torch", "own", "xla", "async", "async inside", "torch inside"],
)
def test_a_plugin_that_cannot_be_honoured_is_refused_by_name(way: Any, make: Any, said: str) -> None:
    with pytest.raises(UnsupportedError, match=said):
        way(make())


@pytest.mark.parametrize("way", WAYS, ids=NAMES)
def test_meshbolts_own_plugin_and_those_around_it_are_what_the_strategy_uses(way: Any) -> None:
    for io in (MeshCheckpointIO(), Wrapping(), Wrapping(MeshCheckpointIO()), Wrapping(Wrapping())):
        assert way(io).checkpoint_io is io
        assert isinstance(mesh_io_inside(io), MeshCheckpointIO)


def test_it_is_there_without_being_asked_for() -> None:
    assert isinstance(MeshStrategy().checkpoint_io, MeshCheckpointIO)
    assert isinstance(FabricMeshStrategy().checkpoint_io, MeshCheckpointIO)


def test_one_given_twice_is_refused_by_lightning() -> None:
    strategy = MeshStrategy(checkpoint_io=MeshCheckpointIO())
    with pytest.raises(Exception, match="checkpoint_io set through both"):
        pl.Trainer(accelerator="cpu", devices=1, strategy=strategy, plugins=[MeshCheckpointIO()])


def test_without_a_strategy_it_says_what_it_is_for(tmp_path: Path) -> None:
    io = MeshCheckpointIO()
    for call in (
        lambda: io.save_checkpoint({}, tmp_path / "a.ckpt"),
        lambda: io.load_checkpoint(tmp_path / "a.ckpt"),
        lambda: io.remove_checkpoint(tmp_path / "a.ckpt"),
    ):
        with pytest.raises(ConfigError, match="no strategy has used it yet"):
            call()


def test_what_directories_do_not_have_is_refused(tmp_path: Path) -> None:
    io = MeshCheckpointIO()
    with pytest.raises(UnsupportedError, match="storage_options"):
        io.save_checkpoint({}, tmp_path / "a.ckpt", storage_options={"key": 1})
    with pytest.raises(UnsupportedError, match="map_location='cuda'"):
        io.load_checkpoint(tmp_path / "a.ckpt", map_location="cuda")
