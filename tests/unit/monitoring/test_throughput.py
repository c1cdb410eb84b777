from __future__ import annotations

from typing import Any

import pytest

from meshbolt.monitoring import CATALOGUE
from meshbolt.monitoring.flops import Flops
from meshbolt.monitoring.throughput import METRICS, SUMMED, StepFigures, of_rank, of_run, percentiles

FLOPS = Flops(model=8e12, model_causal=6e12, hardware=10e12)


def step(seconds: float = 2.0, **more: Any) -> StepFigures:
    given: dict[str, Any] = {"samples": 4, "tokens": 40, "flops": FLOPS, "exposed_seconds": {}}
    return StepFigures(seconds=seconds, **given | more)


def run(*ranks: list[StepFigures], sharing: int = 1, peak: float | None = 8e12, apart: bool = True) -> dict[str, Any]:
    parts = [of_rank(steps, sharing=sharing, peak_flops=peak) for steps in ranks]
    sums = {name: sum(part[name] for part in parts) for name in SUMMED}
    values = of_run(sums, ranks=len(ranks), tells_passes_apart=apart)
    return {name.partition("/")[2]: value for name, value in values.items()}


def test_rates_are_of_all_ranks_and_each_step_counts_once() -> None:
    values = run([step(1.0), step(3.0)], [step(2.0), step(2.0)])
    assert values["samples_per_second"] == 2 * 8 / 4
    assert values["tokens_per_second"] == 2 * 80 / 4
    assert values["device_tokens_per_second"] == 80 / 4
    assert values["step_seconds"] == 2.0
    assert values["step_teraflop"] == 16.0
    assert values["total_teraflops_per_second"] == 8.0
    assert values["device_teraflops_per_second"] == 4.0
    assert (values["mfu"], values["mfu_causal"], values["hfu"]) == (0.5, 0.375, 0.625)
    assert values["peak_teraflops_per_second"] == 8.0


def test_ranks_that_share_a_batch_count_it_once() -> None:
    values = run([step()], [step()], sharing=2)
    assert values["samples_per_second"] == 2.0
    assert values["step_teraflop"] == 8.0
    assert values["mfu"] == 0.25


def test_parts_add_up_to_the_step() -> None:
    waits = {"forward": 0.1, "backward": 0.2, "optimizer": 0.05, "fetch": 0.06, "between": 0.01}
    values = run(
        [
            step(
                fetch_seconds=0.2,
                forward_seconds=0.5,
                backward_seconds=0.7,
                optimizer_seconds=0.3,
                exposed_seconds=waits,
                offload_forward_seconds=0.04,
                offload_step_seconds=0.1,
            )
        ]
    )
    assert values["exposed_communication_seconds"] == pytest.approx(0.42)
    assert values["data_wait_seconds"] == pytest.approx(0.14)
    assert values["compute_seconds"] == pytest.approx(1.2 - 0.3 - 0.04)
    assert values["optimizer_seconds"] == pytest.approx(0.3 - 0.1 - 0.05)
    assert values["offload_wait_seconds"] == pytest.approx(0.14)
    assert values["other_seconds"] == pytest.approx(2.0 - 0.2 - 1.2 - 0.3 - 0.01)
    parts = ("data_wait", "compute", "exposed_communication", "optimizer", "offload_wait", "other")
    assert sum(values[f"{part}_seconds"] for part in parts) == pytest.approx(values["step_seconds"])


@pytest.mark.parametrize(
    ("missing", "unknown"),
    [
        ({"samples": None}, ["samples_per_second"]),
        ({"tokens": None}, ["tokens_per_second", "device_tokens_per_second"]),
        ({"flops": None}, ["step_teraflop", "device_teraflops_per_second", "mfu", "mfu_causal", "hfu"]),
        ({"exposed_seconds": None}, ["exposed_communication_seconds"]),
    ],
)
def test_what_one_rank_does_not_know_is_not_known(missing: dict[str, None], unknown: list[str]) -> None:
    values = run([step()], [step(**missing)])
    assert all(values[name] is None for name in unknown)
    assert values["step_seconds"] == 2.0


def test_without_a_peak_there_is_no_fraction() -> None:
    values = run([step()], peak=None)
    assert [values[name] for name in ("mfu", "mfu_causal", "hfu", "peak_teraflops_per_second")] == [None] * 4
    assert values["device_teraflops_per_second"] == 4.0


def test_operations_that_the_user_gives_make_no_other_fraction() -> None:
    values = run([step(flops=Flops(model=8e12))])
    assert (values["mfu"], values["mfu_causal"], values["hfu"]) == (0.5, None, None)


def test_under_a_pipeline_passes_are_not_told_apart() -> None:
    values = run([step(forward_seconds=1.0)], apart=False)
    assert (values["forward_seconds"], values["backward_seconds"], values["compute_seconds"]) == (None, None, 1.0)


def test_a_rank_that_has_read_nothing_yet_changes_no_number() -> None:
    assert run([step()], []) == run([step()], [step()])
    assert run([], []) == {}


def test_percentiles_are_steps_that_were_taken() -> None:
    values = percentiles([0.3, 0.1, 0.2, 1.0, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9])
    assert list(values.values()) == [0.5, 0.9, 1.0]
    assert set(percentiles([1.0]).values()) == {1.0}


def test_all_numbers_are_in_the_catalogue_and_no_other() -> None:
    logged = {
        *of_run(of_rank([step()], sharing=1, peak_flops=1.0), ranks=1, tells_passes_apart=True),
        *percentiles([1.0]),
    }
    assert logged | {"throughput/peak_source"} == {metric.name for metric in METRICS}
    assert logged <= CATALOGUE.keys()
