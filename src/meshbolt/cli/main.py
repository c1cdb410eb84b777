"""Find the command that is named, and run it."""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import meshbolt
from meshbolt.environment import read_environment
from meshbolt.errors import CheckpointError, MeshboltError, did_you_mean

DONE, NO, BAD_USAGE = 0, 1, 2


class Command(NamedTuple):
    """A command: the module with its `run`, imported only when it is called, and its line in the help."""

    module: str
    help: str


COMMANDS: Mapping[str, Command] = MappingProxyType(
    {
        "fit": Command("meshbolt.cli.train", "train a model"),
        "validate": Command("meshbolt.cli.train", "evaluate a model on validation data"),
        "test": Command("meshbolt.cli.train", "evaluate a model on test data"),
        "predict": Command("meshbolt.cli.train", "run a model on data and collect what it returns"),
        "explain": Command(
            "meshbolt.cli.explain", "show the plan a configuration comes to, and where each value is from"
        ),
    }
)


def main() -> int:
    """Run the command line in `sys.argv`, and return the exit code."""
    arguments = sys.argv[1:]
    if not arguments:
        sys.stderr.write(_help())
        return BAD_USAGE
    name = arguments[0]
    if name in ("-h", "--help"):
        sys.stdout.write(_help())
        return DONE
    if name == "--version":
        sys.stdout.write(f"meshbolt {meshbolt.__version__}\n")
        return DONE
    if name not in COMMANDS:
        sys.stderr.write(f"meshbolt: {name!r} is not a command{did_you_mean(name, COMMANDS)}\n")
        return BAD_USAGE
    return _run(name, arguments)


def _run(name: str, arguments: list[str]) -> int:
    debug = False
    try:
        debug = read_environment().debug
        return int(importlib.import_module(COMMANDS[name].module).run(arguments))
    except MeshboltError as error:
        if debug:
            traceback.print_exc()
        sys.stderr.write(f"meshbolt {name}: {_rank()}{type(error).__name__}: {error}\n")
        return NO if isinstance(error, CheckpointError) else BAD_USAGE


def _rank() -> str:
    """Return which rank speaks, where it is not the first: an error is raised on all of them."""
    rank = os.environ.get("LOCAL_RANK", "0")
    return "" if rank == "0" else f"[local rank {rank}] "


def _help() -> str:
    width = max(map(len, COMMANDS))
    commands = "\n".join(f"  {name.ljust(width)}  {command.help}" for name, command in COMMANDS.items())
    return f"""usage: meshbolt COMMAND ...

Train a model that one GPU cannot hold: ZeRO for any LightningModule.

commands:
{commands}

`meshbolt COMMAND --help` shows the options of a command.
  --version  print the version
  -h, --help print this

example:
  meshbolt fit --config configs/gpt_zero2.yaml --trainer.max_steps 100
"""
