from __future__ import annotations

import signal

from meshbolt.launch.failures import Failure, describe, in_order


def test_a_rank_that_only_waited_for_another_is_never_the_first() -> None:
    waited = Failure(rank=0, words="RankError: rank 1 failed", seconds=1.0, is_of_another=True)
    cause = Failure(rank=1, words="ValueError: x", seconds=2.0)

    assert in_order([waited, cause]) == [cause, waited]


def test_a_rank_that_was_killed_comes_before_what_others_met_thereafter() -> None:
    met = Failure(rank=0, words="RuntimeError: connection closed", seconds=1.0)
    killed = Failure(rank=1, code=-signal.SIGKILL, seconds=1.1)

    assert in_order([met, killed])[0] is killed
    assert killed.exit_code == 137


def test_ranks_that_were_told_to_end_are_left_out() -> None:
    cause = Failure(rank=1, words="ValueError: x", seconds=2.0)

    assert in_order([Failure(rank=0, code=-signal.SIGTERM, seconds=1.0), cause]) == [cause]


def test_the_first_failure_is_shown_with_all_of_its_words_and_others_with_a_line() -> None:
    first = Failure(rank=2, host="b", code=3, words="Traceback\n  line\nValueError: x")
    later = Failure(rank=0, host="a", words="Traceback\nRankError: rank 2", is_of_another=True)

    assert describe([first, later]).splitlines() == [
        "rank 2 on b failed with exit code 3, the first to fail:",
        "  Traceback",
        "    line",
        "  ValueError: x",
        "rank 0 on a, later: RankError: rank 2",
    ]
