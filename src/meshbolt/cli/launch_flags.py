"""The flags of `meshbolt launch`; those of `deepspeed` and torchrun mean the same here, or an error says what to do instead."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from meshbolt.errors import ConfigError, did_you_mean
from meshbolt.launch.variables import FILE_NAME

PORT = 29500
_LAST_PORT = 65535
_SSH = "ssh"
_LEAST = MappingProxyType(
    {
        **{"nproc_per_node": 1, "max_restarts": 0, "min_nodes": 1, "master_port": 1, "nnodes": 1, "node_rank": 0},
        **{"grace": 0, "meet": 1, "ssh_port": 1},
    }
)
_CORES = "ranks are not bound to cores: call it through `taskset` or `numactl`, and set OMP_NUM_THREADS"
_MEETING = "nodes meet at --master-addr and --master-port"
# Of other launchers, by their names with dashes.
_NOT_HERE: Mapping[str, str] = MappingProxyType(
    {
        "autotuning": "there is no autotuner",
        "bind-core-list": _CORES,
        "bind-cores-to-rank": _CORES,
        "launcher-args": "hosts are reached through ssh alone, whose options go into --ssh",
        "local-addr": _MEETING,
        "no-python": "every rank runs Python: name a script, or a module behind -m",
        "rdzv-backend": _MEETING,
        "rdzv-conf": f"{_MEETING}; how long they wait is --meet",
        "rdzv-endpoint": _MEETING,
        "rdzv-id": _MEETING,
        "redirects": "output goes to the terminal, and into files with --log-dir",
        "save-pid": "the process to end is the launcher itself, whose number the shell has in $!",
        "standalone": "on one machine it is always so: leave it out",
        "tee": "output goes to the terminal, and into files with --log-dir",
        "venv-script": "every host runs the Python of this call, which must be at the same path there",
    }
)
_NO_MPI = "hosts are reached through ssh, so leave it out; where MPI is to start ranks, let it start the program itself"
_LAUNCHERS: Mapping[str, str] = MappingProxyType(
    {
        "slurm": "under SLURM call `srun --ntasks-per-node=1 meshbolt launch ...`, without a hostfile",
        "openmpi": _NO_MPI,
        "mpich": _NO_MPI,
        "impi": _NO_MPI,
        "mvapich": _NO_MPI,
    }
)


def read_flags(arguments: Sequence[str]) -> argparse.Namespace:
    """Return what a call asks for, with the program and its arguments in `program`.

    Args:
        arguments: of the call.

    Raises:
        ConfigError: a flag is not known here, is below what it can be, or contradicts another.
    """
    parser = _parser()
    options, unknown = parser.parse_known_args(list(arguments))
    if unknown:
        raise ConfigError(_why_not(unknown[0], parser))
    _check(options)
    _translate(options)
    return options


class _Parser(argparse.ArgumentParser):
    """Takes every flag with underscores in it as well."""

    def __init__(self, **settings: Any) -> None:
        self.shown: list[str] = []
        super().__init__(**settings)

    def flag(self, name: str, *others: str, **settings: Any) -> None:
        """Add a flag, and without a word in the help its other names.

        Args:
            name: with dashes.
            others: that mean the same.
            settings: as `add_argument` has them.
        """
        action = self.add_argument(name, **settings)
        spelled = {each.replace("-", "_").replace("__", "--", 1) for each in (name, *others) if each.startswith("--")}
        hidden = {"dest": action.dest, "default": argparse.SUPPRESS, "help": argparse.SUPPRESS}
        names = sorted({*others, *spelled} - {name})
        if settings.get("help") != argparse.SUPPRESS:
            self.shown.append(name)
        if names:
            self.add_argument(*names, **{**settings, **hidden})


def _parser() -> _Parser:
    parser = _Parser(
        prog="meshbolt launch",
        usage="meshbolt launch [options] SCRIPT | -m MODULE | fit|validate|test|predict [arguments of the program]",
        description="""Run a program on every rank, through torch's own launcher: on this machine, on the hosts
of a hostfile through ssh, or, called once on each node, with --no-ssh. Inside of torchrun
or srun, which have started the ranks, it runs the program only. When a rank fails, all end;
the first failure is shown first, and its exit code is returned.""",
        epilog="""examples:
  meshbolt launch --nproc-per-node 2 train.py --lr 1e-4
  meshbolt launch --hostfile hosts --include node1@node2:0,1 --max-restarts 3 train.py""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    _add_where(parser)
    _add_meeting(parser)
    _add_ending(parser)
    _add_hidden(parser)
    parser.add_argument(
        "program", nargs=argparse.REMAINDER, metavar="...", help="what every rank runs, with its arguments"
    )
    return parser


def _add_where(parser: _Parser) -> None:
    add = parser.flag
    add("-m", "--module", dest="module", action="store_true", help="the program is a module")
    add(
        "--nproc-per-node",
        *("--num-gpus", "--num-accelerators"),
        type=int,
        metavar="N",
        help="ranks on each node; else its slots, its GPUs, or 1 without any",
    )
    add(
        *("--hostfile", "-H"),
        type=Path,
        metavar="FILE",
        help="lines `HOST slots=N`; the same folder and Python must be on all hosts",
    )
    add(
        *("--include", "-i"),
        default="",
        metavar="HOSTS",
        help="these alone: HOST[:SLOT,SLOT...][@HOST...]; without a file localhost",
    )
    add("--exclude", "-e", default="", metavar="HOSTS", help="all but these, written likewise")
    add(
        *("--nnodes", "--num-nodes"),
        type=int,
        metavar="N",
        help="the first N of the hosts; with --no-ssh: how many nodes there are",
    )
    add("--node-rank", type=int, metavar="N", help="with --no-ssh: which node this is, from 0")
    add("--no-ssh", action="store_true", help="run the ranks of this node only; call it on each node")


