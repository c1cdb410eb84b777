"""A Trainer's run over a pipeline that stops: any plan goes on from its checkpoint as if it had not, and it from any other's."""

from __future__ import annotations

import functools
import tempfile
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
from torchmetrics import MeanMetric

import meshbolt
from meshbolt import Checkpoint, MeshStrategy, PipelineParallel, TensorParallel
from meshbolt.checkpoint.reader import CheckpointReader
from meshbolt.compat import local_tensor
from meshbolt.engine.placeholders import held_elsewhere
from meshbolt.testing import run_ranks

pytestmark = [*ADVICE, pytest.mark.filterwarnings("ignore:It is recommended to use `self.log")]

SAMPLES, BATCH, MICROBATCHES = 32, 8, 4
STOP_AFTER, EPOCHS = 3, 2
LIMIT = 1e-12  # float64

Values = dict[str, Tensor]


class Block(nn.Module):
    """A residual block that counts the samples it has seen."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.seen += len(x)
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

    def validation_step(self, batch: Any, _index: int) -> None:
        self.log("val", F.mse_loss(self(batch[0]), batch[1]), sync_dist=True)

    def configure_optimizers(self) -> Any:
        biases = [parameter for name, parameter in self.named_parameters() if name.endswith("bias")]
        others = [parameter for name, parameter in self.named_parameters() if not name.endswith("bias")]
        groups = [{"params": others, "weight_decay": 0.1}, {"params": biases, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=1e-2)
        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9), "interval": "step"}]


def pipeline(size: int, *cuts: int, schedule: str = "1f1b") -> PipelineParallel:
    return PipelineParallel(size, microbatches=MICROBATCHES, schedule=schedule, cuts=[f"blocks.{cut}" for cut in cuts])


TENSOR = TensorParallel(2, plan={"blocks.*.up": "colwise", "blocks.*.down": "rowwise"})
INTERLEAVED = pipeline(2, 1, 2, 3, schedule="interleaved_1f1b")
# The number of ranks, how many of them see different samples, and the strategy's arguments.
PLANS: dict[str, tuple[int, int, dict[str, Any]]] = {
    "one": (1, 1, {}),
    "dp2": (2, 2, {"zero": 3}),
    "tp2": (2, 1, {"tensor_parallel": TENSOR}),
    "pp2": (2, 1, {"zero": 1, "pipeline_parallel": pipeline(2, 2)}),
    "pp2 uneven": (2, 1, {"zero": 3, "pipeline_parallel": pipeline(2, 1)}),
    "pp2 interleaved": (2, 1, {"zero": 2, "pipeline_parallel": INTERLEAVED}),
    "pp4": (4, 1, {"zero": 0, "pipeline_parallel": pipeline(4, 1, 2, 3)}),
    "pp2 dp2": (4, 2, {"zero": 3, "pipeline_parallel": pipeline(2, 2)}),
    "pp2 tp2": (4, 1, {"zero": 2, "pipeline_parallel": pipeline(2, 2), "tensor_parallel": TENSOR}),
}


PLAIN = Checkpoint()


def batches(coordinate: int, coordinates: int) -> DataLoader[Any]:
    """Return a coordinate's part of batches that are the same however many there are."""
    x = torch.randn(SAMPLES, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    y = torch.sin(2 * x)
    each = BATCH // coordinates
    mine = torch.arange(SAMPLES).view(-1, coordinates, each)[:, coordinate].flatten()
    return DataLoader(TensorDataset(x[mine], y[mine]), batch_size=each)


QUIET: dict[str, Any] = {
    "max_epochs": EPOCHS,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "use_distributed_sampler": False,
}


def trainer_of(name: str, *, policy: Checkpoint, **options: Any) -> pl.Trainer:
    ranks, _, arguments = PLANS[name]
    strategy = MeshStrategy(checkpoint=policy, **arguments)
    return pl.Trainer(accelerator="cpu", devices=ranks, strategy=strategy, **QUIET, **options)


def fit(
    name: str,
    end: Path,
    *,
    load: Path | None = None,
    save: Path | None = None,
    frozen: bool = False,
    policy: Checkpoint = PLAIN,
    **options: Any,
) -> float:
    """Train to the end, and save what there is then; return the loss that was logged for the last epoch."""
    _, coordinates, arguments = PLANS[name]
    if policy.asynchronous:
        slow_writer(0.2)  # the run goes on meanwhile
    torch.manual_seed(5 if load is None or frozen else 6)  # what is frozen may have to be there already
    module = Model(frozen=frozen).double()
    callbacks = [] if save is None else [At(STOP_AFTER, do=lambda owner: owner.save_checkpoint(save))]
    trainer = trainer_of(name, policy=policy, callbacks=callbacks, **options)
    coordinate = dist.get_rank() // (2 if "tensor_parallel" in arguments else 1) % coordinates
    trainer.fit(module, batches(coordinate, coordinates), ckpt_path=load)
    trainer.save_checkpoint(end)
    return float(trainer.callback_metrics["loss_epoch"])


def tensors_in(path: Path) -> dict[str, Tensor]:
    with CheckpointReader(path) as reader:
        return {key: reader.read(key) for key in reader.tensors if not key.startswith("meshbolt.")}


def difference(ours: Values, theirs: Values) -> float:
    assert ours.keys() == theirs.keys()
    return max(float((ours[key].double() - theirs[key].double()).abs().max()) for key in ours)


def run(name: str, end: Path, **options: Any) -> float:
    first, *others = run_ranks(functools.partial(fit, **options), PLANS[name][0], name, end)
    assert others == [first] * len(others)
    return first


@functools.cache
def uninterrupted() -> tuple[Values, float]:
    """Return what one process has in the end, and what it has logged."""
    with tempfile.TemporaryDirectory() as folder:
        logged = run("one", Path(folder) / "end.ckpt")
        return tensors_in(Path(folder) / "end.ckpt"), logged


def check_end(path: Path, *, counts: bool = True) -> None:
    ours, expected = tensors_in(path), uninterrupted()[0]
    kept = {key for key in expected if counts or not key.endswith(".seen")}
    assert difference({key: ours[key] for key in kept}, {key: expected[key] for key in kept}) < LIMIT
    assert ours.keys() == expected.keys()


@pytest.mark.parametrize(
    ("saving", "loading"),
    [
        ("pp2", "one"),
        ("one", "pp2"),
        full("pp2 dp2", "pp2 uneven"),
        ("pp2 interleaved", "tp2"),
        full("pp2", "pp4"),
        full("pp4", "pp2 dp2"),
        full("pp2 uneven", "pp2 interleaved"),
        full("tp2", "pp2 tp2"),
        full("pp2 tp2", "pp2 dp2"),
        full("dp2", "pp4"),
        full("pp2 dp2", "dp2"),
        full("pp2 dp2", "pp2 dp2"),
    ],
)
def test_a_run_that_stops_ends_on_any_other_plan_as_one_that_does_not(
    tmp_path: Path, saving: str, loading: str
) -> None:
    run(saving, tmp_path / "end.ckpt", save=tmp_path / "middle.ckpt")
    logged = run(loading, tmp_path / "again.ckpt", load=tmp_path / "middle.ckpt")
    # How many samples a block has seen depends on how many others there are beside it.
    counts = PLANS[saving][1] == PLANS[loading][1] == 1
    check_end(tmp_path / "end.ckpt", counts=counts)
    check_end(tmp_path / "again.ckpt", counts=counts)
    assert abs(logged - uninterrupted()[1]) < LIMIT


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"policy": Checkpoint(asynchronous=True)}, id="in the background"),
        # The last save is between the two batches of a window.
        full({"accumulate_grad_batches": 2}, id="in a window"),
        full({"policy": Checkpoint(trainable_only=True), "frozen": True}, id="trainable only"),
    ],
)
def test_a_pipeline_goes_on_from_its_own_checkpoint(tmp_path: Path, options: dict[str, Any]) -> None:
    options = {"save": tmp_path / "middle.ckpt", **options}
    run("pp2", tmp_path / "end.ckpt", **options)
    run("pp2", tmp_path / "again.ckpt", **{**options, "save": None, "load": tmp_path / "middle.ckpt"})
    run("one", tmp_path / "one.ckpt", **{**options, "save": None})
    expected = tensors_in(tmp_path / "one.ckpt")
    for end in ("end.ckpt", "again.ckpt"):
        assert difference(tensors_in(tmp_path / end), expected) < LIMIT
    assert ("state_dict.blocks.3.up.weight" in expected) != options.get("frozen", False)


