"""Step time side by side: one GPT, every way to train it, fresh processes, interleaved rounds, ratios within each round.

    python benchmarks/run_step_time.py --ranks 2 --window 1 --rounds 5

Prints a table, and one JSON line a contender with --json. Absolute times of a shared machine mean little; the ratio of two
contenders is the median over rounds of their ratio within a round.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent


def main() -> int:
    """Run the rounds and print the table; 1 if a contender failed."""
    arguments = _parse()
    if arguments.worker:
        return _work(arguments)
    names = arguments.only.split(",")
    medians: dict[str, list[float | None]] = {name: [] for name in names}
    losses: dict[str, float] = {}
    for index in range(arguments.rounds):
        # Every other round runs backwards, so that a machine that slows down or speeds up favours nobody.
        for name in names if index % 2 == 0 else reversed(names):
            ranks = _launch(name, arguments)
            medians[name].append(statistics.median(ranks[0]["seconds"]) if ranks else None)
            if ranks:
                losses[name] = ranks[0]["loss"]
            print(f"round {index + 1}/{arguments.rounds} {name}: {medians[name][-1]}", file=sys.stderr, flush=True)
    return _report(names, medians, losses, arguments)


def _report(names: list[str], medians: dict[str, Any], losses: dict[str, float], arguments: argparse.Namespace) -> int:
    print(f"# {_environment()}; {arguments.ranks} ranks, window {arguments.window}, {arguments.rounds} rounds")
    print(
        f"{'contender':16} {'ms/step':>8} "
        + " ".join(f"{'/ ' + base:>12}" for base in arguments.against)
        + f" {'loss':>9}"
    )
    for name in names:
        done = [value for value in medians[name] if value is not None]
        if len(done) < arguments.rounds:
            print(f"{name:16} failed in {arguments.rounds - len(done)} of {arguments.rounds} rounds")
            continue
        ratios = {base: _ratio(medians[name], medians.get(base, [])) for base in arguments.against}
        columns = " ".join(f"{'-' if ratio is None else f'{ratio:.3f}':>12}" for ratio in ratios.values())
        print(f"{name:16} {1e3 * statistics.median(done):8.1f} {columns} {losses[name]:9.4f}")
        if arguments.json:
            print(json.dumps({"contender": name, "seconds": done, "ratios": ratios, "window": arguments.window}))
    return int(any(None in values for values in medians.values()))


def _ratio(values: list[float | None], base: list[float | None]) -> float | None:
    pairs = [(a, b) for a, b in zip(values, base, strict=False) if a is not None and b is not None]
    return statistics.median(a / b for a, b in pairs) if pairs else None


def _environment() -> str:
    import importlib.metadata as metadata

    versions = " ".join(f"{name} {metadata.version(name)}" for name in ("torch", "lightning", "meshbolt"))
    return f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, {versions}"


def _launch(name: str, arguments: argparse.Namespace) -> list[dict[str, Any]] | None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, __file__, *sys.argv[1:], "--worker", name]
    started = []
    for rank in range(arguments.ranks):
        output = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed with the process's results
        process = subprocess.Popen(
            command, env=_rank_environment(rank, arguments.ranks, port), stdout=output, stderr=output
        )
        started.append((process, output))
    results = [_collect(name, process, output, arguments.timeout_seconds) for process, output in started]
    return None if None in results else results  # type: ignore[return-value]


def _rank_environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    ranks = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": world_size,
        "LOCAL_WORLD_SIZE": world_size,
        "GROUP_RANK": 0,
    }
    rendezvous = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "TORCHELASTIC_RUN_ID": "benchmark",
        "OMP_NUM_THREADS": 1,
    }
    return {**os.environ, **{key: str(value) for key, value in {**ranks, **rendezvous}.items()}}


def _collect(name: str, process: subprocess.Popen[bytes], output: Any, timeout: float) -> dict[str, Any] | None:
    try:
        process.wait(timeout)
    except subprocess.TimeoutExpired:
        process.kill()
    output.seek(0)
    text = output.read()
    output.close()
    for line in text.splitlines():
        if line.startswith("RESULT "):
            return json.loads(line.removeprefix("RESULT "))  # type: ignore[no-any-return]
    print(f"{name} failed:\n{text[-3000:]}", file=sys.stderr)
    return None


def _work(arguments: argparse.Namespace) -> int:
    sys.path.insert(0, str(HERE))
    import contenders
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    if arguments.worker not in contenders.OWN_PROCESS_GROUP or arguments.worker.startswith("deepspeed"):
        dist.init_process_group("gloo")
    job = contenders.Job(
        steps=arguments.steps,
        warmup=arguments.warmup,
        window=arguments.window,
        samples=arguments.samples,
        sizes=arguments.sizes,
    )
    timing = contenders.CONTENDERS[arguments.worker](job)
    print("RESULT " + json.dumps({"seconds": timing.seconds, "loss": timing.loss}), flush=True)
    os._exit(0)  # gloo's threads may still wait for a peer that is gone


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--window", type=int, default=1, help="batches of one optimizer step")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=10, help="timed steps a round")
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--samples", type=int, default=4, help="of one batch of one rank")
    parser.add_argument(
        "--sizes", type=json.loads, default={}, help="of the model, as JSON: layers, width, heads, time"
    )
    parser.add_argument("--only", default="fsdp2,local,ddp,deepspeed1,deepspeed2,deepspeed3,zero1,zero2,zero3")
    parser.add_argument(
        "--against", type=lambda text: text.split(","), default=["fsdp2", "deepspeed1", "deepspeed2", "deepspeed3"]
    )
    parser.add_argument("--timeout-seconds", type=float, default=300)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    raise SystemExit(main())
