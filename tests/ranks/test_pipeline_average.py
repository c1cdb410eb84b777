"""The average of weights that are on the ranks of a pipeline: that of one process, validated, saved, and read by any plan."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from tests.ranks.test_pipeline_checkpoint_trainer import STOP_AFTER, Model, difference, tensors_in
from tests.ranks.test_pipeline_whole_weights import LIMIT, PLANS, Values, data_of, trainer_of, values_of, whole
from tests.ranks.trainer.background_support import At
from tests.ranks.trainer.loops_support import ADVICE
from tests.rows import full

from meshbolt.callbacks import ExponentialMovingAverage
from meshbolt.cli.checkpoint.main import run as command
from meshbolt.compat import local_tensor
from meshbolt.engine.placeholders import held_elsewhere
from meshbolt.testing import run_ranks

pytestmark = [*ADVICE, pytest.mark.filterwarnings("ignore:It is recommended to use `self.log")]

DECAY = 0.7
ENTRY = "exponential_moving_average.weights."


class Reference(pl.Callback):
    """The average in one process, by its formula."""

    def __init__(self) -> None:
        self.average: Values = {}
        self.kept: Values = {}
        self.steps = 0

    @torch.no_grad()
    def on_train_batch_end(self, owner: pl.Trainer, module: pl.LightningModule, *_: Any) -> None:
        if owner.global_step == self.steps:
            return
        self.steps = owner.global_step
        for name, parameter in module.named_parameters():
            before = self.average.get(name, parameter)
            self.average[name] = DECAY * before + (1 - DECAY) * parameter

    @torch.no_grad()
    def on_validation_start(self, _owner: pl.Trainer, module: pl.LightningModule) -> None:
        self.kept = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
        for name, parameter in module.named_parameters() if self.average else ():
            parameter.copy_(self.average[name])

    @torch.no_grad()
    def on_validation_end(self, _owner: pl.Trainer, module: pl.LightningModule) -> None:
        for name, parameter in module.named_parameters():
            parameter.copy_(self.kept[name])


class Scores(pl.Callback):
    def __init__(self) -> None:
        self.found: list[float] = []

    def on_validation_end(self, owner: pl.Trainer, _module: pl.LightningModule) -> None:
        self.found.append(float(owner.callback_metrics["val"]))


def fit(name: str | None) -> tuple[Values, Values, list[float]]:
    """Return the average, the weights and what the average scored."""
    torch.manual_seed(5)
    if name is None:
        dist.destroy_process_group()
    average, scores, module = (
        Reference() if name is None else ExponentialMovingAverage(DECAY),
        Scores(),
        Model().double(),
    )
    owner = trainer_of(name, callbacks=[average, scores])
    owner.fit(module, data_of(name), data_of(name))
    if isinstance(average, Reference):
        return average.average, dict(module.named_parameters()), scores.found
    found = []
    for _ in range(2):
        with average.averaged(owner), owner.strategy.gathered(module):  # type: ignore[attr-defined]
            found.append({key: parameter.detach().clone() for key, parameter in module.named_parameters()})
    with owner.strategy.gathered(module):  # type: ignore[attr-defined]
        weights = {key: parameter.detach().clone() for key, parameter in module.named_parameters()}
    assert difference(*found) == 0.0
    return found[0], weights, scores.found


@functools.cache
def reference() -> tuple[Values, Values, list[float]]:
    (found,) = run_ranks(fit, 1, None)
    return found


@pytest.mark.parametrize(
    "name",
    [
        "pp2",
        "pp2 dp2",
        full("pp2 dp2 zero1"),
        full("pp2 dp2 zero2"),
        full("pp2 tp2"),
        full("pp2 interleaved"),
        full("pp4"),
        full("pp2 replicas"),
        full("pp2 dp2 tp2"),
    ],
)
def test_the_average_of_all_stages_is_that_of_one_process_and_is_what_is_validated(name: str) -> None:
    average, weights, scores = reference()
    assert difference(average, weights) > 1e-3
    for of_average, of_weights, found in run_ranks(fit, PLANS[name][0], name):
        assert difference(of_average, average) < LIMIT
        assert difference(of_weights, weights) < LIMIT
        assert found == pytest.approx(scores, abs=LIMIT)


HOOKS = ("on_before_optimizer_step", "on_after_backward", "on_train_batch_start", "on_validation_end")


class Shrinks(pl.Callback):
    """Makes weights of all stages and a moment smaller, wherever a Trainer lets it between two steps."""

    @torch.no_grad()
    def shrink(self, owner: pl.Trainer, module: Any, *_: Any) -> None:
        if not owner.sanity_checking:
            parts = [module.head.weight, module.blocks[3].up.weight, module.blocks[0].down.bias]
            with whole(owner, parts) as state:
                module.head.weight.mul_(0.99)
                module.blocks[3].up.weight.mul_(0.99)
                for values in (state[name] for name in ("blocks.0.down.bias",) if name in state):
                    values["exp_avg"].mul_(0.9)


for hook in HOOKS:
    setattr(Shrinks, hook, Shrinks.shrink)


def fit_in_windows(name: str | None, window: int) -> tuple[Values, list[float]]:
    """Return weights and moments, and what the average scored after every batch."""
    torch.manual_seed(5)
    if name is None:
        dist.destroy_process_group()
    average, scores = Reference() if name is None else ExponentialMovingAverage(DECAY), Scores()
    owner = trainer_of(
        name,
        callbacks=[average, scores, Shrinks()],
        accumulate_grad_batches=window,
        val_check_interval=1,
        gradient_clip_val=0.5,
    )
    owner.fit(Model().double(), data_of(name), data_of(name))
    return values_of(owner), scores.found


@pytest.mark.parametrize(
    ("name", "window"),
    [
        ("pp2", 3),
        ("pp2 dp2 zero2", 3),
        full("pp2 dp2 zero1", 3),
        full("pp2 dp2", 3),
        full("pp2 dp2", 1),
        full("pp2 tp2", 3),
        full("pp2 interleaved", 3),
        full("pp4", 3),
    ],
)
def test_windows_go_on_after_validations_and_changes_in_their_middle(name: str, window: int) -> None:
    ((values, scores),) = run_ranks(fit_in_windows, 1, None, window)
    for found, scored in run_ranks(fit_in_windows, PLANS[name][0], name, window, timeout=60):
        assert difference(found, values) < LIMIT
        assert scored == pytest.approx(scores, abs=LIMIT)


def run_on(name: str, end: Path, save: Path | None = None, load: Path | None = None) -> tuple[int, int]:
    """Train to the end and save that; return the bytes of the average that this rank has, and of the weights."""
    torch.manual_seed(5 if load is None else 6)
    module, average = Model().double(), ExponentialMovingAverage(DECAY)
    callbacks = [average] if save is None else [average, At(STOP_AFTER, do=lambda owner: owner.save_checkpoint(save))]
    owner = trainer_of(name, callbacks=callbacks)
    owner.fit(module, data_of(name), data_of(name), ckpt_path=load)
    owner.save_checkpoint(end)
    own = [parameter for parameter in module.parameters() if not held_elsewhere(parameter)]
    sizes = (sum(local_tensor(each).nbytes for each in values) for values in (average._average.values(), own))
    return next(sizes), next(sizes)


@functools.cache
def without_a_stop(folder: Path) -> Values:
    run_ranks(run_on, 1, "one", folder / "through.ckpt")
    return tensors_in(folder / "through.ckpt")


@pytest.fixture(scope="module")
def through(tmp_path_factory: pytest.TempPathFactory) -> Values:
    return without_a_stop(tmp_path_factory.mktemp("through"))


def without_counts(values: Values) -> Values:
    """Leave out how many samples a block has seen, which depends on how many others there are beside it."""
    return {key: value for key, value in values.items() if not key.endswith(".seen")}


@pytest.mark.parametrize(
    ("saving", "loading"),
    [
        full("pp2", "one"),
        ("pp2", "dp2"),
        ("dp2", "pp2 dp2"),
        full("pp2", "pp4"),
        full("one", "pp2 tp2"),
        full("pp2 tp2", "pp2 uneven"),
        full("pp2 dp2", "pp2 interleaved"),
        full("pp2 interleaved", "tp2"),
    ],
)
def test_a_run_goes_on_with_its_average_on_any_other_plan(
    tmp_path: Path, through: Values, saving: str, loading: str
) -> None:
    run_ranks(run_on, PLANS[saving][0], saving, tmp_path / "end.ckpt", tmp_path / "middle.ckpt")
    sizes = run_ranks(run_on, PLANS[loading][0], loading, tmp_path / "again.ckpt", None, tmp_path / "middle.ckpt")
    assert any(key.startswith(ENTRY) for key in through)
    for end in ("end.ckpt", "again.ckpt"):
        assert difference(without_counts(tensors_in(tmp_path / end)), without_counts(through)) < LIMIT
    # Each rank has read the average of what it holds, and no more.
    assert all(of_average == of_weights for of_average, of_weights in sizes)


def read_only(name: str, path: Path) -> int:
    """Return how much of a saved average comes to this rank with a checkpoint."""
    arrived: list[Any] = []

    class Looks(pl.Callback):
        def on_load_checkpoint(self, _owner: pl.Trainer, _module: Any, checkpoint: dict[str, Any]) -> None:
            arrived.extend(checkpoint["exponential_moving_average"]["weights"].values())

    owner = trainer_of(name, callbacks=[Looks()])
    owner.validate(Model().double(), data_of(name), ckpt_path=path, verbose=False)
    return sum(local_tensor(each).nbytes for each in arrived if not held_elsewhere(each))


def test_a_stage_reads_the_average_of_its_own_parameters_only(tmp_path: Path) -> None:
    sizes = run_ranks(run_on, 2, "pp2", tmp_path / "end.ckpt")
    assert run_ranks(read_only, 2, "pp2", tmp_path / "end.ckpt") == [size for size, _ in sizes]
    assert (
        sum(run_ranks(read_only, 2, "dp2", tmp_path / "end.ckpt"))
        < 1.1 * run_ranks(read_only, 1, "one", tmp_path / "end.ckpt")[0]
    )


class SavesMeanwhile(Model):
    """Saves a checkpoint while the average is in the place of the weights."""

    folder: Path

    def on_validation_epoch_end(self) -> None:
        self.trainer.save_checkpoint(self.folder / "meanwhile.ckpt")


def save_in_validation(name: str, folder: Path) -> None:
    torch.manual_seed(5)
    module = SavesMeanwhile().double()
    module.folder = folder
    owner = trainer_of(name, callbacks=[ExponentialMovingAverage(DECAY)], num_sanity_val_steps=0)
    owner.fit(module, data_of(name), data_of(name))
    owner.save_checkpoint(folder / "end.ckpt")


@pytest.mark.parametrize("name", ["pp2", "dp2", full("pp2 dp2")])
def test_a_checkpoint_of_a_validation_has_the_weights_under_all_their_names(tmp_path: Path, name: str) -> None:
    run_ranks(save_in_validation, PLANS[name][0], name, tmp_path)
    meanwhile, end = tensors_in(tmp_path / "meanwhile.ckpt"), tensors_in(tmp_path / "end.ckpt")
    assert {"state_dict.inp.weight", "state_dict.head.weight"} <= meanwhile.keys()
    assert difference(meanwhile, end) == 0.0


def convert(*arguments: Any) -> None:
    assert command(["checkpoint", *map(str, arguments)]) == 0


def test_the_average_is_exported_and_goes_on_from_one_file(tmp_path: Path, through: Values) -> None:
    run_ranks(run_on, 2, "pp2", tmp_path / "end.ckpt", tmp_path / "middle.ckpt")
    weights = tmp_path / "average.safetensors"
    convert("export", tmp_path / "end.ckpt", weights, "--to", "safetensors", "--weights", ENTRY.rstrip("."))
    expected = {key.removeprefix(ENTRY): value for key, value in through.items() if key.startswith(ENTRY)}
    assert difference(load_file(weights), expected) < LIMIT

    convert("consolidate", tmp_path / "middle.ckpt", tmp_path / "middle.file")
    found: dict[str, Values] = {}
    for name in ("one", "pp2", "dp2"):
        run_ranks(run_on, PLANS[name][0], name, tmp_path / name, None, tmp_path / "middle.file")
        found[name] = {key: value for key, value in tensors_in(tmp_path / name).items() if key.startswith(ENTRY)}
    # Which batches come next, such a file does not tell; they are the same on any plan.
    assert {key.removeprefix(ENTRY) for key in found["one"]} == expected.keys()
    assert difference(found["pp2"], found["one"]) < LIMIT
    assert difference(found["dp2"], found["one"]) < LIMIT
