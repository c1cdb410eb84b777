"""Optimizers whose state lies elsewhere train bit for bit as those whose state lies with the parameters."""

from __future__ import annotations

import itertools
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from tests.rows import full
from torch import Tensor, nn

from meshbolt import MeshStrategy, Offload, TensorParallel, Zero
from meshbolt.compat import local_tensor
from meshbolt.engine.placeholders import held_elsewhere
from meshbolt.offload.update import ChunkUpdate
from meshbolt.plugins import MixedPrecision
from meshbolt.testing import run_ranks

WIDTH, SAMPLES = 16, 48
PLACES = {
    "cpu": {"optimizer": "cpu"},
    "half": {"optimizer": "cpu", "fraction": 0.5},
    "nvme": {"optimizer": "nvme"},
    "hosted": {"optimizer": "cpu", "parameters": "cpu"},
    "both": {"optimizer": "nvme", "parameters": "cpu"},
    "infinity": {"optimizer": "nvme", "parameters": "nvme"},
}
WINDOW = {"gradient_clip_val": 0.1, "accumulate_grad_batches": 2}
TENSOR = TensorParallel(2, plan={"blocks.*.up": "colwise", "blocks.*.down": "rowwise"})
WARNING = "ignore:It is recommended to use:lightning.fabric.utilities.warnings.PossibleUserWarning"
pytestmark = pytest.mark.filterwarnings(WARNING)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(3 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Net(pl.LightningModule):
    """Blocks, a parameter that no layer owns, one that is frozen, one that is never used, and many tiny ones."""

    def __init__(self, kind: str = "AdamW", **options: Any) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.kind, self.options = kind, options
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.scale = nn.Parameter(torch.ones(()))
        self.frozen = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.unused = nn.Linear(WIDTH, 3)
        self.tiny = nn.ModuleList(nn.Linear(1, 2) for _ in range(40))

    def training_step(self, batch: Tensor, _index: int) -> Tensor:
        x = self.frozen(batch)
        for block in self.blocks:
            x = block(x)
        wide = torch.stack([layer(x[:, :1]) for layer in self.tiny])
        return (x * self.scale).square().mean() + wide.square().mean()

    def validation_step(self, batch: Tensor, index: int) -> None:
        # Of parameters as they are after the step before.
        self.log("val", self.training_step(batch, index))

    def configure_optimizers(self) -> Any:
        bias = [p for name, p in self.named_parameters() if name.endswith("bias")]
        others = [p for name, p in self.named_parameters() if not name.endswith("bias")]
        groups = [{"params": others}, {"params": bias, "weight_decay": 0.0}]
        optimizer = getattr(torch.optim, self.kind)(groups, lr=1e-2, **self.options)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def fit(module: Net, offload: Offload | None, *, steps: int = 4, **settings: Any) -> tuple[pl.Trainer, list[Tensor]]:
    """Train; return the Trainer and this rank's parts of the parameters."""
    ranks, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    sharing = 2 if settings.keys() & {"pipeline_parallel", "tensor_parallel"} else 1
    # Stages are outermost, and ranks that share layers innermost.
    copies = ranks // sharing
    copy = rank // sharing if "tensor_parallel" in settings else rank % copies
    precision = settings.pop("precision", "32-true")
    settings["plugins"] = [] if precision == "32-true" else [MixedPrecision(precision, "cpu")]
    data = torch.randn(SAMPLES, WIDTH, generator=torch.Generator().manual_seed(1))
    loader = torch.utils.data.DataLoader(data[copy::copies].contiguous(), batch_size=4)  # type: ignore[arg-type]
    load = settings.pop("ckpt_path", None)
    mesh = {key: settings.pop(key) for key in ("zero", "tensor_parallel", "pipeline_parallel") if key in settings}
    trainer = pl.Trainer(
        strategy=MeshStrategy(offload=offload, **mesh),
        accelerator="cpu",
        devices=ranks,
        max_steps=steps,
        max_epochs=-1,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        **{"limit_val_batches": 0, "logger": False, "enable_checkpointing": False, **settings},
    )
    trainer.fit(module, loader, loader, ckpt_path=load)
    engine = trainer.strategy.engine  # type: ignore[attr-defined]
    engine.settle()
    own = [p for p in engine.parameters_by_name.values() if not held_elsewhere(p)]
    return trainer, [local_tensor(p).detach().clone() for p in own]


def close(found: Tensor, expected: Tensor) -> bool:
    return torch.allclose(found, expected, rtol=1e-5, atol=1e-7)


def both(
    place: str,
    path: str,
    overlap: bool,
    kind: str,
    options: dict[str, Any],
    settings: dict[str, Any],
    slowly: bool = False,
) -> str:
    """Return what differs between a run that offloads and one that does not; nothing if all bits are equal."""
    # Lightning does not clip for fused kernels in mixed precision, and others round differently.
    same = torch.equal if options.get("fused") or kind not in ("AdamW", "SGD") else close
    more = {"path": path} if "nvme" in PLACES[place].values() else {}
    offload = Offload(**PLACES[place], **more, overlap=overlap)  # type: ignore[arg-type]
    plain, expected = fit(Net(kind, **options), None, **settings)
    with pytest.MonkeyPatch.context() as patched:
        if overlap:
            # What gathers ahead on CPUs leaves no time for updates under the next forward pass.
            patched.setenv("MESHBOLT_FAST_PATH", "0")
        if slowly:
            run = ChunkUpdate.run

            def run_late(self: ChunkUpdate, **options: Any) -> None:
                time.sleep(0.03)
                run(self, **options)

            patched.setattr(ChunkUpdate, "run", run_late)
        moved, found = fit(Net(kind, **options), offload, **settings)
    wrong = [number for number, pair in enumerate(zip(found, expected, strict=True)) if not same(*pair)]
    if wrong:
        return f"parameters {wrong[:5]} differ by {max(float((found[n] - expected[n]).abs().max()) for n in wrong)}"
    states = []
    for trainer in (plain, moved):
        state = trainer.strategy.optimizer_state(trainer.optimizers[0])["state"]
        states.append({(p, key): local_tensor(v) for p, of in state.items() for key, v in of.items() if not v.is_meta})
    odd = sorted(states[0].keys() ^ states[1].keys()) or [
        k for k, v in states[0].items() if not torch.equal(v, states[1][k])
    ]
    return f"optimizer state differs: {odd[:5]}" if odd else ""


ROWS = [
    (place, zero, window, clip, precision, ranks)
    for place, zero, window, clip, precision, ranks in itertools.product(
        PLACES, (1, 2, 3), (1, 3), (None, 0.1), ("32-true", "bf16-mixed", "16-mixed"), (1, 2)
    )
    if zero == 3 or "parameters" not in PLACES[place]
]
QUICK = {
    ("cpu", 1, 1, None, "32-true", 2),
    ("cpu", 3, 3, 0.1, "bf16-mixed", 2),
    ("half", 2, 1, None, "16-mixed", 2),
    ("nvme", 3, 1, 0.1, "32-true", 1),
    ("nvme", 2, 3, None, "bf16-mixed", 2),
    ("hosted", 3, 1, 0.1, "bf16-mixed", 2),
    ("both", 3, 3, None, "32-true", 2),
    ("infinity", 3, 1, None, "32-true", 2),
    ("infinity", 3, 3, 0.1, "bf16-mixed", 2),
    ("infinity", 3, 1, None, "16-mixed", 1),
}


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize(
    ("place", "zero", "window", "clip", "precision", "ranks"), [row if row in QUICK else full(*row) for row in ROWS]
)
def test_it_trains_as_without(
    place: str,
    zero: int,
    window: int,
    clip: float | None,
    precision: str,
    ranks: int,
    overlap: bool,
    tmp_path: Path,
) -> None:
    settings: dict[str, Any] = {
        "zero": zero,
        "accumulate_grad_batches": window,
        "gradient_clip_val": clip,
        "precision": precision,
    }
    options = {"fused": clip is None or precision == "32-true"}
    if not options["fused"]:
        settings["steps"] = 1  # after it, other roundings of a parameter are other 16-bit activations
    found = run_ranks(both, ranks, place, str(tmp_path), overlap, "AdamW", options, settings, timeout=60)
    assert found == [""] * ranks


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("Adam", {"fused": True, "amsgrad": True}),
        ("SGD", {"fused": True, "momentum": 0.9, "nesterov": True}),
        full("SGD", {"fused": True}),
        full("Adagrad", {"fused": True}),
        ("RMSprop", {"momentum": 0.5, "foreach": False}),
        full("NAdam", {"foreach": False}),
        full("ASGD", {"foreach": False}),
    ],
)
@pytest.mark.parametrize(("place", "zero"), [("cpu", 2), full("half", 2), ("nvme", 2), full("infinity", 3)])
def test_so_does_every_optimizer(kind: str, options: dict[str, Any], place: str, zero: int, tmp_path: Path) -> None:
    assert run_ranks(both, 2, place, str(tmp_path), True, kind, options, {"zero": zero}, timeout=60) == ["", ""]


