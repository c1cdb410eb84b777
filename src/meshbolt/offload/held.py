"""What an optimizer's state takes, where it lies outside of the model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from meshbolt.compat import storage_identity
from meshbolt.offload.host import OffloadedOptimizer
from meshbolt.offload.tiers import FileTier
from meshbolt.offload.transfers import GpuToHost

Place = Literal["device", "host", "file"]


def held_by(offloaded: OffloadedOptimizer) -> Iterator[tuple[Place, str, int]]:
    """Yield what is held: the place, the unit whose state it is or what it is for, and bytes.

    Args:
        offloaded: an optimizer, with its place for the state.
    """
    tier = offloaded._tiers[False]
    for section in offloaded.layout.sections:
        if section.stays:
            yield "device", section.unit, section.num_bytes
        elif isinstance(tier, FileTier):
            yield "file", section.unit, sum(chunk.num_bytes for chunk in section.chunks)
        else:
            yield "host", section.unit, section.num_bytes
    if isinstance(tier, FileTier):
        buffers = [buffer for _, _, stream in tier._files for buffer in stream._buffers]
        yield "host", "buffers of files", sum(buffer.untyped_storage().nbytes() for buffer in buffers)
    for transfers in dict.fromkeys(offloaded._transfers.values()):
        if isinstance(transfers, GpuToHost):
            incoming = [*transfers._free, *transfers._coming.values()]
            yield "host", "buffers of copies", sum(each.memory.num_bytes for each in incoming)
            yield "device", "buffers of copies", sum(stage.nbytes for stage in transfers._stages.values())


def column_storages(offloaded: OffloadedOptimizer) -> set[int]:
    """Return the storages that have columns in memory, of which `optimizer.state` shows views.

    Args:
        offloaded: an optimizer.
    """
    found: set[int] = set()
    for section in offloaded.layout.sections:
        columns = offloaded._tiers[section.stays].whole(section)
        found.update(storage_identity(column) for column in (columns or {}).values())
    return found
