"""A run that DeepSpeed has saved goes on from its import, under any stage and number of ranks, as it would have gone on alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from tests.deepspeed_fixtures import Trained, write_rows, write_shards
from tests.rows import full
from torch import Tensor, nn
from torch.utils.data import DataLoader

import meshbolt
from meshbolt.checkpoint.formats import import_checkpoint
from meshbolt.testing import run_ranks

DONE, MORE, SAMPLES = 3, 3, 12


class Net(nn.Module):
    """Sizes that no number of ranks divides, tied weights, and a frozen layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.into = nn.Linear(5, 7)
        self.frozen = nn.Linear(7, 7)
        self.norm = nn.LayerNorm(7)
        self.out = nn.Linear(7, 5, bias=False)
        self.tied = nn.Linear(5, 7)
        self.tied.weight = self.into.weight
        self.frozen.requires_grad_(False)
        self.register_buffer("seen", torch.tensor([4, 2]))

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.out(self.norm(torch.tanh(self.into(x) + self.tied(x)) + self.frozen(self.into(x))))
        return scores


def groups_of(module: nn.Module) -> list[dict[str, Any]]:
    """Return the optimizer's groups, with the frozen weights in them, as scripts often have it."""
    parameters = list(module.parameters())
    return [
        {"params": [each for each in parameters if each.dim() > 1], "weight_decay": 0.1},
        {"params": [each for each in parameters if each.dim() == 1], "weight_decay": 0.0, "lr": 2e-2},
    ]


def batches() -> Tensor:
    """Return the batches of all steps."""
    return torch.randn(DONE + MORE, SAMPLES, 5, generator=torch.Generator().manual_seed(9))


def loss_of(net: nn.Module, x: Tensor) -> Tensor:
    """Return the loss of some samples."""
    return (net(x) - x.flip(1)).pow(2).mean()


def trained_alone(steps: int) -> tuple[Net, torch.optim.Optimizer, list[float]]:
    """Train in this process, without ranks."""
    net = Net()
    optimizer = torch.optim.AdamW(groups_of(net), lr=1e-2)
    losses = []
    for batch in batches()[:steps]:
        loss = loss_of(net, batch)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return net, optimizer, losses


def as_deepspeeds(net: Net, optimizer: torch.optim.Optimizer, *, world: int) -> Trained:
    """Return what DeepSpeed would save of it: it leaves what is frozen out of the groups."""
    names = {parameter: name for name, parameter in net.named_parameters()}
    groups = [
        {names[each]: each.detach() for each in group["params"] if each.requires_grad}
        for group in optimizer.param_groups
    ]
    run = Trained(
        groups=groups,
        frozen={name: each.detach() for name, each in net.named_parameters() if not each.requires_grad},
        buffers=dict(net.named_buffers()),
        tied={"tied.weight": "into.weight"},
        dtype=torch.float32,
        step=DONE,
        world=world,
    )
    state: Any = {names[parameter]: values for parameter, values in optimizer.state.items()}
    run.moments = {key: {name: values[key] for name, values in state.items()} for key in ("exp_avg", "exp_avg_sq")}
    given = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    run.settings = lambda numbers: [  # type: ignore[method-assign]
        {**settings, "params": list(each)} for settings, each in zip(given, numbers, strict=True)
    ]
    return run


class Model(pl.LightningModule):
    """The same in Lightning, from other weights."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net()
        with torch.no_grad():
            for parameter in self.net.parameters():
                parameter.fill_(0.5)
        self.losses: list[float] = []

    def training_step(self, x: Tensor, _index: int) -> Tensor:
        loss = loss_of(self.net, x)
        whole = loss.detach().clone()
        dist.all_reduce(whole)
        self.losses.append(float(whole) / dist.get_world_size())
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(groups_of(self.net), lr=1.0)


def goes_on(path: Path, stage: int) -> list[float]:
    """Fit from a checkpoint, and return the losses."""
    x = batches()[DONE:]
    each = SAMPLES // dist.get_world_size()
    mine = x[:, dist.get_rank() * each : (dist.get_rank() + 1) * each].flatten(0, 1)
    trainer = pl.Trainer(
        strategy=meshbolt.MeshStrategy(zero=stage),
        accelerator="cpu",
        devices=dist.get_world_size(),
        max_steps=DONE + MORE,
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    model = Model()
    loader: DataLoader[Any] = DataLoader(mine, batch_size=each)  # type: ignore[arg-type]
    trainer.fit(model, loader, ckpt_path=path)
    assert trainer.global_step == DONE + MORE
    return model.losses


@pytest.mark.parametrize(
    ("written", "world", "stage", "ranks"),
    [
        pytest.param(2, 3, 3, 2, id="from stage 2 of three ranks to stage 3 of two"),
        full(3, 2, 0, 3, id="from stage 3 of two ranks to stage 0 of three"),
        full(1, 2, 1, 1, id="from stage 1 of two ranks to one"),
    ],
)
def test_a_run_goes_on_from_its_import(written: int, world: int, stage: int, ranks: int, tmp_path: Path) -> None:
    net, optimizer, _ = trained_alone(DONE)
    run = as_deepspeeds(net, optimizer, world=world)
    run.common = _counted(run)  # type: ignore[method-assign]
    if written == 3:
        write_shards(tmp_path / "ds", run, pieces=13)
    else:
        write_rows(tmp_path / "ds", run, stage=written)
    import_checkpoint(tmp_path / "ds", tmp_path / "start.ckpt", prefix="net.")
    losses = run_ranks(goes_on, ranks, tmp_path / "start.ckpt", stage)[0]
    *_, expected = trained_alone(DONE + MORE)
    assert losses == pytest.approx(expected[DONE:], rel=1e-5)


def _counted(run: Trained) -> Any:
    """Return what makes a model's file, after as many steps as were done, without a scheduler."""
    made = run.common

    def common(**entries: Any) -> dict[str, Any]:
        return made(**{"global_steps": DONE, "lr_scheduler": None, "skipped_steps": 0, **entries})

    return common
