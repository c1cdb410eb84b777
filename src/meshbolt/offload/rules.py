"""How each optimizer updates pieces of parameters that lie outside of it.

A rule says which columns an optimizer keeps for a parameter, and updates a list of pieces from them: for Adam, AdamW, SGD and
Adagrad with torch's fused kernels (`FAST`), for any other elementwise optimizer with an instance of its own class
(`OwnClassRule`), which is slower.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn
from torch.optim import Optimizer

from meshbolt.compat import fused_adagrad_, fused_adam_, fused_sgd_
from meshbolt.errors import UnsupportedError

Settings = Mapping[str, Any]


@dataclass(kw_only=True)
class Batch:
    """Pieces of parameters to update in one call: of one dtype, one device and one group.

    Attributes:
        settings: of the group, with numbers in the place of tensors.
        params: what is updated.
        gradients: of the parameters' dtype.
        columns: by name, one tensor per parameter each.
        counts: of steps, this one included, as float32 scalars on the parameters' device; empty for rules that do not count.
        scalars: what else is kept for each piece; rules of the optimizer's own class fill and use it.
        is_first: the columns hold no values of an earlier step.
    """

    settings: Settings
    params: list[torch.Tensor] = field(default_factory=list)
    gradients: list[torch.Tensor] = field(default_factory=list)
    columns: dict[str, list[torch.Tensor]] = field(default_factory=dict)
    counts: list[torch.Tensor] = field(default_factory=list)
    scalars: list[dict[str, Any]] = field(default_factory=list)
    is_first: bool = False


class Rule(Protocol):
    """One optimizer's way to update."""

    @property
    def counts(self) -> bool:
        """Whether the optimizer's only other state is a count of steps, named "step"."""

    @property
    def cuts(self) -> bool:
        """Whether a piece may be updated in parts, by several threads."""

    def columns(self, settings: Settings) -> dict[str, float]:
        """Return the columns that the optimizer keeps, and the value that fills each before the first step.

        Args:
            settings: of the parameter's group.
        """

    def update(self, batch: Batch) -> None:
        """Update parameters and columns in place.

        Args:
            batch: what to update.
        """


class AdamRule:
    """Adam and AdamW."""

    counts = cuts = True

    def columns(self, settings: Settings) -> dict[str, float]:
        """Return the two moments, and with amsgrad the maximum of the second."""
        names = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
        return dict.fromkeys(names if settings["amsgrad"] else names[:2], 0.0)

    def update(self, batch: Batch) -> None:
        """Update by torch's fused kernel."""
        fused_adam_(batch.params, batch.gradients, batch.columns, batch.counts, settings=batch.settings)


class SGDRule:
    """SGD, with momentum or without."""

    counts, cuts = False, True

    def columns(self, settings: Settings) -> dict[str, float]:
        """Return the momentum, if there is one."""
        return {"momentum_buffer": 0.0} if settings["momentum"] else {}

    def update(self, batch: Batch) -> None:
        """Update by torch's fused kernel."""
        momentum = batch.columns.get("momentum_buffer", [])
        fused_sgd_(batch.params, batch.gradients, momentum, settings=batch.settings, is_first=batch.is_first)


class AdagradRule:
    """Adagrad."""

    counts = cuts = True

    def columns(self, settings: Settings) -> dict[str, float]:
        """Return the sum of squares."""
        return {"sum": float(settings["initial_accumulator_value"])}

    def update(self, batch: Batch) -> None:
        """Update by torch's fused kernel."""
        fused_adagrad_(batch.params, batch.gradients, batch.columns["sum"], batch.counts, settings=batch.settings)


class OwnClassRule:
    """Any optimizer that updates each element from that element's own gradient and state, by an instance of its class.

    An instance is made for each call, and shown the pieces as parameters. State of a parameter's size becomes a column; what
    else it keeps (step counts, products of its decay) is kept once for each piece.
    """

    counts = cuts = False

    def __init__(self, optimizer: Optimizer) -> None:
        """Copy what the optimizer is, without its parameters, state and hooks.

        Args:
            optimizer: an elementwise one.
        """
        self._pattern = copy.copy(optimizer)
        self._pattern.param_groups, self._pattern.state = [], defaultdict(dict)
        self._known: dict[str, dict[str, float]] = {}

    def columns(self, settings: Settings) -> dict[str, float]:
        """Find out by a step on a parameter of three elements, which are at zero."""
        key = repr({name: value for name, value in settings.items() if name != "lr"})
        if key not in self._known:
            batch = Batch(
                settings=settings, params=[torch.zeros(3)], gradients=[torch.zeros(3)], scalars=[{}], is_first=True
            )
            kept = self._step(batch)[0]
            # The first step sets what the columns begin with: here they have none.
            self._known[key] = {name: 0.0 for name, value in kept.items() if _has_shape(value, torch.Size([3]))}
        return self._known[key]

    def update(self, batch: Batch) -> None:
        """Update by a step of an instance, and take what it keeps."""
        for number, kept in enumerate(self._step(batch)):
            for name, value in kept.items():
                column = batch.columns.get(name)
                if column is None:
                    batch.scalars[number][name] = value
                elif value is not column[number]:
                    column[number].copy_(value)

    def _step(self, batch: Batch) -> list[dict[str, Any]]:
        """Take one step on the batch's pieces; return what the optimizer keeps for each afterwards."""
        instance = copy.copy(self._pattern)
        pieces = [nn.Parameter(param, requires_grad=False) for param in batch.params]
        instance.param_groups = [{**batch.settings, "params": pieces}]
        instance.state = defaultdict(dict)
        for number, piece in enumerate(pieces):
            piece.grad = batch.gradients[number]
            if not batch.is_first:
                columns = {name: column[number] for name, column in batch.columns.items()}
                instance.state[piece] = {**batch.scalars[number], **columns}
        instance.step()
        return [instance.state[piece] for piece in pieces]


FAST: dict[type[Optimizer], Rule] = {
    torch.optim.Adam: AdamRule(),
    torch.optim.AdamW: AdamRule(),
    torch.optim.SGD: SGDRule(),
    torch.optim.Adagrad: AdagradRule(),
}


def rule_of(optimizer: Optimizer) -> Rule:
    """Return how an optimizer updates.

    Args:
        optimizer: an elementwise one, which the caller has made sure of.
    """
    return FAST.get(type(optimizer)) or OwnClassRule(optimizer)


def settings_of(optimizer: Optimizer, group: Mapping[str, Any]) -> dict[str, Any]:
    """Return a group's settings as they are now, tensors (a learning rate) as numbers.

    Args:
        optimizer: whose group it is.
        group: one of its `param_groups`.

    Raises:
        UnsupportedError: a setting asks for what an update outside of the optimizer cannot do.
    """
    for name in ("capturable", "differentiable"):
        if group.get(name):
            raise UnsupportedError(
                f"{type(optimizer).__name__}({name}=True) was to keep its state outside of the model, where its updates run in "
                f"threads of the CPU: they cannot be {'captured in a CUDA graph' if name == 'capturable' else 'differentiated'}. "
                f"Leave {name} out, or train without offload."
            )
    return {name: _number(value) for name, value in group.items() if name != "params"}


def _number(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.item() if value.numel() == 1 else value
    return tuple(map(_number, value)) if isinstance(value, tuple) else value


def _has_shape(value: Any, shape: torch.Size) -> bool:
    return isinstance(value, torch.Tensor) and value.shape == shape
