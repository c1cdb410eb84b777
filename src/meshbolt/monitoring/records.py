"""Records of a run on a disk: one file a rank, one line a record, each a JSON object.

A line is written whole or, where the process dies in it, torn: whoever reads ignores what is no JSON, so that a crash at any
moment loses at most the record that was being written. Files are only ever appended to; a run that goes on in the same directory
writes behind the one before, and lines say which run they are from.
"""

from __future__ import annotations

import contextlib
import heapq
import json
import math
import os
import threading
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from meshbolt.errors import ConfigError

Value = float | int | str | None
Record = dict[str, Any]

# Where records lie in the directory of a run, if nothing else is asked for.
DIRECTORY = "meshbolt_records"
_NAME = "rank_{rank}.jsonl"


class Records:
    """The file of one rank.

    Each line is {"kind", "step", "time_seconds" (since 1970), "rank", "run", "values": {name: number, text or null}} and what
    else its kind has. Numbers that JSON does not know are written as text: "nan", "inf", "-inf".

    Args:
        directory: is made where it is not there.
        rank: of this process; its file is `rank_<rank>.jsonl`.
        run: which run the lines are from; the same text on all ranks.

    Raises:
        ConfigError: the directory or the file cannot be written.
    """

    def __init__(self, directory: str | Path, rank: int, *, run: str = "") -> None:
        if "://" in str(directory):
            raise ConfigError(
                f"Records are appended line by line, which {str(directory)!r} does not offer. Give a directory of this "
                "machine: directory='...'."
            )
        self.directory, self.rank, self.run = Path(directory), rank, run
        self.path = self.directory / _NAME.format(rank=rank)
        self._lock = threading.Lock()
        self._file: int | None = self._open()

    def write(self, kind: str, *, step: int, values: Mapping[str, Value], **further: Any) -> None:
        """Append a record; it is with the operating system when this returns.

        A disk that has become full loses records, not the training: that is said once, and nothing is written from then on.

        Args:
            kind: which monitor it comes from, or what has happened.
            step: how many updates of parameters there were, each optimizer's counted.
            values: metrics by name.
            further: what else belongs to the record; anything that JSON knows.

        Raises:
            TypeError: a value is something else.
        """
        head = {"kind": kind, "step": step, "time_seconds": time.time(), "rank": self.rank, "run": self.run}
        line = json.dumps({**head, "values": _plain(values), **_plain(further)}, allow_nan=False) + "\n"
        with self._lock:
            if self._file is not None:
                self._append(line.encode())

    def close(self) -> None:
        """Close the file; what is written later is lost. Nothing is left of records to which nobody has written."""
        with self._lock:
            if self._file is not None:
                is_empty = os.fstat(self._file).st_size == 0
                os.close(self._file)
                if is_empty:
                    self._remove()
            self._file = None

    def __del__(self) -> None:
        """Close the file of a run that ended by an error."""
        if getattr(self, "_file", None) is not None:
            self.close()

    def _open(self) -> int:
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            file = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
            end = os.fstat(file).st_size
            if end and os.pread(file, 1, end - 1) != b"\n":
                os.write(file, b"\n")  # an earlier run died in a line, which must not swallow the first of this one
        except OSError as error:
            raise ConfigError(
                f"Records cannot be written to {self.path}: {error.strerror}. Give a directory that rank {self.rank} may "
                "write to: directory='...'."
            ) from error
        return file

    def _remove(self) -> None:
        with contextlib.suppress(OSError):  # somebody was faster, or other ranks have files there
            self.path.unlink()
            if self.directory.name == DIRECTORY:
                self.directory.rmdir()

    def _append(self, line: bytes) -> None:
        try:
            while line:
                line = line[os.write(self._file, line) :]  # type: ignore[arg-type]
        except OSError as error:
            os.close(self._file)  # type: ignore[arg-type]
            self._file = None
            warnings.warn(
                f"Records can no longer be written to {self.path}: {error.strerror}. Training goes on; what is measured from "
                "now on is missing there.",
                stacklevel=4,
            )


def read_records(directory: str | Path) -> Iterator[Record]:
    """Yield the records of all ranks in the order of their time; torn lines are left out.

    Args:
        directory: with files `rank_<rank>.jsonl`.

    Raises:
        ConfigError: there are none.
    """
    paths = sorted(Path(directory).glob(_NAME.format(rank="*")))
    if not paths:
        raise ConfigError(
            f"There are no records in {str(directory)!r}: files are called {_NAME.format(rank='<rank>')}."
        )
    # Each file is in the order of its time, so that none needs to be held whole.
    yield from heapq.merge(*map(_records_in, paths), key=lambda record: record["time_seconds"])


def latest_run(records: Iterable[Record]) -> list[Record]:
    """Return the records of the run that was begun last, of several in one directory.

    Args:
        records: in the order of their time.
    """
    kept = list(records)
    begun: dict[str, float] = {}
    for record in kept:
        begun.setdefault(record.get("run", ""), record["time_seconds"])
    last = max(begun, key=lambda run: begun[run], default="")
    return [record for record in kept if record.get("run", "") == last]


def _records_in(path: Path) -> Iterator[Record]:
    with path.open("rb") as file:
        yield from (record for record in map(_parsed, file) if record is not None)


def _parsed(line: bytes) -> Record | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and {"kind", "time_seconds", "values"} <= record.keys() else None


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _plain(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
