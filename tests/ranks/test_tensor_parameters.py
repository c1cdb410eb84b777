"""Parameters of layers that ranks share, in the hands of user code: read, changed, loaded and drawn as in one process."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tests.rows import full
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, TensorDataset

import meshbolt
from meshbolt import MeshStrategy, UnsupportedError, Zero
from meshbolt.callbacks import ExponentialMovingAverage
from meshbolt.checkpoint.formats import export_checkpoint
from meshbolt.compat import whole_of
from meshbolt.demos import ByteGPT
from meshbolt.engine.deferred import Deferred, attach
from meshbolt.testing import run_ranks

LENGTH, BOUND = 4, 0.2
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@dataclass(frozen=True)
class Layout:
    """How ranks hold the module; each layer is shared by two of them, or by all."""

    ranks: int
    stage: int
    tensor: int = 2
    replicate: int = 1

    def __str__(self) -> str:
        return f"tp{self.tensor}-zero{self.stage}x{self.ranks}{'-hsdp' if self.replicate > 1 else ''}"

    def strategy(self) -> Any:
        return MeshStrategy(zero=Zero(stage=self.stage, replicate=self.replicate), tensor_parallel=self.tensor)


PLAIN = None
TWO, FOUR = Layout(2, 1), Layout(4, 3)
OTHERS = [full(Layout(4, 0)), full(Layout(4, 2)), full(Layout(4, 3, 2, 2)), full(Layout(4, 1, 4))]
LAYOUTS = [full(TWO), FOUR, *OTHERS]


class Task(pl.LightningModule):
    """Queries, keys and values lie in one projection, and tokens and head have one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[dict[str, Tensor]] = []
        self.net: Any = None
        self.build()

    def build(self) -> None:
        self.net = ByteGPT(dim=8, num_layers=1, num_heads=4, max_length=LENGTH)
        self.net.head.weight = self.net.tokens.weight
        self.double()

    def loss(self, batch: list[Tensor]) -> Tensor:
        return F.cross_entropy(self.net(batch[0]).flatten(0, 1), batch[1].flatten())

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        return self.loss(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)

    def gathered(self, **options: Any) -> Any:
        strategy = self.trainer.strategy
        return strategy.gathered(self, **options) if isinstance(strategy, MeshStrategy) else nullcontext()


def whole(value: Any) -> Tensor:
    return whole_of(value) if isinstance(value, DTensor) else value.detach().clone()


