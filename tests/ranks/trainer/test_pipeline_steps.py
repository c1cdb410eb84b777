"""Steps as users write them run through stages as in one process, or are refused with what to do instead."""

from __future__ import annotations

import re
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from tests.ranks.trainer.test_pipeline_fit import CLASSES, WIDTH, Layer, data
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from meshbolt import MeshStrategy, PipelineParallel
from meshbolt.compat import whole_of
from meshbolt.engine.placeholders import held_elsewhere
from meshbolt.testing import run_ranks

pytestmark = pytest.mark.filterwarnings(
    "ignore:It is recommended to use:lightning.fabric.utilities.warnings.PossibleUserWarning"
)


class Plain(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, CLASSES)
        self.layers = nn.ModuleList(Layer() for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)]


class ReadsOptimizers(Plain):
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        self.log("rate", self.optimizers().param_groups[0]["lr"])
        self.log("next", float(self.lr_schedulers().get_last_lr()[0]))
        return super().training_step(batch, batch_idx)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, CLASSES)
        self.layers = nn.ModuleList(Layer() for _ in range(4))

    forward = Plain.forward


class TwiceRegistered(Plain):
    """Its layers have two names, of which the first is not that under which they are called."""

    def __init__(self) -> None:
        pl.LightningModule.__init__(self)
        net = Net()
        self.encoder = net.layers
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class LooksBeforeTheHead(Plain):
    """Reads a value after the last layer, where a look without values ends."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for layer in self.layers:
            x = layer(x)
        if torch.isnan(x).any():
            raise RuntimeError("NaN")
        return self.head(x)


def fit(kind: type[Plain], settings: dict[str, Any] | None) -> tuple[dict[str, Tensor], dict[str, float]]:
    torch.set_default_dtype(torch.float64)
    pl.seed_everything(1, verbose=False)
    module = kind()
    trainer = pl.Trainer(
        strategy=MeshStrategy(**settings) if settings else "auto",
        accelerator="cpu",
        devices=2 if settings else 1,
        precision="64-true",
        max_epochs=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    try:
        trainer.fit(module, data(1, 0))
    finally:
        torch.set_default_dtype(torch.float32)
    held = {name: p for name, p in module.named_parameters() if not held_elsewhere(p)}
    weights = {name: (whole_of(p) if isinstance(p, DTensor) else p).detach().clone() for name, p in held.items()}
    return weights, {name: value.item() for name, value in trainer.callback_metrics.items()}


@pytest.mark.parametrize("kind", [ReadsOptimizers, TwiceRegistered, LooksBeforeTheHead])
def test_a_step_trains_as_in_one_process(kind: type[Plain]) -> None:
    ((expected, metrics),) = run_ranks(fit, 1, kind, None)
    results = run_ranks(fit, 2, kind, {"pipeline_parallel": 2, "zero": 1})
    merged = {name: value for weights, _ in results for name, value in weights.items()}
    assert merged.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(merged[name], value, rtol=0.0, atol=1e-12, msg=name)
    assert all(found == pytest.approx(metrics, abs=1e-12) for _, found in results)


class ClipsByItself(Plain):
    def configure_gradient_clipping(self, optimizer: Any, *_: Any, **__: Any) -> None:
        torch.nn.utils.clip_grad_norm_(self.parameters(), 0.1)


class LogsNorms(Plain):
    def on_before_optimizer_step(self, optimizer: Any) -> None:
        pl.utilities.grad_norm(self, norm_type=2)


class BranchesAmongLayers(Plain):
    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for layer in self.layers:
            x = layer(x)
            if x.mean() > 100:
                break
        return self.head(x)


class Optimises(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


class CallsItself(Plain):
    def on_train_epoch_start(self) -> None:
        self(torch.zeros(1, WIDTH))


def refused(kind: type[Plain], settings: dict[str, Any]) -> str:
    try:
        fit(kind, settings)
    except Exception as error:  # every kind is looked at by the test
        return f"{type(error).__name__}: {error}"
    return "nothing"


@pytest.mark.parametrize(
    ("kind", "pipeline", "message"),
    [
        (ClipsByItself, {}, r"UnsupportedError: clip_grad_norm_\(\) was called .* self\.clip_gradients"),
        (LogsNorms, {}, r"UnsupportedError: grad_norm\(\) was called .*strategy\.grad_norm"),
        (BranchesAmongLayers, {}, r"UnsupportedError: The step cannot be cut.*'layers\.1' comes after.*\.item\(\)"),
        (Optimises, {}, r"UnsupportedError: Optimises optimises by itself"),
        (CallsItself, {}, r"UnsupportedError: '(embed|layers.0)' was called outside of a step"),
        (Plain, {"cuts": ["layers.9"]}, r"ConfigError: .*no module 'layers\.9'"),
        (Plain, {"microbatches": 9}, r"ConfigError: .*microbatches=9.*8 samples"),
        (Plain, {"blocks": "layers", "split": [1, 2]}, r"ConfigError: .*4 blocks.*distributes 3"),
    ],
)
def test_what_cannot_be_is_refused_on_every_rank(kind: type[Plain], pipeline: dict[str, Any], message: str) -> None:
    settings = {"pipeline_parallel": PipelineParallel(2, **pipeline), "zero": 1}
    for found in run_ranks(refused, 2, kind, settings):
        assert re.match(message, found, re.DOTALL), found
