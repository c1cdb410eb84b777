"""A tree of objects with tensors anywhere in it, as a checkpoint keeps it: flat tensors, and the rest with markers.

Each tensor stands under the path that leads to it; in the tree a marker with that key has its place.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Mapping
from typing import Any

import torch

from meshbolt.errors import CheckpointError

MARKER = "__tensor__"

# Beside dict, the mappings that torch's restricted reader builds.
_KEPT_CLASSES = (OrderedDict, Counter)


def split_tensors(tree: Any, prefix: str, tensors: dict[str, torch.Tensor]) -> Any:
    """Move the tensors of a tree into a flat dictionary and return the tree with markers in their places.

    Args:
        tree: nested dicts, lists and tuples.
        prefix: key of the tree; the keys of tensors grow from it with dots.
        tensors: filled with the tensors found.

    Raises:
        CheckpointError: two tensors would have the same key.
    """
    if isinstance(tree, torch.Tensor):
        if prefix in tensors:
            raise CheckpointError(
                f"two entries of what is to be saved have the path {prefix!r}, so that one would take the place of the other. "
                "Rename one of them; keys may have dots, and numbers are keys as their text is"
            )
        tensors[prefix] = tree.detach()
        return {MARKER: prefix}
    if isinstance(tree, Mapping):
        return rebuilt(tree, {key: split_tensors(value, f"{prefix}.{key}", tensors) for key, value in tree.items()})
    if type(tree) in (list, tuple):
        return type(tree)(split_tensors(item, f"{prefix}.{index}", tensors) for index, item in enumerate(tree))
    return tree


def join_tensors(tree: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    """Put tensors back in the places of their markers; the inverse of `split_tensors`.

    Raises:
        CheckpointError: a marked tensor is not among `tensors`.
    """
    if isinstance(tree, Mapping):
        if set(tree) == {MARKER}:
            key = tree[MARKER]
            if key not in tensors:
                raise CheckpointError(f"The checkpoint's objects refer to a tensor {key!r} that it does not hold.")
            return tensors[key]
        return rebuilt(tree, {key: join_tensors(value, tensors) for key, value in tree.items()})
    if type(tree) in (list, tuple):
        return type(tree)(join_tensors(item, tensors) for item in tree)
    return tree


def rebuilt(tree: Mapping[Any, Any], items: dict[Any, Any]) -> Mapping[Any, Any]:
    """Return items in a mapping of the tree's class, where a checkpoint can hold one without running code: else in a dict.

    Args:
        tree: what the items are made from.
        items: with the same keys.
    """
    if type(tree) not in _KEPT_CLASSES:
        return items
    alike: Any = type(tree)()
    vars(alike).update(vars(tree))  # the versions of modules, in a state dict
    alike.update(items)
    return alike  # type: ignore[no-any-return]


def markers(tree: Any) -> list[str]:
    """Return the keys of all tensors that a tree refers to."""
    if isinstance(tree, Mapping):
        return [tree[MARKER]] if set(tree) == {MARKER} else [key for value in tree.values() for key in markers(value)]
    return [key for item in tree for key in markers(item)] if type(tree) in (list, tuple) else []
