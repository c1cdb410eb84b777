"""Where cuts lie as models of users have them: inside of modules and of blocks, before all blocks, and where they cannot be."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from tests.rows import full
from torch import Tensor, nn

from meshbolt import PipelineParallel
from meshbolt.errors import UnsupportedError
from meshbolt.testing import assert_parity
from meshbolt.testing.parity.report import ParityReport


class Halves(nn.Module):
    """A block of two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(torch.tanh(self.first(x)))


class Levels(nn.Module):
    """Layers of different kinds, which are in no list."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.middle, self.up = nn.Linear(8, 32), nn.Linear(32, 32), nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        first = self.down(x)
        return self.up(F.gelu(self.middle(F.gelu(first))) + first)


class Task(pl.LightningModule):
    """A network, and the network's own way of handing values on."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.losses: list[Tensor] = []
        self.network = Levels() if kind == "levels" else nn.Sequential(*(Halves() for _ in range(4)))
        self.embed, self.head = nn.Linear(8, 8), nn.Linear(8, 1)
        for block in self.network if kind == "auxiliary" else ():
            block.register_forward_hook(lambda _block, _args, output: self.losses.append(output.square().mean()))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        self.losses.clear()
        loss = F.mse_loss(self.head(self.network(self.embed(batch[0]))), batch[1])
        return loss + 0.1 * sum(self.losses)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def parity(kind: str, pipeline: PipelineParallel, **more: Any) -> ParityReport:
    generator = torch.Generator().manual_seed(0)
    batches = [(torch.randn(8, 8, generator=generator), torch.randn(8, 1, generator=generator)) for _ in range(3)]
    strategy = {"zero": 1, "pipeline_parallel": pipeline, **more}
    return assert_parity(lambda: Task(kind), batches, strategy, ranks=2, steps=3, precision="64-true", timeout=60)


@pytest.mark.parametrize(
    ("kind", "pipeline", "more"),
    [
        ("levels", PipelineParallel(2), {}),
        full("levels", PipelineParallel(2, schedule="zbv"), {}),
        ("blocks", PipelineParallel(2, cuts=["network.1.second"]), {"recompute": "full"}),
        ("blocks", PipelineParallel(2, cuts=["network.0"]), {"recompute": "full"}),  # the first stage has no block
        full("blocks", PipelineParallel(2, cuts=["head"]), {"recompute": "full"}),
    ],
)
def test_stages_train_as_one_process_wherever_they_begin(
    kind: str, pipeline: PipelineParallel, more: dict[str, Any]
) -> None:
    parity(kind, pipeline, **more)


def test_losses_that_layers_append_to_a_list_are_refused_by_name_before_training() -> None:
    with pytest.raises(UnsupportedError, match=r"network\.\d makes a value of \[\] .*the attribute 'losses' of Task"):
        parity("auxiliary", PipelineParallel(2, cuts=["network.2"]))


def test_a_cut_is_chosen_where_one_stage_has_all_of_them() -> None:
    parity("auxiliary", PipelineParallel(2))
