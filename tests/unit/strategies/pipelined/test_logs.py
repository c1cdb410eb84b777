"""What a module logs in microbatches is what it logs for whole batches: values, metric objects, and Lightning's errors."""

from __future__ import annotations

import csv
import math
import pickle
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric import Fabric
from lightning.fabric.loggers.logger import Logger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from tests.unit.strategies.pipelined.microbatched import Microbatched, Plain, fit, loader, seeded
from torch import Tensor
from torchmetrics.classification import BinaryAccuracy

from meshbolt.errors import UnsupportedError
from meshbolt.strategies.pipelined.logs import Logged, MetricAt, combine, record_logs, replay

TOLERANCE = 1e-15

pytestmark = [
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
    pytest.mark.filterwarnings("ignore:You called `self.log\\('steps'"),
    # What metrics say of the few samples of a microbatch.
    pytest.mark.filterwarnings("ignore:No (positive|negative) samples in targets"),
    pytest.mark.filterwarnings("ignore:The variance of predictions or target is close to zero"),
]


def losses(module: Plain, loss: Tensor, _probabilities: Tensor, _labels: Tensor) -> None:
    module.log("plain", loss.mean())
    module.log("both", loss.mean(), on_step=True, on_epoch=True, prog_bar=True)
    module.log("epoch", loss.mean(), on_step=False, on_epoch=True, sync_dist=True)
    module.log("torch_mean", loss.mean(), reduce_fx=torch.mean, on_epoch=True, logger=True)
    module.log("one_element", loss.mean().reshape(1), on_epoch=True, logger=False)
    module.log("number", float(loss.detach().mean()), on_epoch=True)
    module.log("rate", 0.1, prog_bar=True)
    module.log("steps", torch.tensor(7), on_epoch=True)


def reductions(module: Plain, loss: Tensor, _probabilities: Tensor, labels: Tensor) -> None:
    module.log("sum", loss.sum(), reduce_fx="sum", on_epoch=True)
    module.log("builtin_sum", loss.sum(), reduce_fx=sum, on_step=False, on_epoch=True)
    module.log("max", loss.max(), reduce_fx=torch.max, on_epoch=True, on_step=True)
    module.log("min", loss.min(), reduce_fx="MIN", on_epoch=True)
    module.log("avg", loss.mean(), reduce_fx="avg", on_epoch=True)
    module.log("positive", float(labels.sum()), reduce_fx="sum", on_epoch=True)
    module.log_dict({"d1": loss.max(), "d2": -loss.min()}, reduce_fx="max", on_epoch=True)


def batch_sizes(module: Plain, loss: Tensor, _probabilities: Tensor, labels: Tensor) -> None:
    module.log("own", loss.mean(), batch_size=len(loss), on_epoch=True)
    module.log("own_tensor", loss.mean(), batch_size=torch.tensor(len(loss)), on_epoch=True)
    module.log("one", loss.mean(), batch_size=1, on_epoch=True)
    module.log("configured", loss.mean(), batch_size=module.batch_size, on_epoch=True)
    module.log("tokens", loss.mean(), batch_size=5 * len(loss), on_epoch=True)
    # A mean over those samples that count, as over tokens that are not padding: exact though their numbers differ.
    counted = labels == 0
    module.log(
        "counted", loss[counted].sum() / counted.sum().clamp(min=1), batch_size=int(counted.sum()), on_epoch=True
    )


def metric_objects(module: Plain, loss: Tensor, probabilities: Tensor, labels: Tensor) -> None:
    module.acc(probabilities, labels)
    module.log("acc", module.acc, on_step=True, on_epoch=True, prog_bar=True)
    module.f1(probabilities, labels)
    module.log("f1", module.f1)
    module.auroc.update(probabilities, labels)
    module.log("auroc", module.auroc, on_step=False, on_epoch=True, metric_attribute="auroc")
    module.pearson(probabilities, labels.to(probabilities.dtype))
    module.log("pearson", module.pearson, on_step=True, on_epoch=True, sync_dist=True)
    module.mse(probabilities, labels.to(probabilities.dtype))
    module.log("mse", module.mse, on_step=True, on_epoch=True, batch_size=len(loss))
    module.many(probabilities, labels)
    module.log_dict(module.many, on_step=True, on_epoch=True)


