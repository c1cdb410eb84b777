"""Metrics and logs of steps that only the rank of the last stage goes through: alike on all ranks, as of one process."""

from __future__ import annotations

import copy
import pickle
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import Metric, MetricCollection
from torchmetrics.classification import BinaryAccuracy, BinaryAUROC, BinaryF1Score, MulticlassAccuracy
from torchmetrics.wrappers import ClasswiseWrapper, MinMaxMetric

from meshbolt.pipeline import batch_size, split_batch
from meshbolt.strategies.pipelined.logs import Logged, combine, record_logs, replay
from meshbolt.strategies.pipelined.metrics import WholeBatch, share_metrics
from meshbolt.strategies.pipelined.results import detached, join_results, placed
from meshbolt.testing import run_ranks

SAMPLES, BATCH, MICROBATCHES = 24, 8, 4


class Strict(Metric):
    """Raises where it has seen nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.tensor(0.0), dist_reduce_fx="sum")

    def update(self, value: Tensor) -> None:
        self.total = self.total + value.sum()

    def compute(self) -> Tensor:
        if self.total < 0:
            raise ArithmeticError(f"The total is {self.total.item()}.")
        return self.total


class Several(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.accuracy = BinaryAccuracy()
        self.many = MetricCollection([BinaryAccuracy(), BinaryF1Score(), BinaryAUROC()], prefix="m_")
        self.classes = ClasswiseWrapper(MulticlassAccuracy(num_classes=2, average=None))
        self.range = MinMaxMetric(BinaryAccuracy())
        self.twice = 2 * self.accuracy
        self.strict = Strict()

    def update(self, predictions: Tensor, labels: Tensor) -> None:
        self.accuracy.update(predictions, labels)
        self.many.update(predictions, labels)
        self.classes.update((predictions > 0.5).long(), labels)
        self.range.update(predictions, labels)
        self.strict.update(predictions)

    def values(self) -> dict[str, Any]:
        return {
            "classes": self.classes.compute(),
            "range": self.range.compute(),
            "twice": self.twice.compute(),
            **self.many.compute(),
            "accuracy": self.accuracy.compute(),
            "again": self.accuracy.compute(),
            "strict": self.strict.compute(),
        }


def samples(count: int = SAMPLES) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(count, generator=generator), torch.randint(2, (count,), generator=generator)


def plain_values(*, first: int = SAMPLES) -> dict[str, Any]:
    """Return the values in one process, which were asked for after some samples too."""
    module, (predictions, labels) = Several(), samples()
    module.update(predictions[:first], labels[:first])
    if first < SAMPLES:
        module.values()
        module.update(predictions[first:], labels[first:])
    return module.values()


def shared_by_two() -> dict[str, Any]:
    """Only rank 1 updates; both ask, three times, before and after the other's state has changed."""
    module, group, rank = Several(), dist.group.WORLD, dist.get_rank()
    in_step = [False]
    # Alone in its data-parallel group.
    alone = [dist.new_group([each]) for each in range(2)][rank]
    undo = share_metrics(module, group=group, source=1, is_in_step=lambda: in_step[0], samples_group=alone)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        predictions, labels = samples()
        if rank == 1:
            module.update(predictions[:10], labels[:10])
        module.values()
        if rank == 1:
            in_step[0] = True  # where the other rank is not
            module.update(predictions[10:], labels[10:])
            module.strict.compute()
            module.many.compute()
            in_step[0] = False
        found = [module.values(), module.values()]
    assert copy.deepcopy(module.accuracy).update_called == (rank == 1)
    assert pickle.loads(pickle.dumps(module.accuracy)).dist_sync_fn is None

    if rank == 1:
        module.strict.reset()
        module.strict.update(torch.tensor(-3.0))
    with pytest.raises(ArithmeticError) as raised:
        module.strict.compute()
    after = module.accuracy.compute()  # nobody waits for the other

    undo()
    assert module.accuracy.dist_sync_fn is None
    own = None
    if rank == 1:
        module.accuracy.dist_sync_fn = lambda value, group: [value]
        own = module.accuracy.compute()  # alone again
    return {
        "found": found,
        "error": str(raised.value),
        "after": after,
        "own": own,
        "updated": module.accuracy.update_count,
    }


def test_ranks_that_never_update_get_the_values_of_the_one_that_does() -> None:
    expected = plain_values(first=10)

    by_rank = run_ranks(shared_by_two, 2)

    for rank in range(2):
        for values in by_rank[rank]["found"]:
            assert list(values) == list(expected)
            torch.testing.assert_close(values, expected, rtol=0, atol=0)
        assert by_rank[rank]["error"] == "The total is -3.0."
        assert by_rank[rank]["after"] == expected["accuracy"]
    assert [each["updated"] for each in by_rank] == [0, 2]
    assert by_rank[1]["own"] == expected["accuracy"]


