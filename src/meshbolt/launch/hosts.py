"""Which hosts take part and which of their slots: hostfiles, and what `--include` and `--exclude` choose of them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from meshbolt.errors import ConfigError, did_you_mean

_LINE = re.compile(r"(?P<name>\S+)\s+slots=(?P<slots>\S+)")
_GRAMMAR = "HOST[:SLOT,SLOT...][@HOST...], such as node1@node2:0,2"


@dataclass(frozen=True)
class Host:
    """A machine, and where ranks may run on it.

    Attributes:
        name: what ssh is called with.
        slots: one for each rank; on a machine with GPUs the numbers of those.
        is_whole: whether these are all that it has.
    """

    name: str
    slots: tuple[int, ...]
    is_whole: bool = True


def read_hosts(text: str, *, origin: str) -> tuple[Host, ...]:
    """Return the hosts of a hostfile: `name slots=n` in each line, comments behind `#`.

    Args:
        text: the content.
        origin: its path, for messages.

    Raises:
        ConfigError: a line says something else, a host stands there twice, or there is none; with the number of the line.
    """
    lines: dict[str, int] = {}
    hosts: list[Host] = []
    for number, line in enumerate(text.splitlines(), start=1):
        words = line.partition("#")[0].strip()
        if not words:
            continue
        host = _host(words, where=f"{origin}, line {number}")
        if host.name in lines:
            raise ConfigError(
                f"{origin}, line {number}: host {host.name!r} stands in line {lines[host.name]} already. Give each host one "
                "line with all of its slots."
            )
        lines[host.name] = number
        hosts.append(host)
    if not hosts:
        raise ConfigError(f"{origin} names no host. Write a line for each, such as `node1 slots=8`.")
    return tuple(hosts)


def _host(words: str, *, where: str) -> Host:
    found = _LINE.fullmatch(words)
    if found is None:
        raise ConfigError(f"{where}: {words!r} is not `HOST slots=N`. Write a line such as `node1 slots=8`.")
    name, slots = found["name"], found["slots"]
    if not slots.isdecimal() or int(slots) == 0:
        raise ConfigError(f"{where}: slots={slots!r} of {name} is no number of ranks. Give 1 or more, such as slots=8.")
    if set(name) & set("@:,") or name.startswith("-"):
        raise ConfigError(
            f"{where}: {name!r} cannot be the name of a host: it holds one of @ : , or begins with a dash. A user or a port "
            "belongs into ~/.ssh/config."
        )
    return Host(name, tuple(range(int(slots))))


def choose(hosts: Iterable[Host], *, include: str = "", exclude: str = "") -> tuple[Host, ...]:
    """Return what is left of hosts when some of them, or of their slots, are chosen or left out.

    Args:
        hosts: all there are.
        include: `HOST[:SLOT,SLOT...][@HOST...]`: these alone, in the order of `hosts`.
        exclude: likewise, these not.

    Raises:
        ConfigError: both are given, one is not of that form, names what is not there, or leaves nothing.
    """
    known = {host.name: host for host in hosts}
    if include and exclude:
        raise ConfigError(f"--include {include!r} and --exclude {exclude!r} cannot both be given. Use one of them.")
    if not include and not exclude:
        return tuple(known.values())
    flag, text = ("--include", include) if include else ("--exclude", exclude)
    named = _named(text, flag=flag, known=known)
    left = {
        name: [slot for slot in host.slots if (slot in named.get(name, ())) == (flag == "--include")]
        for name, host in known.items()
    }
    chosen = tuple(
        Host(name, tuple(slots), is_whole=len(slots) == len(known[name].slots)) for name, slots in left.items() if slots
    )
    if not chosen:
        raise ConfigError(f"{flag} {text!r} leaves no slot on any host. There are {', '.join(sorted(known))}.")
    return chosen


def _named(text: str, *, flag: str, known: Mapping[str, Host]) -> dict[str, set[int]]:
    named: dict[str, set[int]] = {}
    for part in text.split("@"):
        name, colon, numbers = part.strip().partition(":")
        if not name or (colon and not numbers):
            raise ConfigError(f"{flag} {text!r} is not of the form {_GRAMMAR}: {part!r} names no host or no slots.")
        if name not in known:
            raise ConfigError(f"{flag} {text!r}: there is no host {name!r}{did_you_mean(name, known)}.")
        if name in named:
            raise ConfigError(f"{flag} {text!r} names host {name!r} twice. Give all of its slots at once: {name}:0,1.")
        named[name] = _slots(numbers, asked=f"{flag} {text!r}", host=known[name]) if colon else set(known[name].slots)
    return named


def _slots(numbers: str, *, asked: str, host: Host) -> set[int]:
    words = [word.strip() for word in numbers.split(",")]
    wrong = [word for word in words if not word.isdecimal()]
    if wrong:
        raise ConfigError(f"{asked}: {wrong[0]!r} is no number of a slot. The form is {_GRAMMAR}.")
    missing = sorted({int(word) for word in words} - set(host.slots))
    if missing:
        slots = f"{host.slots[0]} to {host.slots[-1]}"
        raise ConfigError(f"{asked}: host {host.name!r} has no slot {missing[0]}. It has {len(host.slots)}: {slots}.")
    return {int(word) for word in words}


def ranks_on_each(hosts: tuple[Host, ...]) -> int:
    """Return how many ranks run on each host.

    Raises:
        ConfigError: hosts differ in it, which a Trainer cannot be told.
    """
    numbers = {len(host.slots) for host in hosts}
    if len(numbers) > 1:
        each = ", ".join(f"{host.name} {len(host.slots)}" for host in hosts)
        raise ConfigError(
            f"Hosts have different numbers of slots ({each}), and a Trainer has the same number of devices on every node. "
            f"Choose with --include or --exclude, or give --nproc-per-node {min(numbers)}."
        )
    return numbers.pop()


def first_slots(hosts: tuple[Host, ...], number: int) -> tuple[Host, ...]:
    """Return hosts with their first slots alone.

    Args:
        hosts: all of them.
        number: of slots on each.

    Raises:
        ConfigError: a host has fewer.
    """
    few = [host for host in hosts if len(host.slots) < number]
    if few:
        raise ConfigError(
            f"--nproc-per-node {number}: host {few[0].name!r} has {len(few[0].slots)} slots. Give fewer ranks, or correct its "
            "line in the hostfile."
        )
    return tuple(
        Host(host.name, host.slots[:number], is_whole=host.is_whole and len(host.slots) == number) for host in hosts
    )


def first_hosts(hosts: tuple[Host, ...], number: int) -> tuple[Host, ...]:
    """Return the first hosts alone.

    Args:
        hosts: all of them.
        number: how many are wanted.

    Raises:
        ConfigError: there are fewer.
    """
    if number > len(hosts):
        names = ", ".join(host.name for host in hosts)
        raise ConfigError(f"--nnodes {number}: there are {len(hosts)} hosts to choose from, {names}. Ask for fewer.")
    return hosts[:number]