@pytest.mark.parametrize(
    ("place", "ranks", "mesh"),
    [
        ("cpu", 2, {"zero": 1, "pipeline_parallel": 2}),
        full("nvme", 2, {"zero": 1, "pipeline_parallel": 2}),
        full("cpu", 2, {"zero": 2, "pipeline_parallel": 2, **WINDOW}),
        full("nvme", 2, {"zero": 2, "pipeline_parallel": 2, **WINDOW}),
        ("infinity", 2, {"zero": 3, "pipeline_parallel": 2}),
        full("infinity", 4, {"zero": 3, "pipeline_parallel": 2, **WINDOW}),
        full("hosted", 4, {"zero": 3, "pipeline_parallel": 2, **WINDOW}),
        full("infinity", 4, {"zero": Zero(stage=3, replicate=2)}),
        full("infinity", 2, {"zero": 3, "tensor_parallel": TENSOR}),
        full("infinity", 4, {"zero": 3, "tensor_parallel": TENSOR, **WINDOW}),
        full("both", 4, {"zero": 3, "tensor_parallel": TENSOR}),
    ],
)
def test_and_every_mesh(place: str, ranks: int, mesh: dict[str, Any], tmp_path: Path) -> None:
    found = run_ranks(both, ranks, place, str(tmp_path), True, "AdamW", {"fused": True}, mesh, timeout=60)
    assert found == [""] * ranks


@pytest.mark.parametrize(("place", "zero"), [("cpu", 1), ("cpu", 3), ("infinity", 3)])
@pytest.mark.parametrize("more", [{}, {"num_sanity_val_steps": 0, "limit_val_batches": 2, "val_check_interval": 2}])
def test_updates_that_take_long_are_waited_for(place: str, zero: int, more: dict[str, Any], tmp_path: Path) -> None:
    settings = {"zero": zero, **more}
    found = run_ranks(both, 2, place, str(tmp_path), True, "AdamW", {"fused": True}, settings, True, timeout=60)
    assert found == ["", ""]
