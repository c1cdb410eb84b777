"""What a load asks for against what a checkpoint has."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from meshbolt.checkpoint.metadata import TensorInfo

_SHOWN_KEYS = 10


@dataclass(frozen=True, kw_only=True)
class LoadReport:
    """How a checkpoint and the tensors it is loaded into differ; the same on every rank.

    Attributes:
        missing: keys asked for on some rank that the checkpoint does not have.
        unexpected: keys of the checkpoint, under the prefixes in question, that no rank asks for.
        mismatched: keys whose shapes differ, or whose values the asked dtype cannot hold: (saved, asked).
        cast: keys that are loaded into another dtype than they were saved in: (saved, asked).
    """

    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    mismatched: Mapping[str, tuple[TensorInfo, TensorInfo]] = field(default_factory=dict)
    cast: Mapping[str, tuple[TensorInfo, TensorInfo]] = field(default_factory=dict)

    def faults(self) -> str:
        """Return what keeps a strict load from being done, as the lines of a message; empty where nothing does."""
        pairs = [f"{key}: saved {saved}, asked for {asked}" for key, (saved, asked) in self.mismatched.items()]
        return "".join(
            _listed(what, entries)
            for what, entries in (
                ("not in the checkpoint", self.missing),
                ("in the checkpoint and not asked for", self.unexpected),
                ("of another shape or kind", pairs),
            )
        )


def compare(
    *, saved: Mapping[str, TensorInfo], asked: Mapping[str, TensorInfo], prefix: str | tuple[str, ...]
) -> LoadReport:
    """Compare what is saved with what one rank asks for.

    Args:
        saved: the checkpoint's tensors.
        asked: the rank's.
        prefix: saved keys that begin with none of these are nobody's concern.
    """
    both = {key: (saved[key], info) for key, info in asked.items() if key in saved}
    mismatched = {key: pair for key, pair in both.items() if not _fits(*pair)}
    return LoadReport(
        missing=tuple(key for key in asked if key not in saved),
        unexpected=tuple(key for key in saved if key not in asked and key.startswith(prefix)),
        mismatched=mismatched,
        cast={key: pair for key, pair in both.items() if key not in mismatched and pair[0].dtype != pair[1].dtype},
    )


def merge(reports: Sequence[LoadReport]) -> LoadReport:
    """Return the report of all ranks together; a key counts as asked for if one rank asks for it."""
    unexpected = set(reports[0].unexpected).intersection(*(report.unexpected for report in reports))
    return LoadReport(
        missing=tuple(sorted({key for report in reports for key in report.missing})),
        unexpected=tuple(sorted(unexpected)),
        mismatched=_union(report.mismatched for report in reports),
        cast=_union(report.cast for report in reports),
    )


def _fits(saved: TensorInfo, asked: TensorInfo) -> bool:
    return saved.shape == asked.shape and torch.can_cast(saved.dtype, asked.dtype)


def _union(pairs: Iterable[Mapping[str, tuple[TensorInfo, TensorInfo]]]) -> dict[str, tuple[TensorInfo, TensorInfo]]:
    return dict(sorted({key: pair for one in pairs for key, pair in one.items()}.items()))


def _listed(what: str, entries: Sequence[str]) -> str:
    if not entries:
        return ""
    more = f"\n    and {len(entries) - _SHOWN_KEYS} more" if len(entries) > _SHOWN_KEYS else ""
    return f"\n  {len(entries)} {what}:" + "".join(f"\n    {entry}" for entry in entries[:_SHOWN_KEYS]) + more
