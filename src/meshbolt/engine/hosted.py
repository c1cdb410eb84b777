"""Shards of parameters that lie in host memory or in a file while nobody computes with them."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule, OffloadPolicy

from meshbolt.collectives import agree_on_error, same_on_all_ranks
from meshbolt.compat import local_tensor, managed_parameters, move_shards, shards_on_host
from meshbolt.errors import StorageError
from meshbolt.offload.files import StateFile
from meshbolt.offload.parameters import AHEAD, ParameterFile
from meshbolt.offload.planning import Needs
from meshbolt.offload.room import Room, check_room, room_of
from meshbolt.offload.setting import NVME, Offload
from meshbolt.offload.traffic import OffloadTraffic


class HostedParameters:
    """Where the shards of one engine lie.

    Attributes:
        file: that has them; None: they lie in memory.
    """

    def __init__(self, setting: Offload, *, device: torch.device) -> None:
        """Begin without any.

        Args:
            setting: what lies where.
            device: this rank's, on which units are gathered.
        """
        self._setting, self._device = setting, device
        self._error: StorageError | None = None
        self._host_bytes = 0
        self.file: ParameterFile | None = None
        if setting.parameters == NVME:
            self.file = ParameterFile(self._make_file, device=device, pin_memory=setting.pin_memory)

    @property
    def are_elsewhere(self) -> bool:
        """Whether shards lie elsewhere than units are gathered."""
        return self._setting.parameters is not None

    @property
    def policy(self) -> OffloadPolicy | None:
        """Where FSDP2 keeps shards and their gradients; None: on the device."""
        if not self.are_elsewhere:
            return None
        pins = self._device.type == "cuda" and self._setting.pin_memory and self.file is None
        return shards_on_host(pin_memory=pins)

    def check_room(self, units: Sequence[nn.Module], *, ranks: int, left_out: frozenset[nn.Parameter]) -> None:
        """Refuse shards that do not fit into the machine, before any is made; all ranks of the world together.

        Args:
            units: innermost first.
            ranks: that share each parameter.
            left_out: parameters that are not sharded here.

        Raises:
            StorageError: they do not.
        """
        if not self.are_elsewhere or (self.file is None and self._device.type == "cpu"):
            return
        rooms: list[Room] = []
        agree_on_error(lambda: rooms.append(self._room(units, ranks, left_out)))
        check_room(same_on_all_ranks(rooms[0])[1], what="parameters")

    def take(self, name: str, unit: FSDPModule) -> None:
        """Put a unit's shards where they are to lie.

        Args:
            name: of the unit.
            unit: just sharded with `policy`.
        """
        if not self.are_elsewhere:
            return
        shards = managed_parameters(unit)
        if self.file is None:
            self._host_bytes += sum(local_tensor(shard).nbytes for shard in shards) if self._device.type != "cpu" else 0
            return
        try:
            if self._error is None:
                move_shards(
                    unit, functools.partial(self.file.take, name), fetch=functools.partial(self.file.fetch, name)
                )
        except StorageError as error:  # others are still sharding
            self._error = error

    def check(self) -> None:
        """Raise what has kept a rank from putting its shards away, on all ranks.

        Raises:
            StorageError: there was no room for them, or they could not be written.
        """
        if self.file is not None:
            agree_on_error(self._raise)

    def place_of(self, name: str) -> tuple[int, int]:
        """Return where a unit begins and ends in the file of shards, in bytes.

        Args:
            name: of the unit.
        """
        return (0, 0) if self.file is None else self.file.place_of_unit(name)

    def needs(self) -> Needs:
        """Return what shards take, with the buffers on their way."""
        if self.file is None:
            return Needs(host_bytes=self._host_bytes, device_bytes=0, file_bytes=0)
        return Needs(host_bytes=self.file.buffer_bytes, device_bytes=0, file_bytes=self.file.num_bytes)

    def traffic(self) -> OffloadTraffic:
        """Return what parameters have moved so far from their file and to it, and how long gathers waited for them."""
        if self.file is None:
            return OffloadTraffic()
        return OffloadTraffic(parameters=self.file.moved(), gather_wait_seconds=self.file.waited_seconds)

    def settle(self) -> None:
        """Forget what was read ahead: parameters may be changed now."""
        if self.file is not None:
            self.file.drop()

    def _room(self, units: Sequence[nn.Module], ranks: int, left_out: frozenset[nn.Parameter]) -> Room:
        sizes, seen = [], set(left_out)
        for unit in units:
            own = [p for p in unit.parameters() if p not in seen]
            seen.update(own)
            sizes.append(sum(-(-p.nbytes // ranks) for p in own))
        if self.file is None:
            return room_of(Needs(host_bytes=sum(sizes), device_bytes=0, file_bytes=0), path=None)
        buffers = (1 + AHEAD) * max(sizes, default=0)
        return room_of(Needs(host_bytes=buffers, device_bytes=0, file_bytes=sum(sizes)), path=self._setting.path)

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error
        if self.file is not None:
            self.file.prepare()

    def _make_file(self, num_bytes: int) -> StateFile:
        rank = dist.get_rank()
        # What the disk is like is said of the optimizers' file.
        return StateFile(
            str(self._setting.path),
            num_bytes,
            name=f"meshbolt-parameters-rank{rank}",
            say=warnings.warn if rank == 0 and self._setting.optimizer != NVME else _say_nothing,
        )


def _say_nothing(_text: str) -> None:
    """Leave it to others."""
