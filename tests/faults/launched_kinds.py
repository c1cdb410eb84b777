"""A script that `meshbolt launch` starts in tests: one step on all ranks, in the way that its first argument names."""

from __future__ import annotations

import argparse
import json
import os
import sys
from typing import Any

import torch

NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def with_torch() -> float:
    import torch.distributed as dist

    dist.init_process_group("gloo")
    total = torch.tensor(float(dist.get_rank() + 1))
    dist.all_reduce(total)
    dist.destroy_process_group()
    return float(total)


def with_fabric() -> float:
    from lightning.fabric import Fabric

    import meshbolt  # registers the strategies  # noqa: F401

    fabric = Fabric(accelerator="cpu", devices=int(os.environ["LOCAL_WORLD_SIZE"]), strategy="zero2")
    fabric.launch()
    model = torch.nn.Linear(4, 1)
    model, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
    fabric.backward(model(torch.ones(2, 4)).sum())
    optimizer.step()
    return float(fabric.all_reduce(torch.tensor(float(fabric.global_rank + 1)), reduce_op="sum"))


def with_initialize() -> float:
    from meshbolt import deepspeed

    config = {"train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": 2}}
    model = torch.nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    engine.backward(engine(torch.ones(2, 4)).sum())
    engine.step()
    total = torch.tensor(float(engine.global_rank + 1))
    torch.distributed.all_reduce(total)
    return float(total)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--local_rank", type=int, default=-1)
    parser.add_argument("kind")
    parser.add_argument("rest", nargs="*")
    given = parser.parse_args()
    ways: dict[str, Any] = {"torch": with_torch, "fabric": with_fabric, "initialize": with_initialize}
    total = ways[given.kind]()
    told = {"total": total, "rest": given.rest, "local_rank": given.local_rank}
    # One write, for ranks write into the same terminal.
    sys.stdout.write(json.dumps(told | {name: os.environ[name] for name in NAMES}) + "\n")


if __name__ == "__main__":
    main()
