"""Derivatives taken by hand, parameters used by themselves, and weights loaded in hooks; against one process in float64."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.fabric import Fabric
from tests.ranks.trainer.optimisation_support import (
    STAGES,
    Batch,
    Net,
    Strategy,
    assert_fits_as_alone,
    fitted,
    hsdp,
    made,
    whole,
)
from tests.rows import full
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import meshbolt
from meshbolt.errors import UnsupportedError
from meshbolt.testing import run_ranks, run_ranks_expecting

GATHERING = STAGES[:3]  # what has run stays gathered for the rest of training_step


def fits(kind: Callable[[], pl.LightningModule], strategies: tuple[Strategy, ...] = STAGES, **options: Any) -> None:
    """Compare one epoch."""
    assert_fits_as_alone(kind, strategies, max_epochs=1, **options)


def slope(output: Tensor, x: Tensor, **options: Any) -> Tensor:
    """Return the derivative of each sample's output."""
    return torch.autograd.grad(output.sum(), x, **options)[0]


# Derivatives with respect to inputs -------------------------------------------------------------------------------------


class Saliency(Net):
    """Each sample counts by the slope at it; the graph serves the backward too."""

    def training_step(self, batch: Batch, _index: int) -> Tensor:
        x = batch[0].clone().requires_grad_()
        output = self(x)
        weight = 1 + slope(output, x, retain_graph=True).abs().sum(dim=1, keepdim=True)
        return ((output - batch[1]).square() * weight).mean()


class Adversarial(Net):
    """A second and a third forward after a graph that no backward follows."""

    def training_step(self, batch: Batch, _index: int) -> Tensor:
        x = batch[0].clone().requires_grad_()
        worse = x.detach() + 0.1 * slope(F.mse_loss(self(x), batch[1]), x).sign()
        return F.mse_loss(self(worse), batch[1]) + self.loss(batch)


class OnlyInputs(Net):
    """The same by `backward(inputs=...)`."""

    def training_step(self, batch: Batch, _index: int) -> Tensor:
        x = batch[0].clone().requires_grad_()
        F.mse_loss(self(x), batch[1]).backward(inputs=[x])
        assert x.grad is not None
        return F.mse_loss(self(x.detach() + 0.1 * x.grad.sign()), batch[1])


class Penalty(Net):
    """A gradient penalty whose graph is older than another forward, whose backward is through with the units first."""

    def training_step(self, batch: Batch, _index: int) -> Tensor:
        x = batch[0].clone().requires_grad_()
        steep = slope(self(x), x, create_graph=True).square().mean()
        return self.loss(batch) + steep


class Curvature(Net):
    """A derivative of a derivative, in the loss."""

    def training_step(self, batch: Batch, _index: int) -> Tensor:
        x = batch[0].clone().requires_grad_()
        first = slope(self(x), x, create_graph=True)
        second = slope(first, x, create_graph=True)
        return self.loss(batch) + first.square().mean() + second.square().mean()


class FrozenPenalty(Penalty):
    """Blocks get no gradient, yet the penalty's graph uses their weights."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks.requires_grad_(False)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)


class Forces(Net):
    """The derivative is part of what forward returns, also in a validation without gradients."""

    def forces(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            energy = self(x)
            return energy, slope(energy, x, create_graph=True)

    def training_step(self, batch: Batch, _index: int) -> Tensor:
        energy, force = self.forces(batch[0])
        return F.mse_loss(energy, batch[1]) + force.square().mean()

    def on_train_batch_end(self, *_: Any) -> None:
        # Nothing follows this; it must leave nothing behind.
        self.forces(torch.ones(2, 6, dtype=torch.float64))


class InBackward(Net):
    """Within Lightning's hook, before the backward itself."""

    def training_step(self, batch: Batch, _index: int) -> Tensor:
        self.x = batch[0].clone().requires_grad_()
        return F.mse_loss(self(self.x), batch[1])

    def backward(self, loss: Tensor, *_: Any) -> None:
        assert torch.autograd.grad(loss, self.x, retain_graph=True)[0].abs().sum() > 0
        loss.backward()


class OfParameters(Net):
    """With respect to parameters of the root, which are whole in all of training_step."""

    def training_step(self, batch: Batch, _index: int) -> Tensor:
        loss = self.loss(batch)
        assert all(g.abs().sum() > 0 for g in torch.autograd.grad(loss, list(self.out.parameters()), retain_graph=True))
        return loss


