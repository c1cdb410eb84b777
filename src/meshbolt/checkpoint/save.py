"""Save a checkpoint: written aside, made whole, then given its name."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from meshbolt.checkpoint import directory, manifest
from meshbolt.checkpoint.agreement import Ranks
from meshbolt.checkpoint.manifest import Manifest
from meshbolt.checkpoint.objects import PackedObjects, write_objects
from meshbolt.checkpoint.shards import files_of_rank, info_of, write_shards


def save_directory(
    path: str | os.PathLike[str],
    *,
    tensors: Mapping[str, torch.Tensor],
    objects: Mapping[str, object] | PackedObjects,
    plan: Mapping[str, object] | None = None,
    versions: Mapping[str, str] | None = None,
    keep_partial: bool = False,
    group: dist.ProcessGroup | None = None,
) -> None:
    """Save a checkpoint; a collective of all ranks, which returns when the checkpoint is whole and on the disk.

    A checkpoint of that name is replaced in one step once the new one is whole; whatever goes wrong before, it stays. A
    single file of that name is replaced as well.

    Args:
        path: the directory to make, the same on every rank, on a file system that all ranks share.
        tensors: by key. Of a DTensor each rank saves its own part. A plain tensor under a key of several ranks is the
            same on each and saved once; a key may exist on one rank only.
        objects: everything else, as `torch.save` takes it, or packed already; those of the first rank are saved.
        plan: what the run was told to do, as plain data, for the manifest.
        versions: of packages beyond torch and meshbolt, for the manifest.
        keep_partial: where the save fails, keep what was written of it, and of earlier ones that failed.
        group: the ranks that save, with a CPU backend; None for all, or for a single process.

    Raises:
        CheckpointError: some rank could not save; the same on every rank that lives.
        UnsupportedError: the path is a URL, or the group has no CPU backend.
    """
    ranks = Ranks(group)
    target = directory.local_path(path)
    failing = f"Checkpoint {str(target)!r} was not saved, and what had this name before is untouched"
    # The first rank's; every rank draws one, so that one exchange is enough.
    save_id = ranks.each(directory.new_save_id, failing=failing)[0]
    description = Manifest(
        save_id=save_id,
        world_size=ranks.size,
        versions={**manifest.own_versions(), **(versions or {})},
        plan=plan or {},
        files={},
    )
    partial = directory.partial_of(target, save_id=save_id)
    save = _Save(target=target, partial=partial, ranks=ranks, description=description, keep_partial=keep_partial)
    try:
        ranks.each(lambda: save.prepare(tensors, objects=objects), failing=failing)
        write_shards(partial, tensors=tensors, ranks=ranks, failing=failing)
        files = ranks.each(save.own_files, failing=failing)
        committing = f"Checkpoint {str(target)!r} is the old or the new one, each whole, but its commit failed"
        ranks.each(lambda: save.commit(files), failing=committing)
    except BaseException:
        save.clean_up(failed=True)
        raise
    save.clean_up(failed=False)


@dataclass(frozen=True, kw_only=True)
class _Save:
    """The steps of one save around the writing of the shards; what is done once, the first rank does."""

    target: Path
    partial: Path
    ranks: Ranks
    description: Manifest
    keep_partial: bool

    def prepare(self, tensors: Mapping[str, torch.Tensor], *, objects: Mapping[str, object] | PackedObjects) -> None:
        """Find what would fail, and write what is small, before anything large is written."""
        for key, tensor in tensors.items():
            info_of(key, tensor)
        if not self.ranks.first:
            return
        self.description.to_json()
        directory.refuse_foreign(self.target)
        if not self.keep_partial:
            directory.remove_partials(self.target)
        self.partial.mkdir(parents=True)
        write_objects(self.partial, objects)

    def own_files(self) -> dict[str, int]:
        """Bring the names of the files to the disk, and return the bytes of those that this rank wrote."""
        directory.sync_directory(self.partial)
        return files_of_rank(self.partial, self.ranks)

    def commit(self, files: Sequence[Mapping[str, int]]) -> None:
        """Make the directory a checkpoint, and give it its name."""
        if not self.ranks.first:
            return
        sizes = {name: num_bytes for part in files for name, num_bytes in part.items()}
        whole = dataclasses.replace(self.description, files=sizes)
        whole.check_files(self.partial, names=sizes)
        directory.write_synced(self.partial / manifest.FILE_NAME, whole.to_json().encode())
        directory.sync_directory(self.partial)
        directory.commit(self.partial, target=self.target)

    def clean_up(self, *, failed: bool) -> None:
        """Delete what nobody needs: the partial directory, or what the checkpoint has replaced."""
        if not self.ranks.first or (failed and self.keep_partial):
            return
        directory.discard(self.partial)
        if not failed:
            directory.discard(directory.previous_of(self.target))
