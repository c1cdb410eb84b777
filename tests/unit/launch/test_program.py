from __future__ import annotations

import sys
from pathlib import Path

import pytest

from meshbolt.errors import ConfigError
from meshbolt.launch.program import Program, read_program


def test_words_of_a_program_are_its_own_whatever_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.py").touch()

    program = read_program(["--", "a.py", "$x", "--", "-m"], is_module=False)

    assert program == Program("script", "a.py", ("$x", "--", "-m"))
    assert program.as_written() == ["a.py", "$x", "--", "-m"]
    assert program.as_started()[2:] == ["script", "a.py", "$$x", "--", "-m"]
    assert program.as_run(0) == [sys.executable, "a.py", "$x", "--", "-m"]


def test_the_local_rank_comes_before_the_arguments_of_a_script() -> None:
    program = read_program(["a.b", "c"], is_module=True, is_told_local_rank=True)

    assert program.as_written() == ["--pass-local-rank", "-m", "a.b", "c"]
    assert program.as_started()[2:] == ["module", "a.b", "--local_rank=${local_rank}", "c"]
    assert program.as_run(3) == [sys.executable, "-m", "a.b", "--local_rank=3", "c"]


def test_a_command_of_meshbolt_is_told_of_the_ranks_also_where_others_have_started_them() -> None:
    assert read_program(["fit", "--config", "a"], is_module=False).as_run(0)[-4:] == ["command", "fit", "--config", "a"]


def test_a_word_that_is_no_program_is_answered_with_what_could_be_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    with pytest.raises(ConfigError, match=r"There is no script 'trian'.*none of the commands fit, validate"):
        read_program(["trian"], is_module=False)
