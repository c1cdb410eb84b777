"""A script for processes of its own: one rank that measures how fast ranks exchange, and prints it as JSON if it is rank 0.

It knows nothing of meshbolt, and connects as a run does: by the interface that the environment names, or the machine's name.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from datetime import timedelta
from typing import Any

_SMALL_CALLS = 100
_LARGE_BYTES = 32 * 2**20
_SECONDS = 1.0
_MOST_CALLS = 20


def main(backend: str, rank: int, world: int, meeting: str, limit_seconds: float) -> dict[str, float]:
    """Connect and measure.

    Args:
        backend: "gloo" or "nccl", which takes GPU `rank`.
        rank: of this process.
        world: how many there are.
        meeting: path of a file that all reach, not there yet.
        limit_seconds: for one exchange.

    Returns:
        Seconds of an all-reduce of 4 bytes, and of one of 32 MiB with its bytes per second.
    """
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    store = dist.FileStore(meeting, world)  # type: ignore[attr-defined]
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timedelta(seconds=limit_seconds))
    small, large = torch.zeros(1, device=device), torch.zeros(_LARGE_BYTES // 4, device=device)
    for tensor in (small, large):
        dist.all_reduce(tensor)
    latency = statistics.median(_timed(dist, torch, small) for _ in range(_SMALL_CALLS))
    calls = torch.tensor([min(_MOST_CALLS, max(1, round(_SECONDS / _timed(dist, torch, large))))], device=device)
    dist.broadcast(calls, 0)
    seconds = statistics.median(_timed(dist, torch, large) for _ in range(int(calls)))
    dist.barrier()
    return {"latency_seconds": latency, "seconds": seconds, "bytes_per_second": _LARGE_BYTES / seconds}


def _timed(dist: Any, torch: Any, tensor: Any) -> float:
    start = time.perf_counter()
    dist.all_reduce(tensor)
    if tensor.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


if __name__ == "__main__":
    sys.path[0:1] = []  # this script's folder, whose files are no modules of anybody's
    _backend, _rank, _world, _meeting, _limit = sys.argv[1:]
    _answer = main(_backend, int(_rank), int(_world), _meeting, float(_limit))
    if _rank == "0":
        sys.stdout.write(json.dumps(_answer) + "\n")