class Messages(logging.Handler):
    """Keeps what torch's loggers say."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())


def trainer_of(layout: Layout | None, **options: Any) -> pl.Trainer:
    return pl.Trainer(
        accelerator="cpu",
        devices=1 if layout is None else layout.ranks,
        strategy=pl.strategies.SingleDeviceStrategy("cpu") if layout is None else layout.strategy(),
        **{
            "max_epochs": 2,
            "num_sanity_val_steps": 0,
            "use_distributed_sampler": False,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            **options,
        },
    )


def data() -> DataLoader[Any]:
    """Return batches that are the same on every rank."""
    text = torch.randint(0, 256, (8, LENGTH + 1), generator=torch.Generator().manual_seed(3))
    return DataLoader(TensorDataset(text[:, :-1], text[:, 1:]), batch_size=4)


def fit(task: Callable[[], Task], layout: Layout | None, **options: Any) -> tuple[dict[str, Tensor], Any]:
    """Train, and return the weights at the end, and what the task has seen."""
    pl.seed_everything(0, verbose=False)
    module = task()
    trainer_of(layout, **options).fit(module, data())
    return {name: whole(value) for name, value in module.state_dict().items()}, module.seen


def largest_difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def compare(task: Callable[[], Task], layout: Layout, options: dict[str, Any]) -> float:
    """Return how far training on ranks ends from training in one process, and that torch has warned of nothing."""
    reference, expected = fit(task, PLAIN, **options)
    messages = Messages()
    for name in ("torch", "torch.distributed", "torch.distributed.tensor"):  # none passes on what it is told
        logging.getLogger(name).addHandler(messages)
    found, seen = fit(task, layout, **options)
    assert messages.said == []
    assert len(seen) == len(expected)
    return max(largest_difference(*pair) for pair in zip([found, *seen], [reference, *expected], strict=True))


# Changed in place ------------------------------------------------------------------------------------------------------


class Clamps(Task):
    """Clamps its weights in one of the places where user code has them whole."""

    def clamp(self) -> None:
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.data.clamp_(-BOUND, BOUND)


class ClampsInStep(Clamps):
    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        loss = self.loss(batch)
        self.clamp()
        return loss


class ClampsAfterBackward(Clamps):
    def on_after_backward(self) -> None:
        self.clamp()


class ClampsBetween(Clamps):
    def on_train_batch_end(self, *_: Any) -> None:
        self.clamp()


class Gathers(Task):
    """Changes whole parameters and momentum after the first batch, and looks at them after every one."""

    def on_train_batch_end(self, outputs: Any, batch: Any, index: int) -> None:
        optimizer: Any = self.optimizers(use_pl_optimizer=False)
        with self.gathered(optimizer=optimizer) as state, torch.no_grad():
            names = {parameter: name for name, parameter in self.named_parameters()}
            state = state or {names[parameter]: values for parameter, values in optimizer.state.items()}
            self.seen.append({name: parameter.detach().clone() for name, parameter in self.named_parameters()})
            self.seen.append({name: values["momentum_buffer"].clone() for name, values in state.items()})
            if index == 0:
                attention = self.net.blocks[0].attention
                attention.qkv.weight[3:11].mul_(0.5)
                attention.qkv.bias[7] = 0.25
                self.net.head.weight[5] = 0.1
                state["net.blocks.0.attention.qkv.weight"]["momentum_buffer"][:, 1] = 0.0
                state["net.blocks.0.attention.qkv.bias"]["momentum_buffer"].mul_(2.0)


class GathersInStep(Task):
    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        with self.gathered(), torch.no_grad():
            self.net.blocks[0].attention.qkv.weight[:, 2] = 0.1 * index
            self.seen.append({name: parameter.detach().clone() for name, parameter in self.named_parameters()})
        return self.loss(batch)


class ReadsAndLoads(Task):
    """Asks for its state in the middle of a step, and loads whole tensors between two."""

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        loss = self.loss(batch)
        self.seen.append({name: whole(value) for name, value in self.state_dict().items()})
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Any, index: int) -> None:
        if index == 0:
            shapes = {name: value.shape for name, value in self.state_dict().items()}
            self.load_state_dict({name: self.ramp(shape) for name, shape in shapes.items()})
            self.net.blocks[0].attention.load_state_dict(
                {name: self.ramp(value.shape) * 2 for name, value in self.net.blocks[0].attention.state_dict().items()}
            )

    def ramp(self, shape: torch.Size) -> Tensor:
        return torch.linspace(-0.3, 0.4, shape.numel(), dtype=torch.float64).view(shape)


class DrawsAgain(Task):
    """Layers that get new values when they are divided already."""

    def on_train_start(self) -> None:
        torch.manual_seed(5)
        block = self.net.blocks[0]
        nn.init.normal_(block.attention.qkv.weight, std=0.1)
        block.widen.reset_parameters()
        nn.init.trunc_normal_(block.narrow.weight, std=0.1)
        with torch.no_grad():
            block.attention.qkv.bias.uniform_(-0.1, 0.1)
            block.attention.out.weight.add_(torch.randn_like(block.attention.out.weight), alpha=0.01)
            self.net.tokens.weight.bernoulli_(0.5).mul_(0.1)


@pytest.mark.parametrize("layout", [TWO, FOUR, *OTHERS], ids=str)
@pytest.mark.parametrize(
    "task",
    [ClampsInStep, full(ClampsAfterBackward), full(ClampsBetween), Gathers, GathersInStep, ReadsAndLoads, DrawsAgain],
)
def test_what_user_code_does_to_parameters_is_done_as_in_one_process(task: type[Task], layout: Layout) -> None:
    assert max(run_ranks(compare, layout.ranks, task, layout, {})) < 1e-12


@pytest.mark.parametrize("layout", [full(TWO), FOUR], ids=str)
def test_edits_inside_of_a_window_are_kept(layout: Layout) -> None:
    options = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5, "max_epochs": 4}
    assert max(run_ranks(compare, layout.ranks, ClampsInStep, layout, options)) < 1e-12


class Assigns(Task):
    """Gives a parameter other data by assignment, in the middle of a step or between two."""

    def __init__(self, place: str, inside: bool) -> None:
        super().__init__()
        self.place, self.inside = place, inside

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        loss = self.loss(batch)
        if self.inside:
            self.assign()
        return loss

    def on_train_batch_end(self, *_: Any) -> None:
        if not self.inside:
            self.assign()

    def assign(self) -> None:
        parameter = self.get_parameter(self.place)
        parameter.data = parameter.data * 0.5


@pytest.mark.parametrize("layout", [TWO, FOUR, *OTHERS], ids=str)
@pytest.mark.parametrize("inside", [True, full(False)])
def test_data_given_by_assignment_are_refused_by_name(inside: bool, layout: Layout) -> None:
    def train() -> list[str]:
        said = []
        for place in (
            "blocks.0.attention.qkv.weight",
            "head.weight",
            "blocks.0.norm1.weight",
            "blocks.0.attention.qkv.bias",
        ):
            with pytest.raises(UnsupportedError) as refused:
                fit(functools.partial(Assigns, f"net.{place}", inside), layout)
            said.append(str(refused.value))
        return said

    for qkv, head, norm, bias in run_ranks(train, layout.ranks):
        assert "'net.blocks.0.attention.qkv.weight' was given other data by assignment" in qkv
        assert "'net.tokens.weight' was given other data by assignment" in head
        assert "'net.blocks.0.norm1.weight' was given other data by assignment" in norm
        assert "'net.blocks.0.attention.qkv.bias' was given other data by assignment" in bias


# Built late ------------------------------------------------------------------------------------------------------------


class Late(Task):
    """Builds its layers in configure_model, where they are divided before the next one is full."""

    def __init__(self, weights: Path | None = None) -> None:
        super().__init__()
        self.weights = weights

    def build(self) -> None:
        """Do nothing yet."""

    def configure_model(self) -> None:
        if self.net is None:
            super().build()
            self.fill()

    def fill(self) -> None:
        if self.weights is not None:
            meshbolt.load_pretrained(self.net, self.weights)


def starts(make: Callable[[pl.Trainer], Task], layout: Layout | None) -> dict[str, Tensor]:
    """Return the weights that a run begins with."""
    pl.seed_everything(0, verbose=False)
    trainer = trainer_of(layout, max_epochs=1, limit_train_batches=1)
    module = make(trainer)
    found: dict[str, Tensor] = {}
    module.on_train_start = lambda: found.update({n: whole(v) for n, v in module.state_dict().items()})  # type: ignore[method-assign]
    trainer.fit(module, data())
    return found


def in_configure_model(_: pl.Trainer) -> Task:
    return Late()


def in_init_module(trainer: pl.Trainer) -> Task:
    with trainer.init_module():
        return Task()


def as_noted(_: pl.Trainer) -> Task:
    deferred = Deferred()
    with deferred.building():
        module = Task()
    attach(module, deferred)
    return module


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("make", [in_configure_model, full(in_init_module), as_noted])
def test_weights_of_what_is_built_late_do_not_depend_on_the_layout(
    make: Callable[[pl.Trainer], Task], layout: Layout
) -> None:
    def run() -> float:
        # On the meta device reset_parameters() fills layers, whatever the layout; what was noted is as it would be built.
        expected = starts(lambda _: Task(), PLAIN) if make is as_noted else starts(make, Layout(layout.ranks, 3, 1))
        return largest_difference(starts(make, layout), expected)

    assert run_ranks(run, layout.ranks) == [0.0] * layout.ranks


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_pretrained_weights_are_divided(layout: Layout, tmp_path: Path) -> None:
    torch.manual_seed(7)
    weights = {name: value for name, value in Task().net.state_dict().items() if name != "head.weight"}
    save_file(weights, tmp_path / "model.safetensors")
    for found in run_ranks(starts, layout.ranks, lambda _: Late(tmp_path), layout):
        assert torch.equal(found["net.head.weight"], weights["tokens.weight"])
        assert all(torch.equal(found[f"net.{name}"], value) for name, value in weights.items())


# Averaged and saved ----------------------------------------------------------------------------------------------------


def averaged(layout: Layout, load: Path | None, save: Path | None) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Train two epochs, the second one perhaps from a checkpoint, and return the weights and their average."""
    pl.seed_everything(0, verbose=False)
    module, average = Task(), ExponentialMovingAverage(0.5)
    trainer = trainer_of(layout, callbacks=[average], max_epochs=1 if save else 2)
    trainer.fit(module, data(), ckpt_path=load)
    if save:
        trainer.save_checkpoint(save)
    weights = {name: whole(value) for name, value in module.state_dict().items()}
    with average.averaged(trainer):
        return weights, {name: whole(value) for name, value in module.state_dict().items()}


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_averages_of_divided_weights_are_those_of_whole_ones_and_go_through_checkpoints(
    layout: Layout, tmp_path: Path
) -> None:
    alone = Layout(1, 0, 1)
    weights, average = run_ranks(averaged, 1, alone, None, None)[0]
    assert largest_difference(weights, average) > 1e-3
    run_ranks(averaged, layout.ranks, layout, None, tmp_path / "shared.ckpt")
    run_ranks(averaged, 1, alone, None, tmp_path / "alone.ckpt")
    through = run_ranks(averaged, layout.ranks, layout, None, None)[-1]
    from_alone = run_ranks(averaged, layout.ranks, layout, tmp_path / "alone.ckpt", None)[-1]
    to_alone = run_ranks(averaged, 1, alone, tmp_path / "shared.ckpt", None)[0]
    for found in (through, from_alone, to_alone):
        assert largest_difference(found[0], weights) < 1e-12
        assert largest_difference(found[1], average) < 1e-12


