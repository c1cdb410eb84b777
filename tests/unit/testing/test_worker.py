"""The parts of a rank that need no process: its variables and what is left of its stacks."""

from __future__ import annotations

from pathlib import Path

import pytest

from meshbolt.testing import worker


def make_rank(*, forked: bool) -> worker.Rank:
    return worker.Rank(
        rank=1,
        world=4,
        folder=Path("folder"),
        port=1234,
        timeout_seconds=1.0,
        limit_seconds=2.0,
        forked=forked,
        filters=[],
    )


def test_a_rank_has_the_variables_of_torchrun():
    variables = worker.environment(make_rank(forked=True))
    assert {variables[name] for name in ("RANK", "LOCAL_RANK")} == {"1"}
    assert {variables[name] for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE")} == {"4"}
    assert (variables["MASTER_ADDR"], variables["MASTER_PORT"], variables["GROUP_RANK"]) == ("127.0.0.1", "1234", "0")
    assert "TORCHELASTIC_RUN_ID" in variables


@pytest.mark.parametrize("forked", [True, False])
def test_only_a_forked_rank_is_kept_from_the_gpus(forked: bool):
    assert ("CUDA_VISIBLE_DEVICES" in worker.environment(make_rank(forked=forked))) == forked


def test_stacks_end_where_the_harness_begins():
    frame = '  File "{}", line 1 in {}'
    text = "\n".join(
        [
            "Thread 1 (most recent call first):",
            frame.format("/lib/threading.py", "wait"),
            "",
            "Current thread 2 (most recent call first):",
            frame.format("/tests/test_it.py", "hang"),
            frame.format(worker.__file__, "_report"),
            frame.format("/lib/pytest.py", "main"),
            "",
            "Extension modules: torch._C (total: 1)",
        ]
    )
    kept = worker.without_harness(text)
    assert kept.splitlines()[-1] == frame.format("/tests/test_it.py", "hang")
    assert "threading.py" in kept
