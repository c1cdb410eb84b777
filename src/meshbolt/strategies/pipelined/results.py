"""What a step returned for each microbatch, as what it would have returned for the whole batch.

The rules, the first that fits, for values at the same place in every result:

| values | become |
|---|---|
| tensors or arrays whose first dim is the microbatch's samples | one, concatenated |
| tensors, arrays and plain values that are all equal | that value, bit for bit |
| floating tensors of a single element, floats | their mean, weighted by samples |
| mappings | one of the class of the first, key by key; a key that some lack is joined over those that have it |
| dataclasses, namedtuples, tuples of one length | one of that class, item by item |
| lists with an item per sample | one list, concatenated |
| other lists of one length | one list, item by item |
| anything else, counts among it: whether they add up cannot be known | a list with a value per microbatch |

A list has an item per sample if it is as long as the microbatch's samples, unless its items are tensors whose own first dim is
the samples: then it is a list of outputs.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch

_PLAIN = (str, bytes, int, float, complex, bool, torch.dtype, torch.device)
_Rule = Callable[[Sequence[Any], Sequence[int]], Any]


def join_results(results: Sequence[Any], sizes: Sequence[int]) -> Any:
    """Return what a step would have returned for a whole batch.

    Args:
        results: what it returned for each microbatch, in their order, all on one device; see the rules of this file.
        sizes: number of samples of each microbatch.

    Example:
        >>> join_results([{"loss": 1.0, "y": torch.zeros(2)}, {"loss": 4.0, "y": torch.ones(1)}], [2, 1])
        {'loss': 2.0, 'y': tensor([0., 0., 1.])}
    """
    first = results[0]
    if len(results) == 1 or all(result is first for result in results):
        return first
    if isinstance(first, Mapping) and _all_are(Mapping, results):
        return _join_mappings(results, sizes)
    if not _all_are(type(first), results):
        return list(results)
    return _rule_for(first)(results, sizes)


def _rule_for(value: Any) -> _Rule:
    if isinstance(value, torch.Tensor):
        return _join_tensors
    if isinstance(value, np.ndarray):
        return _join_arrays
    if isinstance(value, _PLAIN):
        return _join_plain
    if isinstance(value, list):
        return _join_lists
    if isinstance(value, tuple):
        return _join_tuples
    if dataclasses.is_dataclass(value):
        return _join_dataclasses
    return lambda results, _sizes: list(results)


def detached(tree: Any, device: torch.device | str = "cpu") -> Any:
    """Return what a step returned without its graph and on one device, ready to be sent to other ranks.

    Args:
        tree: tensors in mappings, lists, tuples and dataclasses, in any order; other values stay as they are.
        device: where its tensors shall be.
    """
    return map_tensors(lambda tensor: tensor.detach().to(device), tree)


def placed(tree: Any, device: torch.device | str) -> Any:
    """Return what came from another rank on this rank's device.

    Args:
        tree: as for `detached`.
        device: where its tensors shall be.
    """
    return map_tensors(lambda tensor: tensor.to(device), tree)


def map_tensors(change: Callable[[torch.Tensor], Any], tree: Any) -> Any:
    """Return a result with each tensor in it changed, in new containers of the same classes.

    Args:
        change: takes a tensor and returns what stands in its place.
        tree: as for `detached`.
    """
    if isinstance(tree, torch.Tensor):
        return change(tree)
    if isinstance(tree, Mapping):
        return _mapping_like(tree, {key: map_tensors(change, value) for key, value in tree.items()})
    if isinstance(tree, (list, tuple)):
        return _sequence_like(tree, [map_tensors(change, value) for value in tree])
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        return _dataclass_like(tree, {name: map_tensors(change, value) for name, value in _fields(tree).items()})
    return tree


def mean_of(values: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    """Return the weighted mean of floating tensors of one shape; where all are equal, that value itself.

    Args:
        values: at least one.
        weights: of each.

    Returns:
        Of the shape and dtype of the first; summed in float64.
    """
    if all(torch.equal(value, values[0]) for value in values):
        return values[0]
    total = sum(value.double() * weight for value, weight in zip(values, weights, strict=True))
    return cast("torch.Tensor", total / sum(weights)).to(values[0].dtype)


def _all_are(kind: type, values: Sequence[Any]) -> bool:
    return all(isinstance(value, kind) for value in values)


def _join_tensors(tensors: Sequence[torch.Tensor], sizes: Sequence[int]) -> Any:
    first = tensors[0]
    are_samples = all(_samples_in(tensor) == size for tensor, size in zip(tensors, sizes, strict=True))
    if are_samples and len({(tensor.shape[1:], tensor.dtype) for tensor in tensors}) == 1:
        return torch.cat(list(tensors))
    if are_samples or len({(tensor.shape, tensor.dtype) for tensor in tensors}) > 1:
        return list(tensors)
    if first.is_floating_point() and first.numel() == 1:
        return mean_of(tensors, sizes)
    return first if all(torch.equal(tensor, first) for tensor in tensors) else list(tensors)


def _join_arrays(arrays: Sequence[Any], sizes: Sequence[int]) -> Any:
    # Numbers and words have no common place among tensors; what has is treated alike.
    if not all(array.dtype.kind in "biufc" for array in arrays):
        are_samples = all(array.ndim and len(array) == size for array, size in zip(arrays, sizes, strict=True))
        return np.concatenate(list(arrays)) if are_samples else list(arrays)
    joined = _join_tensors([torch.from_numpy(np.ascontiguousarray(array)) for array in arrays], sizes)
    return joined.numpy() if isinstance(joined, torch.Tensor) else list(arrays)


def _join_plain(values: Sequence[Any], sizes: Sequence[int]) -> Any:
    if all(type(value) is type(values[0]) and value == values[0] for value in values):
        return values[0]
    if _all_are(float, values):
        return sum(value * size for value, size in zip(values, sizes, strict=True)) / sum(sizes)
    return list(values)


def _join_mappings(mappings: Sequence[Mapping[Any, Any]], sizes: Sequence[int]) -> Any:
    joined = {}
    for key in dict.fromkeys(key for mapping in mappings for key in mapping):
        having = [(mapping[key], size) for mapping, size in zip(mappings, sizes, strict=True) if key in mapping]
        joined[key] = join_results([value for value, _ in having], [size for _, size in having])
    return _mapping_like(mappings[0], joined)


def _join_lists(lists: Sequence[list[Any]], sizes: Sequence[int]) -> Any:
    are_samples = all(len(each) == size for each, size in zip(lists, sizes, strict=True))
    if are_samples and not all(_is_output(each, size) for each, size in zip(lists, sizes, strict=True)):
        return [item for each in lists for item in each]
    return _join_items(lists, sizes)


def _is_output(items: list[Any], size: int) -> bool:
    """Return whether a list as long as the samples holds outputs for all of them, not an item for each."""
    found: list[bool] = []
    map_tensors(lambda tensor: found.append(_samples_in(tensor) == size), items)
    return bool(found) and all(found)


def _join_tuples(tuples: Sequence[tuple[Any, ...]], sizes: Sequence[int]) -> Any:
    # A tuple of numbers is what a step has computed; one of texts, as collation makes it, are the names of samples.
    are_samples = all(len(each) == size for each, size in zip(tuples, sizes, strict=True))
    if are_samples and all(isinstance(item, (str, bytes)) for each in tuples for item in each):
        return tuple(item for each in tuples for item in each)
    return _join_items(tuples, sizes)


def _join_items(sequences: Sequence[Any], sizes: Sequence[int]) -> Any:
    if len({len(each) for each in sequences}) > 1:
        return list(sequences)
    return _sequence_like(sequences[0], [join_results(items, sizes) for items in zip(*sequences, strict=True)])


def _join_dataclasses(values: Sequence[Any], sizes: Sequence[int]) -> Any:
    fields = [_fields(value) for value in values]
    return _dataclass_like(
        values[0], {name: join_results([each[name] for each in fields], sizes) for name in fields[0]}
    )


def _samples_in(tensor: torch.Tensor) -> int | None:
    return len(tensor) if tensor.dim() > 0 else None


def _fields(value: Any) -> dict[str, Any]:
    return {field.name: getattr(value, field.name) for field in dataclasses.fields(value) if hasattr(value, field.name)}


def _mapping_like(model: Mapping[Any, Any], values: dict[Any, Any]) -> Any:
    if type(model) is dict:
        return values
    try:
        # A copy keeps what the class holds beside its items; Hugging Face's outputs keep attributes in step with them.
        made: Any = copy.copy(model)
        for key, value in values.items():
            made[key] = value
    except Exception:  # whatever a class raises that does not take these values, or cannot be changed
        return values
    return made


def _sequence_like(model: Any, values: list[Any]) -> Any:
    if isinstance(model, tuple) and hasattr(model, "_make"):
        return model._make(values)
    if isinstance(model, tuple):
        return tuple(values)
    return values


def _dataclass_like(model: Any, values: dict[str, Any]) -> Any:
    # Neither its constructor, which may take other things, nor its own way of setting, which a frozen one refuses.
    made = copy.copy(model)
    for name, value in values.items():
        object.__setattr__(made, name, value)
    return made
