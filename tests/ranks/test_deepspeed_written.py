"""Checkpoints that DeepSpeed itself has written: they hold what it gathers, and training goes on with its losses.

All need DeepSpeed, and are skipped without it; `tests.deepspeed_checkpoints` says how they are made.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from tests.deepspeed_checkpoints import (
    AFTER,
    BEFORE,
    KINDS,
    SAMPLES,
    Net,
    Wrapped,
    batches_of,
    config_of,
    groups_of,
    loss_of,
    piped,
    take_step,
    train_batch,
    write_all,
)
from tests.rows import full
from torch import Tensor, nn
from torch.utils.data import DataLoader

import meshbolt
from meshbolt.checkpoint.deepspeed import open_deepspeed
from meshbolt.checkpoint.formats import import_checkpoint
from meshbolt.checkpoint.reader import CheckpointReader
from meshbolt.deepspeed import WarmupLR, trainer_arguments
from meshbolt.testing import run_ranks

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed"),
    pytest.mark.filterwarnings("ignore"),  # DeepSpeed's own
    pytest.mark.timeout(1800),  # the first one waits till DeepSpeed has compiled its operations and written all kinds
]

# What trains in float32 with AdamW, and saves all of it.
EXACT = [
    name
    for name, kind in KINDS.items()
    if (kind.dtype, kind.save) == ("fp32", {}) and kind.how != "pipeline" and "sgd" not in name and "json" not in name
]
ENGINES = [name for name in EXACT if KINDS[name].how == "engine"]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write all kinds, once; what cannot be written fails in its own row."""
    out = tmp_path_factory.mktemp("deepspeed")
    for name, why in write_all(KINDS, out).items():
        (out / name / "failed").write_text(why)
    return out


def truth_of(folder: Path) -> dict[str, Any]:
    """Return what DeepSpeed says of a checkpoint."""
    if (folder / "failed").exists():
        pytest.skip(f"DeepSpeed cannot write it here: {(folder / 'failed').read_text()}")
    found: dict[str, Any] = torch.load(folder / "truth.pt")
    return found


def values(tensor: Any) -> Tensor:
    """Return a tensor that may be in a file, in memory."""
    found: Tensor = tensor.value() if hasattr(tensor, "value") else tensor
    return found


def assert_weights(found: Mapping[str, Any], truth: Mapping[str, Tensor], *, lacking: tuple[str, ...] = ()) -> None:
    """Check that weights are DeepSpeed's own to the last bit."""
    layers = {name for name in truth if name.startswith(("0.", "4.", "tied_modules."))}
    assert (
        found.keys() | layers == {name for name in truth if not name.removeprefix("net.").startswith(lacking)} | layers
    )
    for name, tensor in found.items():
        expected = truth[name]
        if tensor.dtype == torch.float32:
            expected = expected.float()  # DeepSpeed has no master weights of what is frozen
        assert torch.equal(values(tensor), expected), name


