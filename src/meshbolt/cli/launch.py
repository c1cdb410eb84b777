"""`meshbolt launch`: a program on every rank, of this machine or of several."""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import socket
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from meshbolt.cli.commands import DONE
from meshbolt.cli.launch_flags import PORT, read_flags
from meshbolt.environment import RESTARTS, SAVES
from meshbolt.errors import ConfigError, TopologyError
from meshbolt.launch.cluster import Cluster, run_on
from meshbolt.launch.ending import hold_on_to
from meshbolt.launch.failures import Failure, describe
from meshbolt.launch.hosts import Host, choose, first_hosts, first_slots, ranks_on_each, read_hosts
from meshbolt.launch.program import Program, read_program
from meshbolt.launch.surroundings import Node as SlurmNode
from meshbolt.launch.surroundings import Rank, look_around
from meshbolt.launch.variables import DEEPSPEED_FILE_NAME, find_file, forwarded, read_text

_VISIBLE = "CUDA_VISIBLE_DEVICES"
_WAIT_SECONDS = 60.0
_PAUSE_SECONDS = 5.0


def run(arguments: Sequence[str]) -> int:
    """Run a program on every rank, and return the exit code of the first that failed.

    Args:
        arguments: "launch", then flags, the program and its arguments.

    Raises:
        ConfigError: flags, a hostfile or the surroundings contradict each other.
        TopologyError: hosts cannot be reached or do not meet.
    """
    options = read_flags(arguments[1:])
    program = read_program(options.program, is_module=options.module, is_told_local_rank=options.pass_local_rank)
    around = None if options.no_ssh or options.hostfile else look_around(os.environ)
    if isinstance(around, Rank):
        return _run_here(program, around, options)
    if isinstance(around, SlurmNode):
        options.no_ssh, options.node_rank, options.nnodes = True, around.rank, around.number
        options.master_addr = options.master_addr or around.first
    if options.no_ssh:
        return _run_node(program, options)
    hosts = _hosts(options)
    if len(hosts) == 1 and _is_here(hosts[0]):
        return _run_alone(program, hosts[0], options)
    return _run_cluster(program, hosts, options)


def _run_here(program: Program, rank: Rank, options: argparse.Namespace) -> int:
    names = ("nproc_per_node", "include", "exclude", "nnodes", "max_restarts", "min_nodes")
    given = [name for name in names if getattr(options, name)]
    if given:
        raise ConfigError(
            f"--{given[0].replace('_', '-')} was given, and {rank.launcher} has started this process as rank {rank.rank} of "
            f"{rank.size} already. Give it to {rank.launcher}, or call meshbolt launch by itself."
        )
    if rank.rank == 0:
        _say(f"{rank.launcher} has started {rank.size} ranks; this one runs the program only.")
    seen = {**os.environ, **rank.variables}
    words = program.as_run(int(seen["LOCAL_RANK"]))
    sys.stdout.flush()
    if not options.dry_run:
        os.execve(words[0], words, seen)
    _show(f"rank {rank.rank} of {rank.size}", _with(rank.variables, words))
    return DONE


def _hosts(options: argparse.Namespace) -> tuple[Host, ...]:
    if options.hostfile is not None:
        text = read_text(options.hostfile, asked="--hostfile ")
        hosts = choose(read_hosts(text, origin=str(options.hostfile)), include=options.include, exclude=options.exclude)
    else:
        here = Host("localhost", tuple(range(_slots_here(options))))
        hosts = choose([here], include=options.include, exclude=options.exclude)
    if options.nnodes is not None and options.hostfile is not None:
        hosts = first_hosts(hosts, options.nnodes)
    return hosts if options.nproc_per_node is None else first_slots(hosts, options.nproc_per_node)


def _slots_here(options: argparse.Namespace) -> int:
    from torch.cuda import device_count

    return max(options.nproc_per_node or 1, device_count())


def _is_here(host: Host) -> bool:
    return host.name in ("localhost", "127.0.0.1", "::1", socket.gethostname())


def _visible(host: Host) -> str:
    """Return the GPUs of some slots of this machine, where only some of its GPUs may be seen already."""
    known = [word for word in os.environ.get(_VISIBLE, "").split(",") if word]
    return ",".join(known[slot] if slot < len(known) else str(slot) for slot in host.slots)


def _run_alone(program: Program, host: Host, options: argparse.Namespace) -> int:
    seen = {} if host.is_whole else {_VISIBLE: _visible(host)}
    if options.dry_run:
        _show(host.name, _with(seen, _torchrun(program, len(host.slots), options)))
        return DONE
    os.environ.update(seen)
    return _run_agent(program, options, num_ranks=len(host.slots), rank=0, nodes=(1, 1))


