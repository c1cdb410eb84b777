"""A report of a run: one HTML file that needs no network, made from records alone.

May import: the rest of `monitoring`, and what it may. `runs.py` finds the runs in a directory and which records count;
`gather.py` goes through them once and keeps what is shown, with `envelope.py` for curves of any length; `charts.py` and
`tables.py` draw; `sections.py` lays out what belongs together; `page.py` puts them into a page with `page.css` and `page.js`.
Read `page.py` first.
"""

from meshbolt.monitoring.report.page import write_report
from meshbolt.monitoring.report.runs import Attempt, Run, find_runs
from meshbolt.monitoring.report.summary import summary_of

__all__ = ["Attempt", "Run", "find_runs", "summary_of", "write_report"]
