"""Saves and loads of whole checkpoints beside bare `torch.distributed.checkpoint` (DCP), which both are planned by.

    python benchmarks/run_checkpoint.py --ranks 2 --gigabytes 1 --rounds 5

The state is that of a model of equal blocks with AdamW in float32, sharded over all ranks. Bare DCP syncs its files to the
disk, as ours does, and nothing else; ours adds checksums of every byte, a manifest, the commit under a final name, and on
loads the comparison of the checksums before any tensor changes. Contenders take turns within a round, forth and back; a
figure is the slowest rank's time, wall and processor, and a ratio is the median over rounds of ours over bare within a round.
On a busy machine, or a slow disk, processor times say more. Files stay in the page cache between a save and its load, for all
alike.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from meshbolt.checkpoint import load_tensors, save_directory
from meshbolt.testing import run_ranks

WIDTH = 1024
State = dict[str, torch.Tensor]
Times = dict[str, float]


def state_of(gigabytes: float) -> State:
    """Return weights and both moments of as many blocks as fill the size, on this rank its shards."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    world = dist.get_world_size()
    shapes = {
        "up.weight": (4 * WIDTH, WIDTH),
        "up.bias": (4 * WIDTH,),
        "down.weight": (WIDTH, 4 * WIDTH),
        "norm": (WIDTH,),
    }
    block_bytes = 3 * 4 * sum(torch.Size(shape).numel() for shape in shapes.values())
    found: State = {}
    for block in range(max(1, round(gigabytes * 1e9 / block_bytes))):
        for name, shape in shapes.items():
            for kind in ("model", "exp_avg", "exp_avg_sq"):
                local = torch.randn(shape[0] // world, *shape[1:])
                found[f"{kind}.{block}.{name}"] = DTensor.from_local(local, mesh, [Shard(0)], run_check=False)
    return found


def timed(act: Callable[[], object]) -> Times:
    """Return the seconds that the slowest rank needs."""
    dist.barrier()
    wall, processor = time.perf_counter(), time.process_time()
    act()
    slowest = torch.tensor([time.perf_counter() - wall, time.process_time() - processor])
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    return {"wall": float(slowest[0]), "processor": float(slowest[1])}


def bare(folder: Path, state: State) -> dict[str, Times]:
    path = folder / "bare"
    save = timed(lambda: dcp.save(state, storage_writer=dcp.FileSystemWriter(path)))
    load = timed(lambda: dcp.load(state, storage_reader=dcp.FileSystemReader(path)))
    return {"save": save, "load": load}


def ours(folder: Path, state: State) -> dict[str, Times]:
    path = folder / "ours.ckpt"
    save = timed(lambda: save_directory(path, tensors=state, objects={"epoch": 1}))
    load = timed(lambda: load_tensors(path, state))
    fresh = timed(lambda: load_tensors(path, state, fresh=state.keys()))
    unverified = timed(lambda: load_tensors(path, state, verify=False))
    return {"save": save, "load": load, "load, fresh": fresh, "load, not verified": unverified}


def rounds(folder: str, gigabytes: float, count: int) -> list[dict[str, dict[str, Times]]]:
    """Run all rounds on this rank, after one that does not count."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    state = state_of(gigabytes)
    found = []
    for number in range(count + 1):
        order = (("bare", bare), ("ours", ours)) if number % 2 else (("ours", ours), ("bare", bare))
        times = {}
        for name, contender in order:
            times[name] = contender(Path(folder), state)
            dist.barrier()
            if dist.get_rank() == 0:
                for place in Path(folder).iterdir():
                    shutil.rmtree(place)
            dist.barrier()
        found.append(times)
    return found[1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", help="where to write; a temporary one without it")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        found = run_ranks(rounds, arguments.ranks, folder, arguments.gigabytes, arguments.rounds, timeout=1800)[0]
    print(json.dumps({"python": platform.python_version(), "torch": str(torch.__version__), **vars(arguments)}))
    for what in found[0]["ours"]:
        against = what.split(",")[0]
        for kind in ("wall", "processor"):
            ours_seconds = [times["ours"][what][kind] for times in found]
            bare_seconds = [times["bare"][against][kind] for times in found]
            ratios = [one / other for one, other in zip(ours_seconds, bare_seconds, strict=True)]
            row = {
                "what": what,
                "seconds": kind,
                "ours": round(statistics.median(ours_seconds), 3),
                "bare": round(statistics.median(bare_seconds), 3),
                "ratio": round(statistics.median(ratios), 3),
                "ratios": [round(ratio, 3) for ratio in ratios],
            }
            print(json.dumps(row))


if __name__ == "__main__":
    main()
