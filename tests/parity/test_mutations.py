"""A wrong training does not pass for a right one: every fault below must make the comparison fail, and where it shows."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace

import pytest
from tests.parity import models, mutations
from tests.parity.matrix import Row

from meshbolt import Zero
from meshbolt.testing import ParityError
from meshbolt.testing.parity.assertion import check, meshed_records, reference_records
from meshbolt.testing.parity.case import Case
from meshbolt.testing.parity.record import Record

STAGES = ("zero0", "zero1", "zero2", "zero3")
PRECISIONS = ("32-true", "bf16-mixed", "bf16-mixed without autocast", "16-mixed")
# Every stage in float64, and every precision under one stage.
PLANS = [*((stage, "64-true") for stage in STAGES), *(("zero2", precision) for precision in PRECISIONS)]
OPTIMIZERS = {
    "SGD": functools.partial(models.torch.optim.SGD, lr=0.05, momentum=0.9),
    "AdamW": functools.partial(models.torch.optim.AdamW, lr=1e-2),
}


def case_of(stage: str, precision: str, *, feature: str = "small") -> Case:
    """Return a case of the matrix, with windows of three batches."""
    return Row(feature=feature, strategy=stage, precision=precision, ranks=2, window=3).case()


def with_fault(case: Case, task: type[models.Task], network: type = models.SmallShapes, optimizer: str = "SGD") -> Case:
    """Return a case whose module has a fault where there are several ranks."""
    return replace(case, module=functools.partial(task, network, OPTIMIZERS[optimizer]))


def quantities_that_differ(cases: Sequence[Case], references: Sequence[Record]) -> list[set[str]]:
    """Return, for each case, the quantities in which it differs from its reference."""
    records = meshed_records(cases, timeout=60)
    found = []
    for case, record, reference in zip(cases, records, references, strict=True):
        with pytest.raises(ParityError) as caught:
            check(case, record, reference)
        found.append({difference.quantity for difference in caught.value.report.differences})
    return found


@functools.cache
def references_of_plans(optimizer: str) -> list[Record]:
    """Return the references of all plans: the faults do not show in one process."""
    cases = [(with_fault(case_of(*plan), models.Task, optimizer=optimizer), Zero()) for plan in PLANS]
    return reference_records(cases, timeout=60)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-mixed without autocast"])
def test_gradients_reduced_in_bfloat16_are_found(precision: str) -> None:
    cases = [
        replace(case_of(f"zero{stage}", precision), strategy={"zero": Zero(stage=stage, reduce_dtype="bfloat16")})
        for stage in range(4)
    ]
    references = reference_records([(cases[0], Zero())], timeout=60) * len(cases)
    for found in quantities_that_differ(cases, references):
        assert {"gradients", "parameters"} <= found


@pytest.mark.parametrize(
    ("fault", "optimizer", "quantities"),
    [
        (mutations.RoundedMoments, "AdamW", {"optimizer_state", "parameters"}),
        (mutations.GradientTwice, "SGD", {"optimizer_state", "parameters"}),
        (mutations.LossTwice, "SGD", {"gradients", "parameters"}),
        (mutations.BatchLost, "SGD", {"gradients", "parameters"}),
        (mutations.BatchLostOnOneRank, "SGD", {"gradients", "parameters"}),
        (mutations.GradientNotReduced, "SGD", {"gradients"}),
        (mutations.LateStart, "SGD", {"initial"}),
        (mutations.LastRateDoubled, "SGD", {"settings"}),
    ],
)
def test_a_fault_in_training_is_found(fault: type[models.Task], optimizer: str, quantities: set[str]) -> None:
    cases = [with_fault(case_of(*plan), fault, optimizer=optimizer) for plan in PLANS]
    for found in quantities_that_differ(cases, references_of_plans(optimizer)):
        assert quantities <= found


def test_statistics_that_are_not_the_ranks_own_are_found() -> None:
    case = case_of("zero2", "64-true", feature="batchnorm")
    case = with_fault(case, mutations.StatisticsOfRankZero, models.Normalised)
    (found,) = quantities_that_differ([case], reference_records([(case, Zero())], timeout=60))
    assert found == {"buffers"}


def test_random_numbers_that_are_not_the_ranks_own_are_found() -> None:
    case = case_of("zero2", "64-true", feature="dropout")
    case = with_fault(case, mutations.SameDropout, models.Dropped)
    (found,) = quantities_that_differ([case], reference_records([(case, Zero())], timeout=60))
    assert "losses" in found


def test_a_rank_that_trains_on_the_batches_of_another_is_found() -> None:
    case = case_of("zero2", "64-true")
    swapped = [batch for pair in zip(case.data[1::2], case.data[::2], strict=True) for batch in pair]
    record = meshed_records([replace(case, data=swapped)], timeout=60)[0]
    reference = reference_records([(case, Zero())], timeout=60)[0]
    with pytest.raises(ParityError, match="losses: batch 0 on rank"):
        check(case, record, reference)
