"""Updating one chunk: the rule is called on batches of its pieces."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from meshbolt.offload.entries import MASTER
from meshbolt.offload.layout import Piece
from meshbolt.offload.rules import Batch, Rule
from meshbolt.offload.tiers import Columns
from meshbolt.offload.transfers import Gradients, Live, Visit

BATCH_ELEMENTS = 64 * 2**10
"""What is cast or scaled is worked on in runs of this length a thread, which stay in a core's cache from one pass to the next."""


@dataclass(slots=True, kw_only=True)
class Part:
    """A run of one parameter's elements.

    Attributes:
        live: the parameter.
        piece: that it lies in.
        start: its first element, of the parameter's in one dim.
        stop: behind its last one.
    """

    live: Live
    piece: Piece
    start: int
    stop: int

    @property
    def elements(self) -> int:
        """Its length."""
        return self.stop - self.start

    def cut(self, at: int) -> tuple[Part, Part]:
        """Return the elements before one of the parameter's elements, and those from it on."""
        return (
            Part(live=self.live, piece=self.piece, start=self.start, stop=at),
            Part(live=self.live, piece=self.piece, start=at, stop=self.stop),
        )


@dataclass(frozen=True, kw_only=True)
class ChunkUpdate:
    """The update of one chunk.

    Attributes:
        visit: the chunk, and what of it is updated.
        columns: of the chunk.
        gradients: finds them.
        rule: the optimizer's.
        writes_shards: the model's parameters are written as well, where they are not updated themselves.
    """

    visit: Visit
    columns: Columns
    gradients: Gradients
    rule: Rule
    writes_shards: bool

    def run(self, *, threads: int) -> None:
        """Update all of it.

        Args:
            threads: that torch's operations use here.
        """
        parts = [
            Part(live=self.visit.live[piece.slot], piece=piece, start=piece.start, stop=piece.stop)
            for piece in self.visit.pieces
        ]
        self._run(parts, threads)

    @torch.no_grad()
    def _run(self, parts: Sequence[Part], threads: int) -> None:
        for alike in self._alike(parts):
            bound = BATCH_ELEMENTS * threads if self.rule.cuts and self._has_passes(alike) else None
            for batch in _batches(alike, bound):
                self._update(batch)

    def _alike(self, parts: Sequence[Part]) -> list[list[Part]]:
        """Return the parts in lists of one group that have, or have not, been updated before."""
        lists: dict[tuple[int, bool], list[Part]] = {}
        for part in parts:
            lists.setdefault((part.live.group, part.live.is_first), []).append(part)
        return list(lists.values())

    def _has_passes(self, parts: Sequence[Part]) -> bool:
        """Return whether more is done with the parts' memory than the update itself."""
        dtype = self.visit.chunk.dtype
        casts = any(part.live.gradient.dtype != dtype for part in parts)
        copies = self.writes_shards and any(part.live.entry.has_master for part in parts)
        return casts or copies or self.visit.scale is not None

    def _update(self, parts: Sequence[Part]) -> None:
        first = parts[0].live
        names = [name for name in self.visit.chunk.columns if name != MASTER]
        batch = Batch(settings=self.visit.settings[first.group], is_first=first.is_first)
        batch.columns = {name: [self._column(name, part) for part in parts] for name in names}
        batch.params = [self._param(part) for part in parts]
        batch.gradients = self._own_gradients(parts)
        if self.rule.counts:
            counts = [part.live.count for part in parts if part.live.count is not None]
            device = batch.params[0].device
            batch.counts = counts if device.type == "cpu" else list(torch.stack(counts).to(device))
        if not self.rule.cuts:
            batch.scalars = [part.live.entry.scalars[part.piece.number] for part in parts]
        self.rule.update(batch)
        for part, param in zip(parts, batch.params, strict=True):
            if self.writes_shards and part.live.entry.has_master:
                part.live.shard[part.start : part.stop].copy_(param)

    def _column(self, name: str, part: Part) -> torch.Tensor:
        return self.columns[name][part.piece.span(part.start, part.stop)]

    def _param(self, part: Part) -> torch.Tensor:
        if part.live.entry.has_master:
            return self._column(MASTER, part)
        return part.live.shard[part.start : part.stop]

    def _own_gradients(self, parts: Sequence[Part]) -> list[torch.Tensor]:
        """Return the parts' gradients, scaled, in the dtype of the update."""
        gradients = [self.gradients(part.piece, slice(part.start, part.stop)) for part in parts]
        if self.visit.scale is not None:
            torch._foreach_mul_(gradients, self.visit.scale)
        dtype = self.visit.chunk.dtype
        if all(gradient.dtype == dtype for gradient in gradients):
            return gradients
        return _cast(gradients, dtype)


_scratch = threading.local()


def _cast(gradients: Sequence[torch.Tensor], dtype: torch.dtype) -> list[torch.Tensor]:
    """Return gradients in another dtype; on the host in memory that this thread uses again the next time."""
    if gradients[0].device.type != "cpu":
        return [gradient.to(dtype) for gradient in gradients]
    total = sum(gradient.numel() for gradient in gradients)
    runs: dict[torch.dtype, torch.Tensor] = _scratch.__dict__.setdefault("runs", {})
    if dtype not in runs or runs[dtype].numel() < total:
        runs[dtype] = torch.empty(total, dtype=dtype)
    cast = list(runs[dtype][:total].split([gradient.numel() for gradient in gradients]))
    torch._foreach_copy_(cast, list(gradients))
    return cast


def _batches(parts: Sequence[Part], bound: int | None) -> Iterator[list[Part]]:
    """Yield parts in lists of at most so many elements, cut where they have more."""
    if bound is None:
        yield list(parts)
        return
    batch: list[Part] = []
    left = bound
    for part in parts:
        while part.elements > bound:
            head, part = part.cut(part.start + bound)
            yield [head]
        if part.elements > left:
            yield batch
            batch, left = [], bound
        batch.append(part)
        left -= part.elements
    yield batch
