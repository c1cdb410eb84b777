"""Callbacks for Lightning's Trainer, one class a file.

May import: `plugins` and below, and Lightning; strategies are reached through the Trainer only. `ema.py` averages the
weights; `pipeline_timeline.py` draws a step of a pipeline; `progress.py` and `closing_table.py` tell how a fit goes and how it
went, with the arithmetic and the printing in files of their own. `monitoring.py` is the base of monitors, which measure, and
`together.py` and `summing.py` are what those of a fit share: `throughput.py` with `clock.py`, `fetching.py` and `look.py`;
`report.py` puts a run into a file, with `origins.py`, `surroundings.py` and `warned.py`. `watchdog.py` ends runs that are stuck.
To add a callback, add a file with its class, export it here, and give it a page in the docs. Read `ema.py` first.
"""

from meshbolt.callbacks.closing_table import ClosingTable
from meshbolt.callbacks.communication import CommunicationMonitor
from meshbolt.callbacks.ema import ExponentialMovingAverage
from meshbolt.callbacks.memory import MemoryMonitor
from meshbolt.callbacks.offload import OffloadMonitor
from meshbolt.callbacks.pipeline_timeline import PipelineTimeline
from meshbolt.callbacks.progress import LogProgress
from meshbolt.callbacks.ranks import RankMonitor
from meshbolt.callbacks.report import RunReport
from meshbolt.callbacks.throughput import ThroughputMonitor
from meshbolt.callbacks.watchdog import Watchdog

__all__ = [
    "ClosingTable",
    "CommunicationMonitor",
    "ExponentialMovingAverage",
    "LogProgress",
    "MemoryMonitor",
    "OffloadMonitor",
    "PipelineTimeline",
    "RankMonitor",
    "RunReport",
    "ThroughputMonitor",
    "Watchdog",
]
