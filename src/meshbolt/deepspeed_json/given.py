"""The values of a file that is held against the table of keys, and what is said of each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from meshbolt.deepspeed_json.key import AUTO, IGNORED, MAPPED, REFUSED, Key, Outcome
from meshbolt.deepspeed_json.receipt import Receipt, Row
from meshbolt.deepspeed_json.table import KEYS, names_in
from meshbolt.errors import ConfigError, MeshboltError, UnsupportedError, did_you_mean

LISTED_APART = ("optimizer.params", "scheduler.params")
"""Objects of which each key has a row of its own, whatever its name."""


@dataclass
class Given:
    """The values of a file by dotted key, and notes about them.

    Attributes:
        source: how to name the file.
        values: by key, without those that are "auto".
        autos: keys that are "auto" and got no value.
        filled: keys that were "auto" and got a value from the caller.
        notes: what became of a key, where there is more to say than the table does.
        extra: rows of keys that the file does not have.
    """

    source: str
    values: dict[str, Any] = field(default_factory=dict)
    autos: list[str] = field(default_factory=list)
    filled: dict[str, Any] = field(default_factory=dict)
    notes: dict[str, tuple[Outcome, str, str]] = field(default_factory=dict)
    extra: list[Row] = field(default_factory=list)
    order: list[str] = field(default_factory=list)

    def get(self, key: str, default: Any = None) -> Any:
        """Return a value; the default where the file does not have it, or leaves it to others by "auto"."""
        return self.values.get(key, default)

    def params(self, block: str) -> dict[str, Any]:
        """Return the keys of an object that are listed apart, by name."""
        prefix = f"{block}."
        return {key.removeprefix(prefix): value for key, value in self.values.items() if key.startswith(prefix)}

    def is_auto(self, key: str) -> bool:
        """Return whether a key is "auto" and got no value."""
        return key in self.autos

    def note(
        self, key: str, becomes: str | None = None, *, why: str | None = None, outcome: Outcome | None = None
    ) -> None:
        """Say what became of a key, if the file has it; what is None is as the table says.

        Args:
            key: dotted.
            becomes: the setting, with its value.
            why: the reason.
            outcome: what it is called.
        """
        usual = KEYS.get(key)
        before = self.notes.get(key) or ((usual.outcome, usual.becomes, usual.why) if usual else (MAPPED, "", ""))
        self.notes[key] = (
            before[0] if outcome is None else outcome,
            before[1] if becomes is None else becomes,
            before[2] if why is None else why,
        )

    def add(self, key: str, *, becomes: str, why: str, outcome: Outcome = MAPPED) -> None:
        """Tell of a default of a key that the file does not have."""
        if key not in self.order:
            self.extra.append(Row(key=key, value=None, given=False, outcome=outcome, becomes=becomes, why=why))

    def receipt(self) -> Receipt:
        """Return what became of every key."""
        return Receipt(source=self.source, rows=(*(self._row(key) for key in self.order), *self.extra))

    def _row(self, key: str) -> Row:
        usual = KEYS.get(key)
        outcome, becomes, why = self.notes.get(key) or (
            (usual.outcome, usual.becomes, usual.why) if usual is not None else (MAPPED, "", "")
        )
        if outcome == REFUSED:
            outcome, why = IGNORED, f"asks for nothing; else refused: {why}" if why else "asks for nothing"
        value = self.values.get(key)
        if key in self.filled:
            value, why = AUTO, f"auto, filled in by the caller: {self.filled[key]!r}{'; ' if why else ''}{why}"
        if key in self.autos:
            value = AUTO
            if key not in self.notes:
                outcome, becomes, why = IGNORED, "", "auto: the default of meshbolt"
            elif AUTO not in why:
                why = f"auto: the default{'; ' if why else ''}{why}"
        return Row(key=key, value=value, outcome=outcome, becomes=becomes, why=why)


def check(values: Mapping[str, Any], *, source: str, auto: Mapping[str, Any]) -> Given:
    """Hold a file against the table of keys.

    Args:
        values: of the file.
        source: how to name it.
        auto: by dotted key, values for keys that are "auto".

    Raises:
        ConfigError: a key is unknown, or has a value that it cannot have.
        UnsupportedError: nothing is wrong but keys that are refused.
    """
    given = Given(source=source)
    problems: list[MeshboltError] = []
    remaining = dict(auto)
    for path, value in _walk(_modern(values), "", problems):
        _take(given, path, value, remaining, problems)
    for key in remaining:
        problems.append(
            ConfigError(
                f'auto={{{key!r}: ...}} has a value for a key that is not "auto" in the file{_nearest(key, given.autos)}.'
            )
        )
    if problems:
        raise_all(source, problems)
    return given


def raise_all(source: str, problems: list[MeshboltError]) -> None:
    """Raise one error that names all that is wrong with a file."""
    kind = UnsupportedError if all(isinstance(each, UnsupportedError) for each in problems) else ConfigError
    if len(problems) == 1:
        raise kind(f"{source}: {problems[0]}")
    raise kind(
        f"{source} has {len(problems)} keys that cannot be taken:\n" + "\n".join(f"- {each}" for each in problems)
    )


def _modern(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a file with the old and the long forms of keys as they are written now."""
    modern = dict(values)
    if isinstance(old := modern.get("zero_optimization"), bool):
        modern["zero_optimization"] = {"stage": int(old)}
    if "bfloat16" in modern and "bf16" not in modern:
        modern["bf16"] = modern.pop("bfloat16")
    layers = modern.get("tensor_parallel")
    if isinstance(layers, Mapping) and "tensor_parallel" in layers and "tp" not in layers:
        modern["tensor_parallel"] = {"tp" if key == "tensor_parallel" else key: each for key, each in layers.items()}
    return modern


def _walk(values: Mapping[str, Any], block: str, problems: list[MeshboltError]) -> Iterator[tuple[str, Any]]:
    """Yield every key below a block and its value, down to where a key has no keys of its own."""
    for name, value in values.items():
        path = f"{block}.{name}" if block else name
        key = KEYS.get(path)
        if key is None or ("." in name):
            where = f"{block!r} has no key {name!r}" if block else f"there is no key {name!r}"
            problems.append(ConfigError(f"{where}{_nearest(name, names_in(block))}."))
        elif value == AUTO or not key.values.accepts(value):
            yield path, value
        elif key.values.is_block and value:
            yield from _walk(value, path, problems)
        elif path in LISTED_APART and value:
            yield from ((f"{path}.{each}", item) for each, item in value.items())
        else:
            yield path, value


def _take(given: Given, path: str, value: Any, auto: dict[str, Any], problems: list[MeshboltError]) -> None:
    given.order.append(path)
    if value == AUTO:
        if path not in auto:
            given.autos.append(path)
            return
        value = given.filled[path] = auto.pop(path)
    key = KEYS.get(path)
    if key is not None:
        if not key.values.accepts(value):
            problems.append(ConfigError(f"{path!r} is {value!r}, and needs {key.values.words}."))
            return
        if key.outcome == REFUSED and not _is_off(key, value):
            problems.append(UnsupportedError(f"{path!r} is {value!r}, which is refused: {key.why}."))
            return
    given.values[path] = value


def _is_off(key: Key, value: Any) -> bool:
    return key.off is not None and key.off(value)


def _nearest(name: str, known: list[str]) -> str:
    close = did_you_mean(name, known)
    return close.partition("? known")[0] + "?)" if "did you mean" in close else ""
