"""Catch what nothing else would tell of: ranks that take different branches, and different batches of ranks that share layers.

When ranks run different units of equal size, their all-gathers match by accident and every rank computes with a mixture of
weights; no error, no hang, no sign of it but a bad model. With `MESHBOLT_DEBUG=1` every rank announces, over a group of its
own, which unit it is about to use, and all stop with one error where the announcements differ.

Ranks that share layers add up what each has computed of one batch; from different batches they add up what does not belong
together. So a few bytes that depend on all of a batch are compared among them: for the first batch of each kind always, for
every batch in debug mode, where their random generators are compared too.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from meshbolt.collectives import same_on_all_ranks
from meshbolt.compat import gather_into
from meshbolt.errors import TopologyError

# Multiplying with it spreads a number over all bits (Knuth, "The Art of Computer Programming", vol. 3, section 6.4).
_SPREAD = -7046029254386353131
_PIECE = 1 << 20


class BranchWatch:
    """Announces every event of a rank to all others and compares."""

    def __init__(
        self, units: Mapping[str, nn.Module], *, timeout: timedelta | None, ranks: dist.ProcessGroup | None = None
    ) -> None:
        """Watch the forwards of the units.

        Args:
            units: by name; equal on every rank.
            timeout: how long a rank waits for the others' announcements; None: torch's default.
            ranks: the group of the ranks that use the same units; None: all.
        """
        # Its own group: ranks that have diverged wait in different collectives of the default one.
        members = None if ranks is None else dist.get_process_group_ranks(ranks)
        by_members = members is not None
        self._group = dist.new_group(members, backend="gloo", timeout=timeout, use_local_synchronization=by_members)
        self._count = 0
        for name, unit in units.items():
            unit.register_forward_pre_hook(self._announcer(f"the forward of {name!r}"), prepend=True)

    def announce(self, event: str) -> None:
        """Compare what this rank does next with the others.

        Args:
            event: in words, for the message.

        Raises:
            TopologyError: ranks do different things; raised on every rank.
        """
        self._count += 1
        same, events = same_on_all_ranks(event, group=self._group)
        if same:
            return
        described = "; ".join(f"rank {rank}: {other}" for rank, other in enumerate(events))
        raise TopologyError(
            f"Ranks took different branches at event {self._count}: {described}. Every rank must run the same units in the "
            "same order: do not choose layers by the rank, by local data or by unseeded randomness, or name those layers "
            "so that they share one unit: zero=Zero(unit=[...])."
        )

    def _announcer(self, event: str) -> Callable[..., None]:
        def hook(*_: object) -> None:
            self.announce(event)

        return hook


class SameBatch:
    """Compares what ranks that share layers are about to compute on."""

    def __init__(self, group: dist.ProcessGroup, *, device: torch.device, always: bool) -> None:
        """Watch the ranks of a group.

        Args:
            group: the ranks that share layers.
            device: this rank's, from which the group communicates.
            always: compare every batch, and the state of random generators too; else the first of each kind.
        """
        self._group, self._device, self._always = group, device, always
        self._seen: set[Hashable] = set()

    def check(self, what: str, batch: Any, *, kind: Hashable, is_first: bool) -> None:
        """Compare a batch; on all ranks of the group, or on none.

        Args:
            what: takes the batch, for the message.
            batch: tensors, in any nesting; what is no tensor is not compared.
            kind: of the batch; the first of each is compared.
            is_first: compare it in any case.

        Raises:
            TopologyError: the batches differ, or in debug mode the random generators; on every rank of the group.
        """
        if kind in self._seen and not (is_first or self._always):
            return
        self._seen.add(kind)
        tensors = list(tensors_in(batch))
        numbers = [_hashed(map(_kind, tensors)), _content(tensors), self._random_state() if self._always else 0]
        by_rank = self._by_rank(numbers)
        if all(other[:2] == by_rank[0][:2] for other in by_rank):
            if any(other != by_rank[0] for other in by_rank):
                raise _different_random_states(what, self._names())
            return
        shapes: list[Any] = [None] * self._group.size()
        dist.all_gather_object(shapes, [_kind(tensor) for tensor in tensors], group=self._group)
        raise _different_batches(what, self._names(), shapes)

    def _by_rank(self, numbers: Sequence[int]) -> list[list[int]]:
        own = torch.tensor(numbers, device=self._device)
        everybodys = own.new_empty(self._group.size() * len(numbers))
        gather_into(everybodys, own, self._group)
        found: list[list[int]] = everybodys.view(-1, len(numbers)).tolist()
        return found

    def _names(self) -> list[int]:
        return dist.get_process_group_ranks(self._group)

    def _random_state(self) -> int:
        states = [torch.get_rng_state()]
        if self._device.type == "cuda":
            states.append(torch.cuda.get_rng_state(self._device))
        return _content(states)


def tensors_in(tree: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors of a batch: in lists, tuples, mappings, dataclasses, and named tuples.

    Args:
        tree: whatever a loader yields.
    """
    if isinstance(tree, torch.Tensor):
        yield tree
    elif isinstance(tree, Mapping):
        for value in tree.values():
            yield from tensors_in(value)
    elif isinstance(tree, (list, tuple)):
        for value in tree:
            yield from tensors_in(value)
    elif dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        for field in dataclasses.fields(tree):
            yield from tensors_in(getattr(tree, field.name))


