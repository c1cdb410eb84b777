"""The page of all metrics, generated from the catalogue: `python -m tests.unit.monitoring.page` writes it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from meshbolt.monitoring import Metric
from meshbolt.monitoring.catalogue import KINDS
from meshbolt.monitoring.peaks import DEVICES

DOCUMENT = Path(__file__).parents[3] / "docs" / "metrics.md"

HEAD = """\
# Metrics

Everything that meshbolt's monitors log, by name, unit and formula. This page is generated from `meshbolt.monitoring.CATALOGUE`;
what is not in it is not logged.

Monitors are callbacks of the Trainer: `Trainer(callbacks=[ThroughputMonitor()])`, from `meshbolt.callbacks`. Each logs every
`every=` steps, 10 by default, to whatever loggers the Trainer has, or none (`logger=False`), and always to records of its own:
`meshbolt_records/rank_<rank>.jsonl` in the logger's directory of the run, else in `default_root_dir`, or where `directory=`
says. A line is a JSON object:

```json
{"kind": "throughput", "step": 20, "time_seconds": 1764187200.5, "rank": 0, "run": "17641871", "values": {"throughput/mfu": 0.41}}
```

`meshbolt.monitoring.read_records(directory)` yields the lines of all ranks in the order of their time, and `latest_run` keeps
those of the last run in a directory. A value that is not known is null; numbers that JSON does not have are the texts "nan",
"inf" and "-inf". If the module logs a metric of the same name, loggers get the module's, and that is said once.

A **step** is the batches from one update of parameters to the next. With `accumulate_grad_batches` it is a window. Under manual
optimisation it ends with a batch in which an optimizer has stepped, however often and however many of them: a batch of a GAN,
with an update of each of its two networks, is one step, and so are four batches of which the last one updates. `every=`, all
that is "of a step", and `steps` in a record count these. `step` in a record is Lightning's `global_step` at the end of that step,
which counts each update by each optimizer, as `max_steps` and names of checkpoints do: it grows by two in a step of that GAN.

What is brought together from all ranks takes one small sum over them, in the background, for each step that is logged, whichever
monitors log it: of some twenty numbers, and five for each rank. A logger hears of all monitors' numbers of a step in one call
(one row of a CSV file), when the sum is there.
"""

ABOUT = {
    "throughput": """\
Logged by `ThroughputMonitor`, first after the third step: the first step, which allocates and compiles, is in no number. All
values but percentiles are of the whole run and the same on every rank; `own` beside them has this rank's times. Ranks that
share a batch (by `tensor_parallel` or `pipeline_parallel`) count it once, and validation is not in a step.

On a GPU times are events in its stream, read one step later or when they are there: nothing waits for the device. What other
work hides does not count as waiting: `data_wait_seconds` is time in which the stream was idle while a batch was not there, or
copied it, and `exposed_communication_seconds` what the stream waited for others, taken in one step for each log.

**Floating-point operations** are traced on your own `training_step`, forwards and backwards, on tensors without values, once for
each form of batch (shapes and dtypes), as if one process ran it whole: so that they are the same under every plan. A
multiplication and an addition are two. Matrix products, convolutions and attention count, and nothing else. *Model* FLOPs
(MFU) are what the mathematics needs, whatever is recomputed; *hardware* FLOPs (HFU) have recomputation, and the scores that
fused attention computes again for its backward pass.

**Two conventions for attention** are in use, and both are logged. `mfu` counts all pairs of positions, as torchtitan and most
papers do; `mfu_causal` counts half of them where attention is called with `is_causal=True`, as Megatron does. Attention that is
causal by a mask, or runs as plain products (written out, or on a CPU with dropout), counts whole in both.

Not traced are steps that read values of parameters or losses (`.item()`, branches on them), communicate by themselves, or
optimize manually: that is said once, and training goes on. Give the operations of a batch then: `flops=lambda batch: ...`.

