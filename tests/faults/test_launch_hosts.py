"""`meshbolt launch` on several hosts for real: network namespaces with an ssh server in each."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.faults.network_hosts import NetworkHosts, network_hosts, why_not

REASON = why_not()
SCRIPT = Path(__file__).with_name("launched.py")
TIMEOUT_SECONDS = 240
pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(bool(REASON), reason=REASON),
    pytest.mark.timeout(2 * TIMEOUT_SECONDS),
]


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NetworkHosts]:
    with network_hosts(tmp_path_factory.mktemp("hosts"), 2) as made:
        yield made


@pytest.fixture
def folder(tmp_path: Path, hosts: NetworkHosts) -> Path:
    shutil.copy(SCRIPT, tmp_path / "train.py")
    (tmp_path / "hosts").write_text(f"{hosts.address(1)} slots=2\n{hosts.address(2)} slots=2  # the other\n")
    # All of these hosts have the same name, which says nothing of their addresses.
    (tmp_path / ".meshbolt_env").write_text("GLOO_SOCKET_IFNAME=eth0\n")
    return tmp_path


def start(hosts: NetworkHosts, folder: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "meshbolt", "launch", "--hostfile", "hosts", "--ssh", hosts.ssh, *arguments],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONWARNINGS": "ignore"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    output, _ = process.communicate(timeout=TIMEOUT_SECONDS)
    return process.returncode, output


def losses(folder: Path) -> list[tuple[int, int, float]]:
    """Return world size, step and loss, as written."""
    lines = (folder / "losses.txt").read_text().splitlines() if (folder / "losses.txt").exists() else []
    return [(int(world), int(step), float(loss)) for world, step, loss in map(str.split, lines)]


def wait_for_step(process: subprocess.Popen[str], folder: Path, step: int) -> None:
    until = time.monotonic() + TIMEOUT_SECONDS
    while not any(each[1] >= step for each in losses(folder)):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < until
        time.sleep(0.1)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Losses of one process with the whole batch."""
    folder = tmp_path_factory.mktemp("alone")
    subprocess.run([sys.executable, str(SCRIPT)], cwd=folder, check=True, capture_output=True, timeout=TIMEOUT_SECONDS)
    return [loss for _, _, loss in losses(folder)]


def test_two_hosts_with_two_ranks_each_train_as_one_process(
    hosts: NetworkHosts, folder: Path, alone: list[float]
) -> None:
    code, output = finish(start(hosts, folder, "train.py"))

    assert code == 0, output
    assert [(world, step) for world, step, _ in losses(folder)] == [(4, step) for step in range(1, 9)]
    assert [loss for *_, loss in losses(folder)] == pytest.approx(alone, rel=1e-5, abs=1e-6)
    assert {f"[rank {rank}] " in output for rank in range(4)} == {True}
    assert hosts.all_have_ended()


def test_include_runs_on_what_it_names_alone(hosts: NetworkHosts, folder: Path) -> None:
    one = "import os; print(os.environ['WORLD_SIZE'], os.environ.get('CUDA_VISIBLE_DEVICES'))"
    (folder / "one.py").write_text(one)

    code, output = finish(start(hosts, folder, "--include", f"{hosts.address(2)}:1", "one.py"))

    assert code == 0, output
    assert "[rank 0] 1 1\n" in output


def test_names_that_only_ssh_knows_are_enough(hosts: NetworkHosts, folder: Path) -> None:
    (folder / "hosts").write_text("host1 slots=1\nhost2 slots=1\n")
    shutil.copy(SCRIPT.with_name("launched_kinds.py"), folder / "kinds.py")

    code, output = finish(start(hosts, folder, "kinds.py", "torch"))

    assert code == 0, output
    assert output.count('"total": 3.0') == 2
    assert hosts.all_have_ended()


