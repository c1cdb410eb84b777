"""What every rank runs: a script, a module, or one of meshbolt's own commands."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from meshbolt.errors import ConfigError

COMMANDS = ("fit", "validate", "test", "predict")
_START = Path(__file__).with_name("start.py")


@dataclass(frozen=True)
class Program:
    """A Python program.

    Attributes:
        kind: "script", "module", or "command" for one of meshbolt's.
        name: path, name of the module, or the command.
        arguments: of the program.
    """

    kind: str
    name: str
    arguments: tuple[str, ...]

    def as_written(self) -> list[str]:
        """Return the words that mean it on the command line of `meshbolt launch`."""
        return [*(["-m"] if self.kind == "module" else []), self.name, *self.arguments]

    def as_started(self) -> list[str]:
        """Return the command that runs it as one rank, which records what it fails with."""
        return [sys.executable, str(_START), self.kind, self.name, *self.arguments]


def read_program(words: Sequence[str], *, is_module: bool) -> Program:
    """Return the program that is meant.

    Args:
        words: its name, and its arguments.
        is_module: whether `-m` stood before them.

    Raises:
        ConfigError: nothing is named, or a script that is not there.
    """
    words = list(words[1:] if words[:1] == ["--"] else words)
    if not words:
        raise ConfigError(
            "There is nothing to run. Give a script, `-m MODULE`, or one of "
            + ", ".join(COMMANDS)
            + " with its arguments."
        )
    name, arguments = words[0], tuple(words[1:])
    if is_module:
        return Program("module", name, arguments)
    if name in COMMANDS:
        return Program("command", name, arguments)
    if not Path(name).is_file():
        known = "" if name.endswith(".py") else f" It is none of the commands {', '.join(COMMANDS)} either."
        raise ConfigError(f"There is no script {name!r} in {Path.cwd()}.{known} For a module write `-m {name}`.")
    return Program("script", name, arguments)
