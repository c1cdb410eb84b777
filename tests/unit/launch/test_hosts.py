from __future__ import annotations

import pytest

from meshbolt.errors import ConfigError
from meshbolt.launch.hosts import Host, choose, first_hosts, first_slots, ranks_on_each, read_hosts

TWO = (Host("a", (0, 1, 2, 3)), Host("b", (0, 1, 2, 3)))


def test_a_hostfile_may_have_comments_and_empty_lines() -> None:
    hosts = read_hosts("# all\na slots=2\n\n b  slots=4  # the new one\n", origin="hosts")

    assert hosts == (Host("a", (0, 1)), Host("b", (0, 1, 2, 3)))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a slots=2\nb\n", r"hosts, line 2: 'b' is not `HOST slots=N`"),
        ("a slots=2\n\n# x\nb slot=2\n", r"line 4: 'b slot=2' is not"),
        ("a slots=two", r"line 1: slots='two' of a is no number"),
        ("a slots=0", r"line 1: slots='0' of a is no number"),
        ("a slots=-1", r"line 1: slots='-1' of a is no number"),
        ("a slots=1 max=2", r"line 1: 'a slots=1 max=2' is not"),
        ("a slots=2\nb slots=2\na slots=4", r"line 3: host 'a' stands in line 1 already"),
        ("me@a slots=2", r"line 1: 'me@a' cannot be the name"),
        ("-oProxyCommand=x slots=2", r"line 1: '-oProxyCommand=x' cannot be the name"),
        ("# nothing", r"hosts names no host"),
    ],
)
def test_a_wrong_line_of_a_hostfile_is_named_by_its_number(text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        read_hosts(text, origin="hosts")


@pytest.mark.parametrize(
    ("include", "exclude", "left"),
    [
        ("", "", {"a": (0, 1, 2, 3), "b": (0, 1, 2, 3)}),
        ("b", "", {"b": (0, 1, 2, 3)}),
        ("b@a", "", {"a": (0, 1, 2, 3), "b": (0, 1, 2, 3)}),
        ("a@b:0,2", "", {"a": (0, 1, 2, 3), "b": (0, 2)}),
        ("b:3", "", {"b": (3,)}),
        ("", "b", {"a": (0, 1, 2, 3)}),
        ("", "b:0", {"a": (0, 1, 2, 3), "b": (1, 2, 3)}),
        ("", "a:0,1@b:2,3", {"a": (2, 3), "b": (0, 1)}),
        ("", "a@b:0,1,2", {"b": (3,)}),
    ],
)
def test_include_and_exclude_choose_hosts_and_slots(
    include: str, exclude: str, left: dict[str, tuple[int, ...]]
) -> None:
    chosen = choose(TWO, include=include, exclude=exclude)

    assert {host.name: host.slots for host in chosen} == left
    assert all(host.is_whole == (len(host.slots) == 4) for host in chosen)


@pytest.mark.parametrize(
    ("include", "exclude", "words"),
    [
        ("a", "b", "cannot both be given"),
        ("c", "", "--include 'c': there is no host 'c'"),
        ("", "aa", r"--exclude 'aa': there is no host 'aa' \(did you mean 'a'"),
        ("a:4", "", "host 'a' has no slot 4. It has 4: 0 to 3"),
        ("a:x", "", "'x' is no number of a slot"),
        ("a:", "", "'a:' names no host or no slots"),
        ("a@@b", "", "'' names no host"),
        ("a:0@a:1", "", "names host 'a' twice"),
        ("", "a@b", "leaves no slot on any host"),
    ],
)
def test_what_cannot_be_chosen_is_refused_with_its_words(include: str, exclude: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        choose(TWO, include=include, exclude=exclude)


def test_hosts_with_different_numbers_of_slots_are_refused() -> None:
    uneven = (Host("a", (0, 1)), Host("b", (0,)))

    with pytest.raises(ConfigError, match=r"a 2, b 1.*--nproc-per-node 1"):
        ranks_on_each(uneven)
    assert ranks_on_each(first_slots(uneven, 1)) == 1


def test_more_ranks_than_slots_are_refused() -> None:
    with pytest.raises(ConfigError, match="--nproc-per-node 5: host 'a' has 4 slots"):
        first_slots(TWO, 5)


def test_more_hosts_than_there_are_are_refused() -> None:
    assert first_hosts(TWO, 1) == TWO[:1]
    with pytest.raises(ConfigError, match="--nnodes 3: there are 2 hosts to choose from, a, b"):
        first_hosts(TWO, 3)
