"""Read DeepSpeed's JSON: what is no JSON is refused with its line and column.

DeepSpeed reads files with a looser parser. What files in use take of that is taken here, too: comments, a comma before a closing
bracket, and none at the end of a line. What remains are quotes, which names and strings need here.
"""

from __future__ import annotations

import base64
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from meshbolt.errors import ConfigError

_TOKENS = re.compile(
    r"""(?P<string>"(?:\\.|[^"\\\n])*")|(?P<blank>\s+|//[^\n]*|\#[^\n]*|/\*.*?\*/)|[{}\[\]:,]|[^\s{}\[\]:,"#/]+|.""",
    re.DOTALL | re.VERBOSE,
)
_ENCODED = re.compile(r"[A-Za-z0-9_-]{4,}={0,2}")


def read(config: str | Path | Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """Return what a file says, and how to name it in messages.

    Args:
        config: path of a JSON file, or what such a file says: as a dictionary, or as DeepSpeed's launcher passes it on, in the
            letters of base64.

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
    if isinstance(config, str) and (text := _decoded(config)) is not None:
        return _parse(text, "The DeepSpeed configuration in base64"), "the DeepSpeed configuration in base64"
    try:
        text = Path(config).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise ConfigError(
            f"The DeepSpeed configuration {str(config)!r} cannot be read: {error}. Give the path of a JSON file."
        ) from error
    return _parse(text, str(config)), str(config)


def _decoded(config: str) -> str | None:
    """Return the JSON that letters of base64 stand for; None where they are a path."""
    try:
        if _ENCODED.fullmatch(config) is None or Path(config).exists():
            return None
        text = base64.urlsafe_b64decode(config).decode()
    except (OSError, ValueError):
        return None
    return text if text.lstrip().startswith("{") else None


def _parse(text: str, name: str) -> dict[str, Any]:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        if twice := sorted({key for key in keys if keys.count(key) > 1}):
            raise ConfigError(
                f"{name} gives {', '.join(map(repr, twice))} twice in one object, and only one of them can count. Remove the "
                "other."
            )
        return dict(pairs)

    def number(word: str) -> float:
        if math.isfinite(value := float(word)):
            return value
        raise ConfigError(f"{name} has the number {word}, which is not finite. Write another.")

    try:
        values = json.loads(_strict(text), object_pairs_hook=once, parse_constant=number, parse_float=number)
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


def _strict(text: str) -> str:
    """Return a text as JSON has it, with everything at the line and column where it was."""
    written: list[str] = []
    before = last = ""  # the two words that come before
    at, lines = 0, False
    for found in _TOKENS.finditer(text):
        word = found.group()
        if found["blank"] is not None:
            written.append("".join(letter if letter.isspace() else " " for letter in word))
            lines = lines or "\n" in word
            continue
        if word in "}]" and last == "," and before not in tuple("{[,:"):
            written[at] = " "
        elif lines and last not in tuple("{[,:") and last and word not in tuple("}],:"):
            written[at] += ","
        before, last = last, word
        at, lines = len(written), False
        written.append(word)
    return "".join(written)


def _shown(text: str, error: json.JSONDecodeError) -> str:
    if not text.strip():
        return " The file is empty."
    line = text.split("\n")[error.lineno - 1].strip()
    word = re.match(r"[A-Za-z']\w*", text[error.pos :])
    hint = ""
    if word is not None and error.msg.startswith(("Expecting property", "Expecting value")):
        is_python = word.group() in ("True", "False", "None")
        hint = " JSON writes true, false and null." if is_python else " Names and strings need double quotes."
    return f"{hint} The line is: {line[:80]}" if line else hint