def shared_by_four() -> dict[str, Any]:
    """Two pipelines of two ranks, (0, 2) and (1, 3), whose last ranks each have half of the samples."""
    module, rank = Several(), dist.get_rank()
    pipelines = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    stages = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    share_metrics(
        module, group=pipelines[rank % 2], source=1, is_in_step=lambda: False, samples_group=stages[rank // 2]
    )
    predictions, labels = samples()
    if rank >= 2:
        module.update(predictions[rank % 2 :: 2], labels[rank % 2 :: 2])
    return module.values()


def test_the_ranks_that_update_sync_with_each_other_and_tell_the_others() -> None:
    expected = plain_values()

    for values in run_ranks(shared_by_four, 4):
        assert float(values["accuracy"]) == float(expected["accuracy"])
        torch.testing.assert_close(values, expected, rtol=1e-6, atol=1e-6)  # the order of samples differs


# In a Trainer ------------------------------------------------------------------------------------------------------------


class Classifier(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 1)
        self.acc = BinaryAccuracy()
        self.auroc = BinaryAUROC()
        self.many = MetricCollection({"f1": BinaryF1Score(), "acc": BinaryAccuracy()}, prefix="val_")
        self.seen: list[dict[str, float]] = []
        self.outputs: list[Any] = []
        self.computed: list[Any] = []

    def _predict(self, batch: Any) -> tuple[Tensor, Tensor]:
        x, y = batch
        logits = self.layer(x).squeeze(1)
        loss = nn.functional.binary_cross_entropy_with_logits(logits, y.to(x.dtype))
        return loss, torch.sigmoid(logits)

    def training_step(self, batch: Any, _index: int) -> Any:
        loss, predictions = self._predict(batch)
        self.acc(predictions, batch[1])
        self.log("acc", self.acc, on_step=True, on_epoch=True, prog_bar=True)
        self.auroc(predictions, batch[1])
        self.log("auroc", self.auroc, on_step=True, on_epoch=True)
        self.log("loss", loss, on_step=True, on_epoch=True, sync_dist=True, batch_size=len(batch[0]))
        return {"loss": loss, "predictions": predictions}

    def validation_step(self, batch: Any, _index: int) -> Tensor:
        loss, predictions = self._predict(batch)
        self.many.update(predictions, batch[1])
        self.log("val_loss", loss)
        self.log_dict(self.many)
        return predictions

    def on_train_batch_end(self, outputs: Any, _batch: Any, _index: int) -> None:
        self.outputs.append(detached(outputs))
        self._note()

    def on_validation_batch_end(self, outputs: Any, _batch: Any, _index: int) -> None:
        self.outputs.append(detached(outputs))

    def on_train_epoch_end(self) -> None:
        self.computed.append(self.acc.compute())  # as users do who log it themselves
        self._note()

    def _note(self) -> None:
        trainer = self.trainer
        found = {**trainer.callback_metrics, **trainer.logged_metrics, **trainer.progress_bar_metrics}
        self.seen.append({key: float(value) for key, value in found.items()})

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1e-2)


class OfLastStage(Classifier):
    """The same, with steps that only rank 1 goes through, once per microbatch."""

    def __init__(self) -> None:
        super().__init__()
        self.in_step = False
        self.whole = WholeBatch(self)

    def setup(self, stage: str) -> None:
        alone = [dist.new_group([each]) for each in range(2)][dist.get_rank()]
        self.undo = share_metrics(
            self, group=dist.group.WORLD, source=1, is_in_step=lambda: self.in_step, samples_group=alone
        )

    def training_step(self, batch: Any, index: int) -> Any:
        outputs = self._in_parts(super().training_step, batch, index)
        if dist.get_rank() == 0:
            outputs["loss"] = outputs["loss"] + 0.0 * self.layer.weight.sum()
        return outputs

    def validation_step(self, batch: Any, index: int) -> Any:
        return self._in_parts(super().validation_step, batch, index)

    def _in_parts(self, step: Any, batch: Any, index: int) -> Any:
        box: list[Any] = [None]
        if dist.get_rank() == 1:
            parts, results, logged = split_batch(batch, MICROBATCHES), [], []
            self.in_step = True
            for part in parts:
                noted: list[Logged] = []
                with self.whole.watching(), record_logs(self, noted):
                    results.append(step(part, index))
                logged.append(noted)
            self.in_step = False
            sizes = [batch_size(part) for part in parts]
            own = join_results(results, sizes)
            box = [(self.whole.complete(combine(logged, sizes)), detached(own))]
        dist.broadcast_object_list(box, src=1)
        replay(self, box[0][0])
        return own if dist.get_rank() == 1 else placed(box[0][1], self.device)


def fitted(kind: type[Classifier]) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(SAMPLES, 3, generator=generator, dtype=torch.float64)
    y = (x.sum(1) + torch.randn(SAMPLES, generator=generator, dtype=torch.float64) > 0).long()
    loader = DataLoader(TensorDataset(x, y), batch_size=BATCH)
    torch.manual_seed(0)
    module = kind().double()
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=2,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        log_every_n_steps=1,
        precision="64-true",
    )
    trainer.fit(module, loader, loader)
    (validated,) = trainer.validate(module, loader, verbose=False)
    return module.seen, module.outputs, module.computed, validated


@pytest.mark.filterwarnings("ignore:It is recommended to use `self.log")
@pytest.mark.filterwarnings("ignore:No (positive|negative) samples in targets")
def test_a_trainer_has_the_same_numbers_on_a_rank_that_never_runs_the_step(tmp_path: Path) -> None:
    seen, outputs, computed, validated = fitted(Classifier)
    assert len(seen) == 8
    assert {"acc_step", "acc_epoch", "auroc_step", "loss_epoch", "val_f1", "val_loss"} <= set(seen[-1])

    for found in run_ranks(fitted, 2, OfLastStage):
        torch.testing.assert_close(found[0], seen, rtol=1e-15, atol=1e-15)
        torch.testing.assert_close(found[1], outputs, rtol=1e-15, atol=1e-15)
        assert found[2] == computed
        torch.testing.assert_close(found[3], validated, rtol=1e-15, atol=1e-15)
