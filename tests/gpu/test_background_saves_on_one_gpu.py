"""State that is copied from a GPU to pinned memory and written from there is the state at the call."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from meshbolt.testing import needs

pytestmark = needs(gpus=1)
PROGRAM = Path(__file__).with_name("saving.py")
LIMIT_SECONDS = 150


def test_what_loads_is_the_state_at_the_call(tmp_path: Path) -> None:
    command = [sys.executable, str(PROGRAM), "gpu", "1", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_SECONDS, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("equal") == 1
