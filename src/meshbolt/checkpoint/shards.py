"""The tensors of a checkpoint, written and read by torch's distributed checkpoint (DCP).

Each rank writes its own parts of sharded tensors; what several ranks have whole is written by one of them. DCP plans
that over the ranks' group, and reads any layout into any other. Here stands what it needs around it: typed errors that
name the file, metadata that is no code, and silence.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
import warnings
from collections.abc import Generator, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save
from torch.distributed.tensor import DTensor

from meshbolt.checkpoint.agreement import Ranks, in_words, lost_contact, summary
from meshbolt.checkpoint.metadata import TensorInfo
from meshbolt.errors import CheckpointError


class CheckpointFiles(FileSystem):
    """The files of one directory: errors name the file, and travel between ranks whatever they were."""

    @contextlib.contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Generator[io.IOBase, None, None]:
        """Open a file for as long as the context lasts."""
        handled = sys.exc_info()[1]
        try:
            with super().create_stream(path, mode) as stream:
                yield stream
        except Exception as error:  # torch reports a short read or write by errors of many classes
            first = _first(error, besides=handled)
            if not isinstance(first, Exception):
                raise first from None  # an interrupt, which torch has buried under an error of its own
            raise CheckpointError(f"file {Path(path).name}: {in_words(first)}") from error

    def mkdir(self, path: str | os.PathLike[str]) -> None:
        """Check that the directory, which the first rank has made, is there for this rank as well."""
        if not Path(path).is_dir():
            raise CheckpointError(
                f"{str(path)!r} was made by the first rank and is not there for this one. "
                "Save to a file system that all machines share, by the same path"
            )


def _first(error: BaseException, *, besides: BaseException | None) -> BaseException:
    """Return the error that came first, where torch met others on its way out and would tell of the last one."""
    while not error.__suppress_context__ and error.__context__ not in (None, besides):
        error = error.__context__
    return error


class _Writer(FileSystemWriter):
    def __init__(self, directory: Path) -> None:
        super().__init__(directory, overwrite=False, sync_files=True)
        self.fs = CheckpointFiles()

    def storage_meta(self) -> StorageMeta:
        """Return metadata without a path: it would be the partial directory's, and not every Python could read it."""
        return StorageMeta(save_id=self.save_id)


class _Reader(FileSystemReader):
    def __init__(self, directory: Path, metadata: Metadata) -> None:
        super().__init__(directory)
        self.fs = CheckpointFiles()
        self._metadata = metadata

    def read_metadata(self, *_args: Any, **_kwargs: Any) -> Metadata:
        """Return the metadata that was read and checked before."""
        return self._metadata


def info_of(key: str, tensor: Any) -> TensorInfo:
    """Return shape and dtype of a tensor that is to be written or filled.

    Raises:
        CheckpointError: it is no tensor with values of its own.
    """
    if not isinstance(tensor, torch.Tensor):
        raise CheckpointError(f"{key!r} is a {type(tensor).__name__}; tensors are saved here, other values as objects")
    if tensor.is_meta:
        raise CheckpointError(f"{key!r} is on the meta device and has no values; materialise the model first")
    if isinstance(tensor, DTensor) and any(placement.is_partial() for placement in tensor.placements):
        raise CheckpointError(f"{key!r} is a sum that is not reduced yet ({tensor.placements}); reduce it first")
    return TensorInfo(shape=tuple(tensor.shape), dtype=tensor.dtype)


def write_shards(directory: Path, *, tensors: Mapping[str, torch.Tensor], ranks: Ranks, failing: str) -> None:
    """Write this rank's part of the tensors and have it on the disk; a collective of all ranks.

    Args:
        directory: an empty directory that is there for all ranks.
        tensors: by key; a plain tensor under a key of several ranks is the same on each.
        ranks: who writes.
        failing: how an error's message begins.

    Raises:
        CheckpointError: some rank could not write; the same on every rank that lives.
    """
    with _errors_of_dcp(ranks, failing=failing):
        dcp_save(dict(tensors), storage_writer=_Writer(directory), process_group=ranks.group)


def read_shards(
    directory: Path, *, metadata: Metadata, into: Mapping[str, torch.Tensor], ranks: Ranks, failing: str
) -> None:
    """Fill this rank's tensors from a checkpoint, whatever layout it was written in; a collective of all ranks.

    Args:
        directory: the checkpoint's.
        metadata: what `read_metadata` gave for it.
        into: the tensors by key, all of them in the checkpoint and of its shapes.
        ranks: who reads.
        failing: how an error's message begins.

    Raises:
        CheckpointError: some rank could not read; the same on every rank that lives. Tensors may be filled in part.
    """
    planner = DefaultLoadPlanner(flatten_state_dict=False)
    with _errors_of_dcp(ranks, failing=failing):
        dcp_load(dict(into), storage_reader=_Reader(directory, metadata), planner=planner, process_group=ranks.group)


def files_of_rank(directory: Path, ranks: Ranks) -> dict[str, int]:
    """Return the bytes of the files that this rank wrote, by name; the first rank's include those that exist once."""
    sizes = {file.name: file.stat().st_size for file in directory.iterdir() if _writer_of(file) == ranks.rank}
    return dict(sorted(sizes.items()))


def _writer_of(file: Path) -> int:
    shard = re.fullmatch(r"__(\d+)_\d+\.distcp", file.name)  # DCP's names
    return int(shard[1]) if shard else 0


@contextlib.contextmanager
def _errors_of_dcp(ranks: Ranks, *, failing: str) -> Iterator[None]:
    try:
        with _alone_on_purpose() if ranks.alone else contextlib.nullcontext():
            yield
    except CheckpointException as error:
        raise _converted(error, ranks=ranks, failing=failing) from error
    except Exception as error:  # every failure of a rank's own part comes as the above: what is left is the exchange
        raise lost_contact(error, failing=failing) from error


def _converted(error: CheckpointException, *, ranks: Ranks, failing: str) -> BaseException:
    failures = {rank: failure for rank, (failure, _) in error.failures.items()}
    own = failures.get(ranks.rank)
    if own is not None and not isinstance(own, Exception):
        return own  # an interrupt of this rank stays one
    texts = [in_words(failures[rank]) if rank in failures else None for rank in range(ranks.size)]
    return CheckpointError(f"{failing}: {summary(texts)}")


@contextlib.contextmanager
def _alone_on_purpose() -> Iterator[None]:
    # DCP warns whoever has no process group that it takes him for a single process.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
        yield
