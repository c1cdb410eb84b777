"""The ranks of this node, through torch's own launcher."""

from __future__ import annotations

import json
import os
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, LogsDest, SignalException, Std
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.elastic.rendezvous import RendezvousError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from meshbolt.errors import ConfigError, TopologyError
from meshbolt.launch.ending import surely_ending
from meshbolt.launch.failures import MARK, Failure, in_order, read_error
from meshbolt.launch.program import Program

PREFIX = "[rank ${rank}] "
_GRACE = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"
# Where the agents' store is shared with ranks, those of a restart find in it what the ranks before them have left: gloo then
# connects to processes that are gone, when it comes to read an address before its owner has written a new one.
_OWN_STORE = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"


@dataclass(frozen=True, kw_only=True)
class Node:
    """What one node runs, and where it meets the others.

    Attributes:
        program: of every rank.
        num_ranks: on this node.
        rank: of the node.
        min_nodes: with fewer nothing runs.
        max_nodes: at the most.
        address: of the node where all meet; empty where there is only one.
        port: there.
        run_id: the same on all nodes.
        max_restarts: how often all ranks are started again after one has failed.
        meet_seconds: how long nodes wait for each other.
        grace_seconds: that ranks have to end by themselves.
        log_dir: where the output of each rank is kept; None keeps none.
    """

    program: Program
    num_ranks: int
    rank: int = 0
    min_nodes: int = 1
    max_nodes: int = 1
    address: str = ""
    port: int = 0
    run_id: str = "meshbolt"
    max_restarts: int = 0
    meet_seconds: int = 300
    grace_seconds: int = 10
    log_dir: Path | None = None


Report = Callable[[list[Failure], int], None]
"""Is told of failures in order, and of how many restarts there were before."""


def run_ranks_of(node: Node, report: Report) -> int:
    """Run the ranks of a node until the last has ended, and return the exit code: that of the first failure.

    Args:
        node: what runs.
        report: is called for failures, also where ranks are started again.

    Raises:
        ConfigError: there are not as many GPUs as ranks, the port is taken, or there is no place for output.
        TopologyError: the nodes have not found each other.
    """
    _check_gpus(node.num_ranks)
    folder = node.log_dir or Path(tempfile.mkdtemp(prefix="meshbolt_launch_"))
    try:
        logs = _Logs(folder, report)
    except OSError as error:
        raise ConfigError(
            f"--log-dir {folder} cannot be made on {socket.gethostname()}: {error}. Give another."
        ) from error
    os.environ[_GRACE] = str(node.grace_seconds)
    # Each would compute with all cores otherwise, which are slower together than one.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, _num_cores() // node.num_ranks)))
    command = node.program.as_started()
    try:
        with surely_ending(grace_seconds=node.grace_seconds):
            return _run(node, logs, command)
    except KeyboardInterrupt:  # before there were ranks
        return 130
    finally:
        if node.log_dir is None:
            shutil.rmtree(folder, ignore_errors=True)


def _run(node: Node, logs: _Logs, command: list[str]) -> int:
    try:
        elastic_launch(_config_of(node, logs), command[0])(*command[1:])
    except ChildFailedError as error:
        failures = in_order(logs.failures(error.failures))
        logs.report(failures, logs.restarts)
        return failures[0].exit_code or 1
    except SignalException as ended:
        return 128 + int(ended.sigval)
    except (RendezvousError, torch.distributed.DistError) as error:
        raise _not_met(node, error) from error
    return 0


