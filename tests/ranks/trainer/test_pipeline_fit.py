"""Everything that a user logs, monitors, clips, schedules or counts is the same under a pipeline as in one process."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers.logger import Logger
from tests.rows import full
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

from meshbolt import MeshStrategy, PipelineParallel
from meshbolt.testing import run_ranks

WIDTH, CLASSES, SAMPLES, BATCH = 8, 3, 32, 8
TRAINER = {"max_epochs": 2, "accumulate_grad_batches": 2, "gradient_clip_val": 0.05}


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x)))


class Classifier(pl.LightningModule):
    """Logs in every way that there is."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, CLASSES)
        self.layers = nn.ModuleList(Layer() for _ in range(4))
        self.accuracy = MulticlassAccuracy(CLASSES, average="micro")
        self.val_accuracy = MulticlassAccuracy(CLASSES, average="macro")
        self.norms = MeanMetric()
        self.ends: list[Any] = []

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> dict[str, Tensor]:
        x, y = batch
        logits = self(x)
        loss = nn.functional.cross_entropy(logits, y)
        self.accuracy(logits, y)
        self.log("loss", loss, on_step=True, on_epoch=True, prog_bar=True, sync_dist=True)
        self.log("accuracy", self.accuracy, on_step=True, on_epoch=True)
        self.log("right", (logits.argmax(1) == y).sum().float(), reduce_fx="sum", on_step=False, on_epoch=True)
        self.log("largest", logits.max(), reduce_fx="max", on_step=True, on_epoch=True)
        self.log_dict({"half": loss / 2, "number": 3.0}, batch_size=len(x))
        return {"loss": loss, "logits": logits}

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        logits = self(x)
        self.val_accuracy.update(logits, y)
        self.norms(logits.norm(dim=1))
        self.log("val_loss", nn.functional.cross_entropy(logits, y), sync_dist=True)
        self.log("norms", self.norms)
        return logits

    def on_validation_epoch_end(self) -> None:
        self.log("val_accuracy", self.val_accuracy.compute())
        self.val_accuracy.reset()

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.ends.append({key: value.detach().clone() for key, value in outputs.items()})

    def predict_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self(batch[0]).softmax(1)

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.05)
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "val_loss"}}


class Collected(Logger):
    """Keeps what a logger gets."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int | None, dict[str, float]]] = []

    name = "collected"
    version = 0

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.rows.append((step, dict(metrics)))

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        pass


def data(ranks: int, rank: int, *, shuffle: bool = False) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(SAMPLES, WIDTH, generator=generator)
    dataset = TensorDataset(x, torch.randint(CLASSES, (SAMPLES,), generator=generator))
    if ranks == 1:
        # In an order of its own: ranks begin again with the seed when they meet, as under Lightning's strategies.
        order = torch.Generator().manual_seed(7)
        return DataLoader(dataset, batch_size=BATCH, shuffle=shuffle, generator=order)
    # Batch i of all ranks together is batch i of one process.
    return DataLoader(
        dataset, batch_size=BATCH // ranks, sampler=DistributedSampler(dataset, ranks, rank, shuffle=False)
    )


def fit(settings: dict[str, Any] | None, ranks: int, folder: str, shuffle: bool) -> dict[str, Any]:
    torch.set_default_dtype(torch.float64)
    pl.seed_everything(1, verbose=False)
    module, logger = Classifier(), Collected()
    saving = ModelCheckpoint(folder, monitor="val_loss", save_top_k=2, filename="{epoch}-{val_loss:.6f}")
    stopping = EarlyStopping("val_loss", patience=3, min_delta=0.0)
    trainer = pl.Trainer(
        strategy=MeshStrategy(**settings) if settings else "auto",
        accelerator="cpu",
        devices=ranks,
        precision="64-true",
        callbacks=[saving, stopping, LearningRateMonitor()],
        logger=logger,
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        **TRAINER,
    )
    apart = 1
    if settings:
        apart = ranks // 2 // settings.get("tensor_parallel", 1)
    rank = dist.get_rank() // settings.get("tensor_parallel", 1) % apart if settings else 0
    trainer.fit(module, data(apart, rank, shuffle=shuffle), data(apart, rank))
    found = {
        "metrics": {key: value.item() for key, value in trainer.callback_metrics.items() if key != "grad_norm"},
        "logged": [(step, {k: float(v) for k, v in row.items() if k != "grad_norm"}) for step, row in logger.rows],
        "best": (Path(saving.best_model_path).name, sorted(Path(path).name for path in saving.best_k_models)),
        "stopped": (stopping.stopped_epoch, stopping.wait_count, float(stopping.best_score)),
        "rate": trainer.optimizers[0].param_groups[0]["lr"],
        "steps": (trainer.global_step, trainer.current_epoch, len(module.ends)),
        "ends": module.ends,
        "predicted": torch.cat(trainer.predict(module, data(1, 0))),
    }
    torch.set_default_dtype(torch.float32)
    return found


def compare(found: Any, expected: Any, where: str = "") -> None:
    """Compare numbers in any nesting to 1e-12."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for key in expected:
            compare(found[key], expected[key], f"{where}.{key}")
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected), where
        for index, (mine, other) in enumerate(zip(found, expected, strict=True)):
            compare(mine, other, f"{where}[{index}]")
    elif isinstance(expected, Tensor):
        torch.testing.assert_close(found, expected, rtol=0.0, atol=1e-12, msg=lambda text: f"{where}: {text}")
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, abs=1e-12, nan_ok=True), where
    else:
        assert found == expected, where


# Said in one process too, where ranks that could be are connected.
@pytest.mark.filterwarnings("ignore:It is recommended to use:lightning.fabric.utilities.warnings.PossibleUserWarning")
@pytest.mark.parametrize(
    ("settings", "ranks", "shuffle"),
    [
        ({"pipeline_parallel": 2, "zero": 1}, 2, True),
        full({"pipeline_parallel": PipelineParallel(2, schedule="interleaved_1f1b"), "zero": 2}, 2, False),
        full({"pipeline_parallel": PipelineParallel(2, microbatches=3), "zero": 3}, 2, False),
        full({"pipeline_parallel": 2, "zero": 2}, 4, False),
        full({"pipeline_parallel": 2, "zero": 0, "tensor_parallel": 2}, 4, False),
    ],
)
def test_a_fit_is_that_of_one_process(settings: dict[str, Any], ranks: int, shuffle: bool) -> None:
    with tempfile.TemporaryDirectory() as alone, tempfile.TemporaryDirectory() as together:
        (expected,) = run_ranks(fit, 1, None, 1, alone, shuffle)
        results = run_ranks(fit, ranks, settings, ranks, together, shuffle, timeout=60)
        saved = sorted(path.name for path in Path(together).iterdir())
        assert saved == sorted(path.name for path in Path(alone).iterdir())
    is_divided = ranks == 4 and "tensor_parallel" not in settings
    for rank, found in enumerate(results):
        if is_divided:  # each rank has logged, returned and counted its own samples
            for kept in (found, expected):
                kept.pop("ends", None)
            continue
        compare(found, expected, f"rank {rank}")
    if is_divided:
        first = dict(results[0])
        for key in ("best", "rate", "steps", "predicted"):
            compare(first[key], expected[key], key)
        for key in ("val_loss", "val_accuracy", "norms", "loss_epoch", "accuracy_epoch"):
            compare(first["metrics"][key], expected["metrics"][key], key)
        assert all(found["metrics"].keys() == first["metrics"].keys() for found in results)
