"""Whole weights and moments of all stages, on every rank of a pipeline, to read and to change; afterwards no rank keeps them."""

from __future__ import annotations

import contextlib
import functools
import gc
import weakref
from collections.abc import Iterator
from typing import Any

import lightning.fabric as lf
import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from tests.ranks.test_pipeline_checkpoint_trainer import PLANS as SOME_PLANS
from tests.ranks.test_pipeline_checkpoint_trainer import QUIET, TENSOR, Model, batches, pipeline
from tests.ranks.test_pipeline_fabric import BATCH, WIDTH, Net, loss_of
from tests.ranks.trainer.loops_support import ADVICE
from tests.rows import full
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from meshbolt import ConfigError, MeshStrategy, TensorParallel, Zero
from meshbolt.engine.placeholders import held_elsewhere
from meshbolt.fabric import MeshStrategy as FabricMeshStrategy
from meshbolt.testing import RankFailure, run_ranks, run_ranks_expecting

pytestmark = [*ADVICE, pytest.mark.filterwarnings("ignore:It is recommended to use `self.log")]

LIMIT = 1e-12  # float64
PLANS = {
    **SOME_PLANS,
    "pp2 dp2 zero1": (4, 2, {"zero": 1, "pipeline_parallel": pipeline(2, 2)}),
    "pp2 dp2 zero2": (4, 2, {"zero": 2, "pipeline_parallel": pipeline(2, 2)}),
    "pp2 replicas": (4, 2, {"zero": Zero(2, replicate=2), "pipeline_parallel": pipeline(2, 2)}),
    "pp2 dp2 tp2": (8, 2, {"zero": 3, "pipeline_parallel": pipeline(2, 2), "tensor_parallel": TENSOR}),
}
GATHERED = TensorParallel(2, plan={"layers.*.0": "colwise_gather"})
ALL_RANKS, RANK_0, ANOTHER = 1, 3, 5  # after how many steps each makes a change

Values = dict[str, Tensor]


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


@contextlib.contextmanager
def whole(owner: pl.Trainer, wanted: Any, *, moments: bool = True) -> Iterator[Any]:
    """Hold whole tensors, or have them anyway: weights in the module, and moments by name and key."""
    optimizer: Any = owner.optimizers[0]
    if isinstance(owner.strategy, MeshStrategy):
        with owner.strategy.gathered(wanted, optimizer=optimizer if moments else None) as state:
            yield state
    else:
        names = {parameter: name for name, parameter in owner.lightning_module.named_parameters()}
        yield {names[parameter]: values for parameter, values in optimizer.state.items()}


def values_of(owner: pl.Trainer) -> Values:
    module = owner.lightning_module
    with whole(owner, module) as state:
        weights = {name: p.detach().clone() for name, p in module.named_parameters(remove_duplicate=False)}
        return weights | {f"{key} {n}": v.clone() for n, values in state.items() for key, v in values.items()}


