"""What can be imported, and what torch finds: asked in a process of its own, which may crash or hang."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from meshbolt.cli.doctor.processes import ended_how

_SCRIPT = Path(__file__).with_name("probe.py")
_LIMIT_SECONDS = 90.0
_TAIL_CHARACTERS = 600


@dataclass
class Probe:
    """What came of it.

    Attributes:
        seconds: of each import that succeeded.
        files: where each was found.
        failures: why the others failed.
        torch: what torch says of itself; empty where it cannot be imported.
        driver: of the GPUs.
    """

    seconds: dict[str, float] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    torch: Mapping[str, Any] = field(default_factory=dict)
    driver: Mapping[str, Any] = field(default_factory=dict)


def ask(names: Sequence[str], *, limit_seconds: float = _LIMIT_SECONDS) -> Probe:
    """Import modules in a process of its own, and ask torch.

    Args:
        names: of the modules, in their order.
        limit_seconds: for all of it; what is under way then is said to hang.
    """
    process = subprocess.Popen(
        [sys.executable, str(_SCRIPT), *names], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    how = ""
    try:
        out, err = process.communicate(timeout=limit_seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
        how = f"did not end within {limit_seconds:g} s"
    if not how and process.returncode:
        how = f"{ended_how(process.returncode)}; its last words: {err.strip()[-_TAIL_CHARACTERS:]}"
    return read(out.splitlines(), how)


def read(lines: Iterable[str], how: str) -> Probe:
    """Return what a probe has said.

    Args:
        lines: of its output.
        how: it ended too early; empty if it did not.
    """
    probe, begun, is_whole = Probe(), "python", False
    for line in lines:
        try:
            facts = json.loads(line)
        except json.JSONDecodeError:  # cut off where it crashed
            break
        what = facts.pop("what")
        if what == "begin":
            begun = facts["name"]
        elif what == "failed":
            probe.failures[facts["name"]] = facts["error"]
        elif what == "imported":
            probe.seconds[facts["name"]], probe.files[facts["name"]] = facts["seconds"], str(facts["file"])
        elif what == "driver":
            probe.driver = facts
        elif what == "torch":
            probe.torch = facts
        is_whole = is_whole or what == "end"
    if not is_whole:
        probe.failures[begun] = f"the process {how or 'ended'}"
    return probe
