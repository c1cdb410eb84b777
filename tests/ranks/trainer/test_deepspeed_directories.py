"""Directories that DeepSpeed has written as `ckpt_path`, and in Fabric: files are made by `tests.deepspeed_fixtures`."""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from lightning.fabric import Fabric
from tests.deepspeed_fixtures import Trained, trained, write, write_plain, write_rows, write_shards
from tests.rows import full
from torch import Tensor, nn
from torch.utils.data import DataLoader

import meshbolt
from meshbolt.checkpoint.deepspeed.pieces import Pieces
from meshbolt.deepspeed import WarmupLR
from meshbolt.fabric import MeshStrategy as FabricStrategy
from meshbolt.plugins import MixedPrecision
from meshbolt.testing import run_ranks

SHAPES = [
    {"words.weight": (11, 6), "layers.0.weight": (13, 6), "layers.2.weight": (6, 13)},
    {"layers.0.bias": (13,), "layers.2.bias": (6,)},
]


QUIET: dict[str, Any] = {
    "logger": False,
    "enable_progress_bar": False,
    "enable_checkpointing": False,
    "enable_model_summary": False,
    "use_distributed_sampler": False,
}


class Inner(nn.Module):
    """Uneven sizes, tied weights, a frozen layer and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(11, 6)
        self.layers = nn.Sequential(nn.Linear(6, 13), nn.Tanh(), nn.Linear(13, 6))
        self.old = nn.Linear(6, 6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.words.weight
        self.old.requires_grad_(False)
        self.register_buffer("count", torch.zeros(3, dtype=torch.long))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.words(tokens)
        scores: Tensor = self.head(x + self.layers(x) + self.old(x))
        return scores


def groups_of(module: nn.Module) -> list[dict[str, Any]]:
    """Return the groups, in another order than DeepSpeed has them and with a frozen weight in one."""
    named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    weights = [p for _, p in reversed(named) if p.dim() > 1]
    frozen = [p for p in module.parameters() if not p.requires_grad]
    return [{"params": [*weights, *frozen]}, {"params": [p for _, p in named if p.dim() == 1]}]


class Net(pl.LightningModule):
    """A module whose attribute an engine of DeepSpeed's has trained."""

    def __init__(self, scheduler: Callable[[Any], Any] | None = None) -> None:
        super().__init__()
        torch.manual_seed(dist.get_rank() if dist.is_initialized() else 0)
        self.inner = Inner()
        self.scheduler = scheduler or (lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 100))
        self.found: dict[str, Any] = {}

    def training_step(self, tokens: Tensor, _index: int) -> Tensor:
        return self.inner(tokens).logsumexp(-1).mean()

    def test_step(self, tokens: Tensor, batch_idx: int) -> None:
        self.inner(tokens)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(groups_of(self), lr=0.5)
        return [optimizer], [{"scheduler": self.scheduler(optimizer), "interval": "step"}]

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(torch.arange(16).view(4, 4) % 11, batch_size=2)  # type: ignore[arg-type]

    def on_train_start(self) -> None:
        (optimizer,) = self.trainer.optimizers
        with self.trainer.strategy.gathered(self, optimizer=optimizer) as state:
            self.found = {
                "weights": {name: value.detach().clone() for name, value in self.inner.state_dict().items()},
                "moments": {name: {key: value.clone() for key, value in kept.items()} for name, kept in state.items()},
                "steps": self.trainer.global_step,
                "rates": [group["lr"] for group in optimizer.param_groups],
                "scale": self.trainer.precision_plugin.state_dict(),
                "schedule": self.trainer.lr_scheduler_configs[0].scheduler.last_epoch,
            }


def run(**options: Any) -> Trained:
    """Return what the module was trained to."""
    return trained(
        SHAPES,
        **{
            "frozen": {"old.weight": torch.randn(6, 6), "old.bias": torch.randn(6)},
            "buffers": {"count": torch.tensor([4, 5, 6])},
            "tied": {"head.weight": "words.weight"},
            **options,
        },
    )


def fitted(path: Path | str, *, module: Net | None = None, **settings: Any) -> Net:
    """Fit from a directory."""
    module = module or Net()
    trainer = pl.Trainer(
        strategy=meshbolt.MeshStrategy(**settings),
        accelerator="cpu",
        devices=dist.get_world_size(),
        max_epochs=1,
        **QUIET,
    )
    trainer.fit(module, ckpt_path=path)
    return module


