"""What an export or import is asked for, and what a format gives: values that know nothing of any one format."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from meshbolt.checkpoint.metadata import TensorInfo
from meshbolt.compat import StoredTensor
from meshbolt.errors import ConfigError, did_you_mean
from meshbolt.units import MIB

OnBytes = Callable[[int], None]
DTYPES: Mapping[str, torch.dtype] = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
    "float64": torch.float64,
}


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """What is exported, and how. An option that a format has no use for is refused unless it has its default.

    Attributes:
        max_shard_bytes: a file of weights gets no larger, unless one tensor is.
        weights: the entry of the checkpoint that holds the weights: "state_dict" in those of a Trainer, in those of Fabric
            what the user called it.
        everything: every tensor of the checkpoint under its full key, instead of the weights only.
        strip_prefix: only the weights whose names begin so, named without it; None for all as they are.
        dtype: what floating-point weights are cast to, a name of `DTYPES`; None for as they are.
        config: a `config.json` or the directory of a model, to be copied beside the weights.
        weights_only: False builds objects of any class in the checkpoint, which runs their code; else plain data only.
    """

    max_shard_bytes: int = 512 * MIB
    weights: str = "state_dict"
    everything: bool = False
    strip_prefix: str | None = None
    dtype: str | None = None
    config: str | None = None
    weights_only: bool | None = None

    def __post_init__(self) -> None:
        if self.max_shard_bytes <= 0:
            raise ConfigError(f"A shard of {self.max_shard_bytes} bytes holds nothing. Give a size such as 512MiB.")
        if self.dtype is not None and self.dtype not in DTYPES:
            raise ConfigError(
                f"dtype={self.dtype!r} is not one that weights are cast to{did_you_mean(self.dtype, DTYPES)}."
            )
        if self.everything and self.strip_prefix is not None:
            raise ConfigError(
                f"everything and strip_prefix={self.strip_prefix!r} contradict each other: one exports all tensors under "
                "their full keys, the other some weights under shorter names. Give one of them."
            )

    def refuse_others(self, taken: frozenset[str], *, to: str) -> None:
        """Check that no option was given that a format has no use for.

        Args:
            taken: the names of the options that it has use for.
            to: its name.

        Raises:
            ConfigError: there is one; names it.
        """
        given = [option.name for option in dataclasses.fields(self) if getattr(self, option.name) != option.default]
        if others := [name for name in given if name not in taken]:
            shown = ", ".join(f"{name}={getattr(self, name)!r}" for name in others)
            raise ConfigError(
                f"The format {to!r} has no use for {shown}{did_you_mean(others[0], taken)}. Leave it out."
            )


class Writer(Protocol):
    """An export that is planned: it says what it needs before it writes.

    Attributes:
        num_tensors: how many tensors it writes.
        num_bytes: how many bytes they have.
        notes: what the user should know, as sentences.
    """

    num_tensors: int
    num_bytes: int
    notes: tuple[str, ...]

    def write(self, out: Path, *, on_bytes: OnBytes) -> None:
        """Write to a path where nothing is yet, and have it on the disk.

        Args:
            out: a file or directory to make.
            on_bytes: called with the bytes of each tensor that was written.
        """


class Readable(Protocol):
    """What is exported: a checkpoint of meshbolt's that is open, or another that could be imported.

    Attributes:
        name: what messages call it.
        tensors: shape and dtype of every tensor, by key.
    """

    name: str
    tensors: Mapping[str, TensorInfo]

    def read(self, key: str) -> torch.Tensor:
        """Return a whole tensor, contiguous."""

    def objects(self, *, weights_only: bool | None = None) -> dict[str, Any]:
        """Return everything that is no tensor, with markers where tensors belong."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """What is imported: the content of a checkpoint-to-be.

    Attributes:
        tensors: by key; read when they are used.
        objects: everything else, with markers where tensors belong.
        notes: what the user should know, as sentences.
        closing: closed when everything was read.
    """

    tensors: Mapping[str, torch.Tensor]
    objects: Mapping[str, Any]
    notes: tuple[str, ...] = ()
    closing: ExitStack = field(default_factory=ExitStack)


class SourceReader:
    """Reads a checkpoint of another format as one of meshbolt's is read, so that it is exported without a copy between.

    Attributes:
        name: its path.
        tensors: shape and dtype of every tensor, by key.
    """

    def __init__(self, source: Source, *, name: str) -> None:
        """Take what was found.

        Args:
            source: its content; stays open until the last tensor was read.
            name: its path.
        """
        self.name = name
        self.tensors: Mapping[str, TensorInfo] = {
            key: TensorInfo(shape=tuple(tensor.shape), dtype=tensor.dtype) for key, tensor in source.tensors.items()
        }
        self._source = source

    def read(self, key: str) -> torch.Tensor:
        """Return a whole tensor, contiguous."""
        tensor = self._source.tensors[key]
        return (tensor.value() if isinstance(tensor, StoredTensor) else tensor).contiguous()

    def objects(self, *, weights_only: bool | None = None) -> dict[str, Any]:
        """Return everything that is no tensor, with markers where tensors belong.

        Args:
            weights_only: nothing depends on it: objects were read when the source was.
        """
        return dict(self._source.objects)
