"""DCP's plan of what this rank writes, carried out: one file, chunk after chunk."""

from __future__ import annotations

import io
import os
import pickle
from collections.abc import Callable
from typing import IO, Any

import torch
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.futures import Future

from meshbolt.checkpoint.chunks import naming_file, write_chunk
from meshbolt.checkpoint.manifest import Chunk, FileRecord
from meshbolt.checkpoint.metadata import FILE_NAME
from meshbolt.checkpoint.storage import Files, write_file
from meshbolt.compat import StoredTensor
from meshbolt.errors import CheckpointError


class ShardWriter(StorageWriter):
    """Writes the parts of one rank.

    Attributes:
        records: what it has written, by the file's name.
        begun: keys of the tensors whose first element is among it.
    """

    def __init__(self, files: Files, *, rank: int, on_stored: Callable[[], None] | None = None) -> None:
        """Prepare.

        Args:
            files: where to.
            rank: of this process.
            on_stored: called once all is written whose values are not in memory, which comes first.
        """
        self._on_stored = on_stored
        self.records: dict[str, FileRecord] = {}
        self.begun: list[str] = []
        self._files = files
        self._rank = rank

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Do nothing: a writer serves one save."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Do nothing: the first rank has made room."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Return the plan."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Return the plans."""
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's file and have it on the storage."""
        name = f"__{self._rank}_0.distcp"  # as torch names them
        chunks: list[Chunk] = []
        found = [(item, planner.resolve_data(item)) for item in plan.items]
        found.sort(key=lambda pair: not isinstance(pair[1], StoredTensor))
        stored = sum(isinstance(data, StoredTensor) for _, data in found)
        with naming_file(name), self._files.open(name, "wb") as stream:
            for number, (item, data) in enumerate(found):
                if number == stored:
                    self._stored_is_written()
                end = chunks[-1].offset + chunks[-1].length if chunks else 0
                chunks.append(self.write_item(stream, data, item, offset=end))
            self._stored_is_written()
        self.records[name] = FileRecord(sum(chunk.length for chunk in chunks), tuple(chunks))
        self.begun = [item.index.fqn for item in plan.items if not any(item.index.offset or ())]
        results = [
            WriteResult(
                index=item.index,
                size_in_bytes=chunk.length,
                storage_data=_StorageInfo(name, chunk.offset, chunk.length),
            )
            for (item, _), chunk in zip(found, chunks, strict=True)
        ]
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done

    def _stored_is_written(self) -> None:
        if self._on_stored is not None:
            self._on_stored()

    def write_item(self, stream: IO[bytes], data: torch.Tensor | io.BytesIO, item: WriteItem, *, offset: int) -> Chunk:
        """Write what the plan has one item for, and return what the manifest says of it.

        Args:
            stream: the file.
            data: to be written.
            item: what it is.
            offset: where the stream is.

        Raises:
            CheckpointError: it is no tensor.
        """
        if not isinstance(data, torch.Tensor):
            raise CheckpointError(f"{item.index.fqn!r} is no tensor")
        return write_chunk(stream, data, offset=offset)

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Write the metadata of all ranks' parts; called on the first rank."""
        metadata.version = CURRENT_DCP_VERSION
        metadata.storage_data = {one.index: one.storage_data for part in results for one in part}
        metadata.storage_meta = self.storage_meta()
        content = pickle.dumps(metadata)
        with naming_file(FILE_NAME):
            write_file(self._files, FILE_NAME, content)
        self.records[FILE_NAME] = FileRecord.of(content)

    def storage_meta(self) -> StorageMeta:
        """Return metadata without a path: it would be the partial directory's, and not every Python could read it."""
        return StorageMeta()

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Return False: where to write is not chosen by an id."""
        return False
