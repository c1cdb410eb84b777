"""Blocks with divided layers are compiled in one graph each, and compute what they compute otherwise."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from tests.parity.tensor_by_hand import SmallGPT, batches
from tests.ranks.test_tensor_bytes import BATCH, LAYERS, TIME, WIDTH, GatedBlock, Net, fused_block
from tests.rows import full
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.tensor import DTensor

from meshbolt import UnsupportedError, Zero
from meshbolt.compat import COMPILES_DIVIDED_LAYERS
from meshbolt.config import Settings, resolve
from meshbolt.engine import Engine
from meshbolt.mesh import build_mesh
from meshbolt.precision import precision_policy
from meshbolt.tensor import TensorParallel, for_compiled
from meshbolt.testing import assert_parity, run_ranks

# The compiler behind it warns of its own use of torch.
pytestmark = pytest.mark.filterwarnings("ignore")
compiles = pytest.mark.skipif(not COMPILES_DIVIDED_LAYERS, reason="refused with this version of torch")


def two_steps(kind: Any, *, sequence: bool, backend: Any) -> list[torch.Tensor]:
    """Return a loss and this rank's gradients, of the second of two batches that add up."""
    torch.manual_seed(0)
    settings = Settings(zero=Zero(0), tensor_parallel=TensorParallel(2, sequence_parallel=sequence))
    plan = resolve(settings, world_size=2, precision=precision_policy("64-true"), device_type="cpu")
    mesh = build_mesh(plan.mesh, device_type="cpu")
    module = Net(kind).double()
    engine = Engine(module, plan=plan, mesh=mesh, device=torch.device("cpu"))
    for block in module.blocks if backend is not None else ():
        block.forward = for_compiled(torch.compile(block.forward, backend=backend))
    loss = torch.zeros(())
    for _ in range(2):
        x = torch.randn(BATCH, TIME, WIDTH, dtype=torch.float64)
        loss = engine.call(lambda x: module(x).square().mean(), x)
        with engine.backward(loss) as prepared:
            prepared.backward()
    gradients = [p.grad.to_local() if isinstance(p.grad, DTensor) else p.grad for p in module.parameters()]
    return [loss.detach(), *gradients]


def graphs_and_difference(kind: Any, sequence: bool) -> tuple[int, float]:
    counter = CompileCounterWithBackend("eager")
    plain = two_steps(kind, sequence=sequence, backend=None)
    compiled = two_steps(kind, sequence=sequence, backend=counter)
    return counter.frame_count, max(float((a - b).abs().max()) for a, b in zip(plain, compiled, strict=True))


@compiles
@pytest.mark.parametrize("sequence", [False, True])
@pytest.mark.parametrize("kind", [GatedBlock, fused_block])
def test_a_block_is_one_graph_and_computes_the_same(kind: Any, sequence: bool) -> None:
    for graphs, difference in run_ranks(graphs_and_difference, 2, kind, sequence):
        assert 0 < graphs <= LAYERS
        assert difference <= 1e-12


class Encoder(pl.LightningModule):
    """Attention of torch's own, whose forward runs as it is between what is compiled."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 2 * WIDTH, dropout=0.0, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def training_step(self, batch: torch.Tensor, _: int) -> torch.Tensor:
        return self.layers(batch).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05)


@compiles
@pytest.mark.parametrize("sequence", [full(False), full("auto")])
def test_attention_that_is_not_compiled_stands_between_what_is(sequence: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    data = [torch.randn(2, 8, WIDTH, generator=generator, dtype=torch.float64) for _ in range(2)]
    strategy = {"zero": 1, "tensor_parallel": TensorParallel(2, sequence_parallel=sequence), "compile": True}
    assert_parity(Encoder, data, strategy, ranks=2, steps=2, precision="64-true", timeout=150)


@compiles
@pytest.mark.parametrize(
    ("zero", "ranks", "sequence", "recompute"),
    [full(1, 2, False, "none"), full(1, 2, "auto", "full"), full(3, 4, "auto", "none")],
)
def test_a_run_with_compiled_blocks_trains_as_one_process_does(
    zero: int, ranks: int, sequence: Any, recompute: str
) -> None:
    strategy = {
        "zero": zero,
        "tensor_parallel": TensorParallel(2, sequence_parallel=sequence),
        "recompute": recompute,
        "compile": True,
    }
    assert_parity(SmallGPT, batches(2 * ranks), strategy, ranks=ranks, steps=2, precision="64-true", timeout=150)


@pytest.mark.skipif(COMPILES_DIVIDED_LAYERS, reason="not refused with this version of torch")
def test_what_an_older_compiler_computes_wrongly_is_refused() -> None:
    strategy = {"zero": 1, "tensor_parallel": 2, "compile": True}
    with pytest.raises(UnsupportedError, match=r"needs torch 2\.13"):
        assert_parity(SmallGPT, batches(2), strategy, ranks=2, steps=1)
