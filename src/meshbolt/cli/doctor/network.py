"""How ranks would find each other: launchers' variables, the machine's name, interfaces, and switches of the libraries."""

from __future__ import annotations

import os
import queue
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

from meshbolt.cli.doctor.rows import Row, Status
from meshbolt.units import format_seconds

_PATIENCE_SECONDS = 5.0
_SLOW_SECONDS = 1.0
_TORCHRUN = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# Variables that were set for a search and then forgotten: each changes what a run does, for these values.
_SWITCHES: Mapping[str, tuple[Sequence[str], str]] = {
    "CUDA_LAUNCH_BLOCKING": (("1",), "every kernel is waited for"),
    "NCCL_P2P_DISABLE": (("1",), "GPUs exchange through host memory"),
    "NCCL_IB_DISABLE": (("1",), "InfiniBand is not used"),
    "NCCL_SHM_DISABLE": (("1",), "ranks of a machine exchange through its network"),
    "TORCH_DISTRIBUTED_DEBUG": (("DETAIL",), "every collective is checked by another one"),
    "TORCH_NCCL_BLOCKING_WAIT": (("1",), "collectives are waited for"),
    "MESHBOLT_DEBUG": (("1",), "every gather and batch is compared"),
    "MESHBOLT_FAST_PATH": (("0",), "the plain collectives are used"),
    "MKL_SERVICE_FORCE_INTEL": (("1",), "libraries of threads are mixed"),
}
Resolve = Callable[[str], Sequence[str]]


def addresses_of(name: str) -> list[str]:
    """Return the addresses of a machine.

    Raises:
        OSError: nobody knows it.
    """
    return sorted({str(each[4][0]) for each in socket.getaddrinfo(name, None)})


def network_rows(
    environment: Mapping[str, str] | None = None,
    *,
    resolve: Resolve = addresses_of,
    interfaces: Sequence[str] | None = None,
) -> list[Row]:
    """Return all of it.

    Args:
        environment: variables; None: of this process.
        resolve: returns the addresses of a name.
        interfaces: of this machine; None looks.
    """
    environment = os.environ if environment is None else environment
    interfaces = [name for _, name in socket.if_nameindex()] if interfaces is None else interfaces
    rows = [_name_row(resolve), *_interface_rows(environment, interfaces), *_launcher_rows(environment, resolve)]
    for name, (values, meaning) in _SWITCHES.items():
        if environment.get(name) in values:
            rows.append(_row(name, "yellow", f"{environment[name]}: {meaning}", f"unset {name}"))
    return rows


def _name_row(resolve: Resolve) -> Row:
    """Look up the machine's own name, as gloo does to know where it listens."""
    name = socket.gethostname()
    start = time.monotonic()
    found, error = _in_time(lambda: resolve(name))
    seconds = time.monotonic() - start
    mend = f'echo "127.0.1.1 {name}" | sudo tee -a /etc/hosts   # or, on one machine: export GLOO_SOCKET_IFNAME=lo'
    if found is None:
        return _row("machine's name", "red", f"{name} cannot be looked up: {error}", mend)
    value = f"{name} is {', '.join(found)}"
    if not any(map(_is_own, found)):
        return _row("machine's name", "red", f"{value}, which is no address of this machine", mend)
    if seconds > _SLOW_SECONDS:
        return _row(
            "machine's name", "yellow", f"{value}, looked up in {format_seconds(seconds)}", mend, seconds=seconds
        )
    return _row("machine's name", "green", value, seconds=seconds)


