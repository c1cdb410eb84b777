"""What is freed, and when: figures are for `benchmarks/run_memory.py`, these are the references that would spoil them."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
from tests.ranks.engine_support import batch, engine_of, loss_of, made
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from meshbolt.compat import local_tensor
from meshbolt.environment import Environment
from meshbolt.testing import run_ranks

WINDOW = 3


def freed_when_the_first_block_is_reached(stage: int, fast_path: bool) -> list[bool]:
    module = made(dtype=torch.float32)
    engine = engine_of(module, stage, environment=Environment(fast_path=fast_path))
    gradients: list[StorageWeakRef] = []
    freed: list[bool] = []

    def watch(_module: nn.Module, args: tuple[Tensor]) -> None:
        args[0].register_hook(lambda _: freed.append(all(gradient.expired() for gradient in gradients)))

    for index in range(WINDOW):
        is_last = index == WINDOW - 1
        if is_last:
            later = [module.blocks[1], module.blocks[2]]
            whole = [local_tensor(p.grad).untyped_storage() for block in later for p in block.parameters()]
            gradients = [StorageWeakRef(storage) for storage in whole]
            del whole
            module.blocks[0].register_forward_pre_hook(watch)
        with nullcontext() if is_last else engine.accumulate():
            loss = engine.call(loss_of, module, batch(index, dist.get_rank(), torch.float32))
            with engine.backward(loss) as prepared:
                prepared.backward()
    assert len(gradients) == 8
    return freed


@pytest.mark.parametrize("fast_path", [True, False])
def test_whole_gradients_of_a_window_are_freed_one_unit_after_the_other(fast_path: bool) -> None:
    assert run_ranks(freed_when_the_first_block_is_reached, 2, 1, fast_path) == [[True]] * 2