def several_times(module: Plain, loss: Tensor, _probabilities: Tensor, _labels: Tensor) -> None:
    module.log("loss", loss.mean(), on_epoch=True)
    module.log("loss", 2 * loss.mean(), on_epoch=True)
    module.log("other", loss.mean())


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, tuple[float, float]]:
    """Return the values of the same names that differ."""
    assert list(one) == list(other)
    pairs = {key: (float(one[key]), float(other[key])) for key in one}
    return {
        key: (left, right)
        for key, (left, right) in pairs.items()
        if not (abs(left - right) <= TOLERANCE * max(1.0, abs(left)) or (math.isnan(left) and math.isnan(right)))
    }


def rows(trainer: pl.Trainer) -> list[dict[str, str]]:
    with Path(trainer.logger.log_dir, "metrics.csv").open() as lines:
        return list(csv.DictReader(lines))


def assert_alike(one: pl.Trainer, other: pl.Trainer) -> None:
    """Compare what callbacks, progress bar and logger have got after every step and epoch."""
    assert [
        differences(*each) for each in zip(one.lightning_module.seen, other.lightning_module.seen, strict=True)
    ] == [{} for _ in one.lightning_module.seen]
    written, expected = rows(other), rows(one)
    assert [[key for key in row if row[key]] for row in written] == [
        [key for key in row if row[key]] for row in expected
    ]
    for row, wanted in zip(written, expected, strict=True):
        assert differences(*({k: v for k, v in each.items() if v} for each in (wanted, row))) == {}


@pytest.mark.parametrize("count", [1, 2, 4, 8])
@pytest.mark.parametrize("logs", [losses, reductions, batch_sizes, metric_objects, several_times])
def test_what_is_logged_in_microbatches_is_what_whole_batches_log(
    logs: Callable[..., None], count: int, tmp_path: Path
) -> None:
    plain = fit(seeded(Plain, logs), tmp_path, val=loader())
    parts = fit(seeded(Microbatched, logs, count=count), tmp_path, val=loader())

    assert len(plain.lightning_module.seen) == 8  # three steps and an epoch's end, twice
    assert_alike(plain, parts)
    for one, other in zip(plain.lightning_module.outputs, parts.lightning_module.outputs, strict=True):
        torch.testing.assert_close(other, one, rtol=TOLERANCE, atol=TOLERANCE)


# Of 7 samples, in microbatches of 2, 2, 2 and 1; the last batch as well, or of 4, 1 in each, or of 2.
@pytest.mark.parametrize("samples", [21, 18, 16])
@pytest.mark.parametrize("logs", [losses, reductions, batch_sizes, metric_objects])
def test_batches_and_microbatches_of_different_sizes_count_by_their_samples(
    logs: Callable[..., None], samples: int, tmp_path: Path
) -> None:
    train = loader(samples=samples, batch_size=7)
    plain = fit(seeded(Plain, logs, batch_size=7), tmp_path, train=train)
    parts = fit(seeded(Microbatched, logs, batch_size=7), tmp_path, train=train)

    assert_alike(plain, parts)


def test_a_mean_that_counts_microbatches_alike_would_be_noticed() -> None:
    values = [Logged("loss", torch.tensor(value, dtype=torch.float64)) for value in (1.0, 4.0)]
    (combined,) = combine([[values[0]], [values[1]]], [2, 1])

    assert combined.value == 2.0


@pytest.mark.parametrize(
    "value", [torch.tensor(0.1), torch.tensor(0.1, dtype=torch.bfloat16), 0.1, 3, torch.tensor(3), True]
)
@pytest.mark.parametrize("reduce_fx", ["mean", "max", "min"])
def test_equal_values_stay_as_they_are_bit_for_bit(value: Any, reduce_fx: str) -> None:
    logged = [[Logged("x", value, {"reduce_fx": reduce_fx})] for _ in range(3)]

    (combined,) = combine(logged, [3, 3, 1])

    assert type(combined.value) is type(value)
    assert combined.value == value
    assert getattr(combined.value, "dtype", None) == getattr(value, "dtype", None)


def test_means_of_few_bits_are_kept_in_more_as_lightning_keeps_them() -> None:
    values = [torch.tensor(value, dtype=torch.bfloat16) for value in (1.0, 1.0078125)]

    (combined,) = combine([[Logged("x", value)] for value in values], [1, 1])

    assert combined.value.dtype == torch.float32
    assert combined.value == 1.00390625


def test_names_that_only_some_microbatches_log_are_combined_over_those() -> None:
    one, other = Logged("a", torch.tensor(2.0)), Logged("b", torch.tensor(8.0))

    combined = combine([[one], [other, Logged("a", torch.tensor(5.0))], [other]], [1, 2, 5])

    assert [(each.name, float(each.value)) for each in combined] == [("a", 4.0), ("b", 8.0)]