def _is_own(address: str) -> bool:
    """Return whether an address is of this machine: only then it can be listened at."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        with socket.socket(family) as probe:
            probe.bind((address.partition("%")[0], 0))
    except OSError:
        return False
    return True


def _in_time(ask: Callable[[], Sequence[str]]) -> tuple[Sequence[str] | None, str]:
    """Return an answer or the error; a name server that is silent is waited for a few seconds only."""
    answers: queue.SimpleQueue[tuple[Sequence[str] | None, str]] = queue.SimpleQueue()

    def work() -> None:
        try:
            answers.put((ask(), ""))
        except OSError as error:
            answers.put((None, str(error.strerror or error)))

    threading.Thread(target=work, daemon=True, name="meshbolt doctor: lookup").start()
    try:
        return answers.get(timeout=_PATIENCE_SECONDS)
    except queue.Empty:
        return None, f"no answer in {_PATIENCE_SECONDS:g} s"


def _interface_rows(environment: Mapping[str, str], interfaces: Sequence[str]) -> Iterator[Row]:
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        text = environment.get(variable)
        if not text:
            continue
        # NCCL takes beginnings of names, with ^ for all others and = for whole names.
        is_exact = variable.startswith("GLOO") or "=" in text[:2]
        names = text.lstrip("^=").split(",")
        unknown = [name for name in names if not any(_fits(each, name, is_exact) for each in interfaces)]
        there = ", ".join(interfaces)
        if unknown and not text.startswith("^"):
            value = f"{text}: this machine has no {', '.join(unknown)}, but {there}"
            others = [name for name in interfaces if name != "lo"] or ["lo"]
            yield _row(variable, "red", value, f"export {variable}={others[0]}")
        else:
            yield _row(variable, "green", f"{text} (of {there})")


def _fits(interface: str, name: str, is_exact: bool) -> bool:
    return interface == name if is_exact else interface.startswith(name.partition(":")[0])


def _launcher_rows(environment: Mapping[str, str], resolve: Resolve) -> Iterator[Row]:
    """Look at what a launcher has set: that it is whole, and that the meeting point can be found."""
    given = [name for name in _TORCHRUN if environment.get(name)]
    if "SLURM_JOB_ID" in environment:
        tasks, nodes = environment.get("SLURM_NTASKS", "1"), environment.get("SLURM_JOB_NUM_NODES", "1")
        value = f"job {environment['SLURM_JOB_ID']}: {tasks} tasks on {nodes} machines"
        if "SLURM_PROCID" not in environment or environment.get("SLURM_JOB_NAME") in ("bash", "interactive"):
            yield _row("SLURM", "yellow", f"{value}; this process is none of them", "srun meshbolt doctor")
        else:
            yield _row("SLURM", "green", f"{value}; this is task {environment['SLURM_PROCID']}")
    if not given:
        if "SLURM_JOB_ID" not in environment:
            yield _row("launcher", "green", "none: a Trainer starts its ranks by itself")
        return
    if "RANK" not in given and "WORLD_SIZE" not in given:
        shown = ", ".join(f"{name}={environment[name]}" for name in given)
        yield _row("launcher", "green", f"none; {shown} is set")
    else:
        yield _torchrun_row(environment, [name for name in _TORCHRUN if name not in given])
    if "MASTER_ADDR" in given:
        yield _meeting_row(environment, resolve)


def _torchrun_row(environment: Mapping[str, str], missing: Sequence[str]) -> Row:
    if missing:
        shown = ", ".join(f"{name}={environment[name]}" for name in _TORCHRUN if name not in missing)
        value = f"{shown}, but no {', '.join(missing)}: ranks would wait for each other for ever"
        return _row("launcher", "red", value, f"unset {' '.join(_TORCHRUN)}   # or start by torchrun, srun or meshbolt")
    rank, world = environment["RANK"], environment["WORLD_SIZE"]
    if not (rank.isdigit() and world.isdigit() and int(rank) < int(world)):
        value = f"RANK={rank} is no rank of WORLD_SIZE={world}"
        return _row("launcher", "red", value, f"unset {' '.join(_TORCHRUN)}   # or start by torchrun, srun or meshbolt")
    return _row("launcher", "green", f"rank {rank} of {world}, as torchrun sets it")


def _meeting_row(environment: Mapping[str, str], resolve: Resolve) -> Row:
    address, port = environment["MASTER_ADDR"], environment.get("MASTER_PORT", "")
    found, error = _in_time(lambda: resolve(address))
    if found is None:
        value = f"{address} cannot be looked up: {error}"
        return _row(
            "MASTER_ADDR",
            "red",
            value,
            "export MASTER_ADDR=$(hostname -I | cut -d' ' -f1)   # on the machine of rank 0",
        )
    if port and not (port.isdigit() and 0 < int(port) < 2**16):
        return _row("MASTER_PORT", "red", f"{port!r} is no port", "export MASTER_PORT=29500")
    return _row("MASTER_ADDR", "green", f"{address} is {', '.join(found)}{f', port {port}' if port else ''}")


def _row(name: str, status: Status, value: str, mend: str = "", **measured: float) -> Row:
    return Row(area="network", name=name, status=status, value=value, mend=mend, measured=measured)
