from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from meshbolt.compat import collectives_observed, gather_into, sum_into


def test_calls_are_told_with_their_bytes_and_nothing_stays_behind(tmp_path: Path) -> None:
    plain, seen = dict(vars(dist.ProcessGroup)), list[tuple[str, int]]()

    def observed() -> ExitStack:
        def told(collective: str, group: Any, num_bytes: int, work: Any, begun_seconds: float) -> None:
            assert group is dist.group.WORLD
            seen.append((collective, num_bytes))

        stack = ExitStack()
        stack.enter_context(collectives_observed(told))
        return stack

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        first, second = observed(), observed()
        dist.all_reduce(torch.ones(3))
        first.close()
        gather_into(torch.ones(5), torch.ones(5), group=dist.group.WORLD)
        sum_into(torch.ones(5), torch.ones(5), group=dist.group.WORLD)
        dist.all_to_all_single(torch.ones(2), torch.ones(2))
        dist.broadcast(torch.ones(7, dtype=torch.uint8), 0)
        dist.all_gather([torch.ones(4)], torch.ones(4))
        dist.barrier()
        second.close()
        dist.all_reduce(torch.ones(1))
        dist.barrier()
    finally:
        dist.destroy_process_group()
    assert seen == [
        ("all_reduce", 12),
        ("all_reduce", 12),
        ("all_gather", 20),
        ("reduce_scatter", 20),
        ("all_to_all", 8),
        ("broadcast", 7),
        ("all_gather", 16),
        ("barrier", 0),
    ]
    assert dict(vars(dist.ProcessGroup)) == plain
