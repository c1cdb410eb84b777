"""Updating one chunk: its pieces are shared among threads, and each thread calls the rule on batches of them."""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from meshbolt.offload.entries import MASTER
from meshbolt.offload.layout import VECTOR_BYTES, Piece
from meshbolt.offload.line import UpdateLine
from meshbolt.offload.rules import Batch, Rule
from meshbolt.offload.tiers import Columns
from meshbolt.offload.transfers import Gradients, Live, Visit

BATCH_ELEMENTS = 64 * 2**10
"""What is cast or scaled is worked on in runs of this length, which stay in a core's cache from one pass to the next."""

SHARE_ELEMENTS = 16 * 2**10
"""What is shorter is not worth another thread."""


@dataclass(frozen=True, kw_only=True)
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

    def run(self, line: UpdateLine | None) -> None:
        """Update all of it.

        Args:
            line: whose threads share the work; None: this thread does it.
        """
        parts = [
            Part(live=self.visit.live[piece.slot], piece=piece, start=piece.start, stop=piece.stop)
            for piece in self.visit.pieces
        ]
        if line is None or line.threads == 1:
            self._run(parts)
            return
        vector = VECTOR_BYTES // self.visit.chunk.dtype.itemsize
        count = min(line.threads, 1 + sum(part.elements for part in parts) // SHARE_ELEMENTS)
        shares = _shares(parts, count, cut_at=vector if self.rule.cuts else None)
        line.share([functools.partial(self._run, share) for share in shares])

    @torch.no_grad()
    def _run(self, parts: Sequence[Part]) -> None:
        for alike in self._alike(parts):
            bound = BATCH_ELEMENTS if self.rule.cuts and self._has_passes(alike) else None
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
    """Return gradients in another dtype; where they are short, in memory that this thread uses again the next time."""
    total = sum(gradient.numel() for gradient in gradients)
    if total > BATCH_ELEMENTS or gradients[0].device.type != "cpu":
        return [gradient.to(dtype) for gradient in gradients]
    runs: dict[torch.dtype, torch.Tensor] = _scratch.__dict__.setdefault("runs", {})
    if dtype not in runs:
        runs[dtype] = torch.empty(BATCH_ELEMENTS, dtype=dtype)
    cast = list(runs[dtype][:total].split([gradient.numel() for gradient in gradients]))
    torch._foreach_copy_(cast, list(gradients))
    return cast


def _shares(parts: Sequence[Part], count: int, *, cut_at: int | None) -> list[list[Part]]:
    """Return parts in lists of about as many elements.

    Args:
        parts: what is shared.
        count: of lists, at most.
        cut_at: parts may be cut at multiples of this; None: they are not cut.
    """
    each = max(1, -(-sum(part.elements for part in parts) // count))
    shares: list[list[Part]] = [[]]
    room = each
    rest = list(reversed(parts))
    while rest:
        part = rest.pop()
        if cut_at is not None and part.elements > room:
            at = part.start + max(cut_at, room // cut_at * cut_at)
            if at < part.stop:
                part, after = part.cut(at)
                rest.append(after)
        shares[-1].append(part)
        room -= part.elements
        if room <= 0 and rest and len(shares) < count:
            shares.append([])
            room = each
    return shares


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