def assert_is(found: dict[str, Any], expected: Trained) -> None:
    """Check weights, moments, steps, rates and the schedule."""
    assert found["weights"].keys() == expected.weights().keys()
    for name, value in expected.weights().items():
        assert torch.equal(found["weights"][name], value), name
    for name in expected.masters:
        kept = found["moments"][f"inner.{name}"]
        assert kept["step"].item() == expected.step
        for key, values in expected.moments.items():
            assert torch.equal(kept[key], values[name]), (name, key)
    assert (found["steps"], found["schedule"]) == (10, 7)
    assert found["rates"] == [0.1, 0.05]


def taken_up(paths: dict[str, Path], expected: Trained, settings: dict[str, Any]) -> None:
    for path in paths.values():
        assert_is(fitted(path, **settings).found, expected)


@pytest.mark.parametrize(
    ("ranks", "settings"),
    [
        (2, {"zero": 3}),
        (1, {"zero": 1}),
        full(2, {"zero": 0}),
        full(2, {"zero": 1}),
        full(2, {"zero": 2}),
        full(3, {"zero": 3}),
        full(2, {"zero": 2, "offload": "cpu"}),
        (2, {"zero": 1, "pipeline_parallel": meshbolt.PipelineParallel(2, cuts=["inner.layers"], microbatches=2)}),
    ],
)
def test_a_fit_takes_up_what_deepspeed_has_saved_under_any_plan(
    ranks: int, settings: dict[str, Any], tmp_path: Path
) -> None:
    expected = run(dtype=torch.bfloat16)
    write_rows(tmp_path / "two", expected, stage=2)
    paths = {"rows": tmp_path / "two", "shards": write_shards(tmp_path / "three", expected, pieces=50)}
    run_ranks(taken_up, ranks, paths, expected, settings, timeout=60)


def scaled(path: Path) -> None:
    plugin = MixedPrecision("16-mixed", "cpu", hysteresis=2)
    trainer = pl.Trainer(
        strategy=meshbolt.MeshStrategy(zero=2), accelerator="cpu", devices=2, max_epochs=1, plugins=[plugin], **QUIET
    )
    module = Net()
    trainer.fit(module, ckpt_path=path)
    assert module.found["scale"] == {
        **module.found["scale"],
        "scale": 64.0,
        "_growth_tracker": 3,
        "_hysteresis_tracker": 1,
    }


def test_a_fit_in_16_bits_takes_up_the_loss_scale_and_its_counters(tmp_path: Path) -> None:
    write_rows(tmp_path, run(dtype=torch.float16, loss_scale=64.0))
    run_ranks(scaled, 2, tmp_path)


def only_weights(path: Path, expected: Trained) -> None:
    module = fitted(path, checkpoint=meshbolt.Checkpoint(load_weights_only=True))
    assert torch.equal(module.found["weights"]["words.weight"], expected.masters["words.weight"])
    assert (module.found["moments"], module.found["steps"], module.found["rates"]) == ({}, 0, [0.5, 0.5])
    other = Net()
    trainer = pl.Trainer(strategy=meshbolt.MeshStrategy(), accelerator="cpu", devices=2, **QUIET)
    trainer.test(other, DataLoader(torch.arange(8).view(2, 4)), ckpt_path=path)  # type: ignore[arg-type]
    with trainer.strategy.gathered(other):  # type: ignore[attr-defined]
        assert torch.equal(other.inner.layers[0].weight, expected.masters["layers.0.weight"])


def test_a_fit_takes_only_weights_where_that_is_asked_for_and_so_does_a_test(tmp_path: Path) -> None:
    expected = run()
    write_rows(tmp_path, expected)
    run_ranks(only_weights, 2, tmp_path, expected)


def elements_read(path: Path) -> int:
    counts = []
    read = Pieces.read

    def counted(self: Pieces, start: int, stop: int) -> Iterator[Tensor]:
        for part in read(self, start, stop):
            counts.append(part.numel())
            yield part

    Pieces.read = counted  # type: ignore[method-assign]  # of this rank, a process of its own
    fitted(path, zero=3)
    return sum(counts)


