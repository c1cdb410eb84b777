"""Tables of commands: which module runs one, its line in the help, and the way from its name to its exit code."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from meshbolt.errors import did_you_mean

DONE, NO, BAD_USAGE = 0, 1, 2
# As a shell has it for a program that the signal of a broken pipe has ended.
READER_IS_GONE = 141


class Command(NamedTuple):
    """A command: the module with its `run`, imported only when it is called, and its line in the help."""

    module: str
    help: str


class Group(NamedTuple):
    """Commands that are called by one word, or by several.

    Attributes:
        program: those words.
        about: what they are for.
        example: a whole call of one of them.
        commands: by name.
    """

    program: str
    about: str
    example: str
    commands: Mapping[str, Command]


def dispatch(group: Group, arguments: Sequence[str]) -> int:
    """Run the command that is named first, and return the exit code.

    Args:
        group: the commands.
        arguments: the command's name, and its arguments.

    Raises:
        MeshboltError: what was asked cannot be.
    """
    if not arguments:
        sys.stderr.write(_help(group))
        return BAD_USAGE
    name = arguments[0]
    if name in ("-h", "--help"):
        sys.stdout.write(_help(group))
        return DONE
    if name not in group.commands:
        sys.stderr.write(f"{group.program}: {name!r} is not a command{did_you_mean(name, group.commands)}\n")
        return BAD_USAGE
    return int(importlib.import_module(group.commands[name].module).run(arguments))


def _help(group: Group) -> str:
    width = max(map(len, group.commands))
    commands = "\n".join(f"  {name.ljust(width)}  {command.help}" for name, command in group.commands.items())
    version = "  --version  print the version\n" if group.program == "meshbolt" else ""
    return f"""usage: {group.program} COMMAND ...

{group.about}

commands:
{commands}

`{group.program} COMMAND --help` shows the options of a command.
{version}  -h, --help print this

example:
  {group.example}
"""