def assert_moments(found: Mapping[Any, Any], truth: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Check that moments are DeepSpeed's own to the last bit."""
    if any(isinstance(name, int) for name in found):
        # Nobody but the script knows the order of an optimizer's parameters.
        module = Net()
        names = {parameter: name for name, parameter in module.named_parameters()}
        order = [names[parameter] for group in groups_of(module) for parameter in group["params"]]
        before = "net." if "net.embedding.weight" in truth else ""
        found = {f"{before}{order[number]}": state for number, state in found.items()}
    for name, state in truth.items():
        # Tied weights have state under the name of their owner.
        owners = (name, name.replace("head", "embedding"), "tied_modules.embedding.weight", "0.weight")
        kept = found[next(owner for owner in owners if owner in found)]
        assert state.keys() == kept.keys() - {"step"}
        for key, value in state.items():
            assert torch.equal(values(kept[key]), value), (name, key)


@pytest.mark.parametrize("name", [full(name) for name in KINDS])
def test_weights_and_moments_are_those_that_deepspeed_gathers(name: str, written: Path, tmp_path: Path) -> None:
    folder, kind = written / name, KINDS[name]
    truth = truth_of(folder)
    lacking = ("frozen.",) if kind.save else ()
    opened = open_deepspeed(folder / "saved", weights_only=kind.how != "lightning")
    assert opened.global_steps == BEFORE
    assert opened.optimizer is not None
    assert_weights(opened.weights, truth["weights"], lacking=lacking)
    assert_moments(opened.optimizer["state"], truth["optimizer"])
    import_checkpoint(folder / "saved", tmp_path / "ours", weights_only=kind.how != "lightning")
    with CheckpointReader(tmp_path / "ours") as reader:
        tree = reader.tree()
        assert_weights(tree["state_dict"], truth["weights"], lacking=lacking)
        assert_moments(tree["optimizer_states"][0]["state"], truth["optimizer"])


class Going(Wrapped):
    """The same module, that goes on.

    Args:
        optimizer: "lightning": the one of Lightning's run; "engine": that of an engine's script; None: the JSON's.
    """

    def __init__(self, *, optimizer: str | None) -> None:
        super().__init__()
        self.optimizer = optimizer
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.fill_(9)

    def on_train_batch_start(self, _batch: Any, _index: int) -> None:
        self.net.settled = True

    def training_step(self, tokens: Tensor, _index: int) -> Tensor:
        loss = loss_of(self.net(tokens), tokens)
        self.log("loss", loss, sync_dist=True)
        return loss

    def on_train_batch_end(self, *_: Any) -> None:
        self.losses.append(float(self.trainer.callback_metrics["loss"]))

    def configure_optimizers(self) -> Any:
        if self.optimizer != "engine":
            return super().configure_optimizers() if self.optimizer else None
        optimizer = torch.optim.AdamW(groups_of(self))
        schedule = WarmupLR(optimizer, warmup_max_lr=2e-2, warmup_num_steps=6, warmup_min_lr=1e-3)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "max_epochs": 1,
    "use_distributed_sampler": False,
    "enable_progress_bar": False,
    "enable_checkpointing": False,
    "enable_model_summary": False,
    "logger": False,
}


def in_trainer(path: Path, truth: dict[str, Any], settings: dict[str, Any], plain: bool) -> None:
    strategy = meshbolt.MeshStrategy(**settings)
    ranks = 1 if "tensor_parallel" in settings or "pipeline_parallel" in settings else dist.get_world_size()
    # A loader without a state begins anew, with Lightning as well: what is left comes first.
    batches = batches_of(rank=dist.get_rank() % ranks, size=ranks)
    batches = batches[BEFORE:] + ([] if plain else batches[:BEFORE])
    trainer = pl.Trainer(strategy=strategy, devices=dist.get_world_size(), gradient_clip_val=0.5, **QUIET)
    module = Going(optimizer="engine" if plain else "lightning")
    trainer.fit(module, DataLoader(batches, batch_size=None), ckpt_path=path)  # type: ignore[arg-type]
    assert trainer.global_step == BEFORE + AFTER
    assert_losses(module.losses, truth)
    assert [group["lr"] for group in trainer.optimizers[0].param_groups] == pytest.approx(truth["lr"])
    with strategy.gathered(module):
        found = {name if not plain else name.removeprefix("net."): p for name, p in module.named_parameters()}
        for name, parameter in found.items():
            torch.testing.assert_close(parameter.detach(), truth["after"][name], rtol=1e-4, atol=1e-6)


def assert_losses(losses: list[float], truth: Mapping[str, Any]) -> None:
    """Check that losses are DeepSpeed's next ones."""
    assert len(losses) == AFTER
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(truth["losses"]), rtol=1e-5, atol=1e-6)


def goes_on(name: str, written: Path, ranks: int, settings: dict[str, Any]) -> None:
    truth = truth_of(written / name)
    plain = KINDS[name].how == "engine"
    run_ranks(in_trainer, ranks, written / name / "saved", truth, settings, plain, timeout=120)


@pytest.mark.parametrize("name", [full(name) for name in EXACT])
def test_a_fit_goes_on_with_deepspeeds_next_losses(name: str, written: Path) -> None:
    goes_on(name, written, 2, {"zero": 3 - KINDS[name].stage})


PLANS = [
    *((ranks, {"zero": stage}) for ranks in (1, 2) for stage in range(4)),
    (3, {"zero": 2}),
    (2, {"zero": 2, "offload": "cpu"}),
    (2, {"zero": 0, "tensor_parallel": 2}),
    (2, {"zero": 1, "pipeline_parallel": meshbolt.PipelineParallel(2, microbatches=2, cuts=["net.layers"])}),
]