def write_lightnings_file(path: Path) -> None:
    torch.manual_seed(5)
    save = At(STOP_AFTER, do=lambda owner: owner.save_checkpoint(path))
    trainer = pl.Trainer(accelerator="cpu", callbacks=[save], **QUIET)
    trainer.fit(Model().double(), batches(0, 1))


def test_a_file_of_lightnings_own_is_read_by_every_stage(tmp_path: Path) -> None:
    run_ranks(write_lightnings_file, 1, tmp_path / "middle.ckpt")
    for name in ("one", "pp2"):
        run(name, tmp_path / name, load=tmp_path / "middle.ckpt")
    # Which batches come next, Lightning's file does not tell; they are the same on any plan.
    assert difference(tensors_in(tmp_path / "pp2"), tensors_in(tmp_path / "one")) < LIMIT


def test_any_process_reads_it_without_ranks(tmp_path: Path) -> None:
    run("pp2", tmp_path / "end.ckpt")
    state = meshbolt.load_from_checkpoint(Model, tmp_path / "end.ckpt").state_dict()
    expected = {key.removeprefix("state_dict."): value for key, value in tensors_in(tmp_path / "end.ckpt").items()}
    assert difference(dict(state), {key: expected[key].to(state[key].dtype) for key in state}) == 0.0


