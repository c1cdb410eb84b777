"""`meshbolt launch` on this machine, with real ranks."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from tests.cli.support import CONFIGS, SMALL, meshbolt

from meshbolt.cli.launch import run
from meshbolt.errors import ConfigError

FAULTS = Path(__file__).parents[1] / "faults"
SCRIPT = """
import os, signal, sys, time
rank, what = os.environ["RANK"], sys.argv[1]
print("here", *sys.argv)
if what == "raise":
    if rank == "1":
        raise ValueError("on purpose")
    time.sleep(60)
if what == "exit" and rank == "1":
    sys.exit(7)
if what == "kill" and rank == "1":
    os.kill(os.getpid(), signal.SIGKILL)
if what == "hang":
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    open(f"rank{rank}", "w").write(str(os.getpid()))
    time.sleep(600)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "job.py").write_text(SCRIPT)
    return tmp_path


def test_the_first_error_of_a_rank_is_shown_whole_and_output_carries_its_rank(folder: Path) -> None:
    result = meshbolt("launch", "--nproc-per-node", "2", "job.py", "raise", "--x", cwd=folder)

    assert result.returncode == 1
    assert "[rank 0] here job.py raise --x\n" in result.stdout
    report = result.stderr.partition("meshbolt launch: ")[2].splitlines()
    assert report[:2] == ["rank 1 failed with exit code 1, the first to fail:", "  Traceback (most recent call last):"]
    assert report[-1] == "  ValueError: on purpose"
    assert not any("runpy" in line or "start.py" in line for line in report)


@pytest.mark.full
@pytest.mark.parametrize(("what", "code"), [("exit", 7), ("kill", 137), ("nothing", 0)])
def test_the_exit_code_is_that_of_the_first_failure(folder: Path, what: str, code: int) -> None:
    result = meshbolt("launch", "--nproc-per-node", "2", "-m", "job", what, cwd=folder)

    assert result.returncode == code, result.stderr


