from __future__ import annotations

import importlib
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import meshbolt
from meshbolt.cli import main as command_line
from meshbolt.cli.main import BAD_USAGE, COMMANDS, DONE, NO, Command, main
from meshbolt.errors import CheckpointError, ConfigError, TopologyError, UnsupportedError

Call = Callable[..., int]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch) -> Call:
    """Run the command line with arguments, and return the exit code."""

    def run(*arguments: str) -> int:
        monkeypatch.setattr("sys.argv", ["meshbolt", *arguments])
        return main()

    return run


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_the_help_names_every_command_and_has_an_example(
    call: Call, flag: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(flag) == DONE
    said = capsys.readouterr().out
    assert all(
        re.search(rf"^  {name} +{re.escape(command.help)}$", said, re.MULTILINE) for name, command in COMMANDS.items()
    )
    assert "meshbolt fit --config" in said


def test_the_version_is_that_of_the_package(call: Call, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("--version") == DONE
    assert capsys.readouterr().out == f"meshbolt {meshbolt.__version__}\n"


def test_no_command_is_bad_usage_and_shows_the_help(call: Call, capsys: pytest.CaptureFixture[str]) -> None:
    assert call() == BAD_USAGE
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "usage: meshbolt COMMAND" in captured.err


def test_an_unknown_command_is_bad_usage_and_the_closest_is_suggested(
    call: Call, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("explian") == BAD_USAGE
    assert "'explian' is not a command (did you mean 'explain'?" in capsys.readouterr().err


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_can_be_run(name: str) -> None:
    assert callable(importlib.import_module(COMMANDS[name].module).run)


class Failing:
    """Stands in for the module of a command."""

    def __init__(self, outcome: int | Exception) -> None:
        self._outcome = outcome

    def run(self, arguments: list[str]) -> int:
        if isinstance(self._outcome, Exception):
            raise self._outcome
        return self._outcome


@pytest.fixture
def command_that(monkeypatch: pytest.MonkeyPatch) -> Callable[[int | Exception], None]:
    def make(outcome: int | Exception) -> None:
        monkeypatch.setattr(command_line, "COMMANDS", {"do": Command("a_command_of_the_test", "do it")})
        monkeypatch.setitem(sys.modules, "a_command_of_the_test", Failing(outcome))

    return make


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("wrong value"), BAD_USAGE),
        (TopologyError("wrong ranks"), BAD_USAGE),
        (UnsupportedError("not here"), BAD_USAGE),
        (CheckpointError("damaged"), NO),
    ],
)
def test_an_error_of_meshbolt_is_one_line_and_an_exit_code(
    call: Call,
    command_that: Callable[[Exception], None],
    error: Exception,
    code: int,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    command_that(error)

    assert call("do") == code
    assert capsys.readouterr().err == f"meshbolt do: {type(error).__name__}: {error}\n"


def test_a_rank_that_is_not_the_first_says_which_it_is(
    call: Call,
    command_that: Callable[[Exception], None],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "3")
    command_that(ConfigError("wrong value"))
    call("do")

    assert capsys.readouterr().err == "meshbolt do: [local rank 3] ConfigError: wrong value\n"


def test_the_debug_mode_shows_where_an_error_was_raised(
    call: Call,
    command_that: Callable[[Exception], None],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MESHBOLT_DEBUG", "1")
    command_that(ConfigError("wrong value"))

    assert call("do") == BAD_USAGE
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize("variable", ["MESHBOLT_DEBUG", "MESHBOLT_FAST_PATH"])
def test_a_malformed_switch_is_bad_usage(
    call: Call,
    command_that: Callable[[int], None],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    variable: str,
) -> None:
    monkeypatch.setenv(variable, "yes")
    command_that(DONE)

    assert call("do") == BAD_USAGE
    assert f"ConfigError: {variable}='yes' is not a switch" in capsys.readouterr().err


def test_an_error_of_somebody_else_is_not_hidden(call: Call, command_that: Callable[[Exception], None]) -> None:
    command_that(RuntimeError("a defect"))

    with pytest.raises(RuntimeError, match="a defect"):
        call("do")


@pytest.mark.parametrize("code", [DONE, NO])
def test_the_exit_code_of_a_command_is_passed_on(call: Call, command_that: Callable[[int], None], code: int) -> None:
    command_that(code)

    assert call("do") == code


def test_a_reader_that_has_seen_enough_ends_the_command_without_a_word(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("trainer: {strategy: zero2, accelerator: cpu, devices: 2}")
    command = f"{sys.executable} -m meshbolt explain {tmp_path / 'run.yaml'}"
    done = subprocess.run(
        ["bash", "-c", f"{command} | true; echo ${{PIPESTATUS[0]}}"], capture_output=True, text=True, check=True
    )
    assert (done.stdout, done.stderr) == ("141\n", "")


def test_another_pipe_that_breaks_is_an_error(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> int:
        raise BrokenPipeError("of a worker")

    monkeypatch.setattr(command_line, "dispatch", fail)
    with pytest.raises(BrokenPipeError, match="of a worker"):
        call("explain")
