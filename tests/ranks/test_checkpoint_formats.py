"""Checkpoints that ranks have written, in every other format and back: bit-equal, and Lightning's Trainer goes on from them."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from lightning.pytorch.strategies import ModelParallelStrategy
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, TensorDataset

import meshbolt
from meshbolt.checkpoint.chunks import bytes_of
from meshbolt.checkpoint.formats import ExportOptions, export_checkpoint, import_checkpoint
from meshbolt.checkpoint.reader import CheckpointReader
from meshbolt.testing import run_ranks

STAGES = (1, 2, 3)
SAMPLES = 24


class Model(pl.LightningModule):
    """Tied weights, a parameter without dimensions, buffers, hyperparameters, and sizes that no number of ranks divides."""

    def __init__(self, width: int = 7, named: bool = False) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.named = named
        self.into, self.out = nn.Linear(5, width), nn.Linear(width, 5)
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(2))
        self.tied = nn.Linear(5, width)
        self.tied.weight = self.into.weight
        self.scale = nn.Parameter(torch.tensor(1.25))
        self.register_buffer("seen", torch.zeros(3, dtype=torch.int64))
        self.losses: list[float] = []

    def training_step(self, batch: Sequence[Tensor], _index: int) -> Tensor:
        x = self.into(batch[0]) + self.tied(batch[0])
        for block in self.blocks:
            x = x + torch.tanh(block(x))
        self.seen += 1
        return F.mse_loss(self.out(x) * self.scale, batch[1])

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        loss = outputs["loss"].detach().clone()
        dist.all_reduce(loss)
        self.losses.append(float(loss) / dist.get_world_size())

    def configure_optimizers(self) -> Any:
        parameters = self.named_parameters() if self.named else self.parameters()
        optimizer = torch.optim.AdamW(parameters, lr=1e-2)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)]


def made(**options: Any) -> Model:
    torch.manual_seed(7)
    return Model(**options).double()


def loader(*, whole: bool) -> DataLoader[Any]:
    """Return this rank's batches, or for one process each with the samples of all ranks."""
    world, rank = dist.get_world_size(), dist.get_rank()
    x = torch.randn(SAMPLES, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    y = torch.sin(2 * x)
    each = SAMPLES // 2 // world
    if whole:
        return DataLoader(TensorDataset(x, y), batch_size=each * world)
    mine = torch.arange(SAMPLES).view(2, world, each)[:, rank].flatten()
    return DataLoader(TensorDataset(x[mine], y[mine]), batch_size=each)


def fit(strategy: str, *, epochs: int, path: Any = None, whole: bool = False, **options: Any) -> pl.Trainer:
    trainer = pl.Trainer(
        strategy=strategy,
        accelerator="cpu",
        devices=1 if whole else dist.get_world_size(),
        max_epochs=epochs,
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(made(**options), loader(whole=whole), ckpt_path=path)
    return trainer


def trained_under_each_stage(folder: Path) -> dict[int, dict[str, Tensor]]:
    weights = {}
    for stage in STAGES:
        trainer = fit(f"zero{stage}", epochs=1)
        trainer.save_checkpoint(folder / f"zero{stage}.ckpt")
        module = trainer.lightning_module
        with trainer.strategy.gathered(module):
            weights[stage] = {name: value.detach().clone() for name, value in module.state_dict().items()}
    return weights


@pytest.fixture(scope="module", params=[1, 2, 3])
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[int, Any]]:
    folder = tmp_path_factory.mktemp(f"ranks{request.param}")
    return folder, run_ranks(trained_under_each_stage, request.param, folder)[0]


def contents(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    with CheckpointReader(path) as reader:
        return {key: reader.read(key) for key in reader.tensors}, reader.objects()


def same(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors are of the same bits, which NaN too can be."""
    return (one.shape, one.dtype, bytes_of(one.contiguous())) == (
        other.shape,
        other.dtype,
        bytes_of(other.contiguous()),
    )


def assert_equal(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    different = [key for key in found if not same(found[key], expected[key])]
    assert not different


@pytest.mark.parametrize("stage", STAGES)
def test_a_module_is_built_from_the_directory_with_its_hyperparameters(saved: Any, stage: int) -> None:
    folder, weights = saved
    module = meshbolt.load_from_checkpoint(Model, folder / f"zero{stage}.ckpt")
    assert module.hparams.width == 7
    assert module.into.weight is module.tied.weight
    expected = {name: value.to(module.state_dict()[name].dtype) for name, value in weights[stage].items()}
    assert_equal(dict(module.state_dict()), expected)
    assert_equal(dict(meshbolt.load_from_checkpoint(Double, folder / f"zero{stage}.ckpt").state_dict()), weights[stage])


class Double(Model):
    """Holds its parameters in float64 from the beginning, as those of the checkpoints are."""

    def __init__(self, width: int = 7, named: bool = False) -> None:
        super().__init__(width, named)
        self.double()


@pytest.mark.parametrize("stage", STAGES)
def test_weights_are_the_same_in_safetensors_whole_and_in_shards(saved: Any, stage: int, tmp_path: Path) -> None:
    folder, weights = saved
    path = folder / f"zero{stage}.ckpt"
    export_checkpoint(path, tmp_path / "one.safetensors", to="safetensors")
    export_checkpoint(path, tmp_path / "many", to="safetensors", options=ExportOptions(max_shard_bytes=600))
    assert_equal(load_file(tmp_path / "one.safetensors"), weights[stage])
    shards = sorted((tmp_path / "many").glob("*.safetensors"))
    assert len(shards) > 2
    assert_equal({key: value for shard in shards for key, value in load_file(shard).items()}, weights[stage])
    import_checkpoint(tmp_path / "many", tmp_path / "again.ckpt")
    again, _ = contents(tmp_path / "again.ckpt")
    assert_equal({key.removeprefix("state_dict."): value for key, value in again.items()}, weights[stage])


@pytest.mark.parametrize("stage", STAGES)
def test_one_file_holds_what_lightning_would_write(saved: Any, stage: int, tmp_path: Path) -> None:
    folder, weights = saved
    export_checkpoint(folder / f"zero{stage}.ckpt", tmp_path / "whole.ckpt", to="lightning")
    assert zipfile.ZipFile(tmp_path / "whole.ckpt").testzip() is None, "other programs find a wrong checksum"
    for mapped in (False, True):
        content = torch.load(tmp_path / "whole.ckpt", weights_only=True, mmap=mapped)
        assert_equal(dict(content["state_dict"]), weights[stage])
    tensors, objects = contents(folder / f"zero{stage}.ckpt")
    names = objects["optimizer_states"][0]["param_groups"][0]["params"]
    state = content["optimizer_states"][0]
    assert state["param_groups"][0]["params"] == list(range(len(names)))
    for number, name in enumerate(names):
        for item in ("exp_avg", "exp_avg_sq", "step"):
            assert torch.equal(state["state"][number][item], tensors[f"optimizer_states.0.state.{name}.{item}"])
    assert "meshbolt" not in content
    module = Double.load_from_checkpoint(tmp_path / "whole.ckpt")
    assert_equal(dict(module.state_dict()), weights[stage])


@pytest.mark.parametrize("stage", STAGES)
def test_a_dcp_directory_is_read_by_torch_and_imported_bit_by_bit(saved: Any, stage: int, tmp_path: Path) -> None:
    folder, weights = saved
    path = folder / f"zero{stage}.ckpt"
    export_checkpoint(path, tmp_path / "dcp", to="dcp")
    dcp_to_torch_save(tmp_path / "dcp", tmp_path / "torch.pt")
    content = torch.load(tmp_path / "torch.pt", weights_only=True)
    assert_equal(content["state_dict"], weights[stage])
    assert content["global_step"] == 2
    import_checkpoint(tmp_path / "dcp", tmp_path / "again.ckpt")
    again, expected = contents(tmp_path / "again.ckpt"), contents(path)
    assert_equal(again[0], expected[0])
    assert again[1] == expected[1]


def next_losses(strategy: str, path: Path, **options: Any) -> list[float]:
    return fit(strategy, epochs=3, path=path, **options).lightning_module.losses


def resumed_from_each_form(folder: Path) -> dict[str, list[float]]:
    fit("zero2", epochs=1).save_checkpoint(folder / "run.ckpt")
    if dist.get_rank() == 0:
        export_checkpoint(folder / "run.ckpt", folder / "whole.ckpt", to="lightning")
        export_checkpoint(folder / "run.ckpt", folder / "dcp", to="dcp")
    dist.barrier()
    return {
        "directory": next_losses("zero2", folder / "run.ckpt"),
        "file under Lightning alone": next_losses("auto", folder / "whole.ckpt", whole=True),
    }


def resumed_from_imports(folder: Path) -> dict[str, list[float]]:
    return {name: next_losses("zero3", folder / f"{name}.ckpt") for name in ("from_file", "from_dcp")}


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_lightnings_trainer_goes_on_from_the_file_and_ours_from_imports_with_the_same_losses(tmp_path: Path) -> None:
    found = run_ranks(resumed_from_each_form, 2, tmp_path)[0]
    import_checkpoint(tmp_path / "whole.ckpt", tmp_path / "from_file.ckpt")
    import_checkpoint(tmp_path / "dcp", tmp_path / "from_dcp.ckpt")
    found |= run_ranks(resumed_from_imports, 3, tmp_path)[0]
    expected = found["directory"]
    assert len(expected) == 4
    for name, losses in found.items():
        assert losses == pytest.approx(expected, abs=1e-12), name


def test_a_file_that_tells_the_parameters_names_is_imported_by_name(tmp_path: Path) -> None:
    run_ranks(plain_file, 1, tmp_path / "plain.ckpt", True)
    done = import_checkpoint(tmp_path / "plain.ckpt", tmp_path / "named.ckpt")
    assert done.notes == ()
    _, objects = contents(tmp_path / "named.ckpt")
    assert "blocks.0.weight" in objects["optimizer_states"][0]["state"]
    assert "optimizer_states.0.state.blocks.0.weight.exp_avg" in objects["meshbolt"]["sharded"]


def test_a_file_that_does_not_is_imported_by_number_and_says_so(tmp_path: Path) -> None:
    run_ranks(plain_file, 1, tmp_path / "plain.ckpt", False)
    done = import_checkpoint(tmp_path / "plain.ckpt", tmp_path / "numbered.ckpt")
    assert "by number" in done.notes[0]
    found = run_ranks(resumed_from_a_plain_file, 2, tmp_path)[0]
    assert found["import"] == pytest.approx(found["file"], abs=1e-12)


def plain_file(path: Path, named: bool) -> None:
    fit("auto", epochs=1, whole=True, named=named).save_checkpoint(path)


def resumed_from_a_plain_file(folder: Path) -> dict[str, list[float]]:
    return {
        "file": next_losses("auto", folder / "plain.ckpt", whole=True),
        "import": next_losses("zero2", folder / "numbered.ckpt"),
    }


def converted_by_one_rank(folder: Path) -> bool:
    fit("zero3", epochs=1).save_checkpoint(folder / "run.ckpt")
    if dist.get_rank() == 1:
        export_checkpoint(folder / "run.ckpt", folder / "dcp", to="dcp")
        module = meshbolt.load_from_checkpoint(Double, folder / "run.ckpt")
        export_checkpoint(folder / "run.ckpt", folder / "one.safetensors", to="safetensors")
        assert_equal(dict(module.state_dict()), load_file(folder / "one.safetensors"))
    dist.barrier()
    return True


def test_one_rank_may_load_and_convert_while_the_others_do_something_else(tmp_path: Path) -> None:
    assert run_ranks(converted_by_one_rank, 2, tmp_path) == [True, True]


class Sharded(Model):
    """Shards its blocks, as Lightning's own strategy asks for; the rest stays whole."""

    def configure_model(self) -> None:
        for block in self.blocks:
            fully_shard(block, mesh=self.device_mesh["data_parallel"])


def under_lightnings_strategy(folder: Path) -> dict[str, Tensor]:
    trainer = pl.Trainer(
        strategy=ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1),
        accelerator="cpu",
        devices=2,
        max_epochs=1,
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    torch.manual_seed(7)
    module = Sharded()
    trainer.fit(module, DataLoader(TensorDataset(torch.randn(4, 5), torch.randn(4, 5)), batch_size=2))
    trainer.save_checkpoint(folder / "theirs.ckpt")
    state = module.state_dict()
    return {name: value.full_tensor() if isinstance(value, DTensor) else value.clone() for name, value in state.items()}


def test_a_directory_of_lightnings_own_strategy_is_imported_with_its_optimizer_by_name(tmp_path: Path) -> None:
    weights = run_ranks(under_lightnings_strategy, 2, tmp_path)[0]
    done = import_checkpoint(tmp_path / "theirs.ckpt", tmp_path / "ours.ckpt")
    assert (done.format, done.notes) == ("dcp", ())
    tensors, objects = contents(tmp_path / "ours.ckpt")
    assert_equal(
        {key.removeprefix("state_dict."): tensors[key] for key in tensors if key.startswith("state_")}, weights
    )
    assert objects["global_step"] == 2
    assert tensors["optimizer_states.0.state.blocks.0.weight.exp_avg"].shape == (7, 7)
    assert_equal(dict(meshbolt.load_from_checkpoint(Model, tmp_path / "ours.ckpt").state_dict()), weights)


def begun_from(path: Path) -> tuple[int, dict[str, Tensor]]:
    strategy = meshbolt.MeshStrategy(zero=2, checkpoint=meshbolt.Checkpoint(load_weights_only=True))
    seen = {}

    class Look(pl.Callback):
        def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            with trainer.strategy.gathered(pl_module):
                seen.update({name: value.detach().clone() for name, value in pl_module.state_dict().items()})

    trainer = pl.Trainer(
        strategy=strategy,
        accelerator="cpu",
        devices=2,
        max_epochs=1,
        callbacks=[Look()],
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Double(), loader(whole=False), ckpt_path=path)
    return trainer.global_step, seen


def test_a_run_begins_from_imported_weights(saved: Any, tmp_path: Path) -> None:
    folder, weights = saved
    export_checkpoint(folder / "zero3.ckpt", tmp_path / "weights", to="safetensors")
    import_checkpoint(tmp_path / "weights", tmp_path / "start.ckpt")
    steps, seen = run_ranks(begun_from, 2, tmp_path / "start.ckpt")[0]
    assert steps == 2
    assert_equal(seen, weights[3])
