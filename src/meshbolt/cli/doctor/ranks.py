"""How fast ranks of this machine exchange: real processes, connected as those of a run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from meshbolt.cli.doctor.probing import Probe
from meshbolt.cli.doctor.processes import ended_how
from meshbolt.cli.doctor.rows import Row, Status
from meshbolt.units import MIB, format_bytes, format_seconds

_SCRIPT = Path(__file__).with_name("rank.py")
_EXCHANGE_SECONDS = 30.0
_SLOW_BYTES_PER_SECOND = {"gloo": 100 * MIB, "nccl": 5 * 1024 * MIB}
_SLOW_LATENCY_SECONDS = {"gloo": 5e-3, "nccl": 1e-3}
# What a launcher sets, so that these ranks are not taken for those of a run that is under way.
_OF_LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def rank_rows(probe: Probe, ranks: int, *, limit_seconds: float = _EXCHANGE_SECONDS) -> list[Row]:
    """Measure an all-reduce over processes of this machine: with gloo, and with NCCL where there are GPUs for it.

    Args:
        probe: what torch has.
        ranks: how many processes; fewer than two measure nothing.
        limit_seconds: for one exchange.
    """
    facts = probe.torch
    if ranks < 2 or not facts or not facts["distributed"]:
        return []
    rows = []
    if facts["backends"]["gloo"]:
        rows += measured_rows("gloo", ranks, limit_seconds=limit_seconds)
    gpus = min(ranks, len(facts["gpus"]))
    if facts["backends"]["nccl"] and gpus >= 2:
        rows += measured_rows("nccl", gpus, limit_seconds=limit_seconds)
    return rows


def measured_rows(backend: str, ranks: int, *, limit_seconds: float) -> list[Row]:
    """Start processes, and return what rank 0 measured or why it did not.

    Args:
        backend: "gloo" or "nccl".
        ranks: how many.
        limit_seconds: for one exchange; the processes have as long again, and half a minute to start.
    """
    name = f"{backend}, {ranks} ranks"
    with tempfile.TemporaryDirectory(prefix="meshbolt-doctor-") as folder:
        words = [backend, "{rank}", str(ranks), str(Path(folder) / "meeting"), str(limit_seconds)]
        ends = _run(words, ranks, Path(folder), 30.0 + 2 * limit_seconds)
    failures = [f"rank {rank} {how}" for rank, (_, how) in enumerate(ends) if how]
    if failures:
        value = "; ".join(failures)
        return [Row(area="ranks", name=name, status="red", value=value, mend=_mend(backend, value))]
    return _rows_of(backend, name, json.loads(ends[0][0].splitlines()[-1]))


def _run(words: Sequence[str], ranks: int, folder: Path, limit_seconds: float) -> list[tuple[str, str]]:
    """Run the script once for each rank; return what each printed, and how it failed if it did."""
    environment = {name: value for name, value in os.environ.items() if name not in _OF_LAUNCHERS}
    environment["OMP_NUM_THREADS"] = "1"
    processes: list[tuple[Any, Path, Path]] = []
    for rank in range(ranks):
        command = [sys.executable, str(_SCRIPT), *(word.format(rank=rank) for word in words)]
        out, err = folder / f"{rank}.out", folder / f"{rank}.err"
        with out.open("w") as to_out, err.open("w") as to_err:
            processes.append((subprocess.Popen(command, stdout=to_out, stderr=to_err, env=environment), out, err))
    until, failed = time.monotonic() + limit_seconds, False
    while time.monotonic() < until and any(process.poll() is None for process, _, _ in processes):
        time.sleep(0.02)
        if not failed and any(process.poll() for process, _, _ in processes):
            failed, until = True, min(until, time.monotonic() + 3.0)  # the others may tell why, too
    return [_ended(process, out.read_text(), err.read_text()) for process, out, err in processes]


def _ended(process: Any, out: str, err: str) -> tuple[str, str]:
    if process.poll() is None:
        process.kill()
        process.wait()
        return out, "hung"
    if process.returncode == 0:
        return out, ""
    lines = [line for line in err.strip().splitlines() if line.strip() and "frame #" not in line]
    said = next((line for line in reversed(lines) if "Error" in line), lines[-1] if lines else "")
    return out, f"{ended_how(process.returncode)}: {said[:300]}"


def _mend(backend: str, failure: str) -> str:
    if backend == "nccl":
        return "NCCL_DEBUG=WARN meshbolt doctor   # says what it lacks; NCCL_P2P_DISABLE=1 or NCCL_IB_DISABLE=1: which path"
    if "resolve" in failure or "Name or service" in failure:
        return (
            'echo "127.0.1.1 $(hostname)" | sudo tee -a /etc/hosts   # or, on one machine: export GLOO_SOCKET_IFNAME=lo'
        )
    return "GLOO_SOCKET_IFNAME=lo meshbolt doctor   # if this works, the interface is at fault: name another one (`ip -br addr`)"


def _rows_of(backend: str, name: str, measured: dict[str, float]) -> list[Row]:
    rate, latency = measured["bytes_per_second"], measured["latency_seconds"]
    is_slow, is_late = rate < _SLOW_BYTES_PER_SECOND[backend], latency > _SLOW_LATENCY_SECONDS[backend]
    status: Status = "yellow" if is_slow or is_late else "green"
    words = f"all-reduce of 32 MiB at {format_bytes(rate)}/s, of 4 B in {format_seconds(latency)}"
    mend = "top -b -n 1 | head -20   # whether others use the processors; on GPUs: nvidia-smi topo -m"
    return [
        Row(
            area="ranks",
            name=name,
            status=status,
            value=words,
            mend=mend if is_slow or is_late else "",
            measured=measured,
        )
    ]
