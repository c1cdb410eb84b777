"""Optimizer state by parameter name, as meshbolt keeps it, and by number, as torch and Lightning do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from meshbolt.checkpoint.tree import MARKER, markers, rebuilt

# A key of our own among the user's: which of the tensors were sharded when they were saved, and notes on them.
OWN = "meshbolt"
# What the class of an optimizer is kept under, in its state.
CLASS = "class"


def by_number(tree: Any) -> Any:
    """Return a tree in which parameters of optimizers have numbers instead of names, as `Optimizer.state_dict` gives them.

    Args:
        tree: anything; what is the state of an optimizer by name is found wherever it is.
    """
    if not isinstance(tree, Mapping):
        return type(tree)(map(by_number, tree)) if type(tree) in (list, tuple) else tree
    if not _is_optimizer_state(tree):
        return rebuilt(tree, {key: by_number(value) for key, value in tree.items()})
    names = [name for group in tree["param_groups"] for name in group["params"]]
    if not all(isinstance(name, str) for name in names):
        return tree
    numbers = {name: number for number, name in enumerate(names)}
    groups = [{**group, "params": [numbers[name] for name in group["params"]]} for group in tree["param_groups"]]
    others = {key: value for key, value in tree.items() if key != CLASS}  # torch does not keep it
    return {**others, "state": {numbers[name]: value for name, value in tree["state"].items()}, "param_groups": groups}


def by_name(checkpoint: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Return a checkpoint of Lightning's with optimizer state by name, as far as it tells the names; and what to say of it.

    A file tells them where the optimizer was made of named parameters. Elsewhere the numbers stay: only who makes the
    optimizer again knows their order.

    Args:
        checkpoint: with `state_dict`.
    """
    states = checkpoint.get("optimizer_states")
    if not states:
        return dict(checkpoint), ()
    named = [_named(state, known=checkpoint["state_dict"]) for state in states]
    notes = tuple(
        f"Optimizer {index} keeps its state by number, since the file does not tell the parameters' names; a run that resumes "
        "takes the numbers in the order of its own optimizer's parameters."
        for index, (state, found) in enumerate(zip(states, named, strict=True))
        if found is None and state["state"]
    )
    chosen = [state if found is None else found for state, found in zip(states, named, strict=True)]
    return {**checkpoint, "optimizer_states": chosen}, notes


def sharded_keys(objects: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """Return the keys of tensors that a run on several ranks shards: weights, and state of their shapes.

    Args:
        objects: a checkpoint with markers in the places of its tensors, optimizer state by name.
        tensors: by key.
    """
    weights = {name: marker[MARKER] for name, marker in objects["state_dict"].items() if _is_marker(marker)}
    found = list(weights.values())
    for state in objects.get("optimizer_states", ()):
        for name, values in state["state"].items():
            shape = tensors[weights[name]].shape if name in weights else None
            found += [
                marker[MARKER]
                for marker in values.values()
                if _is_marker(marker) and tensors[marker[MARKER]].shape == shape and shape
            ]
    return sorted(found)


def owners_in(tree: Any) -> dict[str, str]:
    """Return the parameters' names by the keys of the tensors that optimizers keep for them.

    Args:
        tree: objects with markers in the places of tensors; what is the state of an optimizer by name is found wherever it
            is.
    """
    if isinstance(tree, Mapping) and _is_optimizer_state(tree):
        states = ((name, values) for name, values in tree["state"].items() if isinstance(name, str))
        return {key: name for name, values in states for key in markers(values)}
    parts = tree.values() if isinstance(tree, Mapping) else tree if type(tree) in (list, tuple) else ()
    return {key: name for part in parts for key, name in owners_in(part).items()}


def _named(state: Mapping[str, Any], *, known: Mapping[str, Any]) -> dict[str, Any] | None:
    groups = state["param_groups"]
    if all(isinstance(each, str) for group in groups for each in group["params"]):
        return dict(state)
    if not all(isinstance(group.get("param_names"), list) for group in groups):
        return None
    names = [name for group in groups for name in group["param_names"]]
    numbers = [number for group in groups for number in group["params"]]
    if len(names) != len(numbers) or not set(names) <= known.keys():
        return None
    of = dict(zip(numbers, names, strict=True))
    return {
        **state,
        "state": {of[number]: value for number, value in state["state"].items()},
        "param_groups": [{**group, "params": [of[number] for number in group["params"]]} for group in groups],
    }


def _is_optimizer_state(tree: Mapping[Any, Any]) -> bool:
    groups = tree.get("param_groups")
    return (
        isinstance(groups, list)
        and isinstance(tree.get("state"), Mapping)
        and all(isinstance(group, Mapping) and isinstance(group.get("params"), list) for group in groups)
    )


def _is_marker(value: Any) -> bool:
    return isinstance(value, Mapping) and set(value) == {MARKER}
