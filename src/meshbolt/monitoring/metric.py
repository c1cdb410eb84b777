"""What a metric is: a name that is logged, and what its numbers mean."""

from __future__ import annotations

import re
from dataclasses import dataclass

_NAME = re.compile(r"[a-z][a-z0-9_]*/[a-z][a-z0-9_]*")

# How a name must end, by the unit of its numbers. Units that are not here (a fraction, a rank, a text) end no name.
ENDINGS = {
    "bytes": "_bytes",
    "bytes/s": "_bytes_per_second",
    "samples/s": "samples_per_second",
    "tokens/s": "tokens_per_second",
    "seconds": "_seconds",
    "teraflop": "_teraflop",
    "TFLOP/s": "_teraflops_per_second",
}


@dataclass(frozen=True)
class Metric:
    """A name that is logged, and what its numbers mean.

    Attributes:
        name: "<kind>/<what>_<unit>".
        unit: of its numbers; see `ENDINGS` for how each ends a name.
        meaning: a sentence for people who see the name in a chart.
        formula: how it is computed, from what is measured.

    Raises:
        ValueError: the name is not made so.
    """

    name: str
    unit: str
    meaning: str
    formula: str

    def __post_init__(self) -> None:
        """Check the name."""
        if not _NAME.fullmatch(self.name):
            raise ValueError(f"{self.name!r} is no name of a metric: write '<kind>/<what>_<unit>' in small letters.")
        if not self.name.endswith(ENDINGS.get(self.unit, "")):
            raise ValueError(f"{self.name!r} is in {self.unit}: let the name end in {ENDINGS[self.unit]!r}.")

    @property
    def kind(self) -> str:
        """The part before the stroke: which monitor it comes from."""
        return self.name.partition("/")[0]
