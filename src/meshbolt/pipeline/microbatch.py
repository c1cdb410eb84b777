"""Divide a batch of any form into microbatches."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from meshbolt.errors import ConfigError


def split_batch(batch: Any, count: int) -> list[Any]:
    """Return a batch in microbatches, as equal as its samples allow, of the batch's own form.

    Tensors whose first dim is the batch's samples are divided along it, and lists of as many plain values; everything else goes
    into every microbatch.

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
    ends = [(index + 1) * (samples // count) + min(index + 1, samples % count) for index in range(count)]
    return [_part(batch, start, end, samples) for start, end in zip([0, *ends], ends, strict=False)]


def batch_size(batch: Any) -> int:
    """Return how many samples a batch has: the first dim of its first tensor that has one.

    Raises:
        ConfigError: there is none.
    """
    for tensor in _tensors(batch):
        if tensor.dim() > 0:
            return len(tensor)
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
    values = tuple(signature_of(value) for value in _values(batch))
    if isinstance(batch, Mapping):
        return type(batch), tuple(batch), values
    if values or isinstance(batch, (list, tuple)):
        return type(batch), values
    return batch if isinstance(batch, (str, int, float, bool, type(None))) else type(batch)


def _tensors(batch: Any) -> Iterator[torch.Tensor]:
    if isinstance(batch, torch.Tensor):
        yield batch
    for value in _values(batch):
        yield from _tensors(value)


def _values(batch: Any) -> list[Any]:
    if isinstance(batch, Mapping):
        return list(batch.values())
    if isinstance(batch, (list, tuple)):
        return list(batch)
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        return [getattr(batch, each.name) for each in dataclasses.fields(batch)]
    return []


def _part(batch: Any, start: int, end: int, samples: int) -> Any:
    if isinstance(batch, torch.Tensor):
        return batch[start:end] if batch.dim() > 0 and len(batch) == samples else batch
    values = _values(batch)
    if isinstance(batch, list) and len(batch) == samples and not any(_is_container(value) for value in values):
        return batch[start:end]
    parts = [_part(value, start, end, samples) for value in values]
    if isinstance(batch, Mapping):
        return type(batch)(dict(zip(batch, parts, strict=True)))  # type: ignore[call-arg]
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*parts)
    if isinstance(batch, (list, tuple)):
        return type(batch)(parts)
    if parts:
        names = [each.name for each in dataclasses.fields(batch)]
        return dataclasses.replace(batch, **dict(zip(names, parts, strict=True)))
    return batch


def _is_container(value: Any) -> bool:
    return isinstance(value, torch.Tensor) or bool(_values(value))
