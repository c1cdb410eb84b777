"""What a rank says that has run out of memory: where it was, who holds what, and what to try."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from meshbolt.engine.savings import Saving
from meshbolt.errors import RankError
from meshbolt.units import format_bytes

# torch's allocator for CPUs has no class of its own for this.
_CPU_WORDS = ("can't allocate memory", "not enough memory")
_ASKED = re.compile(r"[Tt]ried to allocate ([\d.]+) ?([KMGT]iB|bytes)")
_MOST_HOLDERS = 5


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error, or what it was raised from, says that this rank could not get memory."""
    if isinstance(error, RankError):  # has the words of another rank's
        return False
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    if isinstance(error, OSError) and error.errno == errno.ENOMEM:
        return True
    if isinstance(error, RuntimeError) and any(words in str(error) for words in _CPU_WORDS):
        return True
    return error.__cause__ is not None and is_out_of_memory(error.__cause__)


def asked_for(error: BaseException) -> str | None:
    """Return how much memory was asked for, in words; None where the error does not say."""
    found = _ASKED.search(str(error))
    if found is None:
        return None if error.__cause__ is None else asked_for(error.__cause__)
    return format_bytes(int(found[1])) if found[2] == "bytes" else f"{found[1]} {found[2]}"


@dataclass(frozen=True, kw_only=True)
class Failure:
    """A rank that has run out of memory.

    Attributes:
        rank: which one.
        step: of the optimizer, counted from 0.
        phase: of the step.
        inside: the module that ran forwards; None: none did.
        asked: how much was asked for, in words.
        used_bytes: the most that was in use when it failed.
        limit_bytes: how much there is.
        addresses_bytes: how much the process may reserve (`ulimit -v`); None: no limit, or on a GPU.
        categories: what it held, in bytes by name.
        modules: who held it: bytes by category, by the module's name, the largest first.
        savings: what to try.
    """

    rank: int
    step: int
    phase: str
    inside: str | None
    asked: str | None
    used_bytes: int
    limit_bytes: int
    addresses_bytes: int | None
    categories: Mapping[str, int]
    modules: Mapping[str, Mapping[str, int]]
    savings: Sequence[Saving]

    def text(self) -> str:
        """Return the advice, in lines."""
        return "\n".join([self._head(), *self._holders(), *self._advice()])

    def _head(self) -> str:
        where = f"in {self.phase}" + (f", in {self.inside}" if self.inside else "")
        asked = f"; {self.asked} more were asked for" if self.asked else ""
        limit = self.addresses_bytes
        may = "" if limit is None else f"; this process may reserve {format_bytes(limit)} in all (ulimit -v)"
        return (
            f"rank {self.rank} has run out of memory in step {self.step}, {where}: {format_bytes(self.used_bytes)} of "
            f"{format_bytes(self.limit_bytes)} were in use{asked}{may}"
        )

    def _holders(self) -> Iterator[str]:
        held = [f"{name} {format_bytes(size)}" for name, size in self.categories.items() if size]
        if held:
            yield f"  held: {', '.join(held)}"
        for name, sizes in list(self.modules.items())[:_MOST_HOLDERS]:
            parts = ", ".join(f"{category} {format_bytes(size)}" for category, size in sizes.items() if size)
            yield f"    {name}: {format_bytes(sum(sizes.values()))} ({parts})"

    def _advice(self) -> Iterator[str]:
        if not self.savings:
            yield "  settings that would save memory are all in use: try more ranks, or a smaller model"
            return
        yield "  what to try, with what it saves on this rank (estimated from what the rank holds):"
        width = max(len(saving.setting) for saving in self.savings)
        for saving in self.savings:
            yield f"    {saving.setting.ljust(width)}  {format_bytes(saving.num_bytes)}: {saving.reason}"
