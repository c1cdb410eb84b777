from __future__ import annotations

from meshbolt.monitoring import CATALOGUE
from meshbolt.monitoring.communication import Table, of_steps, waited


def test_rows_add_up_calls_bytes_and_waits_and_begin_anew() -> None:
    table = Table(ceilings={("tp", "all_reduce"): 1e9})
    for _ in range(2):
        row = table.started("tp", "all_reduce", 1000, is_timed=True)
        waited(row, begun_seconds=1.0, wait_seconds=1.5, ended_seconds=2.0)
    table.started("pp", "send", 300, is_timed=True)
    rows = table.take()

    assert list(table.written(rows)) == [
        {
            "axis": "tp",
            "collective": "all_reduce",
            "calls": 2,
            "bytes": 2000,
            "seconds": 2.0,
            "exposed_seconds": 1.0,
            "bytes_per_second": 1000.0,
            "ceiling_bytes_per_second": 1e9,
        },
        {
            "axis": "pp",
            "collective": "send",
            "calls": 1,
            "bytes": 300,
            "seconds": 0.0,
            "exposed_seconds": 0.0,
            "bytes_per_second": None,
            "ceiling_bytes_per_second": None,
        },
    ]
    assert of_steps(rows, steps=2) == {
        "communication/step_bytes": 1150.0,
        "communication/step_calls": 1.5,
        "communication/tp_bytes": 1000.0,
        "communication/tp_exposed_seconds": 0.5,
        "communication/pp_bytes": 150.0,
        "communication/pp_exposed_seconds": 0.0,
    }
    assert of_steps(rows, steps=2).keys() <= CATALOGUE.keys()
    assert table.take() == {}


def test_times_that_nobody_can_tell_are_not_known() -> None:
    table = Table()
    row = table.started("tp", "all_reduce", 8, is_timed=True)
    table.started("tp", "all_reduce", 8, is_timed=False)
    waited(row, begun_seconds=0.0, wait_seconds=0.0, ended_seconds=1.0)
    (written,) = table.written(table.rows)
    assert (written["calls"], written["bytes"]) == (2, 16)
    assert (written["seconds"], written["exposed_seconds"], written["bytes_per_second"]) == (None, None, None)
    assert of_steps(table.rows, steps=1)["communication/tp_exposed_seconds"] is None
