"""Under a pipeline each precision computes what accumulation of the same microbatches does on one rank."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from tests.rows import full
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, TensorDataset

from meshbolt import MeshStrategy
from meshbolt.compat import whole_of
from meshbolt.demos.model import Block
from meshbolt.engine.placeholders import held_elsewhere
from meshbolt.plugins import HalfPrecision, MixedPrecision
from meshbolt.testing import run_ranks

WIDTH, LENGTH, PARTS, STEPS = 16, 8, 4, 4
PRECISIONS = {
    "bf16-mixed": lambda: MixedPrecision("bf16-mixed", "cpu"),
    "bf16-mixed-whole": lambda: MixedPrecision("bf16-mixed", "cpu", autocast=False),
    "16-mixed": lambda: MixedPrecision("16-mixed", "cpu"),
    "16-mixed-overflow": lambda: MixedPrecision("16-mixed", "cpu", init_scale=2.0**21),
    "bf16-true": lambda: HalfPrecision("bf16-true"),
}


class Language(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(32, WIDTH), nn.Linear(WIDTH, 32)
        self.blocks = nn.ModuleList(Block(WIDTH, num_heads=4) for _ in range(4))
        self.norm = nn.LayerNorm(WIDTH)
        self.scales: list[float] = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x = self.embed(batch[0])
        for block in self.blocks:
            x = block(x)
        return nn.functional.cross_entropy(self.head(self.norm(x)).flatten(0, 1), batch[0].flatten())

    def on_train_batch_end(self, *_: Any) -> None:
        scaler = self.trainer.precision_plugin.loss_scaler
        self.scales.append(0.0 if scaler is None else scaler.current_scale)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def fit(name: str, ranks: int, settings: dict[str, Any], clip: float | None) -> tuple[dict[str, Tensor], list[float]]:
    pl.seed_everything(1, verbose=False)
    module = Language()
    tokens = torch.randint(32, (STEPS * PARTS * 2, LENGTH), generator=torch.Generator().manual_seed(3))
    pieces = 1 if "pipeline_parallel" in settings else PARTS
    trainer = pl.Trainer(
        strategy=MeshStrategy(**settings),
        plugins=[PRECISIONS[name]()],
        accelerator="cpu",
        devices=ranks,
        max_epochs=1,
        accumulate_grad_batches=pieces,
        gradient_clip_val=clip,
        gradient_clip_algorithm="value",  # a norm is summed in another order, and its last bit decides how 16 bits are rounded
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    trainer.fit(module, DataLoader(TensorDataset(tokens), batch_size=2 * PARTS // pieces))
    held = {name: p for name, p in module.named_parameters() if not held_elsewhere(p)}
    whole = {name: (whole_of(p) if isinstance(p, DTensor) else p).detach().clone() for name, p in held.items()}
    return whole, module.scales


@pytest.mark.parametrize(
    ("name", "settings", "clip"),
    [
        ("bf16-mixed", {"zero": 2}, 1e-3),
        ("16-mixed-overflow", {"zero": 3}, None),
        full("16-mixed", {"zero": 1}, 1e-3),
        full("bf16-mixed-whole", {"zero": 3}, None),
        full("bf16-true", {"zero": 1}, None),
    ],
)
def test_a_precision_is_that_of_accumulation(name: str, settings: dict[str, Any], clip: float | None) -> None:
    ((expected, scales),) = run_ranks(fit, 1, name, 1, settings, clip)
    scales = scales[PARTS - 1 :: PARTS]
    if name == "16-mixed-overflow":
        assert scales[0] < 2.0**21, "no gradient has overflowed"
        assert scales[-1] in scales[:-1], "each has"
    results = run_ranks(fit, 2, name, 2, {**settings, "pipeline_parallel": 2}, clip, timeout=60)
    merged = {name: value for found, _ in results for name, value in found.items()}
    assert merged.keys() == expected.keys()
    assert all(own == scales for _, own in results)
    for key, value in expected.items():
        torch.testing.assert_close(
            merged[key], value, rtol=0.0, atol=0.0, msg=key
        )  # the same operations on the same numbers
