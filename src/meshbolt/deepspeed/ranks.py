"""Which rank this process is, as whoever has started it says by environment variables; and connecting to the others."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from typing_extensions import override

from meshbolt.deepspeed.accelerator import get_accelerator
from meshbolt.errors import ConfigError, TopologyError
from meshbolt.launch.surroundings import first_node
from meshbolt.strategies.arguments import DEFAULT_TIMEOUT
from meshbolt.strategies.compat import connect_ranks, default_backend

PORT = 29500
_HERE = "127.0.0.1"
_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
_chosen = {"timeout": DEFAULT_TIMEOUT}


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a process is among the ranks.

    Attributes:
        rank: its number.
        world_size: ranks on all machines.
        local_rank: its number on this machine.
        local_world_size: ranks on this machine.
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int


class LaunchedRanks(ClusterEnvironment):
    """Ranks that exist already: Fabric starts none of its own."""

    def __init__(self, place: Place) -> None:
        """Take the place of this process."""
        self.place = place

    @property
    @override
    def creates_processes_externally(self) -> bool:
        """Always."""
        return True

    @property
    @override
    def main_address(self) -> str:
        """Where rank 0 listens."""
        return os.environ.get("MASTER_ADDR", _HERE)

    @property
    @override
    def main_port(self) -> int:
        """On which port."""
        return int(os.environ.get("MASTER_PORT", PORT))

    @staticmethod
    @override
    def detect() -> bool:
        """Never by itself."""
        return False

    @override
    def world_size(self) -> int:
        """Return the number of ranks."""
        return self.place.world_size

    @override
    def set_world_size(self, size: int) -> None:
        """Keep what is known."""

    @override
    def global_rank(self) -> int:
        """Return the number of this rank."""
        return self.place.rank

    @override
    def set_global_rank(self, rank: int) -> None:
        """Keep what is known."""

    @override
    def local_rank(self) -> int:
        """Return the number of this rank on its machine."""
        return self.place.local_rank

    @override
    def node_rank(self) -> int:
        """Return the number of this machine."""
        return self.place.rank // self.place.local_world_size


def init_distributed(
    dist_backend: str | None = None,
    auto_mpi_discovery: bool = True,
    distributed_port: int = PORT,
    verbose: bool = True,
    timeout: timedelta = DEFAULT_TIMEOUT,
    init_method: str | None = None,
    dist_init_required: bool | None = None,
    config: Any = None,
    rank: int = -1,
    world_size: int = -1,
) -> None:
    """Connect the ranks, once; a process that nobody has started as a rank becomes the only one.

    Args:
        dist_backend: "nccl" or "gloo"; None: the device's own.
        auto_mpi_discovery: without effect: who has started the ranks is looked up in any case.
        distributed_port: where rank 0 listens, unless MASTER_PORT says.
        verbose: without effect.
        timeout: how long a collective waits for its peers.
        init_method: a URL of torch's by which the ranks find each other; None: by MASTER_ADDR and MASTER_PORT.
        dist_init_required: False: they must be connected already.
        config: without effect: nothing of it is about connecting.
        rank: of this process; -1: as the variables say.
        world_size: the number of ranks; -1: as the variables say.

    Raises:
        ConfigError: they are not connected and `dist_init_required` is False, or values contradict each other.
        TopologyError: the variables do not say which rank this is.

    Example:
        >>> deepspeed.init_distributed()
    """
    if dist.is_initialized():
        place_of_this_process()
        return
    _chosen["timeout"] = timeout
    if dist_init_required is False:
        raise ConfigError(
            "dist_init_required=False says that the ranks are connected, and they are not. Call init_distributed() or "
            "torch.distributed.init_process_group() before, or leave it out."
        )
    if (rank < 0) is not (world_size < 0):
        raise ConfigError(f"init_distributed(rank={rank}, world_size={world_size}): give both, or none.")
    if rank >= 0:
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size))
    place = place_of_this_process(port=distributed_port)
    accelerator = get_accelerator()
    device = accelerator.device(place.local_rank)
    accelerator.set_device(place.local_rank)
    backend = dist_backend or default_backend(device)
    if init_method is None:
        connect_ranks(LaunchedRanks(place), backend, timeout=timeout, device=device)
        return
    numbers: dict[str, Any] = {"rank": place.rank, "world_size": place.world_size}
    dist.init_process_group(backend, timeout=timeout, init_method=init_method, **numbers)


def place_of_this_process(*, port: int = PORT) -> Place:
    """Return which rank this process is, and set the variables that scripts read: RANK, LOCAL_RANK, WORLD_SIZE and the address.

    Args:
        port: where rank 0 listens, unless MASTER_PORT says.

    Raises:
        TopologyError: some of the variables are set and others not, or they contradict each other.
    """
    environment = os.environ
    _take_from_slurm(environment)
    if dist.is_initialized():
        environment["RANK"], environment["WORLD_SIZE"] = str(dist.get_rank()), str(dist.get_world_size())
    present = [name for name in _VARIABLES if name in environment]
    if not present:
        if int(environment.get("OMPI_COMM_WORLD_SIZE", "1")) > 1:
            raise TopologyError(
                "mpirun has started this process as one of several, and RANK, LOCAL_RANK, WORLD_SIZE are not set. Start ranks "
                "with `meshbolt launch` or torchrun, or export these three and MASTER_ADDR from mpirun's variables."
            )
        environment.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
        environment.setdefault("MASTER_PORT", str(_free_port()))
    elif "RANK" not in present or "WORLD_SIZE" not in present:
        raise TopologyError(
            f"Of the variables that say which rank this process is only {', '.join(present)} is set. Start it with "
            "`meshbolt launch` or torchrun, or set RANK, LOCAL_RANK and WORLD_SIZE; with none of them it is the only rank."
        )
    environment.setdefault("MASTER_ADDR", _HERE)
    environment.setdefault("MASTER_PORT", str(port))
    return _place(environment)


def _place(environment: Mapping[str, str]) -> Place:
    try:
        rank, world_size = int(environment["RANK"]), int(environment["WORLD_SIZE"])
        local = environment.get("LOCAL_WORLD_SIZE") or environment.get("LOCAL_SIZE") or world_size
        # Without either all ranks are on one machine: nothing tells of others.
        local_rank = int(environment.get("LOCAL_RANK", rank % int(local)))
        place = Place(rank=rank, world_size=world_size, local_rank=local_rank, local_world_size=int(local))
    except ValueError as error:
        raise TopologyError(f"One of the variables {', '.join(_VARIABLES)} is no whole number: {error}.") from error
    if not (0 <= rank < world_size and 0 <= local_rank < place.local_world_size):
        raise TopologyError(
            f"RANK={rank} of WORLD_SIZE={world_size}, LOCAL_RANK={local_rank} of {place.local_world_size} on this machine: a "
            "rank is 0 or more and below the number of ranks. Start the ranks with `meshbolt launch` or torchrun."
        )
    if world_size % place.local_world_size:
        raise TopologyError(
            f"{world_size} ranks with {place.local_world_size} of them on this machine: all machines must have the same number. "
            "Change the slots."
        )
    os.environ["LOCAL_RANK"] = str(local_rank)
    return place


def _take_from_slurm(environment: Any) -> None:
    """Set the usual variables where srun has started every rank."""
    tasks = int(environment.get("SLURM_STEP_NUM_TASKS", "1"))
    if "RANK" in environment or "SLURM_STEP_NODELIST" not in environment or tasks == 1:
        return
    nodes = int(environment.get("SLURM_STEP_NUM_NODES", "1"))
    environment.update(
        RANK=environment["SLURM_PROCID"],
        WORLD_SIZE=str(tasks),
        LOCAL_RANK=environment["SLURM_LOCALID"],
        LOCAL_WORLD_SIZE=str(tasks // nodes),
    )
    environment.setdefault("MASTER_ADDR", first_node(environment["SLURM_STEP_NODELIST"]))


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind((_HERE, 0))
        return int(listener.getsockname()[1])


def chosen_timeout() -> timedelta:
    """Return how long a collective waits for its peers, as `init_distributed` was told."""
    return _chosen["timeout"]


def device_type() -> str:
    """Return the type of the devices that ranks train on."""
    return torch.device(get_accelerator().device_name()).type
