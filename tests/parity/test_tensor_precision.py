"""Tensor parallelism in 16 bits, against the same sums written by hand."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import pytest
from tests.parity.tensor_by_hand import SmallGPT, SmallGPTByHand, batches
from tests.rows import full

from meshbolt import Zero
from meshbolt.plugins import MixedPrecision
from meshbolt.tensor import TensorParallel
from meshbolt.testing.parity.assertion import check, meshed_records, reference_records
from meshbolt.testing.parity.case import Case
from meshbolt.testing.parity.report import ParityError

PRECISIONS: dict[str, Any] = {
    "bf16-mixed": "bf16-mixed",
    "bf16-mixed without autocast": functools.partial(MixedPrecision, "bf16-mixed", "cpu", autocast=False),
    "16-mixed": functools.partial(MixedPrecision, "16-mixed", "cpu", init_scale=2.0**10),
    "bf16-true": "bf16-true",
}


def case_of(precision: str, zero: int | Zero, ranks: int, window: int = 1, **tensor: Any) -> Case:
    setting = TensorParallel(2, **{"sequence_parallel": False, **tensor})
    return Case(
        module=SmallGPT,
        data=batches(5 * window * ranks // 2),
        strategy={"zero": zero, "tensor_parallel": setting},
        ranks=ranks,
        precision=PRECISIONS[precision],
        accumulate_grad_batches=window,
        gradient_clip_val=0.5 if window > 1 else None,
    )


def compare(case: Case, module: Any = SmallGPTByHand) -> None:
    meshed = meshed_records([case], timeout=60)[0]
    reference = reference_records([(replace(case, module=module), meshed.zero)], timeout=60)[0]
    check(case, meshed, reference)


HSDP = Zero(2, replicate=2)
ROWS = [
    (precision, zero, ranks, window)
    for zero, ranks, window in [(0, 4, 1), (1, 2, 1), (2, 4, 3), (3, 4, 1), (HSDP, 4, 1)]
    for precision in PRECISIONS
    # The bias of a fused projection is whole over data-parallel ranks: within a window it adds up in its own bfloat16, where
    # the reference adds up in float32, as sharded parameters do.
    if (precision, window) != ("bf16-true", 3)
]
SAMPLE = [("bf16-mixed", 2, 4, 3), ("16-mixed", 1, 2, 1)]


@pytest.mark.parametrize(
    ("precision", "zero", "ranks", "window"), [row if row in SAMPLE else full(*row) for row in ROWS]
)
def test_ranks_round_where_the_sums_written_by_hand_do(precision, zero, ranks, window):
    compare(case_of(precision, zero, ranks, window))


def test_whole_products_are_not_what_ranks_compute_in_16_bits():
    with pytest.raises(ParityError):
        compare(case_of("bf16-mixed", 1, 2), module=SmallGPT)
