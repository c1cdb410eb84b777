from __future__ import annotations

import contextlib
import os
import pty
import re
from collections.abc import Callable

import pytest
from rich.console import Console

from meshbolt.callbacks import console
from meshbolt.callbacks.console import is_terminal, print_table
from meshbolt.callbacks.screens import LineScreen, LiveScreen, Status, open_screen

STATUS = Status(activity="training", unit="step", done=3, total=10, details=["loss 2.1", "1:02 left"])


@pytest.fixture
def on_terminal(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], None]], str]:
    """Run a function with the standard output on a pseudo-terminal, and return what was written there."""

    def run(function: Callable[[], None]) -> str:
        monkeypatch.setenv("TERM", "xterm-256color")
        monkeypatch.setenv("COLUMNS", "120")
        reader, writer = pty.openpty()
        with monkeypatch.context() as patch, os.fdopen(writer, "w") as stream:
            patch.setattr("sys.stdout", stream)
            function()
            stream.flush()
            os.set_blocking(reader, False)
            written = read_all(reader)
        os.close(reader)
        return written

    return run


def show_one_status() -> None:
    screen = open_screen(interval_seconds=0.0)
    assert isinstance(screen, LiveScreen)
    screen.show(STATUS)
    screen.say("a line that stays")
    screen.finish("training")
    screen.close()


def test_a_file_gets_whole_lines_without_control_codes(capsys: pytest.CaptureFixture[str]) -> None:
    screen = open_screen(interval_seconds=0.0)
    assert isinstance(screen, LineScreen)
    screen.show(STATUS)
    screen.close()

    assert capsys.readouterr().out == "training | step 3 of 10 | loss 2.1 | 1:02 left\n"


def test_lines_are_due_once_in_an_interval(capsys: pytest.CaptureFixture[str]) -> None:
    screen = LineScreen(interval_seconds=3600)
    assert not screen.is_due()
    hasty = LineScreen(interval_seconds=0)
    assert hasty.is_due()


@pytest.mark.parametrize("variable", ["FORCE_COLOR", "TTY_COMPATIBLE"])
def test_a_variable_that_asks_for_colours_does_not_make_a_file_a_terminal(
    variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, "1")
    assert Console().is_terminal, "rich believes the variable, which is why the stream itself is asked"

    assert not is_terminal()


def test_a_terminal_is_redrawn_and_coloured(
    on_terminal: Callable[[Callable[[], None]], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    written = on_terminal(show_one_status)

    assert "step 3 of 10 | loss 2.1 | 1:02 left" in written
    assert "a line that stays" in written
    assert "\x1b[2K" in written, "the line is erased and drawn again"
    assert has_colour(written)


def test_no_colour_is_drawn_where_the_user_asked_for_none(
    on_terminal: Callable[[Callable[[], None]], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_COLOR", "1")

    assert not has_colour(on_terminal(show_one_status))


def test_a_table_in_a_file_is_plain_columns(capsys: pytest.CaptureFixture[str]) -> None:
    print_table("plan", columns=("setting", "value"), rows=[("zero.stage", "2"), ("x", "[a, b]")])

    assert capsys.readouterr().out == "plan\n  setting     value\n  zero.stage  2\n  x           [a, b]\n"


def test_a_table_without_heads_has_none(capsys: pytest.CaptureFixture[str]) -> None:
    print_table("this run", columns=("", ""), rows=[("ranks", "2")])

    assert capsys.readouterr().out == "this run\n  ranks  2\n"


def test_a_table_on_a_terminal_has_lines(on_terminal: Callable[[Callable[[], None]], str]) -> None:
    written = on_terminal(lambda: console.print_table("plan", columns=("a", "b"), rows=[("[x]", "[/y]")]))

    assert "│" in written
    assert "[x]" in written
    assert "[/y]" in written, "values are not taken for rich's markup"


def has_colour(text: str) -> bool:
    """Whether a foreground colour is set anywhere: codes 30 to 38 and 90 to 97."""
    return bool(re.search(r"\x1b\[(\d+;)*(3[0-8]|9[0-7])[;m]", text))


def read_all(descriptor: int) -> str:
    """Read what is there; a terminal hands it out in pieces."""
    pieces = []
    with contextlib.suppress(BlockingIOError):
        while piece := os.read(descriptor, 4096):
            pieces.append(piece)
    return b"".join(pieces).decode()
