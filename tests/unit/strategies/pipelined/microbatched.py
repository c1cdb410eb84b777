"""A module that logs in every way, and the same one whose steps run once per microbatch, as a pipeline runs them."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import BinaryAccuracy, BinaryAUROC, BinaryF1Score, BinaryPrecision
from torchmetrics.regression import MeanSquaredError, PearsonCorrCoef

from meshbolt.pipeline import batch_size, split_batch
from meshbolt.strategies.pipelined.logs import combine, record_logs, replay
from meshbolt.strategies.pipelined.metrics import WholeBatch
from meshbolt.strategies.pipelined.results import detached, join_results

SAMPLES, BATCH = 24, 8


class Plain(pl.LightningModule):
    """One layer and metrics; what its training_step logs is given, its validation_step logs a bit of all.

    Args:
        logs: called with the module, the samples' losses, predictions and labels.
    """

    def __init__(self, logs: Callable[..., None], *, batch_size: int = BATCH) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.layer = nn.Linear(3, 1)
        self.acc = BinaryAccuracy()
        self.f1 = BinaryF1Score()
        self.auroc = BinaryAUROC()
        self.pearson = PearsonCorrCoef()
        self.mse = MeanSquaredError()
        self.mean = MeanMetric()
        self.many = MetricCollection([BinaryAccuracy(), BinaryPrecision(), BinaryAUROC()], prefix="many_")
        self.val_many = MetricCollection({"acc": BinaryAccuracy(), "f1": BinaryF1Score()})
        for metric in (self.acc, self.pearson, self.mse, self.mean):
            metric.set_dtype(torch.float64)
        self.logs = logs
        self.seen: list[dict[str, Any]] = []
        self.outputs: list[Any] = []

    def training_step(self, batch: Any, _index: int) -> Any:
        losses, logits, labels = self.forward(batch)
        self.logs(self, losses, torch.sigmoid(logits), labels)
        return {"loss": losses.mean(), "logits": logits}

    def forward(self, batch: Any) -> tuple[Tensor, Tensor, Tensor]:
        x, y = batch
        logits = self.layer(x).squeeze(1)
        return nn.functional.binary_cross_entropy_with_logits(logits, y.to(x.dtype), reduction="none"), logits, y

    def validation_step(self, batch: Any, _index: int) -> Tensor:
        losses, logits, labels = self.forward(batch)
        self.val_many.update(torch.sigmoid(logits), labels)
        self.log_dict(self.val_many)
        self.log("val_loss", losses.mean(), prog_bar=True)
        self.log("val_worst", losses.max(), reduce_fx="max")
        return logits

    def on_train_batch_end(self, outputs: Any, _batch: Any, _index: int) -> None:
        self.outputs.append(detached(outputs))
        self._note()

    def on_train_epoch_end(self) -> None:
        self._note()

    def on_validation_batch_end(self, outputs: Any, _batch: Any, _index: int) -> None:
        self.outputs.append(detached(outputs))

    def _note(self) -> None:
        trainer = self.trainer
        found = (trainer.callback_metrics, trainer.logged_metrics, trainer.progress_bar_metrics)
        self.seen.append({f"{where}.{key}": value for where, each in enumerate(found) for key, value in each.items()})

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1e-2)


class Microbatched(Plain):
    """The same, with steps that run once for each of some microbatches."""

    def __init__(self, logs: Callable[..., None], *, count: int = 4, batch_size: int = BATCH) -> None:
        super().__init__(logs, batch_size=batch_size)
        self.constants: dict[str, bool] = {}
        self.count = count
        self.whole = WholeBatch(self)

    def training_step(self, batch: Any, index: int) -> Any:
        return self._in_parts(super().training_step, batch, index)

    def validation_step(self, batch: Any, index: int) -> Any:
        return self._in_parts(super().validation_step, batch, index)

    def _in_parts(self, step: Callable[[Any, int], Any], batch: Any, index: int) -> Any:
        parts = split_batch(batch, min(self.count, batch_size(batch)))
        results, logged = [], []
        for part in parts:
            logged.append([])
            with self.whole.watching(), record_logs(self, logged[-1]):
                results.append(step(part, index))
        sizes = [batch_size(part) for part in parts]
        told = pickle.loads(pickle.dumps(self.whole.complete(combine(logged, sizes, constants=self.constants))))
        replay(self, told)
        return join_results(results, sizes)


def loader(samples: int = SAMPLES, batch_size: int = BATCH) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(samples, 3, generator=generator, dtype=torch.float64)
    y = (x.sum(1) + torch.randn(samples, generator=generator, dtype=torch.float64) > 0).long()
    return DataLoader(TensorDataset(x, y), batch_size=batch_size)


def fit(module: Plain, folder: Path, *, train: Any = None, val: Any = None, **flags: Any) -> pl.Trainer:
    """Train for two epochs and return the Trainer; what was logged by then is in its logger's folder."""
    settings: dict[str, Any] = {"max_epochs": 2, "log_every_n_steps": 1, "num_sanity_val_steps": 0, **flags}
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        logger=CSVLogger(folder, name=type(module).__name__),
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        precision="64-true",
        **settings,
    )
    trainer.fit(module, loader() if train is None else train, val)
    return trainer


def seeded(kind: type[Plain], logs: Callable[..., None], **settings: Any) -> Any:
    torch.manual_seed(0)
    return kind(logs, **settings).double()
