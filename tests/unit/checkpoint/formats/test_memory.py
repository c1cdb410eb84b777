"""How many tensors of a checkpoint are in memory at once. If these fail, an export needs the memory of a whole checkpoint.

`benchmarks/run_export.py` measures the bytes.
"""

from __future__ import annotations

import weakref
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from tests.unit.checkpoint.formats_support import saved
from torch import nn

import meshbolt
from meshbolt.checkpoint.foreign import DcpReader
from meshbolt.checkpoint.formats import FORMATS, ExportOptions, export_checkpoint, import_checkpoint
from meshbolt.checkpoint.reader import CheckpointReader

NAMES = [f"net.{number}.weight" for number in range(8)]


class Model(pl.LightningModule):
    """Eight layers."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.ModuleList(nn.Linear(3, 3, bias=False) for _ in NAMES)


class Alive:
    """Counts the tensors that a reader has given and somebody still holds, whenever it is asked for the next."""

    def __init__(self) -> None:
        self.most, self.given = 0, 0
        self._tensors: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()

    def watch(self, kind: type, monkeypatch: pytest.MonkeyPatch) -> None:
        read = kind.read

        def counted(reader: CheckpointReader, key: str) -> torch.Tensor:
            self.most = max(self.most, len(list(self._tensors)))
            tensor = read(reader, key)
            self._tensors.add(tensor)
            self.given += 1
            return tensor

        monkeypatch.setattr(kind, "read", counted)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    weights = {name: torch.randn(3, 3) for name in NAMES}
    state = {name: {"exp_avg": torch.randn(3, 3)} for name in NAMES}
    optimizer = {"state": state, "param_groups": [{"params": NAMES}]}
    tree = {"state_dict": weights, "optimizer_states": [optimizer], "pytorch-lightning_version": "2.6.0"}
    return saved(tmp_path / "run.ckpt", tree)


@pytest.mark.parametrize("to", FORMATS)
def test_an_export_holds_one_tensor_at_a_time(
    path: Path, tmp_path: Path, to: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive = Alive()
    alive.watch(CheckpointReader, monkeypatch)
    options = ExportOptions(everything=to == "safetensors")
    done = export_checkpoint(path, tmp_path / "out", to=to, options=options)
    assert alive.given == done.num_tensors >= len(NAMES)
    assert alive.most == 0


def test_an_import_of_a_directory_holds_one_tensor_at_a_time(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export_checkpoint(path, tmp_path / "dcp", to="dcp")
    alive = Alive()
    alive.watch(DcpReader, monkeypatch)
    done = import_checkpoint(tmp_path / "dcp", tmp_path / "again.ckpt")
    assert alive.given == done.num_tensors
    assert alive.most == 0


def test_a_module_is_built_with_one_tensor_at_a_time_beside_it(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alive = Alive()
    alive.watch(CheckpointReader, monkeypatch)
    meshbolt.load_from_checkpoint(Model, path)
    assert alive.given == len(NAMES), "optimizer state is not read"
    assert alive.most == 0