@pytest.mark.full
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_ranks_that_do_not_listen_end_with_the_launcher(folder: Path, number: signal.Signals) -> None:
    words = [sys.executable, "-m", "meshbolt", "launch", "--nproc-per-node", "2", "--grace", "1", "job.py", "hang"]
    process = subprocess.Popen(words, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until = time.monotonic() + 120
    while not all((folder / f"rank{rank}").exists() for rank in range(2)) and time.monotonic() < until:
        time.sleep(0.1)
    ranks = [int((folder / f"rank{rank}").read_text()) for rank in range(2)]

    process.send_signal(number)

    assert process.wait(timeout=30) == (-number if number == signal.SIGKILL else 128 + number)
    until = time.monotonic() + 5
    while any(map(psutil.pid_exists, ranks)) and time.monotonic() < until:
        time.sleep(0.1)
    assert not any(map(psutil.pid_exists, ranks))


@pytest.mark.full
def test_a_fit_that_fails_goes_on_from_its_newest_checkpoint(tmp_path: Path) -> None:
    shutil.copy(FAULTS / "launched.py", tmp_path / "train.py")

    result = meshbolt("launch", "--nproc-per-node", "2", "--max-restarts", "1", "train.py", "--fail", cwd=tmp_path)

    assert result.returncode == 0, result.stderr
    assert "going on from" in result.stdout + result.stderr
    steps = [int(line.split()[1]) for line in (tmp_path / "losses.txt").read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 4, 5, 6, 7, 8]
    assert not list(tmp_path.glob(".meshbolt_saves*"))


@pytest.mark.full
def test_a_command_of_meshbolt_is_told_how_many_ranks_there_are(tmp_path: Path) -> None:
    recipe = ("fit", "--config", CONFIGS / "gpt_zero2.yaml", *SMALL, "--trainer.limit_train_batches=2")

    result = meshbolt("launch", "--nproc-per-node", "3", *recipe, "--trainer.limit_val_batches=1", cwd=tmp_path)

    assert result.returncode == 0, result.stdout + result.stderr
    assert "training with ZeRO-2 on 3 × cpu" in result.stdout


def dry(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    assert run(["launch", "--dry-run", *arguments]) == 0
    return capsys.readouterr().out.splitlines()


def test_a_dry_run_shows_what_each_host_would_run(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("NCCL_DEBUG", "WARN")
    (folder / "hosts").write_text("a slots=4\nb slots=4\n")

    first, second = dry(capsys, "--hostfile", "hosts", "--exclude", "a:0@b:3", "--ssh", "ssh -p 22", "job.py", "x y")

    assert first.startswith("a: ssh -p 22 -o BatchMode=yes")
    assert "CUDA_VISIBLE_DEVICES=1,2,3" in first
    assert "NCCL_DEBUG=WARN" in first
    assert "--nnodes 2 --node-rank 0 --nproc-per-node 3 --master-addr a --master-port 29500" in first
    assert "CUDA_VISIBLE_DEVICES=0,1,2" in second
    assert "--node-rank 1" in second
    assert "job.py" in second


def test_a_dry_run_on_one_machine_is_a_call_of_torchrun(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)

    (line,) = dry(capsys, "--nproc-per-node", "2", "job.py")

    assert line.startswith("localhost: torchrun --standalone --nproc-per-node=2")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        # The forms of DeepSpeed's command.
        (("--num_gpus", "2", "--master_port", "29511"), "torchrun --master-port=29511 --nproc-per-node=2"),
        (
            ("--num_accelerators=3", "--num_nodes=1", "--no_local_rank", "-q", "--log_level", "error"),
            "--nproc-per-node=3",
        ),
        (("-i", "localhost:0", "--launcher", "pdsh", "--no_ssh_check", "--force_multi"), "--nproc-per-node=1"),
        (("--enable_each_rank_log", "None"), "torchrun --standalone"),
        # And of torchrun's.
        (("--nproc_per_node=2", "--max_restarts=3"), "--nproc-per-node=2 --max-restarts=3"),
        (
            ("--no_ssh", "--nnodes=3", "--node_rank=1", "--master_addr=a", "--max-restarts=1", "--min-nodes=2"),
            "node 1 of 3: torchrun --nnodes=2:3 --rdzv-backend=c10d --rdzv-endpoint=a:29500",
        ),
    ],
)
def test_flags_of_other_launchers_mean_the_same(
    arguments: tuple[str, ...],
    words: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(folder)

    (line,) = dry(capsys, *arguments, "job.py")

    assert words in line


def test_hosts_are_chosen_by_number_as_by_deepspeed(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    (folder / "hosts").write_text("a slots=4\nb slots=4\nc slots=4\n")
    call = ("-H", "hosts", "--num_nodes", "2", "--num_gpus", "2", "--ssh_port", "22", "--pass_local_rank", "job.py")

    first, second = dry(capsys, *call)

    assert first.startswith("a: ssh -p 22 -o")
    assert "CUDA_VISIBLE_DEVICES=0,1 " in first
    assert "--nnodes 2 --node-rank 1 --nproc-per-node 2" in second
    assert second.endswith("--pass-local-rank job.py'\n".strip())


def test_hosts_meet_at_the_address_that_ssh_has_for_the_first(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    (folder / "hosts").write_text("a slots=1\nb slots=1\n")
    (folder / "ssh").write_text("#!/bin/sh\necho user x\necho hostname $ADDRESS\n")
    (folder / "ssh").chmod(0o755)
    monkeypatch.setenv("ADDRESS", "10.0.0.1")

    assert (
        "--master-addr 10.0.0.1 --master-port 29500"
        in dry(capsys, "--hostfile", "hosts", "--ssh", "./ssh", "job.py")[1]
    )
    monkeypatch.setenv("ADDRESS", "localhost")
    with pytest.raises(ConfigError, match="Other hosts cannot meet at localhost, which is what the first host, 'a'"):
        run(["launch", "--hostfile", "hosts", "--ssh", "./ssh", "job.py"])
    assert (
        "--master-addr b" in dry(capsys, *("--hostfile", "hosts", "--ssh", "./ssh", "--master-addr", "b", "job.py"))[0]
    )


def test_the_help_has_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run(["launch", "--help"])

    assert ended.value.code == 0
    assert "meshbolt launch --hostfile hosts --include node1@node2:0,1" in capsys.readouterr().out


def test_inside_of_torchrun_only_the_program_runs(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "x"}.items():
        monkeypatch.setenv(name, value)

    assert dry(capsys, "job.py", "a") == [f"rank 0 of 2: {sys.executable} job.py a"]
    with pytest.raises(
        ConfigError, match="--nproc-per-node was given, and torchrun has started this process as rank 0"
    ):
        run(["launch", "--nproc-per-node", "2", "job.py"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "There is nothing to run"),
        (("nothing.py",), "There is no script 'nothing.py'"),
        (("--hostfile", "none", "job.py"), "--hostfile none cannot be read"),
        (("--node-rank", "1", "job.py"), "--node-rank 1 is for --no-ssh"),
        (("--no-ssh", "--nnodes", "2", "job.py"), "--no-ssh needs --node-rank"),
        (("--no-ssh", "--nnodes", "2", "--node-rank", "2", "--master-addr", "a", "job.py"), "is none of 2 nodes"),
        (("--nproc-per-node", "0", "job.py"), "--nproc-per-node 0 is below 1"),
        (("--include", "c:0", "job.py"), "there is no host 'c'"),
        (("--hostfile", "bytes", "job.py"), "--hostfile bytes is no text"),
        (("--hostfile", "two", "--ssh", "no-such-ssh", "job.py"), "there is no command 'no-such-ssh' here"),
        (("--hostfile", "two", "--ssh", "ssh 'x", "job.py"), "is no command: No closing quotation"),
        (("--master-port", "65535", "--max-restarts", "1", "job.py"), "above 65535"),
        (("--log-dir", "job.py/x", "job.py"), "--log-dir job.py/x cannot be made"),
        (("--nnodes", "2", "job.py"), "--nnodes 2: which nodes these are must be told: by --hostfile"),
        (
            ("--no-ssh", "--nnodes=2", "--node-rank=0", "--master-addr=a", "--min-nodes=3", "job.py"),
            "above the 2 nodes",
        ),
        (
            ("--no-ssh", "--nnodes=2", "--node-rank=0", "--master-addr=a", "--min-nodes=1", "job.py"),
            "Add --max-restarts",
        ),
        (
            ("--nproc-per-nod", "2", "job.py"),
            "--nproc-per-nod is no flag of meshbolt launch .did you mean '--nproc-per-node'",
        ),
        (("--bind_cores_to_rank", "job.py"), "--bind_cores_to_rank is no flag.*`taskset`"),
        (("--rdzv-endpoint=a:1", "job.py"), "--rdzv-endpoint is no flag.*nodes meet at --master-addr"),
        (("--launcher", "slurm", "job.py"), "under SLURM call `srun --ntasks-per-node=1 meshbolt launch"),
        (("--launcher", "pdhs", "job.py"), "is not known .did you mean 'pdsh'"),
        (("--ssh", "ssh -i k", "--ssh_port", "1", "job.py"), "Give --ssh 'ssh -i k -p 1'"),
        (("--pass-local-rank", "fit"), "fit has no such flag"),
    ],
)
def test_what_cannot_be_is_refused(
    arguments: tuple[str, ...], words: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    (folder / "bytes").write_bytes(b"\xff\xfe slots=4")
    (folder / "two").write_text("a slots=1\nb slots=1\n")

    with pytest.raises(ConfigError, match=words):
        run(["launch", *arguments])
