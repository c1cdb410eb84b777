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
        is_told_local_rank: whether `--local_rank=N` stands before its arguments.
    """

    kind: str
    name: str
    arguments: tuple[str, ...]
    is_told_local_rank: bool = False

    def as_written(self) -> list[str]:
        """Return the words that mean it on the command line of `meshbolt launch`."""
        told = ["--pass-local-rank"] if self.is_told_local_rank else []
        return [*told, *(["-m"] if self.kind == "module" else []), self.name, *self.arguments]

    def as_started(self) -> list[str]:
        """Return the command that runs it as one rank, which records what it fails with, as torch's launcher takes it."""
        words = [sys.executable, str(_START), self.kind, self.name]
        told = ["--local_rank=${local_rank}"] if self.is_told_local_rank else []
        # That launcher replaces what a dollar stands before; these are the program's own.
        return [*words, *told, *(word.replace("$", "$$") for word in self.arguments)]

    def as_run(self, local_rank: int) -> list[str]:
        """Return the command that runs it in a process which is a rank already.

        Args:
            local_rank: of the process on its machine.
        """
        told = [f"--local_rank={local_rank}"] if self.is_told_local_rank else []
        if self.kind == "command":
            return [sys.executable, str(_START), self.kind, self.name, *self.arguments]
        return [sys.executable, *(["-m"] if self.kind == "module" else []), self.name, *told, *self.arguments]


def read_program(words: Sequence[str], *, is_module: bool, is_told_local_rank: bool = False) -> Program:
    """Return the program that is meant.

    Args:
        words: its name, and its arguments.
        is_module: whether `-m` stood before them.
        is_told_local_rank: whether the program is to be given its local rank.

    Raises:
        ConfigError: nothing is named, a script that is not there, or a command that takes no local rank.
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
        return Program("module", name, arguments, is_told_local_rank)
    if name in COMMANDS:
        if is_told_local_rank:
            raise ConfigError(
                f"--pass-local-rank is for scripts that read --local_rank; {name} has no such flag. Leave it out."
            )
        return Program("command", name, arguments)
    if not Path(name).is_file():
        known = "" if name.endswith(".py") else f" It is none of the commands {', '.join(COMMANDS)} either."
        raise ConfigError(f"There is no script {name!r} in {Path.cwd()}.{known} For a module write `-m {name}`.")
    return Program("script", name, arguments, is_told_local_rank)
