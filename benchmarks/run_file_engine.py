"""Bandwidth of the file that offloaded state lies in, beside fio or dd; and how well updates hide behind it.

    python benchmarks/run_file_engine.py --folder /path/on/the/disk --gib 1 --rounds 5

In every round, one after the other on one file each of the same size, at the same block size and with direct I/O:

- `write`, `read`, `both`: our engine writes all of its file, reads all of it, and reads one half while it writes the other,
  from and to two buffers of 64 MiB for each direction;
- the same by fio: with as many threads as ours (psync), and by io_uring at the same depth, each from small buffers of its own;
  where there is no fio, by dd, which has one block under way;
- `stream`: a pass that reads, updates and writes all of our file, for updates of several durations: `sleep` waits and computes
  nothing, `busy` multiplies the chunk as often as takes that long in memory, which is timed before and by itself.

It prints a JSON line for each round, then the medians over rounds of ours over the fastest other, by direction, and for each
update of pass seconds over max(bytes / bandwidth of `both`, update seconds), where the bandwidth is the best one measured in that
round, by us or the others. `--timeline` prints what was under way when, in one more pass.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")

import torch

from meshbolt.offload import ChunkStream, Request, StateFile, StreamReport, aligned_empty

MIB, GIB = 2**20, 2**30
CHUNK_BYTES = 64 * MIB
DIRECTIONS = ("write", "read", "both")


class Ours:
    """Our engine, with a file of its own."""

    def __init__(self, folder: Path, num_bytes: int, block_bytes: int, threads: int, engine: str) -> None:
        self.file = StateFile(
            folder, num_bytes, name="benchmark", block_bytes=block_bytes, threads=threads, engine=engine
        )
        self.stream = ChunkStream(self.file, chunk_bytes=CHUNK_BYTES)
        self.chunks = self.stream.chunks(num_bytes)
        self.buffers = [aligned_empty(CHUNK_BYTES).fill_(1) for _ in range(4)]
        self.run("write")  # the first write to reserved space is another thing

    def run(self, direction: str) -> float:
        """Move all bytes of the file once; return the bytes per second."""
        half = len(self.chunks) // 2
        lanes: list[tuple[Callable[..., Request], Sequence[Any], list[torch.Tensor]]] = {
            "write": [(self.file.write, self.chunks, self.buffers)],
            "read": [(self.file.read, self.chunks, self.buffers)],
            "both": [
                (self.file.read, self.chunks[:half], self.buffers[:2]),
                (self.file.write, self.chunks[half:], self.buffers[2:]),
            ],
        }[direction]
        start = time.perf_counter()
        under_way: list[list[Request]] = [[] for _ in lanes]
        for number in range(max(len(chunks) for _, chunks, _ in lanes)):
            for (begin, chunks, buffers), requests in zip(lanes, under_way, strict=True):
                if number < len(chunks):
                    if len(requests) == len(buffers):
                        requests.pop(0).wait()
                    chunk = chunks[number]
                    requests.append(begin(buffers[number % len(buffers)][: chunk.num_bytes], chunk.offset))
        for request in itertools.chain.from_iterable(under_way):
            request.wait()
        return sum(chunk.num_bytes for chunk in self.chunks) / (time.perf_counter() - start)


class Fio:
    """fio, by one of its engines."""

    def __init__(self, program: str, path: Path, num_bytes: int, block_bytes: int, depth: int, engine: str) -> None:
        self.program, self.path, self.num_bytes, self.engine = program, path, num_bytes, engine
        self.block_bytes, self.depth = block_bytes, depth
        if not path.exists():
            self.run("write")

    def run(self, direction: str) -> float:
        """Move as many bytes; return the bytes per second of its own clock."""
        common = [
            f"--filename={self.path}",
            "--direct=1",
            f"--bs={self.block_bytes}",
            f"--ioengine={self.engine}",
            "--fallocate=posix",
            "--output-format=json",
            "--thread",
            "--invalidate=0",
            "--group_reporting",
        ]
        half = self.num_bytes // 2
        jobs = {
            "write": [("write", 0, self.num_bytes)],
            "read": [("read", 0, self.num_bytes)],
            "both": [("read", 0, half), ("write", half, half)],
        }[direction]
        words = [word for name, start, size in jobs for word in self._job(name, start, size, len(jobs))]
        result = subprocess.run([self.program, *common, *words], check=True, capture_output=True, text=True)
        found = json.loads(result.stdout)["jobs"]
        runtime = max(float(job[way]["runtime"]) for job in found for way in ("read", "write"))
        moved = sum(job[way]["io_bytes"] for job in found for way in ("read", "write"))
        return moved / (runtime / 1000)

    def _job(self, direction: str, start: int, size: int, jobs: int) -> list[str]:
        depth = max(1, self.depth // jobs)
        if self.engine != "psync":
            return [
                f"--name={direction}",
                f"--rw={direction}",
                f"--offset={start}",
                f"--size={size}",
                f"--iodepth={depth}",
            ]
        # Each of its threads has a part of the range to itself.
        part = size // depth
        return [
            word
            for number in range(depth)
            for word in (
                f"--name={direction}{number}",
                f"--rw={direction}",
                f"--offset={start + number * part}",
                f"--size={part}",
            )
        ]


class Dd:
    """dd with direct I/O, one block at a time; no reading and writing together."""

    def __init__(self, path: Path, num_bytes: int, block_bytes: int) -> None:
        self.path, self.num_bytes, self.block_bytes = path, num_bytes, block_bytes
        self.run("write")

    def run(self, direction: str) -> float:
        """Move as many bytes; return the bytes per second, the start of the program among them."""
        common = [
            "dd",
            f"bs={self.block_bytes}",
            f"count={self.num_bytes // self.block_bytes}",
            "conv=notrunc",
            "status=none",
        ]
        ways = {
            "write": [["if=/dev/zero", f"of={self.path}", "oflag=direct"]],
            "read": [[f"if={self.path}", "of=/dev/null", "iflag=direct"]],
        }.get(direction)
        if ways is None:
            return 0.0
        start = time.perf_counter()
        for way in ways:
            subprocess.run([*common, *way], check=True)
        return self.num_bytes / (time.perf_counter() - start)


def busy(chunk: torch.Tensor, times: int) -> None:
    """Compute on a chunk, its bytes as they were in the end."""
    values = chunk.view(torch.int32)
    for _ in range(times):
        values.add_(1)


def updates(
    ours: Ours, kind: str, seconds: float, step_seconds: float
) -> tuple[Callable[[int, torch.Tensor], None], float]:
    """Return an update that takes about so long, and how long one for each chunk takes in memory."""
    if kind == "sleep":
        return lambda number, chunk: time.sleep(seconds), seconds * len(ours.chunks)
    times = max(1, round(seconds / step_seconds))
    start = time.perf_counter()
    for number, _ in enumerate(ours.chunks):
        busy(ours.buffers[number % len(ours.buffers)], times)
    return lambda number, chunk: busy(chunk, times), time.perf_counter() - start


def measure_streams(ours: Ours, bandwidth: float, parts: Sequence[float]) -> dict[str, float]:
    """Return seconds of a pass over its bound, by kind and duration of the update."""
    start = time.perf_counter()
    busy(ours.buffers[0], 3)
    step_seconds = (time.perf_counter() - start) / 3
    total = sum(chunk.num_bytes for chunk in ours.chunks)
    transfer_seconds = 2 * total / bandwidth
    found = {}
    for kind in ("sleep", "busy"):
        for part in parts:
            update, update_seconds = updates(ours, kind, part * transfer_seconds / len(ours.chunks), step_seconds)
            report = ours.stream.run(ours.chunks, update)
            found[f"{kind}_{part}"] = report.seconds / max(transfer_seconds, update_seconds)
    return found


def print_timeline(report: StreamReport) -> None:
    """Print when each chunk was read, updated and written, in milliseconds."""
    print("chunk        read            update             write       (milliseconds)")
    by_what: dict[tuple[str, int], tuple[float, float]] = {
        (span.what, span.chunk): (span.start_seconds * 1e3, span.end_seconds * 1e3) for span in report.spans
    }
    for number in sorted({span.chunk for span in report.spans}):
        cells = [by_what.get((what, number), (0.0, 0.0)) for what in ("read", "update", "write")]
        print(f"{number:5}  " + "  ".join(f"{start:7.1f}-{end:7.1f}" for start, end in cells))


def others(arguments: argparse.Namespace, num_bytes: int, block_bytes: int) -> dict[str, Fio | Dd]:
    """Return what ours is compared with, by name."""
    path = arguments.folder / "benchmark-of-others"
    if not arguments.fio:
        return {"dd": Dd(path, num_bytes, block_bytes)}
    return {
        f"fio_{engine}": Fio(arguments.fio, path, num_bytes, block_bytes, arguments.threads, engine)
        for engine in ("psync", "io_uring")
    }


def one_round(
    ours: Ours, rivals: dict[str, Fio | Dd], parts: Sequence[float]
) -> tuple[dict[str, dict[str, float]], dict[str, float]]:
    """Return MiB per second by direction and program, and the ratios of the streams."""
    rates: dict[str, dict[str, float]] = {}
    for direction in DIRECTIONS:
        rates[direction] = {"ours": ours.run(direction) / MIB}
        rates[direction] |= {name: rival.run(direction) / MIB for name, rival in rivals.items()}
    return rates, measure_streams(ours, max(rates["both"].values()) * MIB, parts)


def measure(ours: Ours, rivals: dict[str, Fio | Dd], arguments: argparse.Namespace) -> None:
    """Measure in rounds, and print."""
    ratios: dict[str, list[float]] = {}
    for number in range(arguments.rounds):
        rates, streams = one_round(ours, rivals, arguments.updates)
        rounded = {way: {name: round(rate) for name, rate in by.items()} for way, by in rates.items()}
        print(
            json.dumps({"round": number, **rounded, "stream": {k: round(v, 3) for k, v in streams.items()}}), flush=True
        )
        for way, by in rates.items():
            best = max(rate for name, rate in by.items() if name != "ours")
            if best:
                ratios.setdefault(way, []).append(by["ours"] / best)
        for name, ratio in streams.items():
            ratios.setdefault(f"stream_{name}", []).append(ratio)
    print(json.dumps({name: round(statistics.median(values), 3) for name, values in ratios.items()}))
    if arguments.timeline:
        print_timeline(ours.stream.run(ours.chunks, lambda number, chunk: time.sleep(0.05)))


def main() -> int:
    """Make the files, and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="on the disk to measure")
    parser.add_argument("--gib", type=float, default=1.0, help="size of each of the two files")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--block-mib", type=float, default=2.0)
    parser.add_argument("--threads", type=int, default=4, help="blocks under way at once")
    parser.add_argument("--fio", default=shutil.which("fio"), help="the program; dd is used where there is none")
    parser.add_argument(
        "--updates",
        type=float,
        nargs="+",
        default=[0.25, 0.5, 1.0, 1.5, 2.0],
        help="seconds of an update, over those of the transfers of its chunk",
    )
    parser.add_argument("--engine", choices=("auto", "threads", "io_uring"), default="auto")
    parser.add_argument("--timeline", action="store_true")
    arguments = parser.parse_args()
    num_bytes, block_bytes = int(arguments.gib * GIB), int(arguments.block_mib * MIB)
    ours = Ours(arguments.folder, num_bytes, block_bytes, arguments.threads, arguments.engine)
    rivals = others(arguments, num_bytes, block_bytes)
    try:
        measure(ours, rivals, arguments)
    finally:
        ours.file.close()
        (arguments.folder / "benchmark-of-others").unlink()
    return 0


if __name__ == "__main__":
    sys.exit(main())
