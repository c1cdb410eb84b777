"""A wrong training does not pass for a right one: every fault below must make the comparison fail, and where it shows."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest

from meshbolt import Zero
from meshbolt.testing import ParityError
from meshbolt.testing.parity.assertion import check, meshed_records, reference_records
from meshbolt.testing.parity.case import Case
from tests.parity import models, mutations
from tests.parity.matrix import Row

STAGES = ("zero0", "zero1", "zero2", "zero3")
ADAM = functools.partial(models.torch.optim.AdamW, lr=1e-2)
SGD = functools.partial(models.torch.optim.SGD, lr=0.05, momentum=0.9)


def case_of(stage: str, precision: str, *, feature: str = "small") -> Case:
    """Return a case of the matrix, with windows of three batches."""
    return Row(feature=feature, strategy=stage, precision=precision, ranks=2, window=3).case()


def quantities_that_differ(*cases: Case) -> list[set[str]]:
    """Return, for each case, the quantities in which it differs from one process."""
    records = meshed_records(cases, timeout=60)
    references = reference_records([(c, r.accumulates_rounded) for c, r in zip(cases, records, strict=True)], timeout=60)
    found = []
    for case, record, reference in zip(cases, records, references, strict=True):
        with pytest.raises(ParityError) as caught:
            check(case, record, reference)
        found.append({difference.quantity for difference in caught.value.report.differences})
    return found


def with_fault(case: Case, task: type[models.Task], network: type = models.SmallShapes, optimizer: object = SGD) -> Case:
    return replace(case, module=functools.partial(task, network, optimizer))


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-mixed without autocast"])
def test_gradients_reduced_in_bfloat16_are_found(precision: str) -> None:
    cases = [
        replace(case_of(f"zero{stage}", precision), strategy={"zero": Zero(stage=stage, reduce_dtype="bfloat16")})
        for stage in range(4)
    ]
    for found in quantities_that_differ(*cases):
        assert {"gradients", "parameters"} <= found


@pytest.mark.parametrize("precision", ["64-true", "32-true", "bf16-mixed", "16-mixed"])
def test_moments_kept_in_bfloat16_are_found(precision: str) -> None:
    cases = [with_fault(case_of(stage, precision), mutations.RoundedMoments, optimizer=ADAM) for stage in STAGES]
    for found in quantities_that_differ(*cases):
        assert {"optimizer_state", "parameters"} <= found


@pytest.mark.parametrize("precision", ["64-true", "32-true", "bf16-mixed", "16-mixed"])
@pytest.mark.parametrize(
    ("fault", "quantities"),
    [
        (mutations.GradientTwice, {"optimizer_state", "parameters"}),
        (mutations.LossTwice, {"gradients", "parameters"}),
        (mutations.BatchLost, {"gradients", "parameters"}),
        (mutations.BatchLostOnOneRank, {"gradients", "parameters"}),
        (mutations.GradientNotReduced, {"gradients"}),
        (mutations.LateStart, {"initial"}),
        (mutations.LrOnce, {"settings"}),
    ],
)
def test_a_fault_in_training_is_found(precision: str, fault: type[models.Task], quantities: set[str]) -> None:
    for found in quantities_that_differ(*(with_fault(case_of(stage, precision), fault) for stage in STAGES)):
        assert quantities <= found


def test_statistics_that_are_not_the_ranks_own_are_found() -> None:
    case = case_of("zero2", "64-true", feature="batchnorm")
    (found,) = quantities_that_differ(with_fault(case, mutations.StatisticsOfRankZero, models.Normalised))
    assert found == {"buffers"}


def test_random_numbers_that_are_not_the_ranks_own_are_found() -> None:
    case = case_of("zero2", "64-true", feature="dropout")
    (found,) = quantities_that_differ(with_fault(case, mutations.SameDropout, models.Dropped))
    assert "losses" in found


def test_a_rank_that_trains_on_the_batches_of_another_is_found() -> None:
    case = case_of("zero2", "64-true")
    swapped = [batch for pair in zip(case.data[1::2], case.data[::2], strict=True) for batch in pair]
    record = meshed_records([replace(case, data=swapped)], timeout=60)[0]
    reference = reference_records([(case, False)], timeout=60)[0]
    with pytest.raises(ParityError, match="losses: batch 0 on rank"):
        check(case, record, reference)
