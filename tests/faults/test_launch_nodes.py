"""`meshbolt launch` called once on each of two nodes, as by hand or by SLURM, both on this machine; with real ranks."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

FOLDER = Path(__file__).parent
TIMEOUT_SECONDS = 240
pytestmark = [pytest.mark.full, pytest.mark.timeout(2 * TIMEOUT_SECONDS)]

# Rank 1 of the first start fails; on the next, rank 0 comes late, so that the others look for it before it is there.
FAILS_ONCE = """
import datetime, os, sys, time
import torch, torch.distributed as dist
again, rank = os.environ["TORCHELASTIC_RESTART_COUNT"] != "0", os.environ["RANK"]
if again and rank == "0":
    time.sleep(3)
dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=30))
total = torch.ones(())
dist.all_reduce(total)
print("all", int(total), "again" if again else "first", flush=True)
if not again:
    if rank == "1":
        sys.exit(3)
    time.sleep(60)
dist.barrier()
"""


# Hosts that are this machine, and are away where a file says so.
SSH = """#!/bin/sh
while [ "$1" = -o ]; do shift 2; done
[ "$1" = -G ] && exit 1
[ -e "$1.away" ] && { echo "ssh: connect to host $1: No route to host" >&2; exit 255; }
exec sh -c "$2"
"""
COMES_BACK = """
import os, sys, time
from pathlib import Path
start, rank = os.environ["MESHBOLT_RESTARTS"], os.environ["RANK"]
print("start", start, "of", os.environ["WORLD_SIZE"], flush=True)
away = Path("two.away")
if start == "0" and rank == "1":
    away.touch()
    sys.exit(3)
if start == "1":
    away.unlink()
    sys.exit(4)
time.sleep(30 if start == "0" else 0)
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return int(probe.getsockname()[1])