def _kind(tensor: torch.Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def _hashed(words: Iterable[str]) -> int:
    digest = hashlib.sha256("; ".join(words).encode()).digest()
    return int.from_bytes(digest[:8], "little", signed=True)


@torch.no_grad()
def _content(tensors: Iterable[torch.Tensor]) -> int:
    """Return a number that depends on every byte and its place."""
    total = 0
    for index, tensor in enumerate(tensors):
        if tensor.layout != torch.strided or tensor.is_meta:
            continue
        total += (index + 1) * _checksum(tensor.detach())
    return (total + 2**63) % 2**64 - 2**63


def _checksum(tensor: torch.Tensor) -> int:
    words = _as_words(tensor.resolve_conj().resolve_neg().contiguous())
    total = words.new_zeros(())
    for start in range(0, words.numel(), _PIECE):
        piece = words[start : start + _PIECE]
        places = torch.arange(start + 1, start + 1 + piece.numel(), device=words.device)
        # Sums and products of whole numbers wrap around, in the same way on every device and in any order.
        total = total + ((piece ^ (places * _SPREAD)) * _SPREAD).bitwise_right_shift(17).sum() + (piece * places).sum()
    return int(total)


def _as_words(tensor: torch.Tensor) -> torch.Tensor:
    flat = tensor.reshape(-1).view(torch.uint8)
    whole = flat.numel() // 8 * 8
    if flat.numel() == whole and flat.storage_offset() % 8 == 0:
        return flat.view(torch.int64)
    padded = flat.new_zeros(-(-flat.numel() // 8) * 8)
    padded[: flat.numel()] = flat
    return padded.view(torch.int64)


def _different_batches(what: str, ranks: list[int], kinds: list[list[str]]) -> TopologyError:
    same_kind = all(other == kinds[0] for other in kinds)
    found = f"tensors of the same shapes with other values: {', '.join(kinds[0])}"
    if not same_kind:
        found = "; ".join(f"rank {rank} has {', '.join(kind)}" for rank, kind in zip(ranks, kinds, strict=True))
    return TopologyError(
        f"Ranks {ranks} share layers or a pipeline (tensor_parallel, pipeline_parallel), so they must see the same samples, but "
        f"{what} was given different batches on them ({found}). Usually an IterableDataset is divided by the global rank, a "
        "DistributedSampler was made with the global rank and the world size, or seed_everything() was given another seed on "
        "each rank. Use strategy.data_parallel_rank and strategy.data_parallel_size instead (of trainer.strategy or "
        "fabric.strategy), or DistributedSampler(dataset, **strategy.distributed_sampler_kwargs)."
    )


def _different_random_states(what: str, ranks: list[int]) -> TopologyError:
    return TopologyError(
        f"Ranks {ranks} share layers or a pipeline (tensor_parallel, pipeline_parallel), so they must draw the same random "
        f"numbers, but at {what} torch's random generators are in different states on them. Something has drawn numbers, or set "
        "a seed, on some ranks only, such as code for rank 0. Draw on all ranks, from a torch.Generator of your own, or inside "
        "torch.random.fork_rng()."
    )
