"""Outcomes and the error made of them read well and lose nothing."""

from __future__ import annotations

import pytest

from meshbolt.errors import ConfigError, MeshboltError
from meshbolt.testing.outcomes import Outcome, RankFailure, exit_words, type_name


def raised(rank: int, error: BaseException, *, seconds: float = 0.0) -> Outcome:
    names = tuple(type_name(kind) for kind in type(error).__mro__)
    return Outcome(
        rank=rank, kind="raised", seconds=seconds, error_types=names, message=str(error), traceback=f"trace {rank}"
    )


def test_a_raised_error_counts_as_each_of_its_bases_and_as_nothing_else():
    outcome = raised(0, ConfigError("x"))
    assert all(outcome.raised(kind) for kind in (ConfigError, MeshboltError, ValueError))
    assert not outcome.raised(KeyError)
    assert not Outcome(rank=0, kind="died").raised(BaseException)


def test_the_first_rank_to_fail_is_reported_first_and_every_failing_rank_is_reported():
    late, early = raised(0, KeyError("peer"), seconds=2.0), raised(2, ValueError("cause"), seconds=1.0)
    failure = RankFailure([late, Outcome(rank=1, kind="returned"), early])
    text = str(failure)
    assert text.startswith("2 of 3 ranks failed\n--- rank 2 raised after 1.0 s (ValueError: cause) ---\ntrace 2")
    assert text.index("trace 2") < text.index("trace 0") < text.index("rank 1 returned")
    assert failure.outcomes == (late, Outcome(rank=1, kind="returned"), early)


def test_a_dead_rank_shows_its_last_output_and_its_signal():
    outcome = Outcome(rank=1, kind="died", message=exit_words(-6), exit_code=-6, output="terminate called")
    assert outcome.report() == "--- rank 1 died after 0.0 s (killed by SIGABRT) ---\nlast output:\nterminate called"


@pytest.mark.parametrize(
    ("code", "words"), [(-9, "killed by SIGKILL"), (3, "exit code 3"), (-200, "killed by signal 200")]
)
def test_exit_codes_are_put_into_words(code: int, words: str):
    assert exit_words(code) == words