BY_HAND = [Saliency, Adversarial, OnlyInputs, Penalty, Curvature, FrozenPenalty, Forces, InBackward, OfParameters]
OFTEN = {Adversarial, Penalty, Forces, OfParameters}


@pytest.mark.parametrize("window", [1, 2])
@pytest.mark.parametrize("kind", [kind if kind in OFTEN else full(kind) for kind in BY_HAND])
def test_derivatives_taken_by_hand_leave_training_as_in_one_process(kind: type[Net], window: int) -> None:
    run_ranks(functools.partial(fits, kind, accumulate_grad_batches=window), 2, timeout=60)


@pytest.mark.parametrize("kind", [full(Adversarial), Penalty])
def test_derivatives_taken_by_hand_need_no_fast_path(kind: type[Net], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MESHBOLT_FAST_PATH", "0")
    run_ranks(functools.partial(fits, kind, accumulate_grad_batches=2), 2, timeout=60)


@pytest.mark.parametrize("kind", [full(Adversarial), Penalty])
def test_derivatives_taken_by_hand_leave_training_of_two_copies_right(kind: type[Net]) -> None:
    copies = (hsdp(1), hsdp(2), hsdp(3))
    run_ranks(functools.partial(fits, kind, copies, accumulate_grad_batches=2), 4, timeout=60)


def recomputing(stage: int) -> Callable[[], meshbolt.MeshStrategy]:
    return lambda: meshbolt.MeshStrategy(zero=stage, recompute="full")


@pytest.mark.parametrize("kind", [Adversarial, Penalty])
def test_derivatives_taken_by_hand_recompute_too(kind: type[Net]) -> None:
    recomputed = (recomputing(1), recomputing(3))
    run_ranks(functools.partial(fits, kind, recomputed, accumulate_grad_batches=2), 2, timeout=60)


class Manual(Net):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


class Critic(Manual):
    """As a Wasserstein GAN trains its critic: several steps with a penalty, then one on adversarial samples."""

    def training_step(self, batch: Batch, _index: int) -> None:
        optimizer = self.optimizers()
        for _ in range(2):
            x = batch[0].clone().requires_grad_()
            steep = slope(self(x), x, create_graph=True).square().mean()
            self.manual_backward(self.loss(batch), retain_graph=True)
            self.manual_backward(steep, retain_graph=True)
            self.manual_backward(0.5 * steep)
            optimizer.step()
            optimizer.zero_grad()
        x = batch[0].clone().requires_grad_()
        worse = x.detach() + 0.1 * slope(F.mse_loss(self(x), batch[1]), x).sign()
        self.manual_backward(F.mse_loss(self(worse), batch[1]))
        optimizer.step()
        optimizer.zero_grad()


class OthersStepBetween(Manual):
    """An optimizer steps other parameters than those of a graph that is still to be derived."""

    def training_step(self, batch: Batch, _index: int) -> None:
        first, second = self.optimizers()
        x = batch[0].clone().requires_grad_()
        steep = (
            slope(self.blocks[1](self.blocks[0](torch.cat([x, x[:, :4]], dim=1))), x, create_graph=True).square().mean()
        )
        self.manual_backward(F.mse_loss(self.out(self.blocks[2](self.into(batch[0]))), batch[1]))
        second.step()
        self.manual_backward(steep)
        first.step()
        first.zero_grad()
        second.zero_grad()

    def configure_optimizers(self) -> Any:
        first = torch.optim.SGD(self.blocks[:2].parameters(), lr=0.05)
        return first, torch.optim.SGD([*self.blocks[2].parameters(), *self.out.parameters()], lr=0.05)


class StepsBetweenPlainly(Manual):
    """The same where the second loss needs no parameter that was stepped."""

    def training_step(self, batch: Batch, _index: int) -> None:
        first, second = self.optimizers()
        inner = self.blocks[0](self.into(batch[0]))
        outer = self.out(self.blocks[2](inner.detach()))
        self.manual_backward(F.mse_loss(outer, batch[1]))
        second.step()
        self.manual_backward(inner.square().mean())
        first.step()
        first.zero_grad()
        second.zero_grad()

    def configure_optimizers(self) -> Any:
        first = torch.optim.SGD([*self.into.parameters(), *self.blocks[0].parameters()], lr=0.05)
        return first, torch.optim.SGD([*self.blocks[2].parameters(), *self.out.parameters()], lr=0.05)


@pytest.mark.parametrize("kind", [Critic, OthersStepBetween, StepsBetweenPlainly])
def test_derivatives_taken_by_hand_in_manual_optimisation_leave_it_as_in_one_process(kind: type[Net]) -> None:
    run_ranks(fits, 2, kind, timeout=60)


class Outdated(Manual):
    def training_step(self, batch: Batch, _index: int) -> None:
        x = batch[0].clone().requires_grad_()
        steep = slope(self(x), x, create_graph=True).square().mean()
        self.manual_backward(self.loss(batch))
        self.optimizers().step()
        self.manual_backward(steep)


class SecondLossTooLate(Manual):
    """Two losses of one forward through units only, and a step between their backwards."""

    def training_step(self, batch: Batch, _index: int) -> None:
        output = self.blocks[2](self.blocks[0](self.into(batch[0])))
        self.manual_backward(output.square().mean(), retain_graph=True)
        self.optimizers().step()
        self.manual_backward(output.abs().mean())


class DropsWhenItSteps(torch.optim.SGD):
    def step(self, closure: Any = None) -> Any:
        result = super().step(closure)
        self.zero_grad()
        return result


class SecondLossTooLateForADropper(SecondLossTooLate):
    def configure_optimizers(self) -> Any:
        return DropsWhenItSteps(self.parameters(), lr=0.05)


def fit(kind: Callable[[], pl.LightningModule], strategy: Strategy) -> None:
    fitted(made(kind), strategy)


@pytest.mark.parametrize("strategy", ["auto", full("zero0"), "zero1", full("zero2"), "zero3"])
@pytest.mark.parametrize("kind", [Outdated, SecondLossTooLate, SecondLossTooLateForADropper])
def test_a_graph_from_before_the_step_is_refused_as_in_one_process(kind: type[Net], strategy: str) -> None:
    ranks = 1 if strategy == "auto" else 2
    run_ranks_expecting(fit, ranks, kind, strategy, error=RuntimeError, match="modified by an inplace operation")


def penalised_in_fabric(strategy: str) -> None:
    """Compare a step with a penalty whose graph is made in one call and used after the next."""
    module, reference = made(Net), made(Net)
    torch.set_default_dtype(torch.float64)  # in which Fabric returns what a module computes
    fabric = Fabric(accelerator="cpu", devices=2, strategy=strategy, precision="64-true")
    fabric.launch()
    wrapped, optimizer = fabric.setup(module, torch.optim.SGD(module.parameters(), lr=0.1))
    x = torch.linspace(-1, 1, 12, dtype=torch.float64).view(2, 6).requires_grad_()
    steep = slope(wrapped.module(x), x, create_graph=True).square().mean()
    fabric.backward(wrapped(x.detach()).square().mean() + steep)
    optimizer.step()
    expected = torch.optim.SGD(reference.parameters(), lr=0.1)
    (reference(x.detach()).square().mean() + slope(reference(x), x, create_graph=True).square().mean()).backward()
    expected.step()
    for found, parameter in zip(module.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(whole(found), whole(parameter), rtol=0, atol=1e-12)


@pytest.mark.parametrize("strategy", STAGES)
def test_a_penalty_in_fabric_trains_as_in_one_process(strategy: str) -> None:
    run_ranks(penalised_in_fabric, 2, strategy, timeout=60)


# Backwards that the strategy does not see -------------------------------------------------------------------------------


class ByItself(Manual):
    def training_step(self, batch: Batch, _index: int) -> None:
        optimizer = self.optimizers()
        self.loss(batch).backward()
        optimizer.step()


class WithoutUnits(pl.LightningModule):
    """Everything belongs to the root, whose forward is not over yet when a backward runs within training_step."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 1))
        self.seen: list[Any] = []

    def loss(self, batch: Batch) -> Tensor:
        return F.mse_loss(self.net(batch[0]), batch[1])

    def training_step(self, batch: Batch, _index: int) -> Tensor:
        return self.loss(batch)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class ByItselfWithoutUnits(WithoutUnits):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    training_step = ByItself.training_step  # type: ignore[assignment]


class ForInputsWithoutUnits(WithoutUnits):
    """In automatic optimisation, to get the gradient of the inputs."""

    def training_step(self, batch: Batch, _index: int) -> Tensor:
        x = batch[0].clone().requires_grad_()
        F.mse_loss(self.net(x), batch[1]).backward()
        return self.loss(batch)


@pytest.mark.parametrize("strategy", STAGES)
@pytest.mark.parametrize("kind", [ByItself, ByItselfWithoutUnits, ForInputsWithoutUnits])
def test_a_backward_that_the_strategy_does_not_run_is_refused(kind: type[pl.LightningModule], strategy: str) -> None:
    run_ranks_expecting(fit, 2, kind, strategy, error=UnsupportedError, match=r"by itself.*manual_backward.*inputs=")


class OfShards(Net):
    def training_step(self, batch: Batch, _index: int) -> Tensor:
        loss = self.loss(batch)
        torch.autograd.grad(loss, list(self.parameters()), retain_graph=True)
        return loss


def test_a_derivative_with_respect_to_a_shard_is_refused() -> None:
    run_ranks_expecting(fit, 2, OfShards, "zero3", error=UnsupportedError, match=r"autograd\.grad.*parameter of a unit")


# Parameters used by themselves ------------------------------------------------------------------------------------------


def squares(module: nn.Module) -> Tensor:
    return 0.01 * torch.stack([p.square().sum() for p in module.parameters()]).sum()


class After(Net):
    def training_step(self, batch: Batch, _index: int) -> Tensor:
        return self.loss(batch) + squares(self)


class Between(Net):
    """The backward of the second forward would free what the penalty's needs."""

    def training_step(self, batch: Batch, _index: int) -> Tensor:
        return self.loss(batch) + squares(self) + F.mse_loss(self(-batch[0]), batch[1])


class Late(Net):
    """The penalty's gradients come when the units are through with their backward."""

    def training_step(self, batch: Batch, _index: int) -> Tensor:
        with torch.no_grad():
            self(batch[0])
        return 0.01 * torch.stack([p.sum() for p in self.parameters()]).sum() + self.loss(batch)


class Before(Net):
    def training_step(self, batch: Batch, _index: int) -> Tensor:
        return squares(self) + self.loss(batch)


class Added(Net):
    def training_step(self, batch: Batch, _index: int) -> Tensor:
        return self.loss(batch) + 0.01 * sum(p.square().sum() for p in self.parameters())


class MadeWhole(Net):
    def training_step(self, batch: Batch, _index: int) -> Tensor:
        made_whole = (p.full_tensor() if isinstance(p, DTensor) else p for p in self.parameters())
        return self.loss(batch) + 0.01 * torch.stack([p.square().sum() for p in made_whole]).sum()


class FromGathered(Net):
    def training_step(self, batch: Batch, _index: int) -> Tensor:
        with self.trainer.strategy.gathered(self):
            penalty = squares(self)
        return self.loss(batch) + penalty


@pytest.mark.parametrize("window", [1, 2])
@pytest.mark.parametrize("kind", [After, Between, Late])
def test_a_penalty_on_gathered_weights_trains_as_in_one_process(kind: type[Net], window: int) -> None:
    run_ranks(functools.partial(fits, kind, GATHERING, accumulate_grad_batches=window), 2, timeout=60)


def test_a_penalty_between_two_forwards_trains_two_copies_as_one_process() -> None:
    run_ranks(functools.partial(fits, Between, (hsdp(1), hsdp(2)), accumulate_grad_batches=2), 4, timeout=60)


@pytest.mark.parametrize(
    ("kind", "strategy"),
    [*((kind, "zero3") for kind in (After, Late, Added, MadeWhole)), *((Before, stage) for stage in STAGES)],
)
def test_a_penalty_on_shards_is_refused_with_what_to_do(kind: type[Net], strategy: str) -> None:
    remedy = r"outside of its unit's forward.*weight_decay.*on_before_optimizer_step.*Zero\(unit=\[...\]\)"
    run_ranks_expecting(fit, 2, kind, strategy, error=UnsupportedError, match=remedy)


@pytest.mark.parametrize("strategy", STAGES)
def test_a_penalty_that_leads_back_into_gathered_is_refused(strategy: str) -> None:
    run_ranks_expecting(fit, 2, FromGathered, strategy, error=UnsupportedError, match=r"gathered.*weight_decay")


class PenaltyWithoutUnits(WithoutUnits):
    def training_step(self, batch: Batch, _index: int) -> Tensor:
        return squares(self) + self.loss(batch)


def up_only(stage: int) -> Callable[[], meshbolt.MeshStrategy]:
    return lambda: meshbolt.MeshStrategy(zero=meshbolt.Zero(stage=stage, unit=["blocks.0.up", "blocks.1.up"]))


class OfTheRest(Net):
    """On what the units leave out."""

    def training_step(self, batch: Batch, _index: int) -> Tensor:
        return squares(self.blocks[0].down) + squares(self.blocks[2]) + self.loss(batch)


def test_a_penalty_on_what_no_unit_holds_trains_as_in_one_process() -> None:
    run_ranks(fits, 2, PenaltyWithoutUnits, timeout=60)
    run_ranks(fits, 2, OfTheRest, (up_only(2), up_only(3)), timeout=60)


class Decayed(Net):
    """`weight_decay` in the place of the penalty."""

    def training_step(self, batch: Batch, _index: int) -> Tensor:
        return self.loss(batch) + (squares(self) if self.trainer.world_size == 1 else 0.0)

    def configure_optimizers(self) -> Any:
        alone = self.trainer.world_size == 1
        return torch.optim.Adam(self.parameters(), lr=1e-2, weight_decay=0.0 if alone else 0.02)

    def on_fit_end(self) -> None:
        # The one option that is to differ.
        self.optimizers().param_groups[0]["weight_decay"] = None


class AddedByHand(Net):
    """The derivative of a penalty, added to the gradients."""

    def training_step(self, batch: Batch, _index: int) -> Tensor:
        alone = self.trainer.world_size == 1
        return self.loss(batch) + (0.01 * sum(p.abs().sum() for p in self.parameters()) if alone else 0.0)

    def on_before_optimizer_step(self, _optimizer: Any) -> None:
        for parameter in self.parameters() if self.trainer.world_size > 1 else ():
            assert parameter.grad is not None
            parameter.grad.add_(parameter.detach().sign(), alpha=0.01)


@pytest.mark.parametrize("kind", [Decayed, AddedByHand])
def test_what_the_error_advises_trains_as_the_penalty_does(kind: type[Net]) -> None:
    run_ranks(functools.partial(fits, kind, accumulate_grad_batches=2), 2, timeout=60)


class PastItsUnit(Net):
    def training_step(self, batch: Batch, _index: int) -> Tensor:
        hidden = self.blocks[1].down(F.gelu(self.blocks[1].up(self.into(batch[0]))))
        return F.mse_loss(self.out(hidden), batch[1])


def test_a_layer_called_past_its_unit_is_named() -> None:
    match = r"'blocks\.1\.up' was called while its parameters were sharded.*unit 'blocks\.1'.*call the unit itself"
    run_ranks_expecting(fit, 2, PastItsUnit, "zero3", error=UnsupportedError, match=match)


# Whole weights loaded in hooks ------------------------------------------------------------------------------------------


def other_weights(module: Net) -> dict[str, Tensor]:
    """Return whole weights of the module's shapes, the same on every rank."""
    shapes = {name: parameter.shape for name, parameter in module.named_parameters()}
    return {
        name: torch.linspace(-0.2, 0.3, max(shape.numel(), 1), dtype=torch.float64).view(shape)
        for name, shape in shapes.items()
    }


class LoadsFirst(Net):
    def on_fit_start(self) -> None:
        self.load_state_dict(other_weights(self))


class LoadsParts(Net):
    """A part of the root, a unit, and a layer in a unit, in the middle of training."""

    def on_train_batch_start(self, _batch: Batch, index: int) -> None:
        if index == 2:
            weights = other_weights(self)
            for name in ("out", "blocks.1", "blocks.2.up"):
                part = {
                    key.removeprefix(f"{name}."): value for key, value in weights.items() if key.startswith(f"{name}.")
                }
                self.get_submodule(name).load_state_dict(part)


class LoadsWithinAStep(Net):
    """Between two forwards of one step; reading weights there leaves what is gathered as it was."""

    def training_step(self, batch: Batch, index: int) -> Tensor:
        before = self.loss(batch).detach()
        if index == 1:
            self.load_state_dict(other_weights(self))
        assert len(self.state_dict()) == len(list(self.parameters()))
        return self.loss(batch) + before


@pytest.mark.parametrize("kind", [LoadsFirst, LoadsParts, LoadsWithinAStep])
def test_whole_weights_loaded_in_a_hook_train_as_in_one_process(kind: type[Net]) -> None:
    run_ranks(fits, 2, kind, timeout=60)


class LoadsWrongShapes(Net):
    def on_fit_start(self) -> None:
        self.load_state_dict({**other_weights(self), "blocks.0.up.bias": torch.zeros(2)})


class Assigns(Net):
    def on_fit_start(self) -> None:
        self.load_state_dict(other_weights(self), assign=True)


def test_whole_weights_that_cannot_be_loaded_are_refused() -> None:
    run_ranks_expecting(
        fit, 2, LoadsWrongShapes, "zero3", error=RuntimeError, match=r"size mismatch for blocks\.0\.up\.bias"
    )
    run_ranks_expecting(fit, 2, Assigns, "zero3", error=UnsupportedError, match=r"assign=True.*Leave assign out")
