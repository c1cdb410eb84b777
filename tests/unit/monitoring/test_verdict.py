"""Who keeps the others waiting, from what ranks say of themselves."""

from __future__ import annotations

from meshbolt.compat import Collective
from meshbolt.monitoring.stacks import ThreadStack
from meshbolt.monitoring.verdict import Report, judge, report_lines

ALL = (0, 1, 2)


def collective(
    number: int, name: str = "all_reduce", *, group: str = "0", is_done: bool = False, last: int = 0
) -> Collective:
    return Collective(group, f"group {group}", ALL, name, number, is_done, float(number), last or number)


def report(rank: int, *collectives: Collective, mark: int = 9, waits: bool = False, place: str = "") -> Report:
    stack = ThreadStack("MainThread", (f"line of {place}",), place, waits)
    return Report(rank, "box", 100 + rank, mark, "training on a batch", 4, 12.5, 10.0, (stack,), collectives)


def test_who_has_not_come_to_a_collective_in_which_others_wait() -> None:
    done = collective(6, is_done=True)
    reports = [report(0, collective(7)), report(1, done, place="train.py:3, in step: read()"), report(2, collective(7))]
    verdict = judge(reports, {})
    assert verdict.culprits == (1,)
    expected = "rank 1 (box, process 101) has not come to all_reduce (number 7 of group 0), in which ranks 0, 2 wait: "
    assert verdict.why == f"{expected}train.py:3, in step: read()"


def test_who_has_begun_a_later_one_in_the_background_is_not_to_blame() -> None:
    """Of a gather that is launched early, others are under way as well."""
    reports = [
        report(0, collective(7, last=9)),
        report(1, collective(6, is_done=True)),
        report(2, collective(7, last=8)),
    ]
    assert judge(reports, {}).culprits == (1,)


def test_a_rank_that_is_not_of_the_group_is_not_waited_for() -> None:
    waited = Collective("3", "group 3", (0, 2), "all_gather", 5, False, 1.0, 5)
    done = Collective("3", "group 3", (0, 2), "all_gather", 4, True, 1.0, 4)
    assert judge([report(0, waited), report(1), report(2, done)], {}).culprits == (2,)


def test_who_has_skipped_a_collective_waits_in_another_one_than_most() -> None:
    own, others = collective(40, "all_gather", group="0"), collective(7, group="5")
    begun = collective(39, is_done=True, group="0"), collective(6, is_done=True, group="5")
    reports = [report(0, others, begun[0]), report(1, own, begun[1]), report(2, others, begun[0])]
    verdict = judge(reports, {})
    assert verdict.culprits == (1,)
    assert "so that one was skipped, it seems by rank 1: rank 0 in all_reduce (number 7 of group 5)" in verdict.why


def test_of_two_that_wait_for_each_other_the_one_that_has_gone_further_has_skipped() -> None:
    reports = [report(0, collective(7, group="5")), report(1, collective(40, group="0"), mark=10)]
    assert judge(reports, {}).culprits == (1,)
    assert judge([reports[0], report(1, collective(40, group="0"))], {}).culprits == (0, 1)


def test_without_a_record_the_one_that_is_behind_or_not_in_an_exchange() -> None:
    assert judge([report(0), report(1, mark=8)], {}).culprits == (1,)
    assert judge([report(0, waits=True), report(1, place="a.py:1, in f: g()")], {}).culprits == (1,)
    assert judge([report(0), report(1)], {}).culprits == (0, 1)


def test_who_does_not_answer_is_to_blame() -> None:
    verdict = judge([report(0, collective(7))], {1: "is gone"})
    assert (verdict.culprits, verdict.why) == ((1,), "rank 1 is gone")


def test_equal_stacks_are_shown_once() -> None:
    lines = list(
        report_lines([report(0, collective(7)), report(1), report(2, collective(7, is_done=True))], {3: "is gone"})
    )
    assert (
        "  rank 0 (box, process 100): step 4, in training on a batch for 12.5 s; waits in all_reduce (number 7 of group 0)"
        in lines
    )
    assert any(line.endswith("last collective: all_reduce (number 7 of group 0), done") for line in lines)
    assert "  rank 3: is gone" in lines
    assert "stacks of ranks 0, 1, 2, the innermost call last:" in lines
    assert lines.count("  line of ") == 1
