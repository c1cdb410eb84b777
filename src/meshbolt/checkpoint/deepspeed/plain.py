"""What DeepSpeed saves of an optimizer without ZeRO: torch's own state by number, or one that keeps master weights, nameless."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from meshbolt.checkpoint.deepspeed.pieces import Row, joined
from meshbolt.checkpoint.deepspeed.trained import Trained

# Beyond so many choices for each weight there are too many that are equal.
_MOST_TRIES = 100
_FLAT, _EACH, _INNER = "fp32_groups_flat", "fp32_groups", "optimizer_state_dict"


def is_wrapped(state: Mapping[str, Any]) -> bool:
    """Return whether an optimizer's state is of one that keeps master weights."""
    return _FLAT in state or _EACH in state


def trained_without_names(state: Mapping[str, Any], weights: Mapping[str, torch.Tensor]) -> Trained | None:
    """Return what an optimizer that keeps master weights holds; None where they cannot be told apart.

    The file does not say whose they are. Cast to the dtype of the model's weights, they are these: so they are found.

    Args:
        state: the optimizer's.
        weights: of the model, in its order, without buffers and other names of the same weights.
    """
    groups = [_Masters(each, index) for index, each in enumerate(state[_FLAT] if _FLAT in state else state[_EACH])]
    names = _matched(groups, weights)
    if names is None:
        return None
    inner = state[_INNER]
    found = Trained(groups=[dict(group) for group in inner["param_groups"]])
    for group, settings, named in zip(groups, found.groups or (), names, strict=True):
        numbers = list(settings["params"])
        for position, (name, start) in enumerate(named):
            shape = weights[name].shape
            found.masters[name] = group.piece(start, shape, name=name)
            kept = inner["state"].get(numbers[0 if group.is_flat else position], {})
            found.states[name] = {key: group.state(value, start, shape, name=name) for key, value in kept.items()}
        settings["params"] = [name for name, _ in named]
    found.states = {name: kept for name, kept in found.states.items() if kept}
    return found


class _Masters:
    """The master weights of one group: one flat tensor, or one for each parameter."""

    def __init__(self, masters: torch.Tensor | Sequence[torch.Tensor], index: int) -> None:
        self.index, self.is_flat = index, isinstance(masters, torch.Tensor)
        self.row = Row([masters] if isinstance(masters, torch.Tensor) else list(masters))

    def piece(self, start: int, shape: Sequence[int], *, name: str) -> Any:
        """Return the tensor of one parameter."""
        return joined([self.row], start=start, count=torch.Size(shape).numel(), shape=shape, name=name)

    def state(self, value: Any, start: int, shape: Sequence[int], *, name: str) -> Any:
        """Return what the optimizer keeps for one parameter."""
        if not isinstance(value, torch.Tensor) or value.dim() == 0:
            return value
        count = torch.Size(shape).numel()
        return joined([Row([value])], start=start if self.is_flat else 0, count=count, shape=shape, name=name)

    def is_at(self, start: int, weight: torch.Tensor) -> bool:
        """Return whether a weight's values begin at a place."""
        if start + weight.numel() > self.row.numel:
            return False
        at = 0
        for piece in self.row.cut(start, weight.numel()):
            part = weight.reshape(-1)[at : at + piece.numel()]
            if not torch.equal(piece.to(weight.dtype), part):
                return False
            at += piece.numel()
        return True


@dataclass
class _Step:
    """A choice that was made: which weight begins at a place."""

    group: int
    start: int
    candidates: Iterator[str]
    chosen: str = ""


def _matched(groups: Sequence[_Masters], weights: Mapping[str, torch.Tensor]) -> list[list[tuple[str, int]]] | None:
    """Return the names of each group's weights with the places where they begin; None where there is no such assignment."""
    order, free = list(weights), dict.fromkeys(weights)
    steps: list[_Step] = []

    def begin(group: int, start: int, after: str) -> bool:
        """Begin a choice at the next place that has elements; return whether there was one."""
        while group < len(groups) and start >= groups[group].row.numel:
            group, start = group + 1, 0
        if group == len(groups):
            return False
        # Most often it is the next one in the model's order.
        first = order.index(after) + 1 if after else 0
        names = [name for name in (*order[first:], *order[:first]) if name in free and weights[name].numel()]
        fitting = (name for name in names if name in free and groups[group].is_at(start, weights[name]))
        steps.append(_Step(group, start, fitting))
        return True

    going, tries = begin(0, 0, ""), 0
    while going:
        step, tries = steps[-1], tries + 1
        if tries > _MOST_TRIES * (len(weights) + 1):
            return None
        if step.chosen:
            free[step.chosen] = None
        step.chosen = next(step.candidates, "")
        if step.chosen:
            free.pop(step.chosen)
            going = begin(step.group, step.start + weights[step.chosen].numel(), step.chosen)
        else:
            steps.pop()
            if not steps:
                return None
    return [[(step.chosen, step.start) for step in steps if step.group == number] for number in range(len(groups))]


def numbered_by_layer(states: Sequence[Mapping[str, Any]], weights: Mapping[str, torch.Tensor]) -> Trained | None:
    """Return what torch's optimizers of the stages of a pipeline keep; None where it does not fit the weights in their order.

    Args:
        states: of each stage, by number.
        weights: of the whole model, in its order.
    """
    groups = [len(state["param_groups"]) for state in states]
    if len(set(groups)) > 1 or not all(state["state"] for state in states):
        return None
    names: list[list[str]] = [[] for _ in range(groups[0])]
    found, left = Trained(), list(weights)
    for state in states:
        rows = [deque(group["params"]) for group in state["param_groups"]]
        while any(rows):
            group = _next_group(rows, state["state"], weights[left[0]].shape if left else None)
            if group is not None:
                found.states[left[0]] = dict(state["state"][rows[group].popleft()])
                names[group].append(left.pop(0))
                continue
            tied = next((row for row in rows if row and _is_tied(row[0], state["state"], found)), None)
            if tied is None:
                return None
            tied.popleft()
    found.groups = [{**group, "params": each} for group, each in zip(states[0]["param_groups"], names, strict=True)]
    return None if left else found


def _next_group(
    rows: Sequence[deque[int]], state: Mapping[int, Mapping[str, Any]], shape: torch.Size | None
) -> int | None:
    """Return which group has the next weight of the model, of that shape; None where none or several could."""
    fitting = [group for group, row in enumerate(rows) if row and shape and _shape_of(state.get(row[0], {})) == shape]
    return fitting[0] if len(fitting) == 1 else None


def _is_tied(number: int, state: Mapping[int, Mapping[str, Any]], found: Trained) -> bool:
    """Return whether a stage keeps for a number what another one keeps for a weight: they use the same one."""
    return any(_is_same(state.get(number, {}), other) for other in found.states.values())


def _is_same(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    shape = _shape_of(one)
    if shape is None or shape != _shape_of(other) or one.keys() != other.keys():
        return False
    return all(torch.equal(torch.as_tensor(one[key]), torch.as_tensor(other[key])) for key in one)


def _shape_of(state: Mapping[str, Any]) -> torch.Size | None:
    shapes = {value.shape for value in state.values() if isinstance(value, torch.Tensor) and value.dim()}
    return shapes.pop() if len(shapes) == 1 else None
