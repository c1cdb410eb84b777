"""Run rows of the matrix, several on the same ranks, and keep what they leave for the tests to compare."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Sequence

from tests.parity.matrix import Row

from meshbolt.testing import ParityReport, RankFailure
from meshbolt.testing.parity.assertion import check, meshed_records, reference_records
from meshbolt.testing.parity.record import Record

# Every row makes process groups of its own, so that a world does not live for long.
ROWS_PER_WORLD = 8
TIMEOUT_SECONDS = 100


class Worlds:
    """The results of rows, computed when the first row of a world is asked for."""

    def __init__(self, rows: Iterable[Row]) -> None:
        """Divide rows into worlds.

        Args:
            rows: all that may be asked for, in the order in which they will be.
        """
        self._world_of: dict[Row, Sequence[Row]] = {}
        for _, alike in itertools.groupby(sorted(dict.fromkeys(rows), key=_ranks), key=_ranks):
            group = list(alike)
            for start in range(0, len(group), ROWS_PER_WORLD):
                world = group[start : start + ROWS_PER_WORLD]
                self._world_of.update(dict.fromkeys(world, world))
        self._records: dict[Row, Record] = {}
        self._references: dict[Row, Record] = {}

    def compare(self, row: Row) -> ParityReport:
        """Return the comparison of a row.

        Raises:
            ParityError: it does not train as one process does.
            RankFailure: it does not train at all.
        """
        record = self.record(row)
        self._require_references(self._world_of[row])
        return check(row.case(), record, self._references[row.reference()])

    def record(self, row: Row) -> Record:
        """Return what the ranks saw."""
        world = self._world_of[row]
        if row not in self._records and world[0] not in self._records:
            # Where one row brings its world down, each runs by itself.
            with contextlib.suppress(RankFailure):
                self._run(world)
        if row not in self._records:
            self._run([row])
        return self._records[row]

    def _run(self, rows: Sequence[Row]) -> None:
        records = meshed_records([row.case() for row in rows], timeout=TIMEOUT_SECONDS)
        self._records.update(zip(rows, records, strict=True))

    def _require_references(self, world: Sequence[Row]) -> None:
        wanted = dict.fromkeys(row.reference() for row in world if row in self._records)
        missing = [row for row in wanted if row not in self._references]
        if not missing:
            return
        cases = [(row.case(), row.zero()) for row in missing]
        self._references.update(zip(missing, reference_records(cases, timeout=TIMEOUT_SECONDS), strict=True))


def _ranks(row: Row) -> int:
    return row.ranks
