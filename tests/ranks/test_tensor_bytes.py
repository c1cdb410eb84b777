"""What a layer divided over two ranks sends, in forward and backward: the sums of the theory, and nothing else.

With A the bytes of an activation (batch x time x width), a block of attention and a perceptron sends

| | forward | backward |
|---|---|---|
| plain | 2 sums of A | 2 sums of A: one where attention, one where the perceptron begins |
| sequence parallel | 2 gathers and 2 sums in parts of A | 2 sums in parts and 2 gathers of A, and a sum a vector |

(A vector: a norm's weights, or a bias, that meets parts.)

Source: Shoeybi et al. (2019), section 3; Korthikanti et al. (2022), section 4.2. A style on each of query, key and value, and on
gate and up, does not send more: their common input is entered once.
"""

from __future__ import annotations

from collections import Counter
from typing import Any, ClassVar

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from meshbolt import Recompute, Zero
from meshbolt.config import Settings, resolve
from meshbolt.demos.model import Block as FusedBlock
from meshbolt.engine import Engine
from meshbolt.mesh import build_mesh
from meshbolt.precision import precision_policy
from meshbolt.tensor import TensorParallel
from meshbolt.testing import run_ranks

BATCH, TIME, WIDTH, LAYERS = 2, 8, 16, 3
ACTIVATION = BATCH * TIME * WIDTH * 4


class GatedBlock(nn.Module):
    """Queries, keys and values apart, and a gated perceptron, as in Llama."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))
        self.gate_proj, self.up_proj = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(WIDTH, 2 * WIDTH)
        self.down_proj = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        read = self.norm1(x)
        heads = [
            layer(read).unflatten(-1, (4, -1)).transpose(1, 2) for layer in (self.q_proj, self.k_proj, self.v_proj)
        ]
        x = x + self.o_proj(F.scaled_dot_product_attention(*heads, is_causal=True).transpose(1, 2).flatten(2))
        read = self.norm2(x)
        return x + self.down_proj(F.silu(self.gate_proj(read)) * self.up_proj(read))


class Net(nn.Module):
    def __init__(self, kind: Any) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 1)
        self.blocks = nn.ModuleList(kind() for _ in range(LAYERS))

    def forward(self, x: Tensor) -> Tensor:
        x = self.into(x)
        for block in self.blocks:
            x = block(x)
        return self.out(x)


class Sent(TorchDispatchMode):
    """Counts collectives of more than one rank: by kind, and the bytes of the whole tensor."""

    KINDS: ClassVar = {"allreduce_": "sum", "_allgather_base_": "gather", "alltoall_base_": "parts"}

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[tuple[str, int]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            group = next(dist.ProcessGroup.unbox(one) for one in args if isinstance(one, torch.ScriptObject))
            tensor = args[0][0] if isinstance(args[0], list) else args[0]
            if group.size() > 1:
                kind = self.KINDS.get(func.overloadpacket.__name__, func.overloadpacket.__name__)
                self.calls[kind, tensor.numel() * tensor.element_size()] += 1
        return func(*args, **(kwargs or {}))


def sent(kind: Any, *, sequence: bool, recompute: str = "none") -> tuple[dict[Any, int], dict[Any, int]]:
    """Return what the second of two steps sends, in forward and in backward."""
    torch.manual_seed(0)
    setting = TensorParallel(2, sequence_parallel=sequence)
    settings = Settings(zero=Zero(0), tensor_parallel=setting, recompute=Recompute(recompute))
    plan = resolve(settings, world_size=2, precision=precision_policy("32-true"), device_type="cpu")
    mesh = build_mesh(plan.mesh, device_type="cpu")
    module = Net(kind)
    engine = Engine(module, plan=plan, mesh=mesh, device=torch.device("cpu"))
    for _ in range(2):
        x = torch.randn(BATCH, TIME, WIDTH)
        with Sent() as forward:
            loss = engine.call(lambda x: module(x).square().mean(), x)
        with Sent() as backward, engine.backward(loss) as prepared:
            prepared.backward()
    return dict(forward.calls), dict(backward.calls)


def fused_block() -> nn.Module:
    return FusedBlock(WIDTH, num_heads=4)


def plain(kind: Any, recompute: str = "none") -> Any:
    return sent(kind, sequence=False, recompute=recompute)


@pytest.mark.parametrize("kind", [GatedBlock, fused_block])
def test_a_block_sends_two_sums_forward_and_two_backward(kind):
    for forward, backward in run_ranks(plain, 2, kind):
        assert forward == {("sum", ACTIVATION): 2 * LAYERS}
        assert backward == {("sum", ACTIVATION): 2 * LAYERS}


def test_recomputing_a_block_sends_its_forward_again_and_enters_its_input_once():
    for forward, backward in run_ranks(plain, 2, GatedBlock, "full"):
        assert forward == {("sum", ACTIVATION): 2 * LAYERS}
        # The last sum of a block is not needed again, and torch stops before it.
        assert backward == {("sum", ACTIVATION): (1 + 2) * LAYERS}


def in_sequence(kind: Any) -> Any:
    return sent(kind, sequence=True)


def test_sequence_parallelism_sends_as_many_bytes_in_gathers_and_parts():
    vector = WIDTH * 4
    for forward, backward in run_ranks(in_sequence, 2, GatedBlock):
        # The first block reads what is whole; the last layer is whole and gathers what it reads.
        assert forward == {("parts", ACTIVATION): 2 * LAYERS, ("gather", ACTIVATION): 2 * LAYERS}
        assert backward[("gather", ACTIVATION)] == 2 * LAYERS + 1
        assert backward[("parts", ACTIVATION)] == 2 * LAYERS - 1
        # Norms that read parts, and the bias of each down_proj, which is added to parts.
        assert backward[("sum", vector)] == (2 * LAYERS - 1) + LAYERS
