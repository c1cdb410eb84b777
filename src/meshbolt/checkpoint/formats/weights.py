"""Which tensors of a checkpoint are its weights, and what they are called outside of it."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from meshbolt.checkpoint.formats.options import DTYPES, ExportOptions, Readable
from meshbolt.checkpoint.metadata import TensorInfo
from meshbolt.checkpoint.optimizers import OWN
from meshbolt.errors import ConfigError, did_you_mean


def exported_names(reader: Readable, options: ExportOptions) -> dict[str, str]:
    """Return the keys of the tensors to export, by the names they get.

    Args:
        reader: the checkpoint.
        options: say which.

    Raises:
        ConfigError: there are none.
    """
    if options.everything:
        return {key: key for key in reader.tensors}
    entry = f"{options.weights}."
    names = {key.removeprefix(entry): key for key in reader.tensors if key.startswith(entry)}
    if not names:
        entries = sorted({key.partition(".")[0] for key in reader.tensors} - {OWN})
        raise ConfigError(
            f"Checkpoint {reader.name!r} has no tensors under weights={options.weights!r}"
            f"{did_you_mean(options.weights, entries)}. Name the entry that holds the weights."
        )
    if options.strip_prefix is None:
        return names
    prefix = options.strip_prefix
    stripped = {name.removeprefix(prefix): key for name, key in names.items() if name.startswith(prefix)}
    stripped.pop("", None)
    if not stripped:
        beginnings = {name.partition(".")[0] + "." for name in names if "." in name}
        raise ConfigError(
            f"strip_prefix={prefix!r}: no weight of checkpoint {reader.name!r} begins so{did_you_mean(prefix, beginnings)}."
        )
    return stripped


def exported_infos(reader: Readable, names: Mapping[str, str], options: ExportOptions) -> dict[str, TensorInfo]:
    """Return shape and dtype that tensors have when they are exported, by name."""
    dtype = DTYPES.get(options.dtype or "")
    infos = {name: reader.tensors[key] for name, key in names.items()}
    if dtype is None:
        return infos
    return {
        name: TensorInfo(shape=info.shape, dtype=dtype) if info.dtype.is_floating_point else info
        for name, info in infos.items()
    }


def read_exported(reader: Readable, key: str, info: TensorInfo) -> torch.Tensor:
    """Return a tensor as it is exported, contiguous."""
    return reader.read(key).to(info.dtype)
