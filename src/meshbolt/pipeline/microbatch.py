"""Divide a batch of any form into microbatches."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from meshbolt.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Microbatches:
    """A batch that is in microbatches already, whose losses count alike whatever samples they have.

    Attributes:
        parts: one or more, of any form.
    """

    parts: tuple[Any, ...]

    def __post_init__(self) -> None:
        if not self.parts:
            raise ConfigError("Microbatches(()) is no batch. Give one microbatch or more.")


def split_batch(batch: Any, count: int) -> list[Any]:
    """Return a batch in microbatches, as equal as its samples allow, of the batch's own form.

    What has one item for each of the batch's samples is divided: tensors and arrays along their first dim, lists and tuples
    item by item. Everything else goes into every microbatch.

    Args:
        batch: tensors in dictionaries, lists, tuples, dataclasses or Hugging Face's `BatchEncoding`, in any order.
        count: how many.

    Raises:
        ConfigError: there is no tensor to divide, or fewer samples than microbatches.

    Example:
        >>> [part["x"].tolist() for part in split_batch({"x": torch.arange(5), "name": "a"}, 2)]
        [[0, 1, 2], [3, 4]]
    """
    samples = batch_size(batch)
    if samples < count:
        raise ConfigError(
            f"A batch of {samples} samples cannot be divided into {count} microbatches. Use larger batches, or "
            f"PipelineParallel(microbatches={samples})."
        )
    ends = list(itertools.accumulate(part_sizes(samples, count)))
    return [_part(batch, start, end, samples) for start, end in zip([0, *ends], ends, strict=False)]


def part_sizes(samples: int, count: int) -> list[int]:
    """Return how many samples each part of a batch has.

    Args:
        samples: of the batch.
        count: of parts.

    Example:
        >>> part_sizes(7, 3)
        [3, 2, 2]
    """
    return [samples // count + int(index < samples % count) for index in range(count)]


def batch_size(batch: Any) -> int:
    """Return how many samples a batch has: the first dim that most of its tensors share.

    Of lengths that as many tensors have, that of the tensor with the most dims counts, then the first. So a batch may begin with
    weights of classes or a single number. Tensors in a list inside of the batch, as one for each sample, count once.

    Raises:
        ConfigError: there is no tensor with a dim.

    Example:
        >>> batch_size({"weights": torch.ones(3), "x": torch.zeros(8, 4), "y": torch.zeros(8)})
        8
    """
    count, dims = Counter[int](), dict[int, int]()
    for length, number in _lengths(batch):
        count[length] += 1
        dims[length] = max(number, dims.get(length, 0))
    if count:
        return max(count, key=lambda length: (count[length], dims[length]))
    raise ConfigError(
        f"A batch of {type(batch).__name__} holds no tensor with a dim for its samples, along which it could be divided into "
        "microbatches. Put tensors into it."
    )


def signature_of(batch: Any) -> Any:
    """Return what two batches share for which a step runs alike: the shapes and dtypes of tensors, and the other values.

    Values that cannot be compared count by their type.

    Args:
        batch: of any form.
    """
    if isinstance(batch, torch.Tensor):
        return tuple(batch.shape), batch.dtype, batch.requires_grad
    if _is_array(batch):
        return tuple(batch.shape), batch.dtype
    if isinstance(batch, (list, tuple)) and batch and not any(map(_holds_arrays, batch)):
        return type(batch), len(batch), type(batch[0])  # such as the names of samples, which are others in each batch
    values = tuple(signature_of(value) for value in _values(batch))
    if isinstance(batch, Mapping):
        return type(batch), tuple(batch), values
    if values or isinstance(batch, (list, tuple)):
        return type(batch), values
    return batch if isinstance(batch, (str, int, float, bool, type(None))) else type(batch)


def _holds_arrays(value: Any) -> bool:
    return _is_array(value) or any(map(_holds_arrays, _values(value)))


def _lengths(batch: Any, *, inside: bool = False) -> Iterator[tuple[int, int]]:
    """Yield the length of each tensor's first dim, and how many dims it has; those of a list inside once."""
    if isinstance(batch, torch.Tensor):
        if batch.dim() > 0:
            yield len(batch), batch.dim()
        return
    found = (pair for value in _values(batch) for pair in _lengths(value, inside=True))
    is_list = isinstance(batch, (list, tuple)) and not hasattr(batch, "_fields")
    yield from dict(sorted(found)).items() if inside and is_list else found


def _values(batch: Any) -> list[Any]:
    if isinstance(batch, Mapping):
        return list(batch.values())
    if isinstance(batch, (list, tuple)):
        return list(batch)
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        return [getattr(batch, each.name) for each in dataclasses.fields(batch)]
    return []


def _part(batch: Any, start: int, end: int, samples: int) -> Any:
    if _is_array(batch):
        return batch[start:end] if batch.ndim > 0 and len(batch) == samples else batch
    values = _values(batch)
    is_sequence = isinstance(batch, (list, tuple)) and not hasattr(batch, "_fields")
    if is_sequence and len(batch) == samples and not _is_batch(values, samples):
        return batch[start:end]
    parts = [_part(value, start, end, samples) for value in values]
    if isinstance(batch, Mapping):
        return _mapping_like(batch, dict(zip(batch, parts, strict=True)))
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*parts)
    if isinstance(batch, (list, tuple)):
        return type(batch)(parts)
    if parts:
        made = copy.copy(batch)  # a field need not be an argument of the class
        for each, part in zip(dataclasses.fields(batch), parts, strict=True):
            object.__setattr__(made, each.name, part)
        return made
    return batch


def _mapping_like(batch: Any, items: dict[Any, Any]) -> Any:
    if isinstance(batch, defaultdict):
        return defaultdict(batch.default_factory, items)
    return type(batch)(items)


def _is_array(value: Any) -> bool:
    """Return whether a value is a tensor, or an array of numpy, which need not be there."""
    numpy = sys.modules.get("numpy")
    return isinstance(value, torch.Tensor) or (numpy is not None and isinstance(value, numpy.ndarray))


def _is_batch(values: Sequence[Any], samples: int) -> bool:
    """Return whether the values are those of a batch, such as inputs and targets, where there are as many as samples."""
    arrays = [array for value in values for array in _arrays(value) if array.ndim > 0]
    return bool(arrays) and all(len(array) == samples for array in arrays)


def _arrays(value: Any) -> Iterator[Any]:
    if _is_array(value):
        yield value
    for inner in _values(value):
        yield from _arrays(inner)