def _run_node(program: Program, options: argparse.Namespace) -> int:
    hosts = _hosts(options) if options.hostfile else ()
    number = options.nnodes or len(hosts) or 1
    if options.node_rank is None or (number > 1 and not options.master_addr and not hosts):
        raise ConfigError(
            "--no-ssh needs --node-rank, --nnodes (or --hostfile) and --master-addr on each node. Call, on the first of two: "
            "meshbolt launch --no-ssh --nnodes 2 --node-rank 0 --master-addr node1 train.py"
        )
    if options.node_rank >= number:
        raise ConfigError(f"--node-rank {options.node_rank} is none of {number} nodes. They are 0 to {number - 1}.")
    _check_least(options, number)
    options.master_addr = options.master_addr or (hosts[0].name if hosts else "")
    num_ranks = ranks_on_each(hosts) if hosts else options.nproc_per_node or _slots_here(options)
    if options.dry_run:
        _show(f"node {options.node_rank} of {number}", _torchrun(program, num_ranks, options, nodes=number))
        return DONE
    return _run_agent(
        program, options, num_ranks=num_ranks, rank=options.node_rank, nodes=(options.min_nodes or number, number)
    )


def _run_agent(
    program: Program, options: argparse.Namespace, *, num_ranks: int, rank: int, nodes: tuple[int, int]
) -> int:
    from meshbolt.launch.agent import Node, run_ranks_of, tell

    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    if options.lifeline:
        hold_on_to(sys.stdin.fileno())
        tell("begun")
    port = options.master_port or (PORT if nodes[1] > 1 else 0)
    run_id = options.run_id or (f"{options.master_addr}_{port}" if nodes[1] > 1 else uuid.uuid4().hex[:8])
    saves = _remember_saves(run_id) if options.max_restarts else None
    if saves is not None and rank == 0:
        saves.unlink(missing_ok=True)  # of a run before, which was killed

    def report(failures: list[Failure], restarts: int) -> None:
        if options.lifeline:
            tell("failed", failures=[failure.to_plain() for failure in failures])
        else:
            _report(failures, restarts, options.max_restarts)

    node = Node(
        program=program,
        num_ranks=num_ranks,
        rank=rank,
        min_nodes=nodes[0],
        max_nodes=nodes[1],
        address=options.master_addr or ("localhost" if nodes[1] == 1 else ""),
        port=port,
        run_id=run_id,
        max_restarts=options.max_restarts,
        meet_seconds=options.meet,
        grace_seconds=options.grace,
        log_dir=options.log_dir,
    )
    try:
        return run_ranks_of(node, report)
    finally:
        if saves is not None and rank == 0:
            saves.unlink(missing_ok=True)


def _run_cluster(program: Program, hosts: tuple[Host, ...], options: argparse.Namespace) -> int:
    ranks_on_each(hosts)
    _check_least(options, len(hosts))
    least = options.min_nodes or len(hosts)
    run_id = options.run_id or uuid.uuid4().hex[:8]
    saves = _remember_saves(run_id) if options.max_restarts and not options.dry_run else None
    variables, ssh = _variables(options), _ssh(options)
    try:
        for attempt in range(options.max_restarts + 1):
            cluster = Cluster(
                ssh=ssh,
                folder=Path.cwd(),
                variables={**variables, RESTARTS: str(attempt)} if options.max_restarts else variables,
                grace_seconds=options.grace,
            )
            there = _left_of(hosts, cluster, least) if attempt else hosts
            address = options.master_addr or cluster.address_of(there[0])
            agents = _agents(program, there, options, address=address, run_id=run_id, attempt=attempt)
            if options.dry_run:
                for host, words in agents.items():
                    _show(host.name, cluster.call(host, words))
                return DONE
            outcome = run_on(cluster, agents)
            if outcome.failures:
                _report(outcome.failures, attempt, options.max_restarts)
            if not outcome.code or outcome.asked_to_end:
                break
        return outcome.code
    finally:
        if saves is not None:
            saves.unlink(missing_ok=True)


def _ssh(options: argparse.Namespace) -> tuple[str, ...]:
    try:
        words = tuple(shlex.split(options.ssh))
    except ValueError as error:
        raise ConfigError(f"--ssh {options.ssh!r} is no command: {error}. Close it.") from error
    if not options.dry_run and shutil.which(words[0]) is None:
        raise ConfigError(f"--ssh {options.ssh!r}: there is no command {words[0]!r} here. Install it, or use --no-ssh.")
    return words