def train_and_save(layout: Layout, path: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    pl.seed_everything(0, verbose=False)
    module, trainer = Task(), trainer_of(layout)
    trainer.fit(module, data())
    trainer.save_checkpoint(path)
    with trainer.strategy.gathered(module, optimizer=trainer.optimizers[0]) as state:  # type: ignore[attr-defined]
        momentum = {name: values["momentum_buffer"].clone() for name, values in state.items()}
    return {name: whole(value) for name, value in module.state_dict().items()}, momentum


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_checkpoint_of_divided_layers_is_a_module_and_a_file_like_any_other(layout: Layout, tmp_path: Path) -> None:
    path = tmp_path / "run.ckpt"
    expected, momentum = run_ranks(train_and_save, layout.ranks, layout, path)[0]
    assert largest_difference(dict(meshbolt.load_from_checkpoint(Task, path).state_dict()), expected) == 0.0

    export_checkpoint(path, tmp_path / "exported", to="safetensors")
    tensors: dict[str, Tensor] = {}
    for file in (tmp_path / "exported").glob("*.safetensors"):
        tensors |= load_file(file)
    tensors.setdefault("net.head.weight", tensors["net.tokens.weight"])
    assert largest_difference(tensors, expected) == 0.0

    export_checkpoint(path, tmp_path / "run.file", to="lightning")
    file = torch.load(tmp_path / "run.file", weights_only=True)
    assert largest_difference(file["state_dict"], expected) == 0.0
    assert largest_difference(dict(Task.load_from_checkpoint(tmp_path / "run.file").state_dict()), expected) == 0.0
    names = [name for name, _ in Task().named_parameters()]
    saved = {
        names[number]: values["momentum_buffer"] for number, values in file["optimizer_states"][0]["state"].items()
    }
    assert largest_difference(saved, momentum) == 0.0
