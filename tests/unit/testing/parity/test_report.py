"""The comparison of two runs: what it lets pass, what it does not, and what it says."""

from __future__ import annotations

import torch
from torch import Tensor

from meshbolt.testing import ParityError
from meshbolt.testing.parity.record import Record
from meshbolt.testing.parity.report import FLOAT32, FLOAT64, SIXTEEN_BIT, Limits, compare, limits_for


def record(
    *, optimizer: str = "AdamW", gradient: float = 1.0, dtype: torch.dtype = torch.float64, **changed: Tensor
) -> Record:
    """Return a run of one step of one parameter of three elements."""
    values = {"weight": torch.tensor([1.0, 2.0, 3.0], dtype=dtype), **changed}
    return Record(
        initial={"weight": torch.ones(3, dtype=dtype)},
        losses={"batch 0 on rank 0": values.get("loss", torch.tensor(0.5, dtype=dtype))},
        gradients={"step 0: weight": torch.tensor([gradient, gradient, 1.0], dtype=dtype)},
        parameters={"weight": values["weight"]},
        optimizer_state={"exp_avg of weight": torch.ones(3, dtype=dtype)},
        optimizer=optimizer,
    )


def shifted(by: float, *, at: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    moved = torch.tensor([1.0, 2.0, 3.0], dtype=dtype)
    moved[at] += by
    return moved


def test_equal_runs_have_no_differences() -> None:
    report = compare(record(), record(), limits=FLOAT64)
    assert not report.differences
    assert [c.largest for c in report.comparisons] == [0.0] * 7


def test_a_difference_at_the_limit_passes_and_one_beyond_it_does_not() -> None:
    limits = Limits(rtol=0.0, atol=2.0**-20, zero_gradient=0.0)
    assert not compare(record(weight=shifted(2.0**-20)), record(), limits=limits).differences
    assert compare(record(weight=shifted(2.0**-19)), record(), limits=limits).differences


def test_the_relative_limit_counts_from_the_reference() -> None:
    limits = Limits(rtol=0.25, atol=0.0, zero_gradient=0.0)
    assert not compare(record(weight=shifted(0.75, at=2)), record(), limits=limits).differences
    assert compare(record(weight=shifted(0.75, at=1)), record(), limits=limits).differences


def test_a_difference_names_the_tensor_the_place_and_both_values() -> None:
    report = compare(record(weight=shifted(0.5, at=1)), record(), limits=FLOAT64)
    assert [(d.quantity, d.name) for d in report.differences] == [("parameters", "weight")]
    assert report.differences[0].words == "2.5 instead of 2.0 at [1] (off by 0.5)"
    assert "parameters: weight: 2.5 instead of 2.0 at [1] (off by 0.5)" in str(report)


def test_the_earliest_step_stands_first_and_within_it_the_worst() -> None:
    reference, run = record(), record()
    for name, gap in (("step 1: b", 9.0), ("step 0: a", 1.0), ("step 0: c", 2.0), ("step 10: d", 99.0)):
        reference.gradients[name], run.gradients[name] = torch.zeros(1), torch.full((1,), gap)
    names = [difference.name for difference in compare(run, reference, limits=FLOAT64).differences]
    assert names == ["step 0: c", "step 0: a", "step 1: b", "step 10: d"]


def test_a_tensor_on_one_side_only_is_a_difference() -> None:
    reference, run = record(), record()
    del run.optimizer_state["exp_avg of weight"]
    run.buffers["mean on rank 0"] = torch.zeros(1)
    words = [(d.name, d.words) for d in compare(run, reference, limits=FLOAT64).differences]
    assert words == [("exp_avg of weight", "only on one process"), ("mean on rank 0", "only on several ranks")]


def test_another_shape_or_dtype_is_a_difference() -> None:
    (found,) = compare(record(weight=shifted(0.0, dtype=torch.float32)), record(), limits=FLOAT64).differences
    assert found.words == "(3,) torch.float32 instead of (3,) torch.float64"


def test_nan_and_inf_are_equal_to_themselves_alone() -> None:
    nan, inf = float("nan"), float("inf")
    for value in (nan, inf, -inf):
        same = shifted(value)
        assert not compare(record(weight=same), record(weight=same), limits=FLOAT64).differences
    for mine, other in ((nan, 1.0), (1.0, nan), (inf, -inf), (inf, nan), (1.0, inf)):
        run, reference = record(weight=shifted(mine)), record(weight=shifted(other))
        assert compare(run, reference, limits=FLOAT64).differences, (mine, other)


def test_steps_from_gradients_of_zero_are_excepted_by_name() -> None:
    run, reference = record(gradient=1e-17, weight=shifted(1e-3)), record(gradient=-1e-17)
    report = compare(run, reference, limits=FLOAT64)
    assert not report.differences
    assert report.zero_gradients == {"weight": 2}
    assert "not compared after the step, as their true gradient is zero (elements): weight (2)" in str(report)


def test_nothing_is_excepted_where_it_need_not_be() -> None:
    assert not compare(record(gradient=1e-17), record(gradient=1e-17), limits=FLOAT64).zero_gradients


def test_an_element_with_a_gradient_is_not_excepted_beside_those_without() -> None:
    run, reference = record(gradient=1e-17, weight=shifted(1e-3, at=2)), record(gradient=1e-17)
    assert compare(run, reference, limits=FLOAT64).differences


def test_a_gradient_that_is_zero_in_one_step_only_is_none() -> None:
    run, reference = record(gradient=0.0, weight=shifted(1e-3)), record(gradient=0.0)
    for one in (run, reference):
        one.gradients["step 1: weight"] = torch.ones(3, dtype=torch.float64)
    assert compare(run, reference, limits=FLOAT64).differences


def test_sgd_has_no_exceptions() -> None:
    run = record(optimizer="SGD", gradient=1e-17, weight=shifted(1e-3))
    assert compare(run, record(optimizer="SGD", gradient=1e-17), limits=FLOAT64).differences


def test_limits_are_those_of_the_coarsest_dtype() -> None:
    wide, single, half = (record(dtype=dtype) for dtype in (torch.float64, torch.float32, torch.bfloat16))
    assert limits_for("64-true", wide) is FLOAT64
    assert limits_for("32-true", single) is FLOAT32
    assert limits_for("bf16-true", half) is SIXTEEN_BIT
    assert limits_for("16-mixed", single) is SIXTEEN_BIT
    # A loss that is computed in float32 inside a float64 module.
    assert limits_for("64-true", record(loss=torch.tensor(0.5, dtype=torch.float32))) is FLOAT32


def test_the_table_says_how_far_each_quantity_is_off_and_where() -> None:
    text = str(compare(record(weight=shifted(2.0**-43)), record(), limits=FLOAT64))
    assert any(line.split() == ["parameters", "1", "1.14e-13", "weight"] for line in text.splitlines())
    assert "allowed: 1e-12 + 0 * |one process|" in text


def test_a_long_list_of_differences_is_cut() -> None:
    reference, run = record(), record()
    for index in range(20):
        reference.parameters[f"p{index}"], run.parameters[f"p{index}"] = torch.zeros(1), torch.ones(1)
    assert "parameters: ... and 16 more" in str(compare(run, reference, limits=FLOAT64))


def test_the_error_is_an_assertion_error_with_the_report() -> None:
    report = compare(record(weight=shifted(0.5)), record(), limits=FLOAT64)
    error = ParityError(report, case="zero2 on 2 ranks")
    assert isinstance(error, AssertionError)
    assert error.report is report
    assert str(error).startswith("zero2 on 2 ranks does not train as one process does.\nquantity")
