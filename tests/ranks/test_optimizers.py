"""Optimizers on shards against the same optimizers on whole parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from tests.ranks.engine_support import engine_of, largest_difference, made, pair, reference_trained, trained, whole
from torch import nn
from torch.optim import Optimizer

import meshbolt
from meshbolt.engine.optimizer import ELEMENTWISE, REFUSED
from meshbolt.engine.state import optimizer_state
from meshbolt.testing import run_ranks, run_ranks_expecting

# Every class of the table, and every option that changes what it computes; those that take a step are tried in each form.
VARIANTS: list[tuple[type[Optimizer], dict[str, Any]]] = [
    (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}),
    (torch.optim.SGD, {"lr": 0.05, "maximize": True}),
    (torch.optim.Adam, {"amsgrad": True, "weight_decay": 0.1}),
    (torch.optim.Adam, {"decoupled_weight_decay": True, "weight_decay": 0.1}),
    (torch.optim.AdamW, {"amsgrad": True, "maximize": True}),
    (torch.optim.AdamW, {"lr": torch.tensor(0.02), "weight_decay": 0.3}),
    (torch.optim.Adamax, {"weight_decay": 0.01}),
    (torch.optim.NAdam, {"decoupled_weight_decay": True, "weight_decay": 0.1}),
    (torch.optim.RAdam, {"weight_decay": 0.01}),
    (torch.optim.RMSprop, {"momentum": 0.9, "centered": True, "eps": 1e-2}),
    (torch.optim.Rprop, {}),
    (torch.optim.Adagrad, {"lr_decay": 0.1, "initial_accumulator_value": 0.1}),
    (torch.optim.Adadelta, {"lr": 1.0}),
    (torch.optim.ASGD, {"lambd": 0.1, "t0": 1}),
]
FUSED = (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.Adagrad)


def forms_of(kind: type[Optimizer], options: dict[str, Any]) -> list[dict[str, bool]]:
    tensor_rate = isinstance(options.get("lr"), torch.Tensor)
    forms: list[dict[str, bool]] = [{"foreach": False}]
    return forms + [{"foreach": True}] * (not tensor_rate) + [{"fused": True}] * (kind in FUSED)


def trains_as_whole(make: Callable[[Iterable[nn.Parameter]], Optimizer], stage: int) -> None:
    module, reference = pair()
    engine = engine_of(module, stage)
    ours, theirs = make(module.parameters()), make(reference.parameters())
    engine.add_optimizer(ours)
    trained(engine, ours)
    reference_trained(reference, theirs)
    label = type(ours).__name__, {k: v for k, v in ours.param_groups[0].items() if k != "params"}, stage
    assert largest_difference(module, reference) < 1e-12, label
    names = {parameter: name for name, parameter in module.named_parameters()}
    state = optimizer_state(ours, names)["state"]
    for name, parameter in reference.named_parameters():
        for key, value in theirs.state[parameter].items():
            found = whole(state[name][key])
            assert torch.allclose(torch.as_tensor(found), torch.as_tensor(value), rtol=0, atol=1e-12), (
                label,
                name,
                key,
            )


def every_form(chosen: list[tuple[type[Optimizer], dict[str, Any]]]) -> None:
    for kind, options in chosen:
        for form in forms_of(kind, options):
            for stage in (0, 2):
                trains_as_whole(lambda p, k=kind, o={**options, **form}: k(p, **o), stage)


@pytest.mark.parametrize("half", [0, 1])
def test_every_elementwise_optimizer_steps_on_shards_as_on_whole_parameters(half: int) -> None:
    run_ranks(every_form, 2 + half, VARIANTS[half::2], timeout=60)


def test_the_variants_cover_the_table() -> None:
    assert {kind for kind, _ in VARIANTS} == ELEMENTWISE


class Lion(Optimizer):
    """Elementwise, and not in torch: meshbolt does not know it."""

    def __init__(self, params: Any, lr: float = 1e-2, beta: float = 0.9) -> None:
        super().__init__(params, {"lr": lr, "beta": beta})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                momentum = self.state[parameter].setdefault("momentum", torch.zeros_like(parameter))
                update = momentum * group["beta"] + parameter.grad * (1 - group["beta"])
                parameter.add_(update.sign(), alpha=-group["lr"])
                momentum.mul_(group["beta"]).add_(parameter.grad, alpha=1 - group["beta"])


class NormalisedSGD(Optimizer):
    """Looks at a whole matrix: its update is the gradient divided by its norm."""

    def __init__(self, params: Any, lr: float = 1e-2) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.sub_(group["lr"] * parameter.grad / (parameter.grad.norm() + 1e-6))


class OwnAdamW(torch.optim.AdamW):
    """A subclass may do anything: it is not taken for its parent."""


def unknown_classes() -> None:
    for stage in (0, 1, 3):
        for kind in (Lion, NormalisedSGD, OwnAdamW):
            trains_as_whole(kind, stage)
        trains_as_whole(lambda p: OwnAdamW(p, foreach=True), stage)
        trains_as_whole(lambda p: OwnAdamW(p, fused=True), stage)


def test_a_class_that_is_not_known_sees_whole_tensors_and_is_right() -> None:
    run_ranks(unknown_classes, 2, timeout=60)


class OwnMuon(torch.optim.Muon):
    pass


class OwnAdafactor(torch.optim.Adafactor):
    pass


@pytest.mark.parametrize("name", ["Adafactor", "LBFGS", "Muon", "SparseAdam", "OwnMuon", "OwnAdafactor"])
def test_optimizers_that_would_be_wrong_are_refused_with_alternatives(name: str) -> None:
    kind = globals().get(name) or getattr(torch.optim, name)
    messages = run_ranks_expecting(refused, 2, kind, error=meshbolt.UnsupportedError, match=f"^{name} .*elementwise")
    assert all("AdamW" in message for message in messages)


def refused(kind: type[Optimizer]) -> None:
    module = made()
    engine = engine_of(module, 2)
    matrices = [parameter for parameter in module.parameters() if parameter.dim() == 2]
    engine.add_optimizer(kind(matrices))


def test_every_refused_class_is_one_of_torch() -> None:
    assert all(hasattr(torch.optim, name) for name in REFUSED)


def made_before_sharding() -> None:
    module = made()
    optimizer = torch.optim.AdamW(module.parameters())
    engine_of(module, 1).add_optimizer(optimizer)


def test_an_optimizer_of_parameters_from_before_sharding_is_refused() -> None:
    run_ranks_expecting(made_before_sharding, 2, error=meshbolt.UnsupportedError, match="after sharding")


def saved_fresh() -> None:
    module, reference = pair()
    engine = engine_of(module, 1)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
    names = {parameter: name for name, parameter in engine.parameters_by_name.items()}
    assert optimizer_state(optimizer, names)["state"] == {}
    assert not optimizer.state
    trained(engine, optimizer)
    reference_trained(reference, torch.optim.AdamW(reference.parameters(), lr=1e-2))
    assert largest_difference(module, reference) < 1e-12


def test_saving_a_fresh_optimizer_takes_no_step() -> None:
    run_ranks(saved_fresh, 2)
