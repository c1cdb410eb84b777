"""What one optimizer step sends: the collectives and their bytes, for every stage, window and path.

With P the bytes of all sharded parameters, P_root those of the parameters that no inner unit owns, and a window of k batches:

| stage | all-gather | reduce-scatter | all-reduce |
|---|---|---|---|
| 0 | 0 | 0 | P |
| 1 | P | P | 0 |
| 2 | P | k P | 0 |
| 3 | k (2 P - P_root) | k P | 0 |
| 1 to 3 with copies of the shards | as above | as above | P / dp_shard |

The root stays gathered between forward and backward, which follow each other at once: hence 2 P - P_root and not 2 P. An
all-to-all that does a reduce-scatter's work counts as one. Bytes are those of the whole tensor: what is gathered, or summed.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tests.ranks.engine_support import engine_of
from tests.rows import full
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from meshbolt.engine import Engine
from meshbolt.environment import Environment
from meshbolt.testing import run_ranks

# Every first dimension divides by the number of ranks, so that nothing is padded.
BLOCKS = 3


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 24), nn.Linear(24, 16)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(x)))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(8, 16), nn.Linear(16, 8)
        self.blocks = nn.ModuleList(Block() for _ in range(BLOCKS))

    def forward(self, x: Tensor) -> Tensor:
        x = self.into(x)
        for block in self.blocks:
            x = block(x)
        return self.out(x)


# torch's collectives: what each counts as, and which argument is the whole tensor.
COLLECTIVES = {
    "_allgather_base_": ("gather", 0),
    "_reduce_scatter_base_": ("scatter", 1),
    "alltoall_base_": ("scatter", 1),
    "allreduce_": ("reduce", 0),
}


class Counted(TorchDispatchMode):
    """Counts the calls and the bytes of collectives, in backward too."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.num_bytes: Counter[str] = Counter()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if DTensor in types:
            return NotImplemented
        if func.namespace == "c10d":
            kind, place = COLLECTIVES.get(func.overloadpacket.__name__, (func.overloadpacket.__name__, 0))
            tensors = args[place] if isinstance(args[place], list) else [args[place]]
            if func.overloadpacket.__name__ == "alltoall_base_" and args[3]:
                tensors = tensors * 2  # two ranks: each sends the other's half, and keeps its own where it is
            self.names.add(func.overloadpacket.__name__)
            self.calls[kind] += 1
            self.num_bytes[kind] += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        return func(*args, **(kwargs or {}))


def one_window(engine: Engine, optimizer: torch.optim.Optimizer, k: int, dtype: torch.dtype) -> None:
    for index in range(k):
        x = torch.randn(2, 8, dtype=dtype)
        if index < k - 1:
            with engine.accumulate():
                loss = engine.call(lambda x: engine.module(x).float().square().mean(), x)
                with engine.backward(loss) as prepared:
                    prepared.backward()
            continue
        loss = engine.call(lambda x: engine.module(x).float().square().mean(), x)
        with engine.backward(loss) as prepared:
            prepared.backward()
    engine.step(optimizer)
    optimizer.zero_grad()


def expected(stage: int, *, k: int, shards: int, root: int, total: int, gathered: float) -> dict[str, float]:
    """Return the formulas' bytes; `gathered` is the size of a gathered number over that of a stored one."""
    formulas = {
        0: {"reduce": total},
        1: {"gather": total, "scatter": total},
        2: {"gather": total, "scatter": k * total},
        3: {"gather": k * (2 * total - root), "scatter": k * total},
    }
    found = {kind: float(value) for kind, value in formulas[stage].items()}
    if "gather" in found:
        found["gather"] *= gathered
    if stage and shards < dist.get_world_size():
        found["reduce"] = total / shards
    return found


def bytes_of(stage: int, replicate: int, precision: str, *, fast_path: bool) -> None:
    module = Net()
    engine = engine_of(
        module, stage, replicate=replicate, precision=precision, environment=Environment(fast_path=fast_path)
    )
    optimizer = torch.optim.AdamW(module.parameters())
    sizes = {name: p.numel() * p.element_size() for name, p in engine.parameters_by_name.items()}
    total, root = sum(sizes.values()), sum(size for name, size in sizes.items() if not name.startswith("blocks."))
    dtype = engine.plan.precision.param_dtype or torch.float32
    shards = engine.plan.mesh.dp_shard
    for k in (1, 4, 4):
        with Counted() as sent:
            one_window(engine, optimizer, k, dtype)
        wanted = expected(stage, k=k, shards=shards, root=root, total=total, gathered=dtype.itemsize / 4)
        assert dict(sent.num_bytes) == wanted, (stage, replicate, precision, fast_path, k)
        assert ("alltoall_base_" in sent.names) == (fast_path and stage > 0), "the other path was counted"
        units = BLOCKS + 1
        if stage:
            assert sent.calls["gather"] == {1: units, 2: units, 3: k * (2 * units - 1)}[stage]
            assert sent.calls["scatter"] == units * {1: 1, 2: k, 3: k}[stage]
        assert sent.calls["reduce"] == (units if stage == 0 or replicate > 1 else 0)


def every_stage(fast_path: bool) -> None:
    for stage in range(4):
        bytes_of(stage, 1, "32-true", fast_path=fast_path)
    for stage in (1, 3):
        bytes_of(stage, 1, "bf16-mixed", fast_path=fast_path)
    for stage in range(1, 4) if dist.get_world_size() == 4 else ():
        bytes_of(stage, 2, "32-true", fast_path=fast_path)


@pytest.mark.parametrize("fast_path", [False, True], ids=["plain", "fast"])
@pytest.mark.parametrize("ranks", [2, full(4)])
def test_a_step_sends_the_bytes_of_its_stage_and_no_more(ranks: int, fast_path: bool) -> None:
    run_ranks(every_stage, ranks, fast_path, timeout=60)


def gathers_of_manual_steps(stage: int) -> None:
    module = Net()
    engine = engine_of(module, stage)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    root = sum(p.numel() * p.element_size() for name, p in engine.parameters_by_name.items() if "blocks." not in name)
    blocks = sum(p.numel() * p.element_size() for name, p in engine.parameters_by_name.items() if "blocks." in name)

    def two_steps(x: Tensor) -> None:
        for _ in range(2):
            loss = module(x).square().mean()
            with engine.backward(loss) as prepared:
                prepared.backward()
            engine.step(optimizer)
            optimizer.zero_grad()

    for _ in range(3):
        with Counted() as sent:
            engine.call(two_steps, torch.randn(2, 8))
        # At the beginning and after each step, for the code that goes on; the blocks where they are used.
        assert sent.num_bytes["gather"] == 3 * root + 2 * blocks * (2 if stage == 3 else 1), (stage, sent.num_bytes)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_steps_of_manual_optimisation_gather_the_root_once_each(stage: int) -> None:
    run_ranks(gathers_of_manual_steps, 2, stage)
