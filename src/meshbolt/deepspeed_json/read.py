"""Read DeepSpeed's JSON: what is no JSON is refused with its line and column."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from meshbolt.errors import ConfigError


def read(config: str | Path | Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """Return what a file says, and how to name it in messages.

    Args:
        config: path of a JSON file, or what such a file says.

    Raises:
        ConfigError: the file cannot be read, is no JSON, or gives a key twice.
    """
    if isinstance(config, Mapping):
        # Through JSON and back: what a file could not say is refused here, and nothing is shared with the caller.
        try:
            return _parse(
                json.dumps(config, allow_nan=False), "The DeepSpeed configuration"
            ), "the DeepSpeed configuration"
        except (TypeError, ValueError, RecursionError) as error:
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(
                f"The DeepSpeed configuration holds what JSON cannot: {error}. Use numbers, strings, lists and dictionaries."
            ) from error
    if not isinstance(config, (str, Path)) or not str(config):
        raise ConfigError(f"config={config!r} is neither the path of a DeepSpeed JSON file nor a dictionary.")
    try:
        text = Path(config).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise ConfigError(
            f"The DeepSpeed configuration {str(config)!r} cannot be read: {error}. Give the path of a JSON file."
        ) from error
    return _parse(text, str(config)), str(config)


def _parse(text: str, name: str) -> dict[str, Any]:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        if twice := sorted({key for key in keys if keys.count(key) > 1}):
            raise ConfigError(
                f"{name} gives {', '.join(map(repr, twice))} twice in one object, and only one of them can count. Remove the "
                "other."
            )
        return dict(pairs)

    def number(word: str) -> Any:
        raise ConfigError(f"{name} has the number {word}, which JSON does not know. Write a finite number.")

    try:
        values = json.loads(text, object_pairs_hook=once, parse_constant=number)
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"{name} is not valid JSON at line {error.lineno}, column {error.colno}: {error.msg}.{_shown(text, error)}"
        ) from error
    except (RecursionError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{name} is not valid JSON: {error}. Correct it there.") from error
    if not isinstance(values, dict):
        raise ConfigError(
            f'{name} holds {type(values).__name__} at its top; it needs an object: {{"zero_optimization": ...}}.'
        )
    return values


def _shown(text: str, error: json.JSONDecodeError) -> str:
    line = text.split("\n")[error.lineno - 1].strip() if text.strip() else ""
    hint = " JSON has no comments." if line.startswith(("//", "#", "/*")) else ""
    return f"{hint} The line is: {line[:80]}" if line else " The file is empty." if not text.strip() else hint
