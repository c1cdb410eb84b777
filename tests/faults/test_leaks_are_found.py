"""The suite's own guard: a test that leaves something behind in its process fails, and its neighbours do not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

# Of the tests' own tools: `make test` stands on them in every test.
pytestmark = pytest.mark.full

CONFTEST = Path(__file__).parents[1] / "conftest.py"

LEAKY = """
import multiprocessing, os, threading, time
import torch.distributed as dist

def test_clean(monkeypatch):
    monkeypatch.setenv("SET_AND_UNDONE", "1")
    thread = threading.Thread(target=time.sleep, args=(0.1,))
    thread.start()

def test_variable():
    os.environ["LEFT_SET"] = "1"

def test_the_next_one_starts_clean():
    assert "LEFT_SET" not in os.environ

def test_thread():
    threading.Thread(target=time.sleep, args=(20,), name="left_running", daemon=True).start()

def test_group(tmp_path):
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)

def test_process():
    multiprocessing.get_context("spawn").Process(target=time.sleep, args=(20,), daemon=True).start()
"""


def test_each_kind_of_leak_fails_the_test_that_made_it(tmp_path: Path):
    (tmp_path / "conftest.py").write_text(CONFTEST.read_text())
    (tmp_path / "test_leaky.py").write_text(LEAKY)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-rA", "--rootdir", str(tmp_path), "."]
    environment = {**os.environ, "PYTHONPATH": str(CONFTEST.parents[1])}  # the suite's own modules, which it imports
    ran = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=120
    )
    errors = [line.split(" - ")[0].rpartition("::")[2] for line in ran.stdout.splitlines() if line.startswith("ERROR ")]
    assert errors == ["test_variable", "test_thread", "test_group", "test_process"], ran.stdout
    for leak in ("environment variable LEFT_SET", "thread left_running", "an initialised process group", "process "):
        assert f"the test left behind: {leak}" in ran.stdout
    assert "6 passed" in ran.stdout
