"""Find the command that is named after `meshbolt checkpoint`, and run it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

from meshbolt.cli.commands import Command, Group, dispatch

COMMANDS: Mapping[str, Command] = MappingProxyType(
    {
        "ls": Command("meshbolt.cli.checkpoint.ls", "list the checkpoints below a directory"),
        "inspect": Command("meshbolt.cli.checkpoint.inspect", "show what a checkpoint holds"),
        "verify": Command("meshbolt.cli.checkpoint.verify", "compare every byte of a checkpoint with its checksums"),
        "consolidate": Command(
            "meshbolt.cli.checkpoint.consolidate", "write a checkpoint as the single file of Lightning"
        ),
        "export": Command("meshbolt.cli.checkpoint.export", "write a checkpoint in another format"),
        "import": Command(
            "meshbolt.cli.checkpoint.import_", "make a checkpoint from a file or directory of another format"
        ),
    }
)

_GROUP = Group(
    program="meshbolt checkpoint",
    about="Look at checkpoints, and convert them, tensor by tensor: memory holds the one at hand.",
    example="meshbolt checkpoint export run.ckpt weights/ --to safetensors",
    commands=COMMANDS,
)


def run(arguments: Sequence[str]) -> int:
    """Run a command on checkpoints, and return the exit code.

    Args:
        arguments: "checkpoint", then the command and its arguments.

    Raises:
        MeshboltError: what was asked cannot be.
    """
    return dispatch(_GROUP, arguments[1:])
