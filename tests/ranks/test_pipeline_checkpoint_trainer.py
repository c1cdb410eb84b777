"""A Trainer's run over a pipeline that stops: any plan goes on from its checkpoint as if nothing had happened, and it from any."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tests.ranks.trainer.background_support import At, slow_writer
from tests.ranks.trainer.loops_support import ADVICE
from tests.rows import full
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import meshbolt
from meshbolt import Checkpoint, MeshStrategy, PipelineParallel, TensorParallel
from meshbolt.checkpoint.reader import CheckpointReader
from meshbolt.testing import run_ranks

pytestmark = ADVICE

SAMPLES, BATCH, MICROBATCHES = 32, 8, 4
STOP_AFTER, EPOCHS = 3, 2
LIMIT = 1e-12  # float64

Values = dict[str, Tensor]


class Block(nn.Module):
    """A residual block that counts the samples it has seen, in a buffer and beside."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.beside = 0

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.seen += len(x)
            self.beside += len(x)
        return x + self.down(F.gelu(self.up(x)))


class Model(pl.LightningModule):
    """Blocks between a layer and a head that shares its weight; two groups of parameters."""

    def __init__(self, *, frozen: bool = False) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.inp, self.head = nn.Linear(6, 8, bias=False), nn.Linear(6, 8, bias=False)
        self.blocks = nn.ModuleList(Block() for _ in range(4))
        self.head.weight = self.inp.weight
        self.scale = nn.Parameter(torch.tensor(1.25))
        for block in self.blocks if frozen else ():
            block.up.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inp(x)
        for block in self.blocks:
            x = block(x)
        return F.linear(x, self.head.weight.t()) * self.scale

    def training_step(self, batch: Any, _index: int) -> Tensor:
        loss = F.mse_loss(self(batch[0]), batch[1])
        self.log("loss", loss, on_step=True, on_epoch=True, sync_dist=True)
        return loss

    def configure_optimizers(self) -> Any:
        biases = [parameter for name, parameter in self.named_parameters() if name.endswith("bias")]
        others = [parameter for name, parameter in self.named_parameters() if not name.endswith("bias")]
        groups = [{"params": others, "weight_decay": 0.1}, {"params": biases, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=1e-2)
        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9), "interval": "step"}]


# Ranks, those that see different samples, and the strategy's arguments.
PLANS: dict[str, tuple[int, int, dict[str, Any]]] = {
    "one": (1, 1, {}),
    "zero3 x2": (2, 2, {"zero": 3}),
    "tp2": (2, 1, {"tensor_parallel": TensorParallel(2, plan={"blocks.*.up": "column", "blocks.*.down": "row"})}),
    "pp2": (2, 1, {"zero": 1, "pipeline_parallel": PipelineParallel(2, microbatches=4, cuts=["blocks.2"])}),
    "pp2 uneven": (2, 1, {"zero": 3, "pipeline_parallel": PipelineParallel(2, microbatches=4, cuts=["blocks.1"])}),
    "pp2 interleaved": (
        2,
        1,
        {
            "zero": 2,
            "pipeline_parallel": PipelineParallel(
                2, microbatches=4, schedule="interleaved_1f1b", cuts=[f"blocks.{n}" for n in (1, 2, 3)]
            ),
        },
    ),
    "pp4": (4, 1, {"pipeline_parallel": PipelineParallel(4, microbatches=4, cuts=[f"blocks.{n}" for n in (1, 2, 3)])}),
    "pp2 x dp2": (4, 2, {"zero": 3, "pipeline_parallel": PipelineParallel(2, microbatches=4, cuts=["blocks.2"])}),
}


def batches(coordinate: int, coordinates: int) -> DataLoader[Any]:
    """Return a coordinate's part of batches that are the same however many there are."""
    x = torch.randn(SAMPLES, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    y = torch.sin(2 * x)
    each = BATCH // coordinates
    mine = torch.arange(SAMPLES).view(-1, coordinates, each)[:, coordinate].flatten()
    return DataLoader(TensorDataset(x[mine], y[mine]), batch_size=each)


def fit(name: str, end: Path, *, load: Path | None = None, save: Path | None = None, **options: Any) -> dict[str, float]:
    """Train to the end, and save what there is then; return what was logged."""
    ranks, coordinates, arguments = PLANS[name]
    torch.manual_seed(5 if load is None else 6)
    module = Model(frozen=options.pop("frozen", False)).double()
    policy, arguments = Checkpoint(**options.pop("policy", {})), {**arguments}
    callbacks = [] if save is None else [At(STOP_AFTER, do=lambda owner: owner.save_checkpoint(save))]
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=ranks,
        strategy=MeshStrategy(checkpoint=policy, **arguments),
        max_epochs=EPOCHS,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        **options,
    )
    coordinate = dist.get_rank() // (ranks // coordinates) if "tensor_parallel" in arguments else dist.get_rank() % coordinates
    trainer.fit(module, batches(coordinate, coordinates), ckpt_path=load)
    trainer.save_checkpoint(end)
    return {key: float(value) for key, value in trainer.callback_metrics.items()}


def tensors_in(path: Path) -> dict[str, Tensor]:
    with CheckpointReader(path) as reader:
        return {key: reader.read(key) for key in reader.tensors if not key.startswith("meshbolt.")}


def difference(ours: Values, theirs: Values) -> float:
    assert ours.keys() == theirs.keys()
    return max(float((ours[key].double() - theirs[key].double()).abs().max()) for key in ours)


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> tuple[Values, dict[str, float]]:
    path = tmp_path_factory.mktemp("one") / "end.ckpt"
    (logged,) = run_ranks(fit, 1, "one", path)
    return tensors_in(path), logged


def run(name: str, end: Path, **options: Any) -> dict[str, float]:
    first, *others = run_ranks(functools.partial(fit, **options), PLANS[name][0], name, end)
    assert all(other == first for other in others) or "x" in name
    return first


@pytest.mark.parametrize(
    ("saving", "loading"),
    [
        ("pp2", "one"),
        ("one", "pp2"),
        ("pp2", "pp2 uneven"),
        ("pp2 interleaved", "pp4"),
        ("pp2 x dp2", "pp2"),
        ("pp2", "tp2"),
        ("tp2", "pp2 x dp2"),
        ("zero3 x2", "pp2 interleaved"),
    ],
)
def test_a_run_that_stops_ends_on_any_other_plan_as_one_that_does_not(
    tmp_path: Path, expected: Any, saving: str, loading: str
) -> None:
    run(saving, tmp_path / "end.ckpt", save=tmp_path / "middle.ckpt")
    logged = run(loading, tmp_path / "again.ckpt", load=tmp_path / "middle.ckpt")
    same_samples = PLANS[saving][1] == PLANS[loading][1] == 1
    values, expected_logs = expected
    for end in ("end.ckpt", "again.ckpt"):
        ours = tensors_in(tmp_path / end)
        kept = {key for key in ours if same_samples or not key.endswith(".seen")}
        assert difference({key: ours[key] for key in kept}, {key: values[key] for key in kept}) < LIMIT
    assert logged["loss_epoch"] == pytest.approx(expected_logs["loss_epoch"], abs=1e-12)
