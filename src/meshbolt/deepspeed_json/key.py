"""A key of DeepSpeed's JSON: the values it may have, and what becomes of it here."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

Outcome = Literal["honoured", "mapped", "ignored", "refused"]
HONOURED: Outcome = "honoured"
MAPPED: Outcome = "mapped"
IGNORED: Outcome = "ignored"
REFUSED: Outcome = "refused"
OUTCOMES: Mapping[Outcome, str] = {
    HONOURED: "done as DeepSpeed does it",
    MAPPED: "becomes a setting of meshbolt's or of the Trainer's that answers the same question",
    IGNORED: "changes nothing here, for the reason given",
    REFUSED: "an error, for the reason given",
}
AUTO = "auto"
_LARGEST = 9 * 10**18
DTYPES: Mapping[str, str] = {
    **dict.fromkeys(("fp32", "float32", "torch.float32", "float"), "float32"),
    **dict.fromkeys(("fp16", "float16", "torch.float16", "half"), "float16"),
    **dict.fromkeys(("bf16", "bfloat16", "torch.bfloat16"), "bfloat16"),
}
"""What a dtype is called in files, and what it is."""


@dataclass(frozen=True)
class Values:
    """The values that a key may have.

    Attributes:
        words: what they are, as in "needs ...".
        accepts: tells of a value.
        is_block: a value has keys of its own, each with its own row.
    """

    words: str
    accepts: Callable[[Any], bool]
    is_block: bool = False


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_whole(value: Any) -> bool:
    """Return whether a value is a whole number; files write 5e8 for sizes, which JSON reads as a float."""
    return _is_int(value) or (isinstance(value, float) and math.isfinite(value) and value.is_integer())


def _is_number(value: Any) -> bool:
    return (_is_int(value) and abs(value) <= _LARGEST) or (isinstance(value, float) and math.isfinite(value))


WHOLE = Values("a whole number", _is_whole)
SWITCH = Values("true or false", lambda value: isinstance(value, bool))
OPTIONAL_SWITCH = Values("true, false or null", lambda value: value is None or isinstance(value, bool))
COUNT = Values("a whole number of 1 or more, up to 9e18", lambda value: _is_int(value) and 1 <= value <= _LARGEST)
OPTIONAL_COUNT = Values(
    "a whole number of 1 or more, or null", lambda value: value is None or (_is_whole(value) and value >= 1)
)
SIZE = Values("a whole number of 0 or more", lambda value: _is_whole(value) and value >= 0)
NUMBER = Values("a number of 0 or more", lambda value: _is_number(value) and value >= 0)
POSITIVE = Values("a number above 0", lambda value: _is_number(value) and value > 0)
TEXT = Values("a string", lambda value: isinstance(value, str))
OPTIONAL_TEXT = Values("a string or null", lambda value: value is None or isinstance(value, str))
NOTHING = Values("null", lambda value: value is None)
ANYTHING = Values("any value", lambda value: True)
BLOCK = Values("an object", lambda value: isinstance(value, Mapping), is_block=True)
OBJECT = Values("an object", lambda value: isinstance(value, Mapping))
LIST = Values("a list", lambda value: isinstance(value, list))


def one_of(*values: Any) -> Values:
    """Return values of which a key has one; null where None is among them."""
    words = ", ".join("null" if value is None else str(value) for value in values)
    return Values(f"one of {words}", lambda value: any(type(each) is type(value) and each == value for each in values))


def whole_between(lowest: int, highest: int) -> Values:
    """Return whole numbers from one to another."""
    return Values(f"{lowest} to {highest}", lambda value: _is_int(value) and lowest <= value <= highest)


@dataclass(frozen=True, kw_only=True)
class Key:
    """A row of the table of keys.

    Attributes:
        path: dotted, from the top of the file.
        values: that it may have.
        outcome: what becomes of it.
        becomes: the setting of meshbolt's or of the Trainer's; empty where there is none.
        why: the reason, or what differs.
        off: for refused keys: tells of values that ask for nothing, which are ignored.
    """

    path: str
    values: Values
    outcome: Outcome
    becomes: str = ""
    why: str = ""
    off: Callable[[Any], bool] | None = None


def honoured(path: str, values: Values, becomes: str = "", why: str = "") -> Key:
    """Return the row of a key that is done as DeepSpeed does it."""
    return Key(path=path, values=values, outcome=HONOURED, becomes=becomes, why=why)


def mapped(path: str, values: Values, becomes: str, why: str = "") -> Key:
    """Return the row of a key that becomes a setting."""
    return Key(path=path, values=values, outcome=MAPPED, becomes=becomes, why=why)


def ignored(path: str, values: Values, why: str, becomes: str = "") -> Key:
    """Return the row of a key that changes nothing."""
    return Key(path=path, values=values, outcome=IGNORED, becomes=becomes, why=why)


def refused(path: str, values: Values, why: str, *, off: Callable[[Any], bool] | None = None) -> Key:
    """Return the row of a key that is an error unless it is off."""
    return Key(path=path, values=values, outcome=REFUSED, why=why, off=off or is_off)


def is_off(value: Any) -> bool:
    """Return whether a value asks for nothing: false, null, empty, or a block that is not enabled."""
    if isinstance(value, Mapping) and "enabled" in value:
        return value["enabled"] is False
    return value is None or value is False or value in ({}, [])


def is_disabled(value: Any) -> bool:
    """Return whether a block asks for nothing where it must say `"enabled": true` to ask."""
    return is_off(value) or (isinstance(value, Mapping) and not value.get("enabled", False))


def is_equal_to(*values: Any) -> Callable[[Any], bool]:
    """Return what tells of values that ask for nothing."""
    return lambda value: any(isinstance(each, bool) == isinstance(value, bool) and each == value for each in values)