def validate(name: str, path: Path) -> tuple[float, int]:
    """Return the loss of weights from a checkpoint, and how many bytes of parameters this rank has."""
    module = Model().double()
    trainer = trainer_of(name, policy=PLAIN)
    trainer.validate(module, batches(0, 1), ckpt_path=path, verbose=False)
    held = {parameter for parameter in module.parameters() if not held_elsewhere(parameter)}
    return float(trainer.callback_metrics["val"]), sum(local_tensor(parameter).nbytes for parameter in held)


def test_stages_validate_the_weights_of_one_process_and_have_no_others_than_their_own(tmp_path: Path) -> None:
    run("one", tmp_path / "end.ckpt")
    ((expected, whole),) = run_ranks(validate, 1, "one", tmp_path / "end.ckpt")
    (first, ours), (second, theirs) = run_ranks(validate, 2, "pp2", tmp_path / "end.ckpt")
    assert first == second == pytest.approx(expected, abs=LIMIT)
    tied = Model().double().inp.weight.nbytes
    assert ours + theirs == whole + tied


class Counting(Block):
    """Keeps a count that is no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x)

    def get_extra_state(self) -> Any:
        return self.calls

    def set_extra_state(self, state: Any) -> None:
        self.calls = state


class Keeps(Model):
    """State of every kind: in units and outside, before and after the model; and layers that stop training."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Counting() for _ in range(4))
        self.register_buffer("before", torch.zeros(()))
        self.register_buffer("after", torch.zeros(()))
        self.average = MeanMetric()
        self.average.persistent(True)

    def on_train_batch_start(self, *_: Any) -> None:
        for block in self.blocks if self.global_step == 2 else ():
            block.up.requires_grad_(False)

    def training_step(self, batch: Any, index: int) -> Tensor:
        self.before += 1
        loss = super().training_step(batch, index)
        self.after += 1
        self.average.update(loss.detach())
        return loss


def save_what_is_kept(path: Path) -> None:
    module = Keeps().double()
    save = At(STOP_AFTER, do=lambda owner: owner.save_checkpoint(path))
    trainer_of("pp2", policy=Checkpoint(trainable_only=True), callbacks=[save]).fit(module, batches(0, 1))


def test_state_is_taken_from_whoever_keeps_it_up_to_date(tmp_path: Path) -> None:
    run_ranks(save_what_is_kept, 2, tmp_path / "a.ckpt")
    with CheckpointReader(tmp_path / "a.ckpt") as reader:
        state = reader.tree()["state_dict"]
        steps = STOP_AFTER * MICROBATCHES
        assert [state[f"blocks.{number}._extra_state"] for number in range(4)] == [steps] * 4
        assert [float(state[name]) for name in ("before", "after", "average.weight")] == [steps] * 3
    # What was trained before it was frozen is saved, whichever stage has it.
    assert {f"blocks.{number}.up.weight" for number in range(4)} <= state.keys()
