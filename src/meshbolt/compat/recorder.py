"""What torch records of collectives: its flight recorder, which is on unless `TORCH_FR_BUFFER_SIZE=0`, for gloo and NCCL."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

# By the kind of the groups they are of; which of them there are depends on the version and the build.
_DUMPS = ("_dump_fr_trace_json", "_dump_nccl_trace_json")


@dataclass(frozen=True)
class Collective:
    """What this rank does in one group: the first collective that has not ended, or else the last one.

    Attributes:
        group: the group's name; the same on its ranks.
        about: what the group is for, if it says so; else its name.
        ranks: of the group.
        name: such as "all_reduce".
        number: of the group's collectives, counted from 1.
        is_done: whether it has ended, as far as this rank knows.
        begun_seconds: when, since 1970.
        last_number: of the last one that has begun.
    """

    group: str
    about: str
    ranks: tuple[int, ...]
    name: str
    number: int
    is_done: bool
    begun_seconds: float
    last_number: int


def recorded_collectives() -> list[Collective]:
    """Return what this rank does in each of its groups, the latest first; safe in any thread.

    Sends and receives are left out. Nothing is returned where the recorder is off.
    """
    groups = _groups()
    entries: dict[str, list[dict[str, Any]]] = {}
    for entry in sorted(_entries(), key=lambda each: each["time_created_ns"]):
        name = entry["process_group"][0]
        if not entry["is_p2p"] and name in groups:  # not of a group that is gone
            entries.setdefault(name, []).append(entry)
    found = [_described(each, groups[name]) for name, each in entries.items()]
    return sorted(found, key=lambda each: each.begun_seconds, reverse=True)


def meeting_store() -> Any:
    """Return the store through which the ranks once found each other; `clone()` gives another thread its own connection."""
    return dist.distributed_c10d._get_default_store()


def _groups() -> dict[str, tuple[int, ...]]:
    if not dist.is_initialized():
        return {}
    names = dict(dist.distributed_c10d._world.pg_names)
    return {str(name): tuple(dist.get_process_group_ranks(group)) for group, name in names.items()}


def _entries() -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = []
    for name in _DUMPS:
        dump = getattr(torch._C._distributed_c10d, name, None)
        if dump is not None:
            entries += json.loads(dump()).get("entries", [])
    return entries


def _described(entries: list[dict[str, Any]], ranks: tuple[int, ...]) -> Collective:
    """Describe the collectives of one group, in the order of their time."""
    entry = next((each for each in entries if not _is_done(each)), entries[-1])
    name, about = entry["process_group"]
    return Collective(
        group=name,
        about=about if about not in ("", "undefined") else f"group {name}",
        ranks=ranks,
        name=entry["profiling_name"].rpartition(":")[2],
        number=entry["collective_seq_id"],
        is_done=_is_done(entry),
        begun_seconds=entry["time_created_ns"] / 1e9,
        last_number=entries[-1]["collective_seq_id"],
    )


def _is_done(entry: dict[str, Any]) -> bool:
    return bool(entry["retired"]) or entry["state"] == "completed"
