"""Metrics that are called once per microbatch, and metrics that are quiet."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.unit.strategies.pipelined.microbatched import Plain, loader, seeded
from torch import nn
from torchmetrics import CatMetric, MaxMetric, MeanMetric, Metric, MetricCollection
from torchmetrics.classification import BinaryAccuracy, BinaryAUROC, BinaryF1Score, MulticlassAccuracy
from torchmetrics.regression import MeanSquaredError, PearsonCorrCoef
from torchmetrics.wrappers import ClasswiseWrapper, MinMaxMetric

from meshbolt.strategies.pipelined.logs import Logged, MetricAt, combine, record_logs
from meshbolt.strategies.pipelined.metrics import WholeBatch, quiet_metrics

KINDS: dict[str, Callable[[], Metric]] = {
    "state that is summed": BinaryF1Score,
    "state that is concatenated": BinaryAUROC,
    "state that updates depend on": PearsonCorrCoef,
    "a mean": MeanSquaredError,
    "composed": lambda: 2 * BinaryAccuracy(),
    "on the CPU": lambda: BinaryAUROC(compute_on_cpu=True),
}


class Holder(nn.Module):
    def __init__(self, metric: nn.Module) -> None:
        super().__init__()
        self.metric = metric
        self.layer = nn.Linear(1, 1)


def data(samples: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    predictions = torch.rand(samples, generator=generator, requires_grad=False)
    return predictions.requires_grad_(), torch.arange(samples) % 2


@pytest.mark.parametrize("kind", KINDS)
def test_a_metric_has_the_value_of_the_whole_batch_and_its_own_past(kind: str) -> None:
    holder, alone = Holder(KINDS[kind]()), KINDS[kind]()
    whole = WholeBatch(holder)
    for seed in range(3):
        predictions, labels = data(8, seed)
        labels = labels.float() if kind == "state that updates depend on" else labels
        expected = alone(predictions, labels)
        with whole.watching():
            for part in range(4):
                holder.metric(predictions[2 * part : 2 * part + 2], labels[2 * part : 2 * part + 2])

        logged = [Logged("x", MetricAt("metric", torch.zeros(())), {"on_step": True})]
        (completed,) = whole.complete(logged)

        assert not completed.value.forward_value.requires_grad
        torch.testing.assert_close(completed.value.forward_value, expected.detach(), rtol=1e-6, atol=1e-6)  # float32
        torch.testing.assert_close(holder.metric.compute(), alone.compute(), rtol=1e-6, atol=1e-6)
    assert holder.metric._forward_hooks == {}


def test_the_value_of_the_whole_batch_is_no_mean_of_its_parts() -> None:
    holder = Holder(BinaryF1Score())
    predictions, labels = torch.tensor([0.9, 0.9, 0.9, 0.1]), torch.tensor([1, 0, 0, 1])
    whole, parts = WholeBatch(holder), []
    with whole.watching():
        for part in range(2):
            values = holder.metric(predictions[2 * part : 2 * part + 2], labels[2 * part : 2 * part + 2])
            parts.append([Logged("x", MetricAt("metric", values), {"on_step": True})])

    mean = combine(parts, [2, 2])
    (completed,) = whole.complete(mean)

    assert mean[0].value.forward_value == pytest.approx(1 / 3)
    assert completed.value.forward_value == BinaryF1Score()(predictions, labels) == pytest.approx(0.4)


def test_metrics_that_are_not_logged_of_the_step_are_left_out_and_forgotten() -> None:
    holder = Holder(BinaryAccuracy())
    whole = WholeBatch(holder)
    with whole.watching():
        holder.metric(*data(4, 0))
    untouched = [
        Logged("a", MetricAt("metric", torch.zeros(())), {"on_step": False}),
        Logged("b", MetricAt("metric", None), {"on_step": True}),
        Logged("c", torch.ones(())),
    ]
    assert whole.complete(untouched) == untouched

    (again,) = whole.complete([Logged("a", MetricAt("metric", torch.zeros(())), {"on_step": True})])
    assert again.value.forward_value == 0  # nobody called it in this batch


def test_copies_that_a_step_makes_of_a_metric_are_its_own() -> None:
    holder = Holder(BinaryAccuracy())
    whole = WholeBatch(holder)
    predictions, labels = data(4, 0)
    with whole.watching():
        holder.metric(predictions, labels)
        clone = holder.metric.clone()
        clone.reset()
        clone(predictions, 1 - labels)
    clone(predictions, 1 - labels)

    (completed,) = whole.complete([Logged("x", MetricAt("metric", torch.zeros(())), {"on_step": True})])

    assert completed.value.forward_value == holder.metric.compute()
    assert clone.compute() == 1 - holder.metric.compute()


class WithNetwork(MeanMetric):
    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Linear(2, 2)


def test_the_network_of_a_metric_is_not_copied() -> None:
    holder = Holder(WithNetwork())
    whole = WholeBatch(holder)
    with whole.watching():
        holder.metric(1.0)

    assert whole._copies["metric"].network.weight is holder.metric.network.weight


def test_collections_are_logged_with_the_values_of_the_whole_batch() -> None:
    module = seeded(Plain, lambda *_: None)
    whole, logged = WholeBatch(module), []
    predictions, labels = data(8, 0)
    expected = module.many.clone()(predictions, labels)
    for part in range(4):
        logged.append([])
        with whole.watching(), record_logs(module, logged[-1]):
            module.many(predictions[2 * part : 2 * part + 2], labels[2 * part : 2 * part + 2])
            module.log_dict(module.many, on_step=True)

    completed = whole.complete(combine(logged, [2] * 4))

    assert [each.name for each in completed] == list(expected)
    for each in completed:
        torch.testing.assert_close(each.value.forward_value, expected[each.name].detach())
        assert module.get_submodule(each.value.path) is module.many[each.name]


# Quiet metrics -----------------------------------------------------------------------------------------------------------


class Several(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.accuracy = BinaryAccuracy()
        self.many = MetricCollection([BinaryAccuracy(), BinaryF1Score(), BinaryAUROC()])
        self.classes = ClasswiseWrapper(MulticlassAccuracy(num_classes=3, average=None))
        self.range = MinMaxMetric(BinaryAccuracy())
        self.all = CatMetric()
        self.most = MaxMetric()


def states(module: nn.Module) -> dict[str, Any]:
    found = {}
    for name, child in module.named_modules():
        if isinstance(child, Metric):
            found[name] = copy.deepcopy(
                (child.metric_state, child._update_count, child._computed, child._forward_cache)
            )
        elif isinstance(child, MetricCollection):
            found[name] = (copy.deepcopy(child.compute_groups), child._groups_checked)
    return found


@pytest.mark.parametrize("was_used", [False, True])
def test_quiet_metrics_return_zeros_and_keep_their_state(was_used: bool) -> None:
    module = Several()
    predictions, labels = torch.tensor([0.9, 0.8]), torch.tensor([1, 0])
    if was_used:
        module.many(predictions, labels)
        module.most(3.0)
        module.all.update(predictions)
    before = states(module)
    foreign = torch.empty(2, device="meta")

    with quiet_metrics(module):
        accuracy = module.accuracy(foreign, labels)
        module.accuracy.update(foreign, labels)
        module.many.update(foreign, labels)
        many = module.many(foreign, labels)
        module.many.reset()
        classes = module.classes(foreign, labels)
        module.range(foreign, labels)
        module.all(foreign)
        module.most.reset()
        assert module.most.compute() == 0

    assert accuracy.shape == ()
    assert accuracy == 0
    assert many == {"BinaryAccuracy": 0, "BinaryF1Score": 0, "BinaryAUROC": 0}
    assert classes["multiclassaccuracy_0"] == 0
    assert dict(classes) == {}
    assert str(states(module)) == str(before)
    # And afterwards they are as ever.
    assert module.accuracy(predictions, labels) == 0.5
    assert module.many.compute()["BinaryAccuracy"] == 0.5 if was_used else True


def test_a_step_can_be_looked_at_with_quiet_metrics() -> None:
    def logs(module: Plain, _losses: Any, probabilities: Any, labels: Any) -> None:
        module.log("acc", module.acc(probabilities, labels))
        module.log("f1", module.f1)
        module.log_dict(module.many(probabilities, labels))

    module, sink = seeded(Plain, logs), []
    with quiet_metrics(module), record_logs(module, sink):
        module.training_step(next(iter(loader())), 0)

    assert [each.name for each in sink][:2] == ["acc", "f1"]
    assert not any(child.update_called for child in module.modules() if isinstance(child, Metric))
    assert pickle.dumps(sink)
