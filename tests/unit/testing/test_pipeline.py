"""`verify_pipeline` says how a module is cut, and whether its stages compute what it does."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from meshbolt.demos import ByteGPT
from meshbolt.errors import ConfigError
from meshbolt.testing import verify_pipeline


def tokens(samples: int = 4) -> tuple[Tensor, Tensor]:
    drawn = torch.randint(256, (samples, 17), generator=torch.Generator().manual_seed(0))
    return drawn[:, :-1], drawn[:, 1:]


def test_a_module_that_can_be_cut_is_shown_with_what_passes_each_cut() -> None:
    module = ByteGPT(dim=16, num_layers=4, num_heads=2, max_length=16).double()
    report = verify_pipeline(module, tokens(), cuts=["blocks.1", "blocks.3"])
    assert report.is_equal
    lines = str(report).splitlines()
    assert "stage 0:" in lines[1]
    assert lines[2] == "    holds tokens, positions, blocks.0"
    assert "stage 1:" in lines[4]
    assert "begins with blocks.1" in lines[4]
    assert lines[5] == "    holds blocks.1-2"
    assert "sends output of blocks.2: [2, 16, 16] float64, 4,096 bytes" in lines[6]
    assert lines[-1].startswith("equal to the whole module: losses differ by 0.0e+00")
    assert sum(report.shares) == pytest.approx(1.0)
    assert sum(report.num_parameters) == sum(p.numel() for p in module.parameters())
    assert all(p.grad is None for p in module.parameters())


class Tied(pl.LightningModule):
    """Its own optimizer, logs, dropout, and a head that is the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(256, 8)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5)) for _ in range(4))

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        x = self.embed(batch["ids"])
        for layer in self.layers:
            x = layer(x)
        loss = F.cross_entropy(F.linear(x, self.embed.weight).flatten(0, 1), batch["next"].flatten())
        self.log("loss", loss)
        self.log_dict({"of": batch_idx})
        return {"loss": loss}


def test_random_numbers_are_compared_with_one_stage_and_tied_weights_are_named() -> None:
    ids, following = tokens()
    report = verify_pipeline(Tied(), {"ids": ids, "next": following}, stages=3)
    assert report.is_equal
    assert report.compared_with == "one stage"
    assert "embed.weight is held by stages 0, 2, which add up its gradients" in str(report)


def test_a_difference_is_found() -> None:
    class Counting(nn.Linear):
        def __init__(self, seen: list[int]) -> None:
            super().__init__(8, 8)
            self.seen = seen

        def forward(self, x: Tensor) -> Tensor:
            self.seen.append(1)  # of which a stage sees those of its own layers only
            return super().forward(x) * len(self.seen)

    class Drifting(Tied):
        def __init__(self) -> None:
            super().__init__()
            seen: list[int] = []
            self.layers = nn.ModuleList(Counting(seen) for _ in range(4))

    ids, following = tokens()
    report = verify_pipeline(Drifting(), {"ids": ids, "next": following}, cuts=["layers.2"])
    assert not report.is_equal
    assert "NOT EQUAL" in str(report)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cuts": ["layer.1"]}, r"no module 'layer\.1'"),
        ({"stages": 12}, "cannot be cut into 12 stages"),
        ({"microbatches": 9}, "4 samples cannot be divided into 9 microbatches"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], message: str) -> None:
    ids, following = tokens()
    with pytest.raises(ConfigError, match=message):
        verify_pipeline(Tied(), {"ids": ids, "next": following}, **options)


def test_a_module_that_is_elsewhere_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"Parameter 'embed.weight' is on meta.*module\.cpu\(\)"):
        verify_pipeline(Tied().to("meta"), {"ids": tokens()[0]})
