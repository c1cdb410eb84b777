"""The formats: what each is, where it can be written, and what recognises and reads it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Protocol

from meshbolt.checkpoint.formats import dcp, deepspeed, hf, lightning, safetensors
from meshbolt.checkpoint.formats.options import ExportOptions, Readable, Source, Writer

MakeWriter = Callable[[Readable, ExportOptions], Writer]


class Read(Protocol):
    """Reads a foreign checkpoint."""

    def __call__(self, path: Path, *, prefix: str, weights_only: bool | None) -> Source:
        """Return its content; see the functions `read` of the formats."""


class ReadTag(Protocol):
    """Reads one of the foreign checkpoints in a directory."""

    def __call__(self, path: Path, *, prefix: str, weights_only: bool | None, tag: str) -> Source:
        """Return its content; see the functions `read` of the formats."""


@dataclass(frozen=True, kw_only=True)
class Format:
    """A format that a checkpoint is exported to.

    Attributes:
        help: what it is, in a line.
        options: names of the options that it has use for.
        writer: plans an export.
        file_writer: plans an export into a single file with `suffix`, where there is one.
        suffix: what a path of a single file ends with.
    """

    help: str
    options: frozenset[str]
    writer: MakeWriter
    file_writer: MakeWriter | None = None
    suffix: str = ""


@dataclass(frozen=True, kw_only=True)
class SourceFormat:
    """A format that a checkpoint is imported from.

    Attributes:
        help: what it is, in a line.
        recognises: whether a path is of this format.
        read: returns its content.
        read_tag: likewise, of the save of that name, where a directory has several.
        is_exported: whether it is exported as it is, too. What could be a damaged checkpoint of meshbolt's is not.
    """

    help: str
    recognises: Callable[[Path], bool]
    read: Read
    read_tag: ReadTag | None = None
    is_exported: bool = False


FORMATS: Mapping[str, Format] = MappingProxyType(
    {
        "safetensors": Format(
            help="weights, in shards with an index, or in one file where OUT ends in .safetensors",
            options=safetensors.OPTIONS,
            writer=safetensors.SafetensorsWriter,
            file_writer=safetensors.SafetensorsFileWriter,
            suffix=safetensors.SUFFIX,
        ),
        "hf": Format(
            help="weights as Hugging Face's from_pretrained takes them",
            options=hf.OPTIONS,
            writer=hf.HuggingFaceWriter,
        ),
        "lightning": Format(
            help="everything, in the single file that Lightning writes",
            options=lightning.OPTIONS,
            writer=lightning.LightningWriter,
        ),
        "dcp": Format(
            help="everything, as a directory of torch.distributed.checkpoint", options=dcp.OPTIONS, writer=dcp.DcpWriter
        ),
    }
)

# Looked at in this order: beside what DeepSpeed saves others put files of weights, which hold less.
SOURCES: Mapping[str, SourceFormat] = MappingProxyType(
    {
        "deepspeed": SourceFormat(
            help="a directory of DeepSpeed's (any stage of ZeRO, pipelines, universal), Lightning's strategy for it included",
            recognises=deepspeed.recognises,
            read=deepspeed.read,
            read_tag=deepspeed.read,
            is_exported=True,
        ),
        "safetensors": SourceFormat(
            help="a .safetensors file, or a directory of them", recognises=safetensors.recognises, read=safetensors.read
        ),
        "dcp": SourceFormat(
            help="a directory of torch.distributed.checkpoint, Lightning's FSDP and ModelParallel strategies included",
            recognises=dcp.recognises,
            read=dcp.read,
        ),
        "lightning": SourceFormat(
            help="a .ckpt file of Lightning's, or a state dict", recognises=lightning.recognises, read=lightning.read
        ),
    }
)
