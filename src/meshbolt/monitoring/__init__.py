"""What is measured of a run, and how it is written down: names, units and formulas; arithmetic; records on a disk.

May import: `errors`, `units`, `environment`, `compat`, `mesh`, `blocks`. It knows no training loop: callbacks measure, and hand
over numbers. `metric.py` says what a metric is, and `catalogue.py` lists them all; each kind has a file of its own with its
tuple `METRICS` and its arithmetic, as `throughput.py`; `records.py` writes and reads files. `heartbeats.py` finds ranks that do
not get on, with `stacks.py`, `verdict.py` and `interrupt.py`. To add a kind, write `<kind>.py` with its `METRICS` and add that
to `catalogue.py`. Read `catalogue.py` first.
"""

from meshbolt.monitoring.catalogue import CATALOGUE, find_metric
from meshbolt.monitoring.metric import Metric
from meshbolt.monitoring.records import Record, Records, Value, latest_run, read_records

__all__ = ["CATALOGUE", "Metric", "Record", "Records", "Value", "find_metric", "latest_run", "read_records"]
