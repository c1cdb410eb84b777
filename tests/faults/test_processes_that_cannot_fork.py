"""A process whose fork would hang is refused with what to do; a pool of threads that survives forks is not."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

BUSY = """
import torch
torch.set_num_threads(4)
torch.rand(1 << 20).sin()
from meshbolt.testing import run_ranks
run_ranks(int, 2)
"""

NUMPY = """
import numpy
numpy.ones((512, 512)) @ numpy.ones((512, 512))
from meshbolt.testing import run_ranks
print(run_ranks(int, 2))
"""

# Of the tests' own tools: `make test` stands on them in every test.
pytestmark = pytest.mark.full


def run(script: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", "-c", script]
    kept = {name: value for name, value in os.environ.items() if not name.endswith("_NUM_THREADS")}
    return subprocess.run(command, env=kept | variables, capture_output=True, text=True, check=False, timeout=120)


def test_threads_left_by_torch_are_refused_with_the_remedy():
    ran = run(BUSY)
    assert re.search(r"UnsupportedError: run_ranks forks this process, but \d+ native threads run in it", ran.stderr)
    assert "OMP_NUM_THREADS=1" in ran.stderr
    assert "meshbolt.testing.warm()" in ran.stderr


def test_threads_that_end_themselves_at_a_fork_are_no_obstacle():
    ran = run(NUMPY, OPENBLAS_NUM_THREADS="4")
    assert ran.stdout.endswith("[0, 0]\n"), ran.stderr