**The peak** is of dense matrix products in the dtype of the run (float32 counts as tfloat32 where torch may use it), by the name
of the device. There is no guess: for a device that is not in the [table](#peaks), give `peak_flops=`; without it no utilisation
is logged.
""",
    "memory": """\
Logged by `MemoryMonitor`, by each rank of itself; `least`, `mean` and `most` compare the ranks, and are logged by rank 0 when
all have told. Parameters, gradients, state, gathered parameters and buffers are counted by their storages, to the byte.
Activations and the rest are the difference to what is in use: what torch's allocator has on a GPU, the anonymous memory of the
process on a CPU, which is Python's and its libraries' too. A tier is named in front of what lies elsewhere: `host_`, of a run on
GPUs, and `file_`.

On a CPU a process keeps much of what it has freed, so that `used_bytes`, `other_bytes` and peaks show what it takes of the
machine, not what it needs, and a step's peak may be little more than what is in use after it. Activations are what the C library
says is allocated (glibc from 2.33 on): exact but for some KiB after the first step, which sets up libraries. Without it (musl,
macOS, jemalloc or tcmalloc in its place, or a heap in so many pieces that asking takes more than 2 ms) they are what the process
has grown by since it was smallest: an upper bound, and for small models much too high.

The peak begins anew in each step, and is read at the end of its phases (`between` two steps, `forward`, `backward`, `optimizer`);
under `pipeline_parallel` all passes are in `forward`. Nothing is waited for.

On demand, `monitor.snapshot()` writes `memory_rank_<rank>_step_<step>.json` beside the records: bytes by module and category;
on GPUs also what the allocator holds, for https://pytorch.org/memory_viz. [What a rank says](memory.md) that runs out of memory.
""",
    "ranks": """\
Logged by `RankMonitor`, the same on every rank; `own_seconds` and `data_seconds` beside them are of each rank, in their order.
[watchdog.md](watchdog.md#ranks-that-are-slow) says what a rank's own time is, and when a warning names one.
""",
    "offload": """\
Logged by `OffloadMonitor`, by each rank of itself: see [offload.md](offload.md#what-it-costs-while-it-runs). Bytes of a step are
what updates have taken and put, the same in every step; bytes per second are of what was on its way meanwhile.
""",
    "communication": """\
Logged by `CommunicationMonitor`: of this rank, per step, without validation; loggers get rank 0's. `rows` beside them is a
table of what came since the last log (`steps` of them): for each axis of the mesh and collective its calls, `bytes` of
the larger side (what a gather returns, what a scatter is given, else what is sent), `seconds` from the call to the end of the
wait for it, `exposed_seconds` of these in the wait, `bytes_per_second`, and `ceiling_bytes_per_second`: what the same collective
had over this axis with nothing beside it, measured before the first step (`ceiling=False` leaves that out). What is hidden behind
computation takes up to its wait, so that its bytes per second are a lower bound.

An axis that all ranks stand along also has what the Trainer, meshbolt and other monitors tell each other; groups that are no
axis are `other`. On CPUs (gloo) ZeRO's reduce-scatters run as `all_to_all` and are listed so; of two ranks each sends only the
other's half. Under NCCL no rank waits but its device: calls and bytes are counted, times are not. There `seconds`,
`exposed_seconds` and `bytes_per_second` of rows, and `_exposed_seconds` of axes, are null; what the device waits for all of them
together is `throughput/exposed_communication_seconds`.
""",
}


def page() -> str:
    """Return the page as it should be."""
    parts = [HEAD]
    for metrics in KINDS:
        kind = metrics[0].kind
        parts += [f"## {kind.capitalize()}\n", *([ABOUT[kind]] if kind in ABOUT else []), _metrics(metrics)]
    return "\n".join([*parts, "## Peaks\n", _peaks()])


def _metrics(metrics: Sequence[Metric]) -> str:
    rows = ([f"`{each.name}`", each.unit, each.meaning, each.formula] for each in metrics)
    return _table(["name", "unit", "what it means", "formula"], rows)


def _peaks() -> str:
    dtypes = ("float64", "float32", "tfloat32", "float16", "bfloat16")
    rows = (
        [f"`{each.names}`", *(f"{each.teraflops[d]:g}" if d in each.teraflops else "" for d in dtypes), each.source]
        for each in DEVICES
    )
    return (
        "TFLOP/s of dense matrix products, by the name that the driver gives (a regular expression for all of it).\n\n"
        + _table(["device", *dtypes, "source"], rows)
    )


def _table(head: Sequence[str], rows: Iterator[list[str]]) -> str:
    lines = [list(head), ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines)


if __name__ == "__main__":
    DOCUMENT.write_text(page(), encoding="utf-8")