@pytest.mark.parametrize("name", [full("zero2_fp32"), full("zero3_pieces"), full("lightning_zero3")])
@pytest.mark.parametrize(("ranks", "settings"), PLANS)
def test_a_fit_goes_on_under_any_plan(name: str, ranks: int, settings: dict[str, Any], written: Path) -> None:
    goes_on(name, written, ranks, settings)


def with_json(path: Path, truth: dict[str, Any], stage: int) -> None:
    config = {**config_of(KINDS["zero1_json"], folder=path.parent), "zero_optimization": {"stage": stage}}
    trainer = pl.Trainer(**trainer_arguments(config, show=False), devices=dist.get_world_size(), **QUIET)
    module = Going(optimizer=None)
    samples = torch.cat(batches_of(rank=dist.get_rank(), size=dist.get_world_size())[BEFORE:])
    loader = DataLoader(samples, batch_size=SAMPLES // dist.get_world_size())  # type: ignore[arg-type]
    trainer.fit(module, loader, ckpt_path=path)
    assert_losses(module.losses, truth)


@pytest.mark.parametrize(("ranks", "stage"), [full(1, 2), full(2, 0), full(2, 1), full(2, 3)])
def test_deepspeeds_json_and_its_directory_go_on_in_a_trainer(ranks: int, stage: int, written: Path) -> None:
    truth = truth_of(written / "zero1_json")
    run_ranks(with_json, ranks, written / "zero1_json" / "saved", truth, stage, timeout=120)


# Beside float32's limits: DeepSpeed reduces gradients in 16 bits, meshbolt in float32, so that they differ by half a unit of the
# last place (2e-3 in bfloat16, 2.4e-4 in float16), and so do weights and losses.
LIMITS = {"fp32": 1e-5, "bf16": 2e-3, "fp16": 2.5e-4}


def in_engine(path: Path, name: str, truth: dict[str, Any], stage: int) -> None:
    kind = KINDS[name]
    module = Net(affine=kind.dtype == "fp32")
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(9)
    module.settled = True
    groups = groups_of(module)
    engine, *_ = meshbolt.initialize(
        model=module,
        optimizer=torch.optim.AdamW(groups),
        model_parameters=groups,
        config={**config_of(kind, folder=path.parent), "zero_optimization": {"stage": stage}},
    )
    place, client = engine.load_checkpoint(str(path))
    assert place == str(path / f"global_step{BEFORE}")
    assert client == {"note": "of the user's", "numbers": [1, 2, 3]}
    assert engine.global_steps == BEFORE
    if kind.dtype == "fp16":
        scaler = engine.fabric.strategy.precision.loss_scaler.state_dict()
        assert (scaler["scale"], scaler["_growth_tracker"]) == (256.0, BEFORE - 1)
    losses = [take_step(engine, BEFORE + step) for step in range(AFTER)]
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(truth["losses"]), rtol=LIMITS[kind.dtype], atol=1e-6)


@pytest.mark.parametrize("stage", [full(0), full(1), full(2), full(3)])
@pytest.mark.parametrize(
    "name",
    [*(f"zero{stage}_fp32" for stage in range(4)), "zero2_elastic", "zero2_bf16", "bf16_optimizer", "zero3_fp16"],
)
def test_a_loop_of_deepspeeds_goes_on_from_what_it_has_saved(name: str, stage: int, written: Path) -> None:
    truth = truth_of(written / name)
    run_ranks(in_engine, 2, written / name / "saved", name, truth, stage, timeout=120)


def in_pipeline(path: Path, name: str, truth: dict[str, Any]) -> None:
    module: nn.Module = piped(meshbolt.deepspeed.pipe)
    groups = groups_of(module)
    config = config_of(KINDS[name], folder=path.parent)
    engine, *_ = meshbolt.initialize(
        model=module,
        optimizer=torch.optim.AdamW(groups),
        model_parameters=groups,
        config={**config, "gradient_accumulation_steps": 2},
    )
    engine.load_checkpoint(str(path))
    assert_losses([train_batch(engine, BEFORE + step) for step in range(AFTER)], truth)


@pytest.mark.parametrize("name", [full("pipeline"), full("pipeline_zero1")])
def test_a_pipeline_goes_on_with_deepspeeds_next_losses(name: str, written: Path) -> None:
    truth = truth_of(written / name)
    run_ranks(in_pipeline, KINDS[name].ranks, written / name / "saved", name, truth, timeout=180)
