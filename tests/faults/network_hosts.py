"""Hosts that are network namespaces of this machine: each with an address, a wire to the others, and an ssh server of its own."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

NETWORK = "10.213.77"
BRIDGE = "mbl-br"
SSHD = shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")


def why_not() -> str:
    """Return why there cannot be such hosts here; empty where there can."""
    if SSHD is None or shutil.which("ssh") is None or shutil.which("ssh-keygen") is None:
        return "no ssh server is installed (package openssh-server)"
    if shutil.which("ip") is None:
        return "no `ip` is installed (package iproute2)"
    made = subprocess.run(["ip", "netns", "add", "mbl-probe"], capture_output=True, check=False)
    subprocess.run(["ip", "netns", "del", "mbl-probe"], capture_output=True, check=False)
    return "" if made.returncode == 0 else "this system allows no network namespaces (root is needed)"


def call(*words: str | Path) -> None:
    subprocess.run(list(map(str, words)), check=True, capture_output=True)


@dataclass
class NetworkHosts:
    """Hosts, by number from 1.

    Attributes:
        folder: of keys and settings.
        number: how many.
    """

    folder: Path
    number: int
    servers: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def ssh(self) -> str:
        """The ssh command that reaches them."""
        return f"ssh -F {self.folder / 'config'}"

    def address(self, host: int) -> str:
        """Return the address of a host."""
        return f"{NETWORK}.{host + 1}"

    def processes(self, host: int, *, but_for_sessions: bool = False) -> list[int]:
        """Return the processes of a host, but for its ssh server.

        Args:
            host: its number.
            but_for_sessions: leave out what the server has started for its connections, until it knows that they are dead.
        """
        found = subprocess.run(["ip", "netns", "pids", f"mbl-{host}"], capture_output=True, text=True, check=False)
        pids = set(map(int, found.stdout.split())) - {server.pid for server in self.servers}
        return sorted(pid for pid in pids if not (but_for_sessions and _is_session(pid)))

    def all_have_ended(self, seconds: float = 5.0, *, but_for_sessions: bool = False) -> bool:
        """Return whether nothing runs on any host within some time."""
        until = time.monotonic() + seconds
        while any(self.processes(host, but_for_sessions=but_for_sessions) for host in range(1, self.number + 1)):
            if time.monotonic() > until:
                return False
            time.sleep(0.1)
        return True

    def cut(self, host: int) -> None:
        """Pull the wire of a host."""
        call("ip", "link", "set", f"mbl-w{host}", "down")

    def mend(self, host: int) -> None:
        """Put the wire of a host in again."""
        call("ip", "link", "set", f"mbl-w{host}", "up")

    def switch_on(self, host: int) -> None:
        """Let a host that was switched off be there again."""
        self.servers[host - 1].wait()
        self.servers[host - 1] = _serve(self, host)
        self.mend(host)

    def switch_off(self, host: int) -> None:
        """End a host at once, as a power cut does: nobody is told."""
        self.cut(host)
        for process in [*self.processes(host), self.servers[host - 1].pid]:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)


def _is_session(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/comm").read_text().startswith("sshd")
    except OSError:  # it has ended
        return True


@contextmanager
def network_hosts(folder: Path, number: int) -> Iterator[NetworkHosts]:
    """Make hosts, and take them away with all that runs there.

    Args:
        folder: for keys and settings.
        number: how many.
    """
    hosts = NetworkHosts(folder, number)
    _write_keys(folder)
    _remove(number)
    try:
        call("ip", "link", "add", BRIDGE, "type", "bridge")
        call("ip", "addr", "add", f"{NETWORK}.1/24", "dev", BRIDGE)
        call("ip", "link", "set", BRIDGE, "up")
        for host in range(1, number + 1):
            _make(hosts, host)
        yield hosts
    finally:
        for host in range(1, number + 1):
            for process in hosts.processes(host):
                with suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
        for server in hosts.servers:
            server.kill()
            server.wait()
        _remove(number)


def _write_keys(folder: Path) -> None:
    for name in ("host", "user"):
        call("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name)
    (folder / "config").write_text(
        f"Host *\n  User root\n  IdentityFile {folder / 'user'}\n  StrictHostKeyChecking no\n"
        "  UserKnownHostsFile /dev/null\n  LogLevel ERROR\n"
        + "".join(f"Host host{number}\n  HostName {NETWORK}.{number + 1}\n" for number in range(1, 10))
    )
    (folder / "sshd_config").write_text(
        f"HostKey {folder / 'host'}\nAuthorizedKeysFile {folder / 'user.pub'}\nStrictModes no\nPermitRootLogin yes\n"
        "UsePAM no\nPidFile none\nUseDNS no\n"
    )
    Path("/run/sshd").mkdir(exist_ok=True)


def _make(hosts: NetworkHosts, host: int) -> None:
    name, wire = f"mbl-{host}", f"mbl-w{host}"
    call("ip", "netns", "add", name)
    call("ip", "link", "add", wire, "type", "veth", "peer", "name", "eth0", "netns", name)
    call("ip", "link", "set", wire, "master", BRIDGE, "up")
    inside = ("ip", "netns", "exec", name)
    call(*inside, "ip", "addr", "add", f"{hosts.address(host)}/24", "dev", "eth0")
    call(*inside, "ip", "link", "set", "eth0", "up")
    call(*inside, "ip", "link", "set", "lo", "up")
    hosts.servers.append(_serve(hosts, host))


def _serve(hosts: NetworkHosts, host: int) -> subprocess.Popen[bytes]:
    server = ["ip", "netns", "exec", f"mbl-{host}", str(SSHD), "-D", "-e", "-f", str(hosts.folder / "sshd_config")]
    return subprocess.Popen(server, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def _remove(number: int) -> None:
    for host in range(1, number + 1):
        subprocess.run(["ip", "netns", "del", f"mbl-{host}"], capture_output=True, check=False)
        subprocess.run(["ip", "link", "del", f"mbl-w{host}"], capture_output=True, check=False)
    subprocess.run(["ip", "link", "del", BRIDGE], capture_output=True, check=False)