def test_each_rank_reads_its_shards_and_nothing_else(tmp_path: Path) -> None:
    expected = run()
    write_shards(tmp_path, expected, pieces=50)
    found = run_ranks(elements_read, 2, tmp_path)
    trained_ones = sum(value.numel() for value in expected.masters.values())
    tied, buffers = expected.masters["words.weight"].numel(), 3
    frozen = sum(value.numel() for value in expected.frozen.values())
    # Weights and two moments once in all; a tied weight under both names; buffers, which every rank has.
    assert sum(found) == 3 * trained_ones + tied + frozen + 2 * buffers
    assert max(found) < 0.55 * sum(found)


def in_fabric(path: Path, expected: Trained) -> None:
    fabric = Fabric(accelerator="cpu", devices=2, strategy=FabricStrategy(zero=2))
    fabric.launch()
    inner = Inner()
    model, optimizer = fabric.setup(inner, torch.optim.AdamW(groups_of(inner), lr=0.5))
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 100)
    state = {"model": model, "adam": optimizer, "rates": scheduler, "epoch": 0}
    rest = fabric.load(path, state)
    assert (state["epoch"], scheduler.last_epoch) == (4, 7)
    assert rest == {"global_steps": 10, "global_samples": 40, "skipped_steps": 1}
    other, fresh = Inner(), Inner()
    model_of_weights, raw = fabric.setup(other, torch.optim.AdamW(groups_of(other), lr=0.5))
    fabric.load_raw(path, model_of_weights)
    fabric.load_raw(path, raw)
    for each, adam in ((inner, optimizer), (other, raw)):
        with fabric.strategy.gathered(each, optimizer=adam) as moments:  # type: ignore[attr-defined]
            found = {name: value.detach() for name, value in each.state_dict().items()}
            assert all(torch.equal(found[name], value) for name, value in expected.weights().items())
            for name in expected.masters:
                assert torch.equal(moments[name]["exp_avg_sq"], expected.moments["exp_avg_sq"][name])
    with pytest.raises(meshbolt.CheckpointError, match="saves one module, and 'one' and 'two' are both given"):
        fabric.load(path, {"one": model, "two": model_of_weights})
    del fresh


def test_fabric_finds_who_takes_what_by_their_kind_and_returns_the_rest(tmp_path: Path) -> None:
    expected = run(client={"epoch": 4})
    write_rows(tmp_path, expected)
    run_ranks(in_fabric, 2, tmp_path, expected)


def refusal(path: str, module: Net | None) -> str:
    with pytest.raises(meshbolt.CheckpointError) as error:
        fitted(path, module=module, zero=2)
    return str(error.value)


def refused(folder: Path) -> None:
    def warm(optimizer: Any) -> Any:
        return WarmupLR(optimizer, warmup_max_lr=0.5)

    cases: dict[str, Any] = {
        "cut": (None, "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt", "cannot be read"),
        "lost": (None, "data-parallel ranks [0] are missing"),
        "strange": (None, "tests.ranks.trainer.test_deepspeed_directories.Strange", "weights_only=False"),
        "schedule": (None, "StepLR", "meshbolt.deepspeed.WarmupLR"),
        "other": (Net(warm), "do not fit this module, nor an attribute of it", "inner.count", "words.other"),
        "torchs": (Net(warm), "another learning rate schedule than WarmupLR", "step_size"),
        "saves/global_step9": (None, "under other tags: global_step10", "the directory alone"),
        f"saves/global_step10/{RANK_FILE}": (None, "one of the files", "Give the directory"),
        "saves/latest": (None, "one of the files", "Give the directory"),
        "seen by one rank": (None, "own is not the same on all ranks", "file system that all ranks share"),
    }
    os.chdir(folder / f"rank{dist.get_rank()}")
    for name, (module, *words) in cases.items():
        found = refusal("own" if name.startswith("seen") else str(folder / name), module)
        others: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(others, found)
        assert others == [found] * len(others), name
        assert not [word for word in words if word not in found], (name, found)


RANK_FILE = "mp_rank_00_model_states.pt"


class Strange:
    """A class that no file may build by itself."""