def test_variables_of_deepspeed_s_file_and_of_flags_are_set_on_all_hosts(hosts: NetworkHosts, folder: Path) -> None:
    (folder / ".meshbolt_env").rename(folder / ".deepspeed_env")
    with (folder / ".deepspeed_env").open("a") as file:
        file.write("OF_FILE='a b'\n")
    (folder / "show.py").write_text(
        "import os; print(*(os.environ.get(name) for name in ('OF_FILE', 'OF_FLAG', 'NOWHERE')))"
    )

    code, output = finish(start(hosts, folder, "--env", "OF_FLAG=$x", "show.py"))

    assert code == 0, output
    assert output.count("a b $x None\n") == 4
    assert f"other hosts are given the variables of {folder / '.deepspeed_env'}" in output


def test_a_host_that_cannot_be_reached_ends_the_run_with_its_name(hosts: NetworkHosts, folder: Path) -> None:
    (folder / "hosts").write_text(f"{hosts.address(1)} slots=2\n{hosts.address(7)} slots=2\n")

    code, output = finish(start(hosts, folder, "train.py"))

    assert code == 1
    assert (
        f"host {hosts.address(7)} is lost, the first to fail:\n  It cannot be reached: ssh: connect to host" in output
    )
    assert hosts.all_have_ended()


def test_wrong_slots_are_refused_before_anything_starts(hosts: NetworkHosts, folder: Path) -> None:
    (folder / "hosts").write_text(f"{hosts.address(1)} slots=2\n{hosts.address(2)} slots=3\n")

    code, output = finish(start(hosts, folder, "train.py"))

    assert code == 2
    assert "Hosts have different numbers of slots" in output
    assert hosts.all_have_ended(seconds=0.5)


def test_the_first_failure_is_shown_first_and_all_hosts_end(hosts: NetworkHosts, folder: Path) -> None:
    code, output = finish(start(hosts, folder, "train.py", "--fail"))

    assert code == 1
    assert f"meshbolt launch: rank 3 on {hosts.address(2)} failed with exit code 1, the first to fail:" in output
    assert "  ValueError: on purpose on rank 3\n" in output
    assert hosts.all_have_ended()


def test_a_host_that_dies_is_done_without_and_the_newest_checkpoint_goes_on(
    hosts: NetworkHosts, folder: Path, tmp_path_factory: pytest.TempPathFactory, alone: list[float]
) -> None:
    process = start(hosts, folder, "--max-restarts", "1", "--min-nodes", "1", "train.py", "--slow")
    wait_for_step(process, folder, 5)
    newest = folder / "saved" / "step=4.ckpt"
    assert newest.is_dir()
    damaged = next(newest.glob("*.distcp"))
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    hosts.switch_off(2)
    try:
        code, output = finish(process)
    finally:
        hosts.switch_on(2)

    assert code == 0, output
    assert f"going on without {hosts.address(2)}" in output
    assert re.search(r"checkpoint \S+/saved/step=4.ckpt is passed over: .*damaged", output)
    assert re.search(r"going on from \S+/saved/step=3.ckpt", output)
    again = [(step, loss) for world, step, loss in losses(folder) if world == 2]
    assert [step for step, _ in again] == [4, 5, 6, 7, 8]
    assert [loss for _, loss in again] == pytest.approx(alone[3:], rel=1e-5, abs=1e-6)
    assert hosts.all_have_ended()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_whatever_ends_the_launcher_ends_all_hosts_within_seconds(
    hosts: NetworkHosts, folder: Path, number: signal.Signals
) -> None:
    process = start(hosts, folder, "--grace", "3", "train.py", "--slow")
    wait_for_step(process, folder, 5)

    process.send_signal(number)

    code, output = finish(process)
    assert code == (-number if number == signal.SIGKILL else 128 + number), output
    assert hosts.all_have_ended(seconds=10)


def test_ranks_end_when_their_connection_dies(hosts: NetworkHosts, folder: Path) -> None:
    process = start(hosts, folder, "--grace", "3", "train.py", "--slow")
    wait_for_step(process, folder, 5)

    hosts.cut(2)
    try:
        code, output = finish(process)
        assert code == 1
        assert f"host {hosts.address(2)} is lost, the first to fail:\n  The connection has ended" in output
        # The server there waits for hours for a connection of which it does not know that it is dead; no rank does.
        assert hosts.all_have_ended(seconds=40, but_for_sessions=True)
    finally:
        hosts.mend(2)
