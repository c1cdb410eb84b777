"""Save a checkpoint: written aside, made whole, then given its name."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.metadata import Metadata

from meshbolt.checkpoint import directory
from meshbolt.checkpoint.agreement import Ranks, in_words
from meshbolt.checkpoint.manifest import FileRecord, Manifest, own_versions
from meshbolt.checkpoint.metadata import tensors_in
from meshbolt.checkpoint.objects import FILE_NAME as OBJECTS
from meshbolt.checkpoint.objects import PackedObjects, write_objects
from meshbolt.checkpoint.places import place_of
from meshbolt.checkpoint.shards import Written, info_of, write_shards
from meshbolt.checkpoint.storage import Place

_log = logging.getLogger(__name__)


def save_directory(
    path: str | os.PathLike[str],
    *,
    tensors: Mapping[str, torch.Tensor],
    objects: Mapping[str, object] | PackedObjects,
    plan: Mapping[str, object] | None = None,
    versions: Mapping[str, str] | None = None,
    keep_partial: bool = False,
    storage_options: Mapping[str, Any] | None = None,
    group: dist.ProcessGroup | None = None,
    on_stored: Callable[[], None] | None = None,
) -> None:
    """Save a checkpoint; a collective of all ranks, which returns when the checkpoint is whole and on the disk.

    A checkpoint of that name is replaced in one step once the new one is whole; whatever goes wrong before, it stays. A
    single file of that name is replaced as well.

    Args:
        path: the directory to make, the same on every rank, on a file system that all ranks share; or a URL of any
            scheme that fsspec knows.
        tensors: by key. Of a DTensor each rank saves its own part. A plain tensor under a key of several ranks is the
            same on each and saved once; a key may exist on one rank only.
        objects: everything else, as `torch.save` takes it, or packed already; those of the first rank are saved.
        plan: what the run was told to do, as plain data, for the manifest.
        versions: of packages beyond torch and meshbolt, for the manifest.
        keep_partial: where the save fails, keep what was written of it, and of earlier ones that failed.
        storage_options: what fsspec passes to the file system of a URL, such as credentials.
        group: the ranks that save, with a CPU backend; None for all, or for a single process.
        on_stored: called once this rank has written those tensors whose values are not in memory, which comes first; not
            where the save fails before.

    Raises:
        CheckpointError: some rank could not save; the same on every rank that lives.
        ConfigError: there are storage options for a local path.
        MissingPackageError: the URL's scheme needs a package that is not installed.
        UnsupportedError: nobody knows the URL's scheme, or the group has no CPU backend.
    """
    ranks = Ranks(group)
    place = place_of(path, storage_options=storage_options)
    failing = f"Checkpoint {place.text!r} was not saved, and what had this name before is untouched"
    # The first rank's; every rank draws one, so that one exchange is enough.
    save_id = ranks.each(directory.new_save_id, failing=failing)[0]
    description = Manifest(
        save_id=save_id,
        world_size=ranks.size,
        versions={**own_versions(), **(versions or {})},
        plan=plan or {},
        files={},
        folder=place.folder_of(save_id),
    )
    save = _Save(place=place, ranks=ranks, description=description, keep_partial=keep_partial)
    try:
        own = ranks.each(lambda: save.prepare(tensors, objects=objects), failing=failing)[0]
        files = ranks.agree(lambda: place.files_of(save_id), failing=failing)
        written = write_shards(files, tensors=tensors, ranks=ranks, failing=failing, on_stored=on_stored)
        parts = ranks.each(lambda: save.settle(written), failing=failing)
        committing = f"Checkpoint {place.text!r} is the old or the new one, each whole, but its commit failed"
        ranks.each(lambda: save.commit(own, parts=parts, metadata=written.metadata), failing=committing)
    except BaseException:
        save.clean_up(failed=True)
        raise
    save.clean_up(failed=False)


# What a rank tells the first one of what it wrote: its files, and how tensors are laid out.
_Part = tuple[Mapping[str, FileRecord], Mapping[str, str]]


@dataclass(frozen=True, kw_only=True)
class _Save:
    """The steps of one save around the writing of the shards; what is done once, the first rank does."""

    place: Place
    ranks: Ranks
    description: Manifest
    keep_partial: bool

    def prepare(
        self, tensors: Mapping[str, torch.Tensor], *, objects: Mapping[str, object] | PackedObjects
    ) -> Mapping[str, FileRecord]:
        """Find what would fail, and write what is small, before anything large is written."""
        for key, tensor in tensors.items():
            info_of(key, tensor)
        if not self.ranks.first:
            return {}
        self.description.to_json()
        save_id = self.description.save_id
        self.place.prepare(save_id, keep_partial=self.keep_partial)
        return {OBJECTS: write_objects(self.place.files_of(save_id), objects)}

    def settle(self, written: Written) -> _Part:
        """Bring the names of this rank's files to the storage, and return what is known of them."""
        self.place.settle(self.description.save_id)
        return written.files, written.placements

    def commit(self, own: Mapping[str, FileRecord], *, parts: Sequence[_Part], metadata: Metadata) -> None:
        """Make the save the checkpoint of its path."""
        if not self.ranks.first:
            return
        placements = {key: text for _, part in parts for key, text in part.items()}
        tensors = {
            key: {"shape": info.shape, "dtype": str(info.dtype).removeprefix("torch."), "placement": placements[key]}
            for key, info in tensors_in(metadata).items()
        }
        files = {**own, **{name: record for part, _ in parts for name, record in part.items()}}
        manifest = dataclasses.replace(self.description, files=files, tensors=tensors)
        self.place.commit(manifest.save_id, manifest=manifest)

    def clean_up(self, *, failed: bool) -> None:
        """Delete what nobody needs any more; say so in the log where that cannot be done, on the one rank that does it."""
        if not self.ranks.first or (failed and self.keep_partial):
            return
        try:
            self.place.clean_up(self.description.save_id, failed=failed)
        except Exception as error:  # a storage has errors of many classes
            _log.warning(
                "Of checkpoint %r something is left that nobody needs, and cannot be deleted (%s); delete it yourself.",
                self.place.text,
                in_words(error),
            )
