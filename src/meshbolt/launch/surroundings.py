"""Who has started this process: whether it is a rank already, one task on each node of SLURM, or none of these."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from meshbolt.errors import ConfigError

_RANK = ("RANK", "WORLD_SIZE", "LOCAL_RANK")


@dataclass(frozen=True)
class Rank:
    """This process is one of the ranks, as another launcher has started it.

    Attributes:
        rank: its number.
        size: of the world.
        launcher: its name.
        variables: that programs look for, and the other launcher does not set.
    """

    rank: int
    size: int
    launcher: str
    variables: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Node:
    """This process is to start the ranks of one node, as SLURM has started one on each.

    Attributes:
        rank: of the node.
        number: of nodes.
        first: the name of the first.
    """

    rank: int
    number: int
    first: str


def look_around(environment: Mapping[str, str]) -> Rank | Node | None:
    """Return what this process is to whoever has started it; None: it was called by hand, or by a batch script on one node.

    Args:
        environment: its variables.

    Raises:
        ConfigError: it is in a batch script of SLURM for several nodes, of which it would use one; or mpirun has started it as
            one of several.
    """
    if all(name in environment for name in _RANK):
        name = "torchrun" if "TORCHELASTIC_RUN_ID" in environment else "another launcher"
        return Rank(int(environment["RANK"]), int(environment["WORLD_SIZE"]), name)
    is_in_slurm = "SLURM_JOB_ID" in environment
    _refuse_mpi(environment, () if is_in_slurm else ("PMI_SIZE",))  # SLURM sets it as well
    if not is_in_slurm:
        return None
    if "SLURM_STEP_NUM_TASKS" not in environment:
        _refuse_batch_script(environment)
        return None
    tasks, nodes = int(environment["SLURM_STEP_NUM_TASKS"]), int(environment.get("SLURM_STEP_NUM_NODES", "1"))
    if tasks > nodes:
        return Rank(int(environment["SLURM_PROCID"]), tasks, "srun", _variables_of_a_task(environment))
    if nodes == 1:
        return None
    return Node(int(environment["SLURM_NODEID"]), nodes, first_node(environment["SLURM_STEP_NODELIST"]))


def _refuse_mpi(environment: Mapping[str, str], more: tuple[str, ...]) -> None:
    size = max(int(environment.get(name, "1")) for name in ("OMPI_COMM_WORLD_SIZE", *more))
    if size > 1:
        raise ConfigError(
            f"mpirun has started this process as one of {size}, and each would start ranks of its own. Call meshbolt launch "
            "without mpirun (--hostfile names the nodes), or let mpirun start one on each node, with --no-ssh, --nnodes, "
            "--node-rank and --master-addr, and without OMPI_COMM_WORLD_SIZE and PMI_SIZE in its environment."
        )


def _variables_of_a_task(environment: Mapping[str, str]) -> dict[str, str]:
    """Return what torchrun would set for a task that srun has started as a rank; an address and a port that are set are kept."""
    node = int(environment.get("SLURM_NODEID", "0"))
    each = ranks_on_nodes(environment.get("SLURM_STEP_TASKS_PER_NODE", environment["SLURM_STEP_NUM_TASKS"]))
    port = 15000 + int(re.sub(r"\D", "", environment["SLURM_JOB_ID"])[-4:] or "0")  # another one for each job
    return {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": environment["SLURM_STEP_NUM_TASKS"],
        "LOCAL_RANK": environment["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": str(each[node]),
        "GROUP_RANK": str(node),
        "GROUP_WORLD_SIZE": environment.get("SLURM_STEP_NUM_NODES", "1"),
        "MASTER_ADDR": environment.get("MASTER_ADDR") or first_node(environment["SLURM_STEP_NODELIST"]),
        "MASTER_PORT": environment.get("MASTER_PORT") or str(port),
    }


def ranks_on_nodes(numbers: str) -> list[int]:
    """Return the tasks on each node from how SLURM writes them.

    Example:
        >>> ranks_on_nodes("4(x2),3")
        [4, 4, 3]
    """
    found: list[int] = []
    for number, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", numbers):
        found += [int(number)] * int(times or "1")
    return found


def _refuse_batch_script(environment: Mapping[str, str]) -> None:
    nodes = int(environment.get("SLURM_JOB_NUM_NODES", "1"))
    if nodes > 1:
        raise ConfigError(
            f"This is a job of SLURM on {nodes} nodes, and meshbolt launch was called on one of them. Call it once on each: "
            "`srun --ntasks-per-node=1 meshbolt launch ...`, or let SLURM start every rank: `srun --ntasks-per-node=GPUS "
            "python train.py`."
        )


def first_node(names: str) -> str:
    """Return the first of the names that SLURM writes as one.

    Example:
        >>> first_node("gpu[03-05,9],login1")
        'gpu03'
    """
    found = re.match(r"([^,\[]+)(?:\[(\w+)[^\]]*\]([^,\[]*))?", names)
    if found is None:
        raise ConfigError(f"SLURM names its nodes {names!r}, in which there is no name. Give --master-addr.")
    beginning, number, end = found.groups()
    return beginning + (number or "") + (end or "")
