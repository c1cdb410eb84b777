"""Differences between a checkpoint and what it is loaded into, as data."""

from __future__ import annotations

import pytest
import torch

from meshbolt.checkpoint import LoadReport, TensorInfo
from meshbolt.checkpoint.compare import compare, merge

A = TensorInfo(shape=(2, 3), dtype=torch.float32)
B = TensorInfo(shape=(3, 2), dtype=torch.float32)


def with_dtype(dtype: torch.dtype) -> TensorInfo:
    return TensorInfo(shape=(2, 3), dtype=dtype)


def test_equal_keys_shapes_and_dtypes_leave_nothing_to_report() -> None:
    report = compare(saved={"w": A}, asked={"w": A}, prefix="")
    assert report == LoadReport()
    assert report.faults() == ""


def test_missing_unexpected_and_misshapen_keys_are_each_listed_under_their_name() -> None:
    report = compare(saved={"w": A, "old": A}, asked={"w": B, "new": A}, prefix="")
    assert (report.missing, report.unexpected, report.mismatched) == (("new",), ("old",), {"w": (A, B)})
    assert report.faults() == (
        "\n  1 not in the checkpoint:\n    new"
        "\n  1 in the checkpoint and not asked for:\n    old"
        "\n  1 of another shape or kind:\n    w: saved float32[2, 3], asked for float32[3, 2]"
    )


def test_only_ten_keys_of_a_kind_are_listed_and_the_rest_is_counted() -> None:
    report = compare(saved={}, asked={f"w{number:02}": A for number in range(12)}, prefix="")
    assert "12 not in the checkpoint" in report.faults()
    assert "w09" in report.faults()
    assert "w10" not in report.faults()
    assert report.faults().endswith("and 2 more")


@pytest.mark.parametrize(
    ("prefix", "unexpected"),
    [("", ("model.b", "rng.1")), ("model.", ("model.b",)), (("a.", "rng."), ("rng.1",)), ((), ())],
)
def test_keys_outside_the_prefixes_are_not_missed(prefix: str | tuple[str, ...], unexpected: tuple[str, ...]) -> None:
    saved = {"model.a": A, "model.b": A, "rng.1": A}
    assert compare(saved=saved, asked={"model.a": A}, prefix=prefix).unexpected == unexpected


@pytest.mark.parametrize(
    ("saved", "asked", "fits"),
    [
        (torch.float32, torch.bfloat16, True),
        (torch.float16, torch.float64, True),
        (torch.int32, torch.int64, True),
        (torch.float32, torch.int64, False),
        (torch.complex64, torch.float32, False),
        (torch.int64, torch.bool, False),
    ],
)
def test_another_dtype_is_cast_within_its_kind_and_refused_beyond(
    saved: torch.dtype, asked: torch.dtype, fits: bool
) -> None:
    pair = {"w": (with_dtype(saved), with_dtype(asked))}
    report = compare(saved={"w": with_dtype(saved)}, asked={"w": with_dtype(asked)}, prefix="")
    assert (report.cast, report.mismatched) == ((pair, {}) if fits else ({}, pair))


def test_a_key_that_one_rank_asks_for_is_expected_and_one_that_any_misses_is_missing() -> None:
    saved = {"rng.0": A, "rng.1": A, "rng.2": A}
    reports = [compare(saved=saved, asked={key: A}, prefix="") for key in ("rng.0", "rng.1", "rng.9")]
    assert merge(reports) == LoadReport(missing=("rng.9",), unexpected=("rng.2",))