@pytest.mark.parametrize(
    ("given", "sizes", "expected"),
    [
        ([2, 2, 2], [2, 2, 2], 6),  # len(x)
        ([2, 2, 1], [2, 2, 1], 5),
        ([6, 6, 6], [2, 2, 2], 6),  # the configured size of the whole batch
        ([6, 6, 6], [2, 2, 1], 6),  # that, for a smaller last batch
        ([1, 1, 1], [2, 2, 2], 1),
        ([1, 1, 1], [1, 1, 1], 3),
        ([40, 40, 40], [2, 2, 2], 120),  # tokens
        ([40, 17, 20], [2, 2, 2], 77),
        ([None, None], [2, 2], None),
        ([None, 3], [2, 3], 5),
        ([0, 0], [2, 3], 0),
    ],
)
def test_batch_sizes_are_summed_unless_they_are_of_no_microbatch(
    given: list[Any], sizes: list[int], expected: Any
) -> None:
    logged = [[Logged("x", torch.ones(()), {"batch_size": size})] for size in given]

    (combined,) = combine(logged, sizes)

    assert combined.settings["batch_size"] == expected


# What Lightning refuses --------------------------------------------------------------------------------------------------


def nested(module: Plain, loss: Tensor, _probabilities: Tensor, _labels: Tensor) -> None:
    module.log("x", {"a": {"b": loss.mean()}})


def words(module: Plain, *_: Tensor) -> None:
    module.log("x", "a word")


def many_elements(module: Plain, loss: Tensor, *_: Tensor) -> None:
    module.log("x", loss)


def other_arguments(module: Plain, loss: Tensor, *_: Tensor) -> None:
    module.log("x", loss.mean())
    module.log("x", loss.mean(), prog_bar=True)


def in_one_microbatch(module: Any, loss: Tensor, *_: Tensor) -> None:
    # In whole batches the second of them differs from the first.
    module.calls = getattr(module, "calls", 0) + 1
    module.log("x", loss.mean(), prog_bar=module.calls > 1)


def custom_reduction(module: Plain, loss: Tensor, *_: Tensor) -> None:
    module.log("x", loss.mean(), reduce_fx=lambda values: values[0])


def unknown_reduction(module: Plain, loss: Tensor, *_: Tensor) -> None:
    module.log("x", loss.mean(), reduce_fx="median")


def loader_in_name(module: Plain, loss: Tensor, *_: Tensor) -> None:
    module.log("x/dataloader_idx_0", loss.mean())


def no_time(module: Plain, loss: Tensor, *_: Tensor) -> None:
    module.log("x", loss.mean(), on_step=False, on_epoch=False)


def no_attribute(module: Plain, _loss: Tensor, probabilities: Tensor, labels: Tensor) -> None:
    metric = BinaryAccuracy()
    metric(probabilities, labels)
    module.log("x", metric)


def computes_mapping(module: Plain, _loss: Tensor, probabilities: Tensor, labels: Tensor) -> None:
    module.val_many(probabilities, labels)
    module.log("x", module.val_many)


def outcome(module: Plain, folder: Path) -> tuple[type, str]:
    with pytest.raises(Exception) as raised:  # noqa: PT011 - which one is compared
        fit(module, folder)
    return raised.type, re.sub(r"tensor\([^)]*\)\)?| at 0x\w+", "...", str(raised.value))


@pytest.mark.parametrize(
    "logs",
    [
        nested,
        words,
        many_elements,
        other_arguments,
        in_one_microbatch,
        custom_reduction,
        unknown_reduction,
        loader_in_name,
        no_time,
        no_attribute,
        computes_mapping,
    ],
)
def test_lightning_refuses_what_it_refuses_in_one_process(logs: Callable[..., None], tmp_path: Path) -> None:
    expected = outcome(seeded(Plain, logs), tmp_path)

    assert expected[0] in (MisconfigurationException, ValueError)
    assert outcome(seeded(Microbatched, logs), tmp_path) == expected


def test_what_cannot_be_sent_is_refused_where_it_is_logged_again(tmp_path: Path) -> None:
    sink: list[Logged] = []
    module = seeded(Plain, losses)
    with record_logs(module, sink):
        module.log("x", torch.ones(()), sync_dist_group=lambda: None)

    with pytest.raises(UnsupportedError, match="sync_dist_group"):
        replay(module, pickle.loads(pickle.dumps(combine([sink], [1]))))


