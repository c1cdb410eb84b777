"""What a rank holds under tensor parallelism: its share of divided layers, and with sequence parallelism of what lies between."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.ranks.test_tensor_bytes import BATCH, LAYERS, TIME, WIDTH, GatedBlock, Net
from torch import nn
from torch.distributed.tensor import DTensor

from meshbolt import Recompute, Zero
from meshbolt.config import Settings, resolve
from meshbolt.engine import Engine
from meshbolt.mesh import build_mesh
from meshbolt.precision import precision_policy
from meshbolt.tensor import TensorParallel
from meshbolt.testing import run_ranks


def engine_of(ranks: int, *, sequence: bool = False, data_parallel: int = 1, recompute: str = "none") -> Engine:
    torch.manual_seed(0)
    module = Net(GatedBlock)
    setting = TensorParallel(ranks, sequence_parallel=sequence) if ranks > 1 else TensorParallel()
    settings = Settings(zero=Zero(3), tensor_parallel=setting, recompute=Recompute(recompute))
    plan = resolve(settings, world_size=ranks * data_parallel, precision=precision_policy("32-true"), device_type="cpu")
    mesh = build_mesh(plan.mesh, device_type="cpu")
    return Engine(module, plan=plan, mesh=mesh, device=torch.device("cpu"))


def numel(tensor: torch.Tensor) -> int:
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).numel()


def held_after_a_step(ranks: int, data_parallel: int) -> dict[str, tuple[int, int, int]]:
    """Return, by name, how many numbers this rank holds of parameter, gradient and optimizer state."""
    engine = engine_of(ranks, data_parallel=data_parallel)
    optimizer = torch.optim.AdamW(engine.module.parameters())
    loss = engine.call(lambda x: engine.module(x).square().mean(), torch.randn(BATCH, TIME, WIDTH))
    with engine.backward(loss) as prepared:
        prepared.backward()
    engine.step(optimizer)
    return {
        name: (numel(p), numel(p.grad), sum(numel(v) for k, v in optimizer.state[p].items() if k != "step"))
        for name, p in engine.parameters_by_name.items()
    }


def test_parameters_gradients_and_state_of_divided_layers_fall_with_the_ranks():
    whole = {name: p.numel() for name, p in Net(GatedBlock).named_parameters()}
    for ranks, data_parallel in [(2, 1), (4, 1), (2, 2)]:
        for held in run_ranks(held_after_a_step, ranks * data_parallel, ranks, data_parallel):
            for name, (parameter, gradient, state) in held.items():
                is_divided = "proj" in name and not name.endswith("down_proj.bias")
                share = whole[name] // (data_parallel * (ranks if is_divided else 1))
                if name.startswith("blocks."):
                    assert (parameter, gradient, state) == (share, share, 2 * share), (name, ranks, data_parallel)


def saved_for_backward(sequence: bool, recompute: str) -> int:
    """Return in how many whole activations' numbers a forward keeps what its backward needs, of floating point."""
    engine = engine_of(2, sequence=sequence, recompute=recompute)
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> Any:
        if not isinstance(tensor, nn.Parameter) and not isinstance(tensor, DTensor) and tensor.is_floating_point():
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        engine.call(lambda x: engine.module(x).square().mean(), torch.randn(BATCH, TIME, WIDTH))
    sizes = [tensor.untyped_storage().nbytes() // tensor.element_size() for tensor in kept.values()]
    return sum(size == BATCH * TIME * WIDTH for size in sizes)


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_sequence_parallelism_keeps_parts_of_what_lies_between_blocks(recompute):
    plain, sequence = (run_ranks(saved_for_backward, 2, on, recompute)[0] for on in (False, True))
    # With recomputation a block keeps its input and nothing else: all but the first block's are parts now. Without, so does each
    # norm that reads it; what layers multiply is gathered for them, and kept.
    fewer = LAYERS - 1 if recompute == "full" else 2 * LAYERS - 1
    assert sequence <= plain - fewer
