"""A disk that cannot give the state of an optimizer to a save fails the save, on all ranks, and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from tests.ranks.trainer.test_offload import WARNING, Net, fit

from meshbolt import Offload
from meshbolt.checkpoint import verify_checkpoint
from meshbolt.errors import CheckpointError
from meshbolt.offload import SystemCalls
from meshbolt.testing import run_ranks

pytestmark = pytest.mark.filterwarnings(WARNING)


class SavesTwice(pl.Callback):
    """Saves after two steps of training, and once more where the disk of one rank cannot be read meanwhile."""

    def __init__(self, path: Path, patched: pytest.MonkeyPatch) -> None:
        self.path, self.patched, self.said = path, patched, ""

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == 2:
            trainer.save_checkpoint(self.path)
        if trainer.global_step == 4:
            with self.patched.context() as broken:
                if dist.get_rank() == 1:
                    broken.setattr(SystemCalls, "read", self.fail)
                try:
                    trainer.save_checkpoint(self.path)
                except CheckpointError as error:
                    self.said = str(error)

    @staticmethod
    def fail(*_: Any) -> int:
        raise OSError(5, "Input/output error")


def trained(path: str, breaks: bool) -> tuple[str, list[torch.Tensor]]:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("meshbolt.offload.files.find_library", lambda: None)  # faults happen in system calls here
        callbacks = [SavesTwice(Path(path, "saved"), patched)] if breaks else []
        _, found = fit(Net(fused=True), Offload("nvme", path=path), zero=2, callbacks=callbacks)
    return callbacks[0].said if callbacks else "", found


def test_a_save_that_cannot_read_the_state_keeps_the_checkpoint_before_and_the_run(tmp_path: Path) -> None:
    expected = run_ranks(trained, 2, str(tmp_path), False, timeout=60)
    found = run_ranks(trained, 2, str(tmp_path), True, timeout=60)
    for (said, parameters), (_, others) in zip(found, expected, strict=True):
        assert (
            "was not saved, and what had this name before is untouched: rank 1: file __1_0.distcp: StorageError" in said
        )
        assert "Input/output error" in said
        assert all(torch.equal(*pair) for pair in zip(parameters, others, strict=True))
    assert verify_checkpoint(tmp_path / "saved") == ()
    assert not list(tmp_path.glob("*.partial*"))