@contextmanager
def launched(folder: Path, *arguments: str, **variables: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-m", "meshbolt", "launch", *arguments],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONWARNINGS": "ignore", **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def output_of(process: subprocess.Popen[str]) -> tuple[int, str]:
    output, _ = process.communicate(timeout=TIMEOUT_SECONDS)
    return process.returncode, output


def steps(folder: Path) -> list[tuple[int, int]]:
    """Return world size and step of each loss that was written."""
    file = folder / "losses.txt"
    lines = file.read_text().splitlines() if file.exists() else []
    return [(int(world), int(step)) for world, step, _ in map(str.split, lines)]


def node(rank: int, port: int, *more: str) -> tuple[str, ...]:
    where = ("--no-ssh", "--nnodes", "2", "--node-rank", str(rank), "--master-addr", "localhost")
    return (*where, "--master-port", str(port), *more)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    shutil.copy(FOLDER / "launched.py", tmp_path / "train.py")
    shutil.copy(FOLDER / "launched_kinds.py", tmp_path / "kinds.py")
    (tmp_path / "fails_once.py").write_text(FAILS_ONCE)
    return tmp_path


def test_ranks_that_start_again_meet_no_trace_of_those_before(folder: Path) -> None:
    with launched(folder, "--nproc-per-node", "2", "--max-restarts", "1", "fails_once.py") as process:
        code, output = output_of(process)

    assert code == 0, output
    assert output.count("all 2 again") == 2


def test_nodes_without_ssh_start_again_and_go_on_from_the_newest_checkpoint(folder: Path) -> None:
    port, words = free_port(), ("--nproc-per-node", "1", "--max-restarts", "1", "train.py", "--fail")
    stale = folder / f".meshbolt_saves_localhost_{port}.jsonl"
    stale.write_text(json.dumps({"fit": 1, "path": str(folder / "train.py")}) + "\n")  # of a run that was killed

    with launched(folder, *node(0, port, *words)) as first, launched(folder, *node(1, port, *words)) as second:
        ends = [output_of(first), output_of(second)]

    assert [code for code, _ in ends] == [0, 0], ends
    assert any("going on from" in output for _, output in ends)
    assert steps(folder) == [(2, step) for step in (1, 2, 3, 4, 4, 5, 6, 7, 8)]
    assert not stale.exists()


def test_a_node_that_does_not_come_back_is_done_without(folder: Path) -> None:
    port, words = (
        free_port(),
        ("--nproc-per-node", "1", "--max-restarts", "1", "--min-nodes", "1", "train.py", "--slow=8"),
    )

    with launched(folder, *node(0, port, *words)) as first, launched(folder, *node(1, port, *words)) as second:
        until = time.monotonic() + TIMEOUT_SECONDS
        while (2, 5) not in steps(folder) and time.monotonic() < until:
            time.sleep(0.1)
        second.kill()  # its ranks die with it
        code, output = output_of(first)

    assert code == 0, output
    assert "going on from" in output
    assert steps(folder)[5:] == [(1, 5), (1, 6), (1, 7), (1, 8)]


def test_a_host_that_is_back_by_the_next_restart_takes_part_again(folder: Path) -> None:
    (folder / "ssh").write_text(SSH)
    (folder / "ssh").chmod(0o755)
    (folder / "hosts").write_text("one slots=1\ntwo slots=1\n")
    (folder / "job.py").write_text(COMES_BACK)
    through = ("--hostfile", "hosts", "--ssh", "./ssh", "--master-addr", "localhost", "--master-port", str(free_port()))

    with launched(folder, *through, "--max-restarts", "2", "--min-nodes", "1", "job.py") as process:
        code, output = output_of(process)

    assert code == 0, output
    assert sorted(re.findall(r"\] (start \d of \d)", output)) == [
        *["start 0 of 2"] * 2,
        "start 1 of 1",
        *["start 2 of 2"] * 2,
    ]
    assert "going on without two" in output


def test_a_node_that_comes_alone_says_where_it_has_waited(folder: Path) -> None:
    port = free_port()

    with launched(folder, *node(1, port, "--meet", "3", "kinds.py", "torch")) as process:
        code, output = output_of(process)

    assert code == 2, output
    assert f"Node 1 has not met the 2 nodes of this run at localhost:{port} within 3 seconds" in output
    assert "Traceback" not in output


def test_a_node_that_waits_for_restarts_says_where_as_well(folder: Path) -> None:
    port = free_port()

    with launched(folder, *node(0, port, "--meet", "3", "--max-restarts", "1", "kinds.py", "torch")) as process:
        code, output = output_of(process)

    assert code == 2, output
    assert f"Node 0 has not met the 2 nodes of this run at localhost:{port} within 3 seconds" in output
    assert "Traceback" not in output


def test_a_port_that_is_taken_is_named(folder: Path) -> None:
    with socket.create_server(("localhost", 0)) as taken:
        port = taken.getsockname()[1]
        with launched(folder, *node(0, port, "--meet", "5", "kinds.py", "torch")) as process:
            code, output = output_of(process)

    assert code == 2, output
    assert f"--master-port {port} is taken" in output
    assert "Traceback" not in output


def in_slurm(node_rank: int, **more: str) -> dict[str, str]:
    step = {"SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NODELIST": "localhost,other", "SLURM_NODEID": str(node_rank)}
    return {"SLURM_JOB_ID": "7", **step, **more}


def rows(output: str) -> list[dict[str, Any]]:
    lines = [line.partition("] ")[2] if line.startswith("[rank ") else line for line in output.splitlines()]
    return [json.loads(line) for line in lines if line.startswith("{")]


def test_a_task_on_each_node_of_slurm_starts_the_ranks_there(folder: Path) -> None:
    words = ("--nproc-per-node", "2", "--master-port", str(free_port()), "kinds.py", "torch")
    variables = [in_slurm(rank, SLURM_STEP_NUM_TASKS="2", SLURM_PROCID=str(rank)) for rank in (0, 1)]

    with launched(folder, *words, **variables[0]) as first, launched(folder, *words, **variables[1]) as second:
        ends = [output_of(first), output_of(second)]

    assert [code for code, _ in ends] == [0, 0], ends
    found = [row for _, output in ends for row in rows(output)]
    assert {(row["RANK"], row["LOCAL_RANK"], row["total"]) for row in found} == {
        ("0", "0", 10.0),
        ("1", "1", 10.0),
        ("2", "0", 10.0),
        ("3", "1", 10.0),
    }


def test_a_task_of_slurm_for_each_rank_is_given_what_torchrun_would_set(folder: Path) -> None:
    port = str(free_port())
    variables = [
        in_slurm(rank // 2, SLURM_STEP_NUM_TASKS="3", SLURM_PROCID=str(rank), SLURM_LOCALID=str(rank % 2))
        | {"SLURM_STEP_TASKS_PER_NODE": "2,1", "MASTER_PORT": port}
        for rank in range(3)
    ]
    ends = []
    with (
        launched(folder, "kinds.py", "torch", **variables[0]) as first,
        launched(folder, "kinds.py", "torch", **variables[1]) as second,
        launched(folder, "kinds.py", "torch", **variables[2]) as third,
    ):
        ends = [output_of(each) for each in (first, second, third)]

    assert [code for code, _ in ends] == [0, 0, 0], ends
    found = [rows(output)[0] for _, output in ends]
    assert [(row["RANK"], row["LOCAL_RANK"], row["LOCAL_WORLD_SIZE"], row["total"]) for row in found] == [
        ("0", "0", "2", 6.0),
        ("1", "1", "2", 6.0),
        ("2", "0", "1", 6.0),
    ]
    assert "srun has started 3 ranks; this one runs the program only." in ends[0][1]


@pytest.mark.parametrize("kind", ["torch", "fabric", "initialize"])
def test_programs_of_every_kind_train_and_are_told_who_they_are(folder: Path, kind: str) -> None:
    with launched(folder, "--nproc-per-node", "2", "kinds.py", kind, "a$$b ${local_rank}") as process:
        code, output = output_of(process)

    assert code == 0, output
    found = sorted(rows(output), key=lambda row: row["RANK"])
    assert [(row["RANK"], row["LOCAL_RANK"], row["WORLD_SIZE"], row["total"]) for row in found] == [
        ("0", "0", "2", 3.0),
        ("1", "1", "2", 3.0),
    ]
    assert {(row["MASTER_ADDR"], row["local_rank"], *row["rest"]) for row in found} == {
        ("localhost", -1, "a$$b ${local_rank}")
    }


def test_a_script_of_deepspeed_s_is_told_its_local_rank_where_that_is_asked_for(folder: Path) -> None:
    with launched(folder, "--num_gpus", "2", "--pass-local-rank", "kinds.py", "torch") as process:
        code, output = output_of(process)

    assert code == 0, output
    assert {(row["LOCAL_RANK"], row["local_rank"]) for row in rows(output)} == {("0", 0), ("1", 1)}


def test_ranks_share_the_cores_of_their_machine(folder: Path) -> None:
    words = ["-c", "import os; del os.environ['OMP_NUM_THREADS']; from meshbolt.cli.main import main; main()", "launch"]
    cores = len(os.sched_getaffinity(0))
    (folder / "threads.py").write_text("import os; print('threads', os.environ['OMP_NUM_THREADS'])")

    called = [sys.executable, *words, "--nproc-per-node", str(cores), "threads.py"]
    output = subprocess.run(
        called, cwd=folder, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=True
    ).stdout

    assert output.count("threads 1\n") == cores


def test_ranks_of_torchrun_run_the_program_only(folder: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--no-python"]
    called = [*torchrun, sys.executable, "-m", "meshbolt", "launch", "--pass-local-rank", "kinds.py", "torch"]

    ended = subprocess.run(called, cwd=folder, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False)

    assert ended.returncode == 0, ended.stderr
    assert {(row["RANK"], row["local_rank"], row["total"]) for row in rows(ended.stdout)} == {
        ("0", 0, 3.0),
        ("1", 1, 3.0),
    }
    assert ended.stderr.count("torchrun has started 2 ranks; this one runs the program only.") == 1


def test_a_second_interrupt_kills_at_once(folder: Path) -> None:
    (folder / "deaf.py").write_text(
        "import os, signal, time\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "open('rank' + os.environ['RANK'], 'w').write(str(os.getpid()))\ntime.sleep(600)\n"
    )
    with launched(folder, "--nproc-per-node", "2", "--grace", "60", "deaf.py") as process:
        until = time.monotonic() + TIMEOUT_SECONDS
        while not all((folder / f"rank{rank}").exists() for rank in (0, 1)) and time.monotonic() < until:
            time.sleep(0.1)
        time.sleep(0.2)
        ranks = [int((folder / f"rank{rank}").read_text()) for rank in (0, 1)]
        process.send_signal(signal.SIGINT)
        time.sleep(1)
        assert process.poll() is None  # it waits for them
        process.send_signal(signal.SIGINT)

        assert process.wait(timeout=20) == 130
    assert not any(map(psutil.pid_exists, ranks))