def test_what_cannot_be_loaded_is_the_same_error_on_every_rank(tmp_path: Path) -> None:
    place = write_rows(tmp_path / "cut", run(), bf16=True)
    path = place / "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    (write_rows(tmp_path / "lost", run()) / "zero_pp_rank_0_mp_rank_00_optim_states.pt").unlink()
    write_rows(tmp_path / "strange", run(client={"mine": Strange()}))
    place = write_rows(tmp_path / "schedule", run())
    write(place / "mp_rank_00_model_states.pt", run().common(lr_scheduler={"last_batch_iteration": 3}))
    write_plain(tmp_path / "other", trained([{"words.other": (3, 2)}]), kind="torch")
    scheduler = torch.optim.lr_scheduler.StepLR(torch.optim.SGD([torch.zeros(1)], lr=0.1), 2)
    write(write_rows(tmp_path / "torchs", run()) / RANK_FILE, run().common(lr_scheduler=scheduler.state_dict()))
    write_rows(tmp_path / "saves", run())
    write_rows(tmp_path / "rank0" / "own", run())
    (tmp_path / "rank1").mkdir()
    run_ranks(refused, 2, tmp_path, timeout=60)


class Averaged(Net):
    """A copy of the module beside it, and another head."""

    strict_loading = False

    def __init__(self, *, freezes: bool = True) -> None:
        super().__init__()
        self.average = copy.deepcopy(self.inner)
        if freezes:
            self.average.requires_grad_(False)
        self.inner.more = nn.Linear(6, 2).requires_grad_(False)


def what_fits(path: Path, expected: Trained) -> None:
    module = Averaged()
    before = {name: value.clone() for name, value in module.average.state_dict().items()}
    fitted(path, module=module, zero=2)
    found = module.found["weights"]
    assert all(torch.equal(found[name], value) for name, value in expected.weights().items())
    trainer = pl.Trainer(strategy=meshbolt.MeshStrategy(zero=3), accelerator="cpu", devices=2, **QUIET)
    module = Averaged()
    trainer.test(module, DataLoader(torch.arange(8).view(2, 4)), ckpt_path=path)  # type: ignore[arg-type]
    with trainer.strategy.gathered(module):  # type: ignore[attr-defined]
        assert torch.equal(module.inner.head.weight, expected.masters["words.weight"])
        if dist.get_rank() == 0:
            assert all(torch.equal(value, before[name]) for name, value in module.average.state_dict().items())
    with pytest.raises(meshbolt.CheckpointError, match=r"self.average, self.inner. Freeze those"):
        fitted(path, module=Averaged(freezes=False))


def test_of_a_module_that_has_changed_what_fits_is_loaded_into_the_part_that_is_trained(tmp_path: Path) -> None:
    expected = run()
    write_rows(tmp_path, expected)
    run_ranks(what_fits, 2, tmp_path, expected)
    with pytest.warns(UserWarning, match="Found keys that are in the model state dict but not in the checkpoint"):
        module = meshbolt.load_from_checkpoint(Averaged, tmp_path)
    assert all(torch.equal(module.inner.state_dict()[name], value) for name, value in expected.weights().items())


class InOrder(Net):
    """With an optimizer whose groups are in the order of the save."""

    def configure_optimizers(self) -> Any:
        named = dict(self.inner.named_parameters())
        optimizer = torch.optim.AdamW([{"params": [named[name] for name in group]} for group in SHAPES])
        return [optimizer], [{"scheduler": self.scheduler(optimizer), "interval": "step"}]


def said_of(path: Path, words: str, module: Net) -> None:
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("meshbolt").addHandler(handler)
    fitted(path, module=module, zero=2)
    assert [words in each for each in said if "checkpoint" not in each] == [True] * (dist.get_rank() == 0), said


def said(paths: dict[str, Path]) -> None:
    said_of(paths["scale"], "(64) is not taken", Net())
    said_of(paths["numbers"], "has numbers for parameters, no names", InOrder())


def test_a_loss_scale_that_is_not_taken_and_state_by_number_are_said_once(tmp_path: Path) -> None:
    paths = {"scale": tmp_path / "scale", "numbers": tmp_path / "numbers"}
    write_rows(paths["scale"], run(dtype=torch.float16, loss_scale=64.0))
    write_plain(paths["numbers"], run(dtype=torch.float32), kind="torch")
    run_ranks(said, 2, paths)


def test_a_module_is_built_from_weights_that_were_those_of_its_attribute(tmp_path: Path) -> None:
    expected = run()
    write_shards(tmp_path, expected)
    module = meshbolt.load_from_checkpoint(Net, tmp_path)
    assert all(torch.equal(module.inner.state_dict()[name], value) for name, value in expected.weights().items())
    assert module.inner.head.weight is module.inner.words.weight
