"""Whether somebody else has changed parameters of which the state has copies.

Versions of tensors do not tell: operations on a DTensor leave that of its part as it is, and `p.data` has one of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from meshbolt.fingerprint import fingerprint
from meshbolt.offload.entries import Entry


class Fingerprints:
    """Recognises parameters in memory by a number for all of a unit."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, ...], torch.Tensor] = {}

    def changed(self, entries: Iterable[Entry]) -> list[Entry]:
        """Return those that may have been changed since they were noted together; on a GPU this waits for the current stream.

        Args:
            entries: parameters in memory.
        """
        groups = _groups(entries)
        new = [key for key in groups if key not in self._known]
        old = [key for key in groups if key in self._known]
        differ = [_fingerprint(groups[key]) != self._known[key] for key in old]
        told = torch.stack(differ).tolist() if differ else []
        return [entry for key in (*new, *(k for k, d in zip(old, told, strict=True) if d)) for entry in groups[key]]

    def note(self, entries: Iterable[Entry]) -> None:
        """Remember parameters as they are, on the current stream.

        Args:
            entries: parameters in memory.
        """
        for key, group in _groups(entries).items():
            for other in [known for known in self._known if not set(key).isdisjoint(known)]:
                del self._known[other]  # of values before an update of some of them
            self._known[key] = _fingerprint(group)


def _groups(entries: Iterable[Entry]) -> Mapping[tuple[int, ...], list[Entry]]:
    units: dict[tuple[str, torch.dtype], list[Entry]] = {}
    for entry in entries:
        units.setdefault((entry.slot.unit, entry.parameter.dtype), []).append(entry)
    return {tuple(entry.number for entry in group): group for group in units.values()}


def _fingerprint(group: list[Entry]) -> torch.Tensor:
    shards = [entry.shard for entry in group]
    return fingerprint(shards[0] if len(shards) == 1 else torch.cat(shards))
