"""Records of runs that never were, in the form in which monitors write them: fast, of any size, and the same each time."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

BEGUN = 1_790_000_000.0
SETTINGS = [
    ["world_size", 4, "Trainer(devices, num_nodes)"],
    ["mesh.pp", 2, "follows from world_size, zero and pipeline_parallel"],
    ["mesh.dp_shard", 2, "follows from world_size, zero and pipeline_parallel"],
    ["zero.stage", 1, "given to the strategy"],
    ["pipeline_parallel.size", 2, "given to the strategy"],
    ["precision.flag", "bf16-mixed", "command line: trainer.precision"],
    ["offload.optimizer", "cpu", "config.yaml: trainer.strategy.init_args.offload"],
    *[[f"setting.number_{number}", None, "default"] for number in range(24)],
]
ENVIRONMENT = [
    ["python", "3.11.7", ""],
    ["torch", "2.13.0", ""],
    ["lightning", "2.6.6", ""],
    ["meshbolt", "0.1.0", ""],
    ["system", "Linux-6.1-x86_64", ""],
    ["command", "train.py --trainer.devices 4 --trainer.max_steps 2000", ""],
]


class Writer:
    """Writes the file of a rank."""

    def __init__(self, directory: Path, rank: int, *, run: str = "1", begun: float = BEGUN) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.file = (directory / f"rank_{rank}.jsonl").open("a")
        self.rank, self.run, self.now = rank, run, begun

    def write(self, kind: str, step: int, values: Mapping[str, Any], **further: Any) -> None:
        head = {"kind": kind, "step": step, "time_seconds": self.now, "rank": self.rank, "run": self.run}
        self.file.write(json.dumps({**head, "values": values, **further}) + "\n")

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *_: Any) -> None:
        self.file.close()


def make_run(
    directory: Path,
    *,
    ranks: int = 4,
    steps: int = 2000,
    every: int = 10,
    first: int = 0,
    run: str = "1",
    begun: float = BEGUN,
    end: Mapping[str, Any] | None = None,
    start: Mapping[str, Any] | None = None,
) -> Path:
    """Write a run with everything in it; return its directory of records."""
    for rank in range(ranks):
        with Writer(directory, rank, run=run, begun=begun) as writer:
            _write_rank(writer, ranks, range(first + every, steps + 1, every), first, start, end)
    return directory


def _write_rank(
    writer: Writer, ranks: int, at: range, first: int, start: Mapping[str, Any] | None, end: Mapping[str, Any] | None
) -> None:
    rank, drawn = writer.rank, random.Random(writer.rank + 17 * first)
    if rank == 0:
        writer.write("run", first, {"what": "start"}, **{**_start(ranks, at.stop - 1), **(start or {})})
    host = {
        "host": f"node{rank // 2}",
        "device": "NVIDIA H100 80GB HBM3",
        "pid": 4000 + rank,
        "mesh": f"pp {rank // 2}",
    }
    writer.write("rank", first, host)
    for step in at:
        writer.now += 0.21 * at.step
        for kind, values, further in _of_step(rank, step, at.step, drawn):
            writer.write(kind, step, values, **further)
    if rank == 0:
        ended = end or {"status": "finished", "text": "max_steps=2000 reached"}
        trace = {"traceback": ended["traceback"]} if "traceback" in ended else {}
        writer.write("run", at[-1] if at else first, {"what": "end", **ended}, **trace)


def _start(ranks: int, steps: int) -> dict[str, Any]:
    return {
        "title": "ByteGPT",
        "strategy": "ZeRO-1, 2 stages on 2 ranks",
        "call": 'MeshStrategy(zero=1, pipeline_parallel=2, offload="cpu")',
        "world_size": ranks,
        "device": "cuda",
        "precision": "bf16-mixed",
        "mesh": {"pp": 2, "dp_shard": 2},
        "offloads": True,
        "max_steps": steps,
        "settings": SETTINGS,
        "environment": ENVIRONMENT,
    }


def _of_step(
    rank: int, step: int, every: int, drawn: random.Random
) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    noise = drawn.gauss(0, 1)
    if rank == 0:
        loss = 1.9 + 3.7 * math.exp(-step / 420) + 0.06 * noise + (1.4 if step == 1210 else 0)
        yield "metrics", {"train_loss": loss, "grad_norm": 0.8 + 0.3 * abs(noise), "lr": 3e-4 * min(step / 200, 1)}, {}
        if step % (20 * every) == 0:
            value = 2.0 + 3.6 * math.exp(-step / 400) + 0.02 * noise
            yield "metrics", {"val_loss": value, "val_accuracy": 0.7 - 0.6 * math.exp(-step / 500)}, {}
            yield "event", {"what": "checkpoint", "text": f"checkpoints/step={step}.ckpt was saved"}, {}
        if step == 1210:
            yield "event", {"what": "warning", "text": "The loss scale was halved: gradients were not finite."}, {}
    slow = 1.25 if rank == 3 and 900 < step < 1300 else 1.0
    step_seconds = 0.21 * slow + 0.004 * abs(noise)
    parts = {"compute": 0.62, "exposed_communication": 0.14, "optimizer": 0.08, "offload_wait": 0.05, "data_wait": 0.07}
    seconds = {f"throughput/{name}_seconds": share * step_seconds for name, share in parts.items()}
    throughput = {
        "throughput/tokens_per_second": 65536 / step_seconds,
        "throughput/samples_per_second": 64 / step_seconds,
        "throughput/step_seconds": step_seconds,
        "throughput/step_p50_seconds": step_seconds * 0.98,
        "throughput/step_p90_seconds": step_seconds * 1.1,
        "throughput/mfu": 0.41 / slow,
        **seconds,
        "throughput/other_seconds": 0.04 * step_seconds,
    }
    own = {
        "step_seconds": step_seconds,
        "compute_seconds": 0.62 * step_seconds,
        "data_wait_seconds": 0.07 * step_seconds,
    }
    yield "throughput", throughput, {"own": own, "steps": every}
    yield "memory", _memory(rank, step, noise), {}
    rows = [
        {
            "axis": "dp_shard",
            "collective": "all_gather",
            "calls": 12,
            "bytes": 3e8,
            "seconds": 0.011,
            "exposed_seconds": 0.002,
        },
        {
            "axis": "dp_shard",
            "collective": "reduce_scatter",
            "calls": 12,
            "bytes": 3e8,
            "seconds": 0.014,
            "exposed_seconds": 0.006,
        },
        {"axis": "pp", "collective": "send", "calls": 64, "bytes": 5e7, "seconds": None, "exposed_seconds": None},
    ]
    yield "communication", {}, {"rows": [{**row, "ceiling_bytes_per_second": 4.2e10} for row in rows]}
    moved = {"to_host": 1.1e9, "to_device": 0.6e9}
    yield (
        "offload",
        {
            **{f"offload/state_{way}_bytes": size for way, size in moved.items()},
            **{f"offload/state_{way}_bytes_per_second": size * 18 + 1e8 * noise for way, size in moved.items()},
            "offload/updated_bytes_per_second": 2.1e10 + 1e9 * noise,
            "offload/busy_seconds": 0.09,
            "offload/not_hidden_seconds": 0.011 + 0.002 * abs(noise),
            "offload/hidden_fraction": 0.88,
        },
        {"steps": every},
    )
    if rank < 2:
        own = [0.15, 0.151, 0.149, 0.19 if 900 < step < 1300 else 0.15]
        values = {"ranks/slowest_rank": own.index(max(own)), "ranks/slowest_part": "compute"}
        yield "ranks", {**values, "ranks/behind_seconds": max(own) - 0.15}, {"own_seconds": own}
    if step == 30 and rank == 0:
        yield "pipeline", {}, made_up_pipeline()


def _memory(rank: int, step: int, noise: float) -> dict[str, Any]:
    gib = 2**30
    first = rank < 2
    return {
        "memory/parameters_bytes": (7.5 if first else 6.1) * gib,
        "memory/gradients_bytes": (3.7 if first else 3.0) * gib,
        "memory/optimizer_bytes": 2.2 * gib,
        "memory/gathered_bytes": 4.0 * gib,
        "memory/activations_bytes": (21 if first else 12) * gib + 0.4 * gib * noise,
        "memory/other_bytes": 1.4 * gib + 0.0004 * gib * step,
        "memory/peak_bytes": (46 if first else 34) * gib + 0.0004 * gib * step,
        "memory/limit_bytes": 79.1 * gib,
    }


def made_up_pipeline(*, ranks: int = 2, microbatches: int = 8) -> dict[str, Any]:
    """A step of a pipeline as records have it: filling and draining, with waits."""
    spans: list[list[Any]] = []
    for rank in range(ranks):
        now = 0.006 * rank
        for number in range(microbatches):
            spans.append([rank, rank, number, "F", now, now + 0.0055])
            now += 0.006
        now = max(now, 0.006 * (microbatches + ranks - 1)) + 0.011 * (ranks - 1 - rank)
        for number in range(microbatches):
            spans.append([rank, rank, number, "B", now, now + 0.0105])
            now += 0.011
    end = max(span[5] for span in spans)
    bubble = 1 - sum(span[5] - span[4] for span in spans) / (ranks * end)
    planned = [[*span[:4], span[4] * 0.94, span[5] * 0.94] for span in spans]
    return {
        "schedule": "gpipe",
        "stages": ranks,
        "microbatches": microbatches,
        "timelines": [
            {"name": "measured", "end_seconds": end, "bubble": bubble, "spans": spans},
            {"name": "by the schedule", "end_seconds": end * 0.94, "bubble": bubble, "spans": planned},
        ],
    }
