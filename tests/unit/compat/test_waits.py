from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import torch
import torch.distributed as dist

from meshbolt.compat import waits_observed


def test_observers_come_and_go_in_any_order_and_nothing_stays_behind(tmp_path: Path) -> None:
    plain, seen = vars(dist.Work)["wait"], list[str]()

    def observed(name: str) -> ExitStack:
        stack = ExitStack()
        stack.enter_context(waits_observed(torch.device("cpu"), lambda: name, lambda since: seen.append(since)))
        return stack

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        first, second = observed("first"), observed("second")
        dist.all_reduce(torch.ones(1))
        first.close()
        dist.all_reduce(torch.ones(1))
        second.close()
        dist.all_reduce(torch.ones(1), async_op=True).wait()
    finally:
        dist.destroy_process_group()
    assert seen == ["first", "second", "second"]
    assert vars(dist.Work)["wait"] is plain