def _add_meeting(parser: _Parser) -> None:
    add = parser.flag
    add(
        "--master-addr",
        default="",
        metavar="ADDRESS",
        help="where nodes meet, as all reach it; the first host by default",
    )
    add("--master-port", type=int, metavar="PORT", help=f"there ({PORT}); each restart through ssh takes the next one")
    add(
        "--meet", type=int, default=300, metavar="SECONDS", help="how long nodes wait for each other at the start (300)"
    )
    add("--ssh", default="", metavar="COMMAND", help="ssh with options, such as 'ssh -p 2222 -i key'")
    add(
        "--env",
        action="append",
        default=[],
        metavar="NAME[=VALUE]",
        help="a variable for other hosts, beside PATH, NCCL*, PYTHON*, "
        f"MESHBOLT*, GLOO*, TORCH* and the like, and lines NAME=VALUE of {FILE_NAME} in this folder or at home",
    )
    add(
        "--pass-local-rank",
        action="store_true",
        help="give the script --local_rank=N before its own arguments, as `deepspeed` does",
    )


def _add_ending(parser: _Parser) -> None:
    add = parser.flag
    add(
        "--max-restarts",
        type=int,
        default=0,
        metavar="N",
        help="starts after a failure (0): a Trainer with a strategy of "
        "meshbolt's goes on from the newest checkpoint of the run that is whole",
    )
    add(
        "--min-nodes",
        type=int,
        metavar="N",
        help="restart with so few nodes when others are gone; all of them by default",
    )
    add(
        "--grace",
        type=int,
        default=10,
        metavar="SECONDS",
        help="that ranks have to end by themselves before they are killed (10)",
    )
    add(
        *("--log-dir", "--enable_each_rank_log"),
        type=Path,
        metavar="DIR",
        help="keep the output of each rank there, on its host",
    )
    add("--dry-run", action="store_true", help="print what would run on each node, and run nothing")


def _add_hidden(parser: _Parser) -> None:
    """Add what the launcher tells itself on other hosts, and flags of `deepspeed` that ask for what is so already."""
    parser.add_argument("--lifeline", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--run-id", default="", help=argparse.SUPPRESS)
    parser.flag("--ssh-port", type=int, help=argparse.SUPPRESS)
    parser.flag("--launcher", default="pdsh", help=argparse.SUPPRESS)
    for name in ("--no-local-rank", "--no-ssh-check", "--force-multi", "--quiet"):
        parser.flag(name, action="store_true", help=argparse.SUPPRESS)
    parser.flag("-q", dest="quiet", action="store_true", help=argparse.SUPPRESS)
    parser.flag("--log-level", help=argparse.SUPPRESS)


def _why_not(flag: str, parser: _Parser) -> str:
    name = flag.partition("=")[0]
    answer = _NOT_HERE.get(name.lstrip("-").replace("_", "-"))
    if answer:
        return f"{name} is no flag of meshbolt launch: {answer}."
    return f"{name} is no flag of meshbolt launch{did_you_mean(name, parser.shown)}. Flags of the program stand behind its name."


def _check(options: argparse.Namespace) -> None:
    for name, least in _LEAST.items():
        value = getattr(options, name)
        if value is not None and value < least:
            raise ConfigError(f"--{name.replace('_', '-')} {value} is below {least}. Give {least} or more.")
    last = (options.master_port or PORT) + options.max_restarts
    if last > _LAST_PORT:
        raise ConfigError(
            f"--master-port {last - options.max_restarts} with {options.max_restarts} restarts, each of which may take the next, "
            f"is above {_LAST_PORT}, the last port. Give a lower one."
        )
    if options.node_rank is not None and not options.no_ssh:
        raise ConfigError(
            f"--node-rank {options.node_rank} is for --no-ssh, which is called once on each node. Add it."
        )
    is_one = options.hostfile is None and not options.no_ssh
    if is_one and options.nnodes not in (None, 1):
        raise ConfigError(
            f"--nnodes {options.nnodes}: which nodes these are must be told: by --hostfile FILE, or by --no-ssh with "
            "--node-rank and --master-addr on each."
        )
    launcher = options.launcher.lower()
    if launcher not in (_SSH, "pdsh"):
        answer = _LAUNCHERS.get(launcher)
        raise ConfigError(
            f"--launcher {options.launcher}: {answer}."
            if answer
            else f"--launcher {options.launcher} is not known{did_you_mean(launcher, ['pdsh', 'ssh', *_LAUNCHERS])}."
        )
    if options.ssh and options.ssh_port:
        raise ConfigError(
            f"--ssh {options.ssh!r} and --ssh_port {options.ssh_port} cannot both be given. Give --ssh "
            f"{shlex.quote(f'{options.ssh} -p {options.ssh_port}')}."
        )


def _translate(options: argparse.Namespace) -> None:
    options.ssh = options.ssh or (f"{_SSH} -p {options.ssh_port}" if options.ssh_port else _SSH)
    if str(options.log_dir) == "None":  # what `deepspeed` has for none
        options.log_dir = None
