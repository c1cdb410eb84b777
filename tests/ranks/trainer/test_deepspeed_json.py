"""A fit with DeepSpeed's JSON: as the same settings in Python, and as DeepSpeed itself where it is installed."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tests.rows import full
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import meshbolt
from meshbolt.deepspeed import WarmupLR, trainer_arguments
from meshbolt.testing import run_ranks

SAMPLES, STEPS, WINDOW = 3, 4, 2
QUIET = {
    "use_distributed_sampler": False,
    "enable_progress_bar": False,
    "enable_checkpointing": False,
    "logger": False,
    "enable_model_summary": False,
}


def config(stage: int, **others: Any) -> dict[str, Any]:
    return {
        "train_batch_size": SAMPLES * WINDOW * 2,
        "gradient_accumulation_steps": WINDOW,
        "gradient_clipping": 0.3,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "weight_decay": 0.1, "torch_adam": True}},
        "scheduler": {
            "type": "WarmupLR",
            "params": {"warmup_max_lr": 2e-2, "warmup_num_steps": 3, "warmup_min_lr": 1e-3},
        },
        "zero_optimization": {"stage": stage},
        **others,
    }


class Net(pl.LightningModule):
    """Three layers of uneven sizes, whose optimizer comes from the file."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.layers = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 13), nn.Tanh(), nn.Linear(13, 1))
        self.losses: list[float] = []

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.mse_loss(self.layers(batch[0]), batch[1])

    def training_step(self, batch: tuple[Tensor, Tensor], _index: int) -> Tensor:
        loss = self.loss(batch)
        self.losses.append(loss.item())
        return loss

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(TensorDataset(*mine()), batch_size=SAMPLES)


class Python(Net):
    """The same settings, written in Python."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2, weight_decay=0.1)
        schedule = WarmupLR(optimizer, warmup_max_lr=2e-2, warmup_num_steps=3, warmup_min_lr=1e-3)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def samples() -> TensorDataset:
    draw = torch.Generator().manual_seed(3)
    count = SAMPLES * WINDOW * STEPS * 2
    return TensorDataset(torch.randn(count, 6, generator=draw), 3 * torch.randn(count, 1, generator=draw))


def mine() -> list[Tensor]:
    return [each[dist.get_rank() :: 2] for each in samples().tensors]


def fit(module: Net, **arguments: Any) -> list[float]:
    trainer = pl.Trainer(**QUIET, **arguments, accelerator="cpu", devices=2, max_epochs=1)
    trainer.fit(module)
    return module.losses


def as_in_python() -> None:
    for stage in range(4):
        in_json = fit(Net(), **trainer_arguments(config(stage), show=False))
        in_python = fit(
            Python(), strategy=meshbolt.MeshStrategy(zero=stage), accumulate_grad_batches=WINDOW, gradient_clip_val=0.3
        )
        assert in_json == in_python, f"stage {stage}"
        assert len(in_json) == STEPS * WINDOW


def test_losses_are_those_of_the_same_settings_in_python() -> None:
    run_ranks(as_in_python, 2, timeout=60)


def as_refused(kind: type[Net], stage: int, config_others: dict[str, Any], flags: dict[str, Any], *words: str) -> None:
    arguments = trainer_arguments(config(stage, **config_others), show=False)
    with pytest.raises(meshbolt.ConfigError) as error:
        fit(kind(), **{**arguments, **flags})
    assert not [word for word in words if word not in str(error.value)], error.value


class OtherBatch(Net):
    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(samples(), batch_size=SAMPLES + 1)


def refusals() -> None:
    as_refused(
        Net, 0, {}, {"accumulate_grad_batches": 3}, "gradient_accumulation_steps", "accumulate_grad_batches=3", "=2"
    )
    as_refused(Net, 1, {}, {"gradient_clip_val": 0.5}, "'gradient_clipping'", "gradient_clip_val=0.5", "=0.3")
    as_refused(Net, 1, {}, {"gradient_clip_algorithm": "value"}, "gradient_clip_algorithm='value'")
    as_refused(Net, 2, {"bf16": {"enabled": False}}, {"precision": "bf16-mixed"}, "precision='bf16-mixed'", "'32-true'")
    as_refused(Net, 2, {"bf16": {"enabled": True}}, {"precision": "64-true"}, "precision='64-true'", "'bf16-mixed'")
    as_refused(OtherBatch, 2, {}, {}, "batch_size=4", "batches of 3 samples")
    as_refused(Net, 2, {"train_batch_size": 14}, {}, "'train_batch_size' 14", "2 data-parallel ranks", "12 or 16")


def test_flags_of_the_trainer_that_disagree_with_the_file_are_refused_and_both_are_named() -> None:
    run_ranks(refusals, 2, timeout=60)


def sixteen_bits() -> None:
    arguments = trainer_arguments(
        config(2, fp16={"enabled": True, "initial_scale_power": 4, "hysteresis": 3, "consecutive_hysteresis": True}),
        show=False,
    )
    trainer = pl.Trainer(**QUIET, **arguments, accelerator="cpu", devices=2, max_epochs=1)
    trainer.fit(Net())
    plugin: Any = trainer.strategy.precision_plugin
    assert (plugin.precision, plugin.autocast) == ("16-mixed", False)
    assert (plugin.loss_scaler.current_scale, plugin.loss_scaler.hysteresis) == (16.0, 3)
    assert plugin.loss_scaler.consecutive_hysteresis
    assert trainer.optimizers[0].param_groups[0]["lr"] == 2e-2


def test_an_fp16_block_runs_in_16_bits_with_its_loss_scale() -> None:
    run_ranks(sixteen_bits, 2, timeout=60)


def in_deepspeed(stage: int) -> list[float]:
    """Train as a script of DeepSpeed's does, on the batches of this rank."""
    os.environ.update(DS_ACCELERATOR="cpu", LOCAL_SIZE=str(dist.get_world_size()), LOCAL_RANK=str(dist.get_rank()))
    import deepspeed

    deepspeed.init_distributed(dist_backend="gloo")
    module = Net()
    engine, *_ = deepspeed.initialize(
        model=module.layers,
        model_parameters=module.layers.parameters(),
        config={**config(stage), "steps_per_print": 10**9},
    )
    losses = []
    for one, other in zip(*(each.split(SAMPLES) for each in mine()), strict=True):
        loss = F.mse_loss(engine(one), other)
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


def as_in_deepspeed(stage: int) -> None:
    ours = torch.tensor(fit(Net(), **trainer_arguments(config(stage), show=False)))
    theirs = torch.tensor(in_deepspeed(stage))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
@pytest.mark.filterwarnings("ignore")  # DeepSpeed's own
@pytest.mark.parametrize("stage", [full(0), full(1), full(2), full(3)])
def test_losses_are_those_of_deepspeed(stage: int) -> None:
    run_ranks(as_in_deepspeed, 2, stage, timeout=120, start="spawn")
