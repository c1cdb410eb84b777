"""What is committed works on any machine: no path of one of them, no large file."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MAX_FILE_BYTES = 1_000_000
# A folder at the root of a file system, not a part of an address or of a longer path.
MACHINE_PATH = re.compile(r"(?<![\w.~/$)}\]*-])/(?:home|mnt|opt|root|tmp|Users|work)/")


@pytest.fixture(scope="module")
def committed_files() -> list[Path]:
    """Every file that is tracked or about to be."""
    if not shutil.which("git") or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    return [path for path in (ROOT / name for name in listed if name) if path.is_file()]


def test_no_committed_file_names_a_folder_of_one_machine(committed_files: list[Path]) -> None:
    hits = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in committed_files
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1)
        if MACHINE_PATH.search(line)
    ]
    assert not hits, "\n".join(hits)


def test_no_committed_file_is_large(committed_files: list[Path]) -> None:
    large = [str(path.relative_to(ROOT)) for path in committed_files if path.stat().st_size > MAX_FILE_BYTES]
    assert not large
