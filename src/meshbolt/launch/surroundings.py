"""Who has started this process: whether it is a rank already, one task on each node of SLURM, or none of these."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from meshbolt.errors import ConfigError

_RANK = ("RANK", "WORLD_SIZE", "LOCAL_RANK")


@dataclass(frozen=True)
class Rank:
    """This process is one of the ranks, as another launcher has started it.

    Attributes:
        rank: its number.
        size: of the world.
        launcher: its name.
    """

    rank: int
    size: int
    launcher: str


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
        ConfigError: it is in a batch script of SLURM for several nodes, of which it would use one.
    """
    if all(name in environment for name in _RANK):
        name = "torchrun" if "TORCHELASTIC_RUN_ID" in environment else "another launcher"
        return Rank(int(environment["RANK"]), int(environment["WORLD_SIZE"]), name)
    if "SLURM_JOB_ID" not in environment:
        return None
    if "SLURM_STEP_NUM_TASKS" not in environment:
        _refuse_batch_script(environment)
        return None
    tasks, nodes = int(environment["SLURM_STEP_NUM_TASKS"]), int(environment.get("SLURM_STEP_NUM_NODES", "1"))
    if tasks > nodes:
        return Rank(int(environment["SLURM_PROCID"]), tasks, "srun")
    if nodes == 1:
        return None
    return Node(int(environment["SLURM_NODEID"]), nodes, first_node(environment["SLURM_STEP_NODELIST"]))


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
