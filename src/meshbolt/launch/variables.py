"""Which environment variables other hosts are given: by the beginnings of their names, by name, and from a file."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from meshbolt.errors import ConfigError

FILE_NAME = ".meshbolt_env"
DEEPSPEED_FILE_NAME = ".deepspeed_env"
BEGINNINGS = (
    *("NCCL", "PYTHON", "MESHBOLT", "GLOO", "TORCH", "OMP_", "MKL_", "UCX_", "MLFLOW_"),
    # Non-interactive shells of other hosts know neither; compilers and tools of the environment are found by them.
    *("PATH", "LD_LIBRARY_PATH"),
)
# Of this process alone, which was perhaps started by torchrun or a test.
_NOT = ("TORCHELASTIC", "PYTHONSTARTUP", "PYTHONINSPECT")
_NAME = re.compile(r"[A-Za-z_]\w*")


def forwarded(environment: Mapping[str, str], *, asked: Iterable[str], file: Path | None) -> dict[str, str]:
    """Return the variables for other hosts: those of here by name, then those of a file, then those that were asked for.

    Args:
        environment: of this process.
        asked: `NAME=VALUE`, or `NAME` for the value of here.
        file: with lines `NAME=VALUE`; None for none.

    Raises:
        ConfigError: a line or a name cannot be one, or a variable is not set.
    """
    found = {
        name: value
        for name, value in environment.items()
        if name.startswith(BEGINNINGS) and not name.startswith(_NOT) and _NAME.fullmatch(name)
    }
    if file is not None:
        found |= read_variables(read_text(file), origin=str(file))
    for words in asked:
        name, equals, value = words.partition("=")
        _check(name, where=f"--env {words!r}")
        if not equals and name not in environment:
            raise ConfigError(f"--env {name}: the variable is not set here. Set it, or give --env {name}=VALUE.")
        found[name] = value if equals else environment[name]
    return found


def read_text(file: Path, *, asked: str = "") -> str:
    """Return what stands in a file.

    Args:
        file: its path.
        asked: the flag that names it, for messages.

    Raises:
        ConfigError: it cannot be read, or is no text.
    """
    try:
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{asked}{file} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{asked}{file} is no text: {error}. Save it as UTF-8.") from error


def read_variables(text: str, *, origin: str) -> dict[str, str]:
    """Return the variables of a file: `NAME=VALUE` in each line, values as they stand but for quotes around; `#` for comments.

    Args:
        text: the content.
        origin: its path, for messages.

    Raises:
        ConfigError: a line says something else; with its number.
    """
    found: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        words = line.strip().removeprefix("export ").strip()
        if not words or words.startswith("#"):
            continue
        name, equals, value = words.partition("=")
        where = f"{origin}, line {number}"
        if not equals:
            raise ConfigError(f"{where}: {words!r} is not NAME=VALUE. Write one variable in each line.")
        _check(name, where=where)
        is_quoted = len(value) > 1 and value[0] == value[-1] and value[0] in "'\""
        found[name] = value[1:-1] if is_quoted else value
    return found


def find_file(*folders: Path) -> Path | None:
    """Return the file with variables in the first folder that has one, else that of DeepSpeed's; None: no folder has."""
    places = [folder / name for name in (FILE_NAME, DEEPSPEED_FILE_NAME) for folder in folders]
    return next((place for place in places if place.is_file()), None)


def _check(name: str, *, where: str) -> None:
    if not _NAME.fullmatch(name):
        raise ConfigError(f"{where}: {name!r} is no name of a variable. Use letters, digits and underscores.")