class Changes(pl.Callback):
    """Changes weights and moments of the first, the last and a shared layer, between two steps."""

    @torch.no_grad()
    def on_train_batch_end(self, owner: pl.Trainer, module: Any, *_: Any) -> None:
        step = owner.global_step
        if step == ALL_RANKS:
            with whole(owner, module) as state:
                for parameter in module.parameters():
                    parameter.clamp_(-0.2, 0.2)
                for name in ("inp.weight", "blocks.3.down.bias", "scale"):
                    state[name]["exp_avg"].mul_(0.5)
        elif step == RANK_0:
            # Past autograd, and only in the second halves: other ranks hold them, under ZeRO and tensor parallelism too.
            parts = [
                module.head.weight,
                module.blocks[0].up.weight,
                module.blocks[3].up.weight,
                module.blocks[3].down.bias,
            ]
            with whole(owner, parts) as state:
                if rank() == 0:
                    for part in (module.head.weight, module.blocks[0].up.weight, module.blocks[3].up.weight):
                        part.data[len(part) // 2 :] *= 0.5
                    state["blocks.3.down.bias"]["exp_avg_sq"][4:] += 1e-4
        elif step == ANOTHER and isinstance(owner.strategy, MeshStrategy):
            with whole(owner, [module.blocks[3].up.weight, module.inp.weight]):
                if rank() > 0:
                    module.blocks[3].up.weight.mul_(7)
                    module.inp.weight.mul_(7)


def trainer_of(name: str | None, **options: Any) -> pl.Trainer:
    options = {**QUIET, "accelerator": "cpu", **options}
    if name is None:
        return pl.Trainer(**options)
    ranks, _, arguments = PLANS[name]
    return pl.Trainer(strategy=MeshStrategy(**arguments), devices=ranks, **options)


def data_of(name: str | None) -> Any:
    if name is None:
        return batches(0, 1)
    _, coordinates, arguments = PLANS[name]
    return batches(rank() // (2 if "tensor_parallel" in arguments else 1) % coordinates, coordinates)


def train(name: str | None, window: int) -> Values:
    torch.manual_seed(5)
    if name is None:
        dist.destroy_process_group()
    owner = trainer_of(name, callbacks=[Changes()], accumulate_grad_batches=window, max_epochs=2 * window)
    owner.fit(Model().double(), data_of(name))
    return values_of(owner)


@functools.cache
def reference(window: int) -> Values:
    (found,) = run_ranks(train, 1, None, window)
    return found


@pytest.mark.parametrize(
    ("name", "window"),
    [
        ("pp2", 1),
        ("pp2 dp2", 2),
        full("pp2 dp2", 1),
        full("pp2 dp2 zero1", 2),
        full("pp2 dp2 zero2", 2),
        full("pp2 uneven", 2),
        ("pp2 tp2", 1),
        full("pp2 interleaved", 1),
        full("pp4", 1),
        full("pp2 replicas", 1),
        full("pp2 dp2 tp2", 2),
        full("dp2", 2),
        full("tp2", 1),
    ],
)
def test_every_rank_reads_and_changes_what_all_stages_hold(name: str, window: int) -> None:
    expected = reference(window)
    for found in run_ranks(train, PLANS[name][0], name, window):
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value, rtol=0.0, atol=LIMIT, msg=f"{key}: {{}}".format)


class Sent(TorchDispatchMode):
    """Counts the bytes of tensors that a rank has broadcast, or taken from one that has."""

    num_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.c10d.broadcast_.default:
            self.num_bytes += sum(tensor.nbytes for tensor in args[0])
        return func(*args, **(kwargs or {}))


def held(module: nn.Module) -> set[str]:
    return {name for name, p in module.named_parameters(remove_duplicate=False) if not held_elsewhere(p)}


def look(name: str) -> list[Any]:
    owner = trainer_of(name, max_steps=1)
    owner.fit(module := Model().double(), data_of(name))
    before, placeholders = held(module), dict(module.named_parameters())
    asked = {"blocks.0.up.weight", "blocks.3.up.weight"}
    found: list[Any] = []
    with Sent() as sent, whole(owner, [module.get_parameter(each) for each in asked], moments=False):
        found.append(held(module) == before | asked)
        stand_ins = [weakref.ref(module.get_parameter(each)) for each in asked]
        with whole(owner, module):
            found.append(held(module) == {name for name, _ in module.named_parameters(remove_duplicate=False)})
            with whole(owner, module.head):
                found.append(module.head.weight is module.inp.weight)
        found.append(held(module) == before | asked)
    again = dict(module.named_parameters())
    found.append(all(again[each] is placeholders[each] for each in again))
    gc.collect()
    found.append(all(each() is None for each in stand_ins))
    with Sent() as sent, whole(owner, [module.get_parameter(each) for each in asked], moments=False):
        pass
    flags = len(asked) + 1  # which were changed, and whether any was replaced
    return [*found, sent.num_bytes - flags == sum(again[each].numel() * 8 for each in asked)]


@pytest.mark.parametrize("name", ["pp2", full("pp2 dp2"), full("pp2 tp2")])
def test_only_what_is_asked_for_travels_and_nothing_is_kept(name: str) -> None:
    assert run_ranks(look, PLANS[name][0], name) == [[True] * 7] * PLANS[name][0]


def train_in_fabric(ranks: int, settings: dict[str, Any] | None) -> Values:
    if settings is None:
        dist.destroy_process_group()
    torch.set_default_dtype(torch.float64)  # to which a plain Fabric converts what a module returns
    fabric = lf.Fabric(
        accelerator="cpu",
        devices=ranks,
        precision="64-true",
        strategy=FabricMeshStrategy(**settings) if settings else "auto",
    )
    fabric.launch()
    torch.manual_seed(1)
    module = Net()
    model, optimizer = fabric.setup(module, torch.optim.AdamW(module.parameters(), lr=0.01))
    own, size = (fabric.strategy.data_parallel_rank, fabric.strategy.data_parallel_size) if settings else (0, 1)
    found: Values = {}
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        drawn = {key: torch.randn(BATCH, WIDTH, generator=generator) for key in ("x", "y")}
        batch = {key: value[own::size] for key, value in drawn.items()}
        if settings:
            fabric.strategy.pipeline_step(batch, loss_of)
        else:
            fabric.backward(loss_of(model, batch))
        optimizer.step()
        optimizer.zero_grad()
        gathered = fabric.strategy.gathered(module, optimizer=optimizer) if settings else contextlib.nullcontext()
        with gathered, torch.no_grad():
            for parameter in module.parameters():
                parameter.clamp_(-0.3, 0.3)
            found = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    torch.set_default_dtype(torch.float32)
    return found


@pytest.mark.parametrize(
    ("ranks", "settings"),
    [
        (2, {"pipeline_parallel": 2, "zero": 1}),
        full(4, {"pipeline_parallel": 2, "zero": 3}),
        full(4, {"pipeline_parallel": 2, "tensor_parallel": GATHERED, "zero": 0}),
    ],
)
def test_a_loop_of_fabric_clamps_weights_of_all_stages(ranks: int, settings: dict[str, Any]) -> None:
    (expected,) = run_ranks(train_in_fabric, 1, 1, None)
    for found in run_ranks(train_in_fabric, ranks, ranks, settings):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=0.0, atol=LIMIT, msg=f"{name}: {{}}".format)


class Impatient(Model):
    """Asks for whole weights in its step."""

    after = 0

    def training_step(self, batch: Any, index: int) -> Tensor:
        if index >= self.after:
            with self.trainer.strategy.gathered(self.head):  # type: ignore[attr-defined]
                pass
        return super().training_step(batch, index)


def gather_in_step(after: int) -> None:
    module = Impatient().double()
    module.after = after
    trainer_of("pp2").fit(module, data_of("pp2"))


@pytest.mark.parametrize("after", [0, 1], ids=["while it is looked at", "while it trains"])
def test_a_step_is_not_the_place_for_whole_weights(after: int) -> None:
    with pytest.raises(RankFailure, match=r"(?s)UnsupportedError: .* called in a step.*on_train_batch_end"):
        run_ranks(gather_in_step, 2, after)


def ask_for_others() -> None:
    owner = trainer_of("pp2", max_steps=1)
    owner.fit(module := Model().double(), data_of("pp2"))
    with whole(owner, [module.head.weight, nn.Parameter(torch.ones(1))]):
        raise AssertionError("it was entered")


def test_parameters_of_no_sharded_module_are_refused() -> None:
    run_ranks_expecting(ask_for_others, 2, error=ConfigError, match="given 2 parameters, of which one is in no module")
