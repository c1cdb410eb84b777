"""How fast a run goes, and where its time goes: names, and the arithmetic from steps of ranks to numbers of the run.

Each rank adds up its steps since the last log; one sum over all ranks makes the run's numbers of these. Ranks that share a batch
(those of one tensor-parallel group, and of one pipeline) each count their part of it, so that nothing is counted twice.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from meshbolt.monitoring.flops import Flops
from meshbolt.monitoring.metric import Metric
from meshbolt.monitoring.records import Value

_MEAN = "mean over ranks, and over the steps since the last log"
METRICS = (
    Metric(
        "throughput/samples_per_second",
        "samples/s",
        "Samples that all ranks together train on in a second; ranks that share a batch count it once.",
        "sum over data-parallel ranks of samples / time, of the steps since the last log",
    ),
    Metric(
        "throughput/tokens_per_second",
        "tokens/s",
        "Tokens that all ranks together train on in a second, with padding, unless `tokens=` says otherwise.",
        "sum over data-parallel ranks of tokens / time, of the steps since the last log",
    ),
    Metric(
        "throughput/device_tokens_per_second",
        "tokens/s",
        "The same for one device, to compare with other numbers of them.",
        "throughput/tokens_per_second / ranks",
    ),
    Metric(
        "throughput/step_seconds",
        "seconds",
        "Time of a step, with all its batches and updates and their loading, without validation.",
        f"from the end of the step before to its own end, less validation; {_MEAN}",
    ),
    Metric(
        "throughput/step_p50_seconds",
        "seconds",
        "The step time that half of the steps do not exceed.",
        "50th percentile of this rank's last `window` steps; in loggers, of rank 0's",
    ),
    Metric(
        "throughput/step_p90_seconds",
        "seconds",
        "The step time that nine of ten steps do not exceed.",
        "90th percentile of the same steps",
    ),
    Metric(
        "throughput/step_max_seconds",
        "seconds",
        "The longest of these steps.",
        "maximum of the same steps",
    ),
    Metric(
        "throughput/data_wait_seconds",
        "seconds",
        "Part of a step: the next batch was not there yet, or on its way to the device.",
        f"time in the loader and in the transfer - what it waited for other ranks; {_MEAN}",
    ),
    Metric(
        "throughput/compute_seconds",
        "seconds",
        "Part of a step: forward and backward passes, while they computed.",
        f"time of the passes - what they waited for other ranks or for offloaded parameters; {_MEAN}",
    ),
    Metric(
        "throughput/forward_seconds",
        "seconds",
        "Time of the forward passes with what they wait for; under a pipeline nobody can tell it from the backward's.",
        f"from the batch's start, or an update under manual optimisation, to before_backward or the batch's end; {_MEAN}",
    ),
    Metric(
        "throughput/backward_seconds",
        "seconds",
        "Time of the backward passes with what they wait for; see forward.",
        f"from before_backward to after_backward; {_MEAN}",
    ),
    Metric(
        "throughput/exposed_communication_seconds",
        "seconds",
        "Part of a step: computation waited for other ranks, for what they send or for them to come.",
        "time in waits for collectives and messages; on a GPU what its stream waited for others, in one step of each interval; "
        "mean over ranks",
    ),
    Metric(
        "throughput/optimizer_seconds",
        "seconds",
        "Part of a step: clipping and the updates of all optimizers, while they computed.",
        "from before_optimizer_step to the batch's end, or that of the update under manual optimisation - what it waited for "
        f"ranks or offloading; {_MEAN}",
    ),
    Metric(
        "throughput/offload_wait_seconds",
        "seconds",
        "Part of a step: it waited for offloaded updates or parameters, which other work did not hide.",
        f"time in these waits; {_MEAN}",
    ),
    Metric(
        "throughput/other_seconds",
        "seconds",
        "Part of a step: what is left, such as callbacks, logging and checkpoints.",
        "step - data wait - compute - exposed communication - optimizer - offload wait",
    ),
    Metric(
        "throughput/step_teraflop",
        "teraflop",
        "Floating-point operations that the model needs for a step, of all ranks; attention counted whole.",
        "traced operations of the batches' forward and backward passes, without recomputation",
    ),
    Metric(
        "throughput/total_teraflops_per_second",
        "TFLOP/s",
        "The model's floating-point operations in a second, of all ranks.",
        "sum over ranks of model FLOPs / time, of the steps since the last log",
    ),
    Metric(
        "throughput/device_teraflops_per_second",
        "TFLOP/s",
        "The same for one device.",
        "throughput/total_teraflops_per_second / ranks",
    ),
    Metric(
        "throughput/mfu",
        "fraction",
        "Model FLOPs utilisation: the part of the devices' peak that the model's operations took; attention counted whole.",
        "model FLOPs per second of all ranks / sum of their peaks",
    ),
    Metric(
        "throughput/mfu_causal",
        "fraction",
        "The same with half of each attention that is called with is_causal=True, as other publications count.",
        "model FLOPs per second of all ranks, with causal attention halved / sum of their peaks",
    ),
    Metric(
        "throughput/hfu",
        "fraction",
        "Hardware FLOPs utilisation: likewise with what is computed again, by recomputation and by fused attention.",
        "FLOPs done per second of all ranks / sum of their peaks",
    ),
    Metric(
        "throughput/peak_teraflops_per_second",
        "TFLOP/s",
        "The peak of one device that these fractions are of: dense, in the dtype of the run.",
        "`peak_flops=`, or from the table in meshbolt.monitoring.peaks; mean over ranks",
    ),
    Metric(
        "throughput/peak_source",
        "text",
        "Where that peak is from.",
        "the device, the dtype, and the publication",
    ),
)


@dataclass(frozen=True, kw_only=True)
class StepFigures:
    """A step of one rank.

    Attributes:
        seconds: it took.
        fetch_seconds: of these, in getting batches, and so on for the others; all with what they waited for.
        exposed_seconds: by the phase that waited; None where nobody has watched.
        offload_forward_seconds: that passes waited for offloaded parameters.
        offload_step_seconds: that the step waited for offloaded updates.
        samples: of the batches; None where that is not known.
        tokens: likewise.
        flops: likewise.
    """

    seconds: float
    fetch_seconds: float = 0.0
    forward_seconds: float = 0.0
    backward_seconds: float = 0.0
    optimizer_seconds: float = 0.0
    exposed_seconds: Mapping[str, float] | None = None
    offload_forward_seconds: float = 0.0
    offload_step_seconds: float = 0.0
    samples: int | None = None
    tokens: int | None = None
    flops: Flops | None = None


_COUNTS = ("samples", "tokens", "model", "model_causal", "hardware")
_TIMES = (
    "step_seconds",
    "data_wait_seconds",
    "forward_seconds",
    "backward_seconds",
    "compute_seconds",
    "optimizer_seconds",
    "offload_wait_seconds",
    "exposed_seconds",
)
_KNOWN = ("knows_samples", "knows_tokens", "knows_flops", "knows_peak", "knows_exposed")
SUMMED = (*_COUNTS, *_TIMES, *_KNOWN, "peak", "flop_per_step", "reports")


def of_rank(steps: Sequence[StepFigures], *, sharing: int, peak_flops: float | None) -> dict[str, float]:
    """Return what a rank adds to the sum over all: rates of its part of the batches, and mean times.

    Args:
        steps: since the last log; of a rank without any, none of the others' numbers depend on it.
        sharing: ranks that have the same batches.
        peak_flops: of its device, per second; None where that is not known.

    Returns:
        By the names in `SUMMED`.
    """
    if not steps:
        return dict.fromkeys(SUMMED, 0.0)
    seconds = sum(step.seconds for step in steps)
    flops = [step.flops for step in steps if step.flops is not None]
    total = sum(flops, Flops())
    counts = {
        "samples": float(sum(step.samples or 0 for step in steps)),
        "tokens": float(sum(step.tokens or 0 for step in steps)),
        "model": total.model,
        "model_causal": total.model_causal,
        "hardware": total.hardware,
    }
    known = {
        "knows_samples": all(step.samples is not None for step in steps),
        "knows_tokens": all(step.tokens is not None for step in steps),
        "knows_flops": len(flops) == len(steps) and total.model > 0,
        "knows_peak": peak_flops is not None,
        "knows_exposed": any(step.exposed_seconds is not None for step in steps),
    }
    return {
        **{name: count / seconds / sharing for name, count in counts.items()},
        **_mean_times(steps),
        **{name: float(is_known) for name, is_known in known.items()},
        "peak": peak_flops or 0.0,
        "flop_per_step": total.model / len(steps) / sharing,
        "reports": 1.0,
    }


def _mean_times(steps: Sequence[StepFigures]) -> dict[str, float]:
    watched = [step.exposed_seconds for step in steps if step.exposed_seconds is not None]

    def exposed(*phases: str) -> float:
        return _mean([sum(each.get(phase, 0.0) for phase in phases) for each in watched])

    passes = _mean([step.forward_seconds + step.backward_seconds - step.offload_forward_seconds for step in steps])
    optimizer = _mean([step.optimizer_seconds - step.offload_step_seconds for step in steps])
    return {
        "step_seconds": _mean([step.seconds for step in steps]),
        "data_wait_seconds": max(0.0, _mean([step.fetch_seconds for step in steps]) - exposed("fetch")),
        "forward_seconds": _mean([step.forward_seconds for step in steps]),
        "backward_seconds": _mean([step.backward_seconds for step in steps]),
        "compute_seconds": max(0.0, passes - exposed("forward", "backward")),
        "optimizer_seconds": max(0.0, optimizer - exposed("optimizer")),
        "offload_wait_seconds": _mean([step.offload_forward_seconds + step.offload_step_seconds for step in steps]),
        "exposed_seconds": _mean([sum(each.values()) for each in watched]),
    }


def of_run(sums: Mapping[str, float], *, ranks: int, tells_passes_apart: bool) -> dict[str, Value]:
    """Return the run's numbers.

    Args:
        sums: over all ranks, of what `of_rank` has returned.
        ranks: how many.
        tells_passes_apart: the forward's time from the backward's.

    Returns:
        By name in the catalogue; None for what is not known.
    """
    reports = sums["reports"]
    if not reports:
        return {}

    def known(what: str, number: float) -> float | None:
        return number if sums[f"knows_{what}"] >= reports else None

    times = {name: sums[name] / reports for name in _TIMES}
    rates = {name: sums[name] * ranks / reports for name in (*_COUNTS, "flop_per_step")}
    parts = ("data_wait_seconds", "compute_seconds", "exposed_seconds", "optimizer_seconds", "offload_wait_seconds")
    peak = sums["peak"] * ranks / reports

    def fraction(flops: float) -> float | None:
        return known("flops", flops / peak) if flops and sums["knows_peak"] >= reports else None

    values: dict[str, Value] = {
        "samples_per_second": known("samples", rates["samples"]),
        "tokens_per_second": known("tokens", rates["tokens"]),
        "device_tokens_per_second": known("tokens", rates["tokens"] / ranks),
        "step_seconds": times["step_seconds"],
        "data_wait_seconds": times["data_wait_seconds"],
        "compute_seconds": times["compute_seconds"],
        "forward_seconds": times["forward_seconds"] if tells_passes_apart else None,
        "backward_seconds": times["backward_seconds"] if tells_passes_apart else None,
        "exposed_communication_seconds": known("exposed", times["exposed_seconds"]),
        "optimizer_seconds": times["optimizer_seconds"],
        "offload_wait_seconds": times["offload_wait_seconds"],
        "other_seconds": max(0.0, times["step_seconds"] - sum(times[part] for part in parts)),
        "step_teraflop": known("flops", rates["flop_per_step"] / 1e12),
        "total_teraflops_per_second": known("flops", rates["model"] / 1e12),
        "device_teraflops_per_second": known("flops", rates["model"] / ranks / 1e12),
        "peak_teraflops_per_second": known("peak", peak / ranks / 1e12),
        "mfu": fraction(rates["model"]),
        "mfu_causal": fraction(rates["model_causal"]),
        "hfu": fraction(rates["hardware"]),
    }
    return {f"throughput/{name}": value for name, value in values.items()}


def percentiles(seconds: Sequence[float]) -> dict[str, Value]:
    """Return the percentiles of step times, by name in the catalogue.

    Args:
        seconds: of the last steps, at least one.
    """
    ordered = sorted(seconds)
    named = {"step_p50_seconds": 0.5, "step_p90_seconds": 0.9, "step_max_seconds": 1.0}
    return {f"throughput/{name}": ordered[math.ceil(part * len(ordered)) - 1] for name, part in named.items()}


def _mean(numbers: Sequence[float]) -> float:
    return sum(numbers) / len(numbers) if numbers else 0.0
