"""Save in the background on N devices while training goes on, and compare what loads with the state at the call.

python saving.py ACCELERATOR DEVICES FOLDER: exit code 0 and one "equal" per rank.
"""

from __future__ import annotations

import sys
from typing import Any

import lightning as L
import torch
from program import Regression, whole

from meshbolt import Checkpoint, MeshStrategy
from meshbolt.checkpoint import is_checkpoint
from meshbolt.checkpoint.background import HostCopies


class SaveAt(L.Callback):
    """Saves after the second step, and keeps what the weights were."""

    def __init__(self, path: str) -> None:
        self.path, self.saved = path, dict[str, torch.Tensor]()

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        if trainer.global_step == 2:
            expected = whole(module)
            trainer.save_checkpoint(self.path)
            self.saved = expected


def trainer_of(accelerator: str, devices: int, **options: Any) -> L.Trainer:
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    strategy = MeshStrategy(zero=3, checkpoint=Checkpoint(asynchronous=True))
    options = {"enable_checkpointing": False, "use_distributed_sampler": False, "max_epochs": 1, **options}
    return L.Trainer(strategy=strategy, accelerator=accelerator, devices=devices, **quiet, **options)


def copy_a_gpu() -> None:
    """Check that a copy is pinned, and done when the call returns."""
    source = torch.arange(1 << 24, device="cuda", dtype=torch.float32)
    expected = source.cpu()
    taken = HostCopies().take({"a": source})["a"]
    source.zero_()
    assert taken.is_pinned()
    assert torch.equal(taken, expected)


def main(accelerator: str, devices: str, folder: str) -> None:
    if accelerator == "gpu":
        copy_a_gpu()
    saving = SaveAt(f"{folder}/a.ckpt")
    module = Regression()
    trainer_of(accelerator, int(devices), callbacks=[saving]).fit(module)
    assert is_checkpoint(saving.path)
    assert any(not torch.equal(value, saving.saved[name]) for name, value in whole(module).items())

    class Compare(L.Callback):
        def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
            assert trainer.global_step == 2
            assert all(torch.equal(value, saving.saved[name]) for name, value in whole(module).items())
            buffers = trainer.optimizers[0].state_dict()["state"].values()
            assert all(value["momentum_buffer"].device.type == module.device.type for value in buffers)
            print("equal", flush=True)

    trainer_of(accelerator, int(devices), callbacks=[Compare()]).fit(Regression(), ckpt_path=saving.path)


if __name__ == "__main__":
    main(*sys.argv[1:])