def test_a_metric_that_is_named_but_not_there_is_refused() -> None:
    module, sink = seeded(Plain, losses), []
    with record_logs(module, sink):
        module.log("x", BinaryAccuracy(), metric_attribute="gone")

    with pytest.raises(UnsupportedError, match="metric_attribute='gone'"):
        replay(module, combine([sink], [1]))


# Recording ---------------------------------------------------------------------------------------------------------------


class OwnLog(pl.LightningModule):
    def log(self, name: str, value: Any, *args: Any, stage: str = "train", **settings: Any) -> None:
        super().log(f"{stage}/{name}", value, *args, **settings)

    def log_dict(self, dictionary: Any, **settings: Any) -> None:
        super().log_dict({f"d_{key}": value for key, value in dictionary.items()}, **settings)


class WithOwnLog(OwnLog, Plain):
    pass


class WithOwnLogMicrobatched(OwnLog, Microbatched):
    pass


def own_names(module: Plain, loss: Tensor, *_: Tensor) -> None:
    module.log("a", loss.mean(), True, on_epoch=True)
    module.log_dict({"b": loss.mean()})
    module.log(value=loss.max(), name="c", stage="fit", reduce_fx="max", on_epoch=True)


def test_arguments_are_noted_as_given_and_the_module_is_left_as_it_was() -> None:
    module, sink = seeded(Plain, losses), []
    before = dict(vars(module))
    loss = torch.ones((), requires_grad=True)

    with record_logs(module, sink):
        module.log("a", loss, True, on_step=False)
        module.log(value=2, name="b", reduce_fx=torch.sum)
        module.log_dict({"c": 1.0, "d": loss}, batch_size=3)
        module.log("e", module.acc)
    assert vars(module) == before

    noted = pickle.loads(pickle.dumps(sink))
    assert [each.name for each in noted] == ["a", "b", "c", "d", "e"]
    assert noted[0].settings == {"prog_bar": True, "on_step": False}
    assert noted[1].settings == {"reduce_fx": "sum"}
    assert noted[2].settings["batch_size"] == 3
    assert not noted[0].value.requires_grad
    assert noted[4].value.path == "acc"


def test_a_recorder_that_was_there_comes_back_also_after_an_error() -> None:
    module, outer, inner = seeded(Plain, losses), [], []
    with record_logs(module, outer):
        with suppress(ZeroDivisionError), record_logs(module, inner):
            module.log("a", 1.0)
            raise ZeroDivisionError
        module.log("b", 1.0)

    assert [[each.name for each in sink] for sink in (outer, inner)] == [["b"], ["a"]]
    assert "log" not in vars(module)


def test_a_tensor_that_is_changed_after_it_was_logged_counts_as_it_was() -> None:
    module, sink, value = seeded(Plain, losses), [], torch.ones(())
    with record_logs(module, sink):
        module.log("a", value)
        value.add_(1)

    assert sink[0].value == 1


def test_a_module_may_have_its_own_log(tmp_path: Path) -> None:
    torch.manual_seed(0)
    plain = fit(WithOwnLog(own_names).double(), tmp_path)
    torch.manual_seed(0)
    parts = fit(WithOwnLogMicrobatched(own_names).double(), tmp_path)

    assert "1.fit/c_epoch" in plain.lightning_module.seen[-1]
    assert_alike(plain, parts)


def test_a_metric_that_nobody_called_has_no_value_of_its_step() -> None:
    module, sink = seeded(Plain, losses), []
    with record_logs(module, sink):
        module.log("auroc", module.auroc)

    (combined,) = combine([sink, sink], [1, 1])

    assert isinstance(combined.value, MetricAt)
    assert combined.value.forward_value is None


class Kept(Logger):
    """A logger that keeps what it gets."""

    name = version = "kept"

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def log_metrics(self, metrics: Any, step: Any = None) -> None:
        self.rows.append(dict(metrics))

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        pass


def test_a_module_that_fabric_trains_logs_through_it() -> None:
    kept, module, logged = Kept(), seeded(Plain, losses), []
    module.fabric = Fabric(accelerator="cpu", devices=1, loggers=kept)
    for value in (1.0, 3.0):
        logged.append([])
        with record_logs(module, logged[-1]):
            module.log("a", torch.tensor(value))
            module.log_dict({"b": value, "c": 2 * value})

    assert kept.rows == []
    replay(module, combine(logged, [1, 1]))
    assert kept.rows == [{"a": 2.0}, {"b": 2.0}, {"c": 4.0}]
