"""Load a checkpoint: found and compared on every rank first, then read."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.metadata import Metadata

from meshbolt.checkpoint.agreement import Ranks
from meshbolt.checkpoint.compare import LoadReport, compare, merge
from meshbolt.checkpoint.directory import find, local_path
from meshbolt.checkpoint.manifest import FILE_NAME, Manifest, read_manifest
from meshbolt.checkpoint.metadata import read_metadata, tensors_in
from meshbolt.checkpoint.objects import read_objects
from meshbolt.checkpoint.shards import info_of, read_shards
from meshbolt.errors import CheckpointError


def load_objects(
    path: str | os.PathLike[str],
    *,
    weights_only: bool | None = None,
    verify: bool = True,
    group: dist.ProcessGroup | None = None,
) -> dict[str, Any]:
    """Return what a checkpoint holds beside its tensors, on every rank; a collective of all ranks.

    Args:
        path: the checkpoint's directory.
        weights_only: False builds objects of any class, which runs code from the file; True or None plain data only.
        verify: compare the sizes of all files with the manifest first.
        group: the ranks that load, with a CPU backend; None for all, or for a single process.

    Raises:
        CheckpointError: there is no checkpoint, it is damaged, or it holds objects of classes that `weights_only` does
            not allow; the same on every rank.
    """
    reading = _open(path, verify=verify, group=group)

    def read() -> dict[str, Any]:
        objects = read_objects(reading.directory, weights_only=weights_only)
        reading.check_unchanged()
        return objects

    return reading.ranks.agree(read, failing=reading.failing)


def load_tensors(
    path: str | os.PathLike[str],
    into: Mapping[str, torch.Tensor],
    *,
    strict: bool = True,
    prefix: str | tuple[str, ...] = "",
    verify: bool = True,
    group: dist.ProcessGroup | None = None,
) -> LoadReport:
    """Fill tensors from a checkpoint, in place, whatever layout it was saved in; a collective of all ranks.

    Args:
        path: the checkpoint's directory.
        into: by key, the tensors to fill, sharded in any way; ranks may ask for different keys. Values are cast to the
            tensor's dtype, within one kind of numbers, and the report says so.
        strict: raise where keys or shapes differ. False fills what fits and leaves the rest as it is.
        prefix: saved keys that begin with none of these may be absent from `into`.
        verify: compare the sizes of all files with the manifest first.
        group: the ranks that load, with a CPU backend; None for all, or for a single process.

    Returns:
        How the checkpoint and `into` differ, the same on every rank.

    Raises:
        CheckpointError: there is no checkpoint, it is damaged, or it differs from `into`; the same on every rank. A
            difference is found before any tensor is touched; a file that cannot be read, while they are filled.
    """
    reading = _open(path, verify=verify, group=group)
    ranks, failing = reading.ranks, reading.failing
    metadata = ranks.agree(reading.metadata, failing=failing)
    saved = tensors_in(metadata)
    reports = ranks.each(
        lambda: compare(saved=saved, asked={key: info_of(key, tensor) for key, tensor in into.items()}, prefix=prefix),
        failing=failing,
    )
    report = merge(reports)
    if strict and (faults := report.faults()):
        raise CheckpointError(f"{failing}: it does not fit what it is loaded into.{faults}")
    fitting = {key: tensor for key, tensor in into.items() if key in saved and key not in report.mismatched}
    read_shards(reading.directory, metadata=metadata, into=fitting, ranks=ranks, failing=failing)
    ranks.agree(reading.check_unchanged, failing=failing)
    return report


def _open(path: str | os.PathLike[str], *, verify: bool, group: dist.ProcessGroup | None) -> _Reading:
    ranks, target = Ranks(group), local_path(path)
    failing = f"Checkpoint {str(target)!r} cannot be loaded"

    def look() -> _Reading:
        directory = find(target)
        manifest = read_manifest(directory / FILE_NAME)
        if verify:
            # Each file is looked at by one rank.
            manifest.check_files(directory, names=sorted(manifest.files)[ranks.rank :: ranks.size])
        return _Reading(directory=directory, manifest=manifest, ranks=ranks, failing=failing)

    reading = ranks.agree(look, failing=failing)
    if len(set(ranks.gather(reading.manifest.save_id, failing=failing))) > 1:
        raise CheckpointError(
            f"{failing}: different ranks find different checkpoints there. It was replaced at this moment, in which "
            "case load again, or the machines do not share the file system."
        )
    return reading


@dataclass(frozen=True, kw_only=True)
class _Reading:
    """A checkpoint that all ranks have found."""

    directory: Path
    manifest: Manifest
    ranks: Ranks
    failing: str

    def metadata(self) -> Metadata:
        """Return what DCP knows of the tensors, every file of which the manifest has vouched for."""
        metadata = read_metadata(self.directory)
        strange = {place.relative_path for place in metadata.storage_data.values()} - set(self.manifest.files)
        if strange:
            raise CheckpointError(f"its tensors lie in files that its {FILE_NAME} does not name: {sorted(strange)}")
        return metadata

    def check_unchanged(self) -> None:
        """Check that nobody has replaced or removed the checkpoint since it was found."""
        file = self.directory / FILE_NAME
        if not file.exists() or read_manifest(file).save_id != self.manifest.save_id:
            raise CheckpointError("it was replaced or removed while it was read; load again")