def _variables(options: argparse.Namespace) -> dict[str, str]:
    file = find_file(Path.cwd(), Path.home())
    if file is not None and file.name == DEEPSPEED_FILE_NAME:
        _say(f"other hosts are given the variables of {file}")
    return forwarded(os.environ, asked=options.env, file=file)


def _check_least(options: argparse.Namespace, number: int) -> None:
    if options.min_nodes is not None and options.min_nodes > number:
        raise ConfigError(
            f"--min-nodes {options.min_nodes} is above the {number} nodes of the run. Give {number} or fewer."
        )
    if options.min_nodes is not None and not options.max_restarts:
        raise ConfigError(
            f"--min-nodes {options.min_nodes} is for restarts, of which there are none. Add --max-restarts N."
        )


def _left_of(hosts: tuple[Host, ...], cluster: Cluster, least: int) -> tuple[Host, ...]:
    """Return the hosts that are there, once there are enough of them."""
    until = time.monotonic() + _WAIT_SECONDS
    while True:
        away = cluster.reachable(hosts)
        left = tuple(host for host in hosts if host.name not in away)
        if len(left) >= least:
            if away:
                _say(f"going on without {', '.join(sorted(away))}")
            return left
        if time.monotonic() > until:
            name, why = next(iter(away.items()))
            raise TopologyError(
                f"{len(left)} of {len(hosts)} hosts are left, and --min-nodes {least} needs more: {name} cannot be reached "
                f"({why}). Bring it back, or allow fewer nodes."
            )
        time.sleep(_PAUSE_SECONDS)


def _agents(
    program: Program, hosts: tuple[Host, ...], options: argparse.Namespace, *, address: str, run_id: str, attempt: int
) -> dict[Host, list[str]]:
    """Return what is called on each host, which could be called there by hand."""
    port = (options.master_port or PORT) + attempt
    commands: dict[Host, list[str]] = {}
    for rank, host in enumerate(hosts):
        flags: dict[str, Any] = {
            "nnodes": len(hosts),
            "node-rank": rank,
            "nproc-per-node": len(host.slots),
            "master-addr": address,
            "master-port": port,
            "run-id": f"{run_id}-{attempt}",
            "grace": options.grace,
            "meet": options.meet,
            **({"log-dir": options.log_dir} if options.log_dir else {}),
        }
        pairs = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
        commands[host] = [
            sys.executable,
            "-m",
            "meshbolt",
            "launch",
            "--no-ssh",
            "--lifeline",
            *pairs,
            *program.as_written(),
        ]
    return commands


def _torchrun(program: Program, num_ranks: int, options: argparse.Namespace, *, nodes: int = 1) -> list[str]:
    """Return the call of torchrun that does the same on one node, but for what is said and for how all of it ends."""
    meeting = f"{options.master_addr}:{options.master_port or PORT}"
    if nodes > 1 and options.max_restarts:
        least = options.min_nodes or nodes
        where = [f"--nnodes={least}:{nodes}", "--rdzv-backend=c10d", f"--rdzv-endpoint={meeting}"]
    elif nodes > 1:
        address, _, port = meeting.rpartition(":")
        where = [f"--nnodes={nodes}", f"--node-rank={options.node_rank}"]
        where += [f"--master-addr={address}", f"--master-port={port}"]
    else:
        where = [f"--master-port={options.master_port}" if options.master_port else "--standalone"]
    return [
        *("torchrun", *where, f"--nproc-per-node={num_ranks}", f"--max-restarts={options.max_restarts}", "--no-python"),
        *program.as_started(),
    ]


def _remember_saves(run_id: str) -> Path:
    """Let ranks write down which checkpoints they save, for those that are started after a failure."""
    path = Path.cwd() / f".meshbolt_saves_{run_id}.jsonl"
    os.environ.setdefault(SAVES, str(path))
    os.environ.setdefault(RESTARTS, "0")
    return path


def _report(failures: list[Failure], restarts: int, max_restarts: int) -> None:
    _say(describe(failures))
    if restarts < max_restarts:
        _say(f"restart {restarts + 1} of {max_restarts}")


def _with(variables: Mapping[str, str], words: Sequence[str]) -> list[str]:
    return [*(["env", *(f"{name}={value}" for name, value in variables.items())] if variables else []), *words]


def _show(where: str, words: Sequence[str]) -> None:
    sys.stdout.write(f"{where}: {shlex.join(words)}\n")


def _say(words: str) -> None:
    sys.stderr.write(f"meshbolt launch: {words}\n")
    sys.stderr.flush()