def _config_of(node: Node, logs: _Logs) -> LaunchConfig:
    is_alone, may_restart = node.max_nodes == 1, node.max_restarts > 0 or node.min_nodes < node.max_nodes
    meeting: dict[str, Any] = {"timeout": node.meet_seconds, "join_timeout": node.meet_seconds}
    if may_restart:
        os.environ[_OWN_STORE] = "1"
    if is_alone and not node.port:
        backend, endpoint, local = "c10d", "localhost:0", "localhost"
    elif may_restart:
        backend, endpoint, local = "c10d", f"{node.address}:{node.port}", _own_address(node)
        meeting["is_host"] = node.rank == 0
    else:
        backend, endpoint, local = "static", f"{node.address or 'localhost'}:{node.port}", None
        meeting["rank"] = node.rank
    return LaunchConfig(
        min_nodes=node.min_nodes,
        max_nodes=node.max_nodes,
        nproc_per_node=node.num_ranks,
        run_id=node.run_id,
        rdzv_backend=backend,
        rdzv_endpoint=endpoint,
        rdzv_configs=meeting,
        local_addr=local,
        max_restarts=node.max_restarts,
        logs_specs=logs,
        log_line_prefix_template=PREFIX,
    )


def _own_address(node: Node) -> str:
    """Return the address of this node as the others reach it: the one that it would reach the first of them from."""
    if node.rank == 0:
        return node.address
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((node.address, node.port))  # nothing is sent
        except OSError as error:
            raise TopologyError(f"--master-addr {node.address!r} cannot be reached from this node: {error}.") from error
        return str(probe.getsockname()[0])


def _num_cores() -> int:
    is_told = hasattr(os, "sched_getaffinity")  # on Linux, where it is those that this process may use
    return len(os.sched_getaffinity(0)) if is_told else os.cpu_count() or 1


def _check_gpus(num_ranks: int) -> None:
    number = torch.cuda.device_count()
    if 0 < number < num_ranks and os.environ.get("CUDA_VISIBLE_DEVICES") != "":
        raise ConfigError(
            f"{num_ranks} ranks were asked for on {socket.gethostname()}, which shows {number} GPUs. Give it that many slots in "
            f"the hostfile, or --nproc-per-node {number}; for ranks on the CPU set CUDA_VISIBLE_DEVICES=''."
        )


def _not_met(node: Node, error: Exception) -> Exception:
    why = (str(error).splitlines() or ["no others came"])[0]
    if "EADDRINUSE" in str(error):
        return ConfigError(f"--master-port {node.port} is taken on {node.address}: {why}. Give another one.")
    return TopologyError(
        f"Node {node.rank} has not met the {node.max_nodes} nodes of this run at {node.address}:{node.port} within "
        f"{node.meet_seconds} seconds: {why}. Check that the launcher runs on each, with the same --nnodes, --master-addr and "
        "--master-port and a --node-rank of its own, and that a firewall lets the port pass."
    )


class _Logs(DefaultLogsSpecs):
    """Where ranks write to; hears of every start of them, and knows what the last ones have recorded."""

    def __init__(self, folder: Path, report: Report) -> None:
        super().__init__(log_dir=str(folder), tee=Std.ALL)
        self.report, self.restarts = report, -1
        self._files: dict[int, Path] = {}

    def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
        """Return the files of a start, and tell of the failures that have led to it."""
        failures = in_order(self.failures({}))
        if failures:
            self.report(failures, self.restarts)
        self.restarts += 1
        destination = super().reify(envs)
        self._files = {int(envs[local]["RANK"]): Path(file) for local, file in destination.error_files.items()}
        return destination

    def failures(self, known: dict[int, ProcessFailure]) -> list[Failure]:
        """Return what ranks have failed with.

        Args:
            known: by rank, those whose end torch's launcher has seen.
        """
        found: list[Failure] = []
        for rank, file in self._files.items():
            recorded = read_error(file)
            if recorded or rank in known:
                code = known[rank].exitcode if rank in known else 1
                found.append(Failure(rank=rank, code=code, **({"seconds": time.time()} | recorded)))
        return found


def tell(event: str, **content: Any) -> None:
    """Write a line for the launcher of several hosts.

    Args:
        event: what has happened.
        content: plain data.
    """
    sys.stderr.write(MARK + json.dumps({"event": event, **content}) + "\n")
    sys.stderr.flush()
