from __future__ import annotations

import contextlib
import io
import os
import pty
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace

import pytest
from rich.cells import cell_len
from rich.console import Console

from meshbolt.callbacks import console
from meshbolt.callbacks.console import is_terminal, print_table
from meshbolt.callbacks.screens import MOST_LINES, LineScreen, LiveScreen, Status, _Panels, open_screen, packed

STATUS = Status(
    activity="training",
    unit="step",
    done=3,
    total=10,
    remaining="1:02 left",
    metrics=["loss 2.1"],
    rates=["12 samples/s"],
)


@pytest.fixture
def on_terminal(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], None]], str]:
    """Run a function with the standard output on a pseudo-terminal, and return what was written there."""

    def run(function: Callable[[], None]) -> str:
        monkeypatch.setenv("TERM", "xterm-256color")
        monkeypatch.setenv("COLUMNS", "120")
        reader, writer = pty.openpty()
        pieces: list[str] = []
        # A terminal holds little, and whoever writes waits for whoever reads.
        reading = threading.Thread(target=lambda: pieces.append(read_all(reader)))
        reading.start()
        with monkeypatch.context() as patch, os.fdopen(writer, "w") as stream:
            patch.setattr("sys.stdout", stream)
            function()
            stream.flush()
        reading.join()
        os.close(reader)
        return "".join(pieces)

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

    assert capsys.readouterr().out == "training | step 3 of 10 | 1:02 left | loss 2.1 | 12 samples/s\n"


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

    for part in ("training", "step 3 of 10", "30%", "loss 2.1", "12 samples/s", "1:02 left", "╭", "╯"):
        assert part in written
    assert "a line that stays" in written
    assert "\x1b[J" in written, "the panel is erased and drawn again"
    assert has_colour(written)


def test_only_what_was_said_is_left_when_drawing_ends(on_terminal: Callable[[Callable[[], None]], str]) -> None:
    def run() -> None:
        screen = open_screen(interval_seconds=0.0)
        for done in (1, 2, 3):
            screen.show(replace(STATUS, done=done))
            screen.show(replace(STATUS, activity="validation"))
            screen.finish("validation")
            screen.say(f"line {done}")
        screen.close()
        print("after")

    written = on_terminal(run)
    assert seen(written) == ["line 1", "line 2", "line 3", "after"]
    assert "\x1b[?25l" not in written, "the cursor is never hidden, so that no end of a program can leave it so"


def test_what_is_printed_beside_the_panel_stays_readable(on_terminal: Callable[[Callable[[], None]], str]) -> None:
    def run() -> None:
        screen, plain = open_screen(interval_seconds=0.0), sys.__stdout__
        screen.show(STATUS)
        print("one\ntwo")
        screen.show(STATUS)
        print("a part", end="")
        screen.show(STATUS)
        assert plain is sys.__stdout__
        # Another rank, or a handler that keeps the stream it was made with.
        sys.stdout.plain.write("another rank\n")  # type: ignore[union-attr]
        screen.show(STATUS)
        screen.close()

    assert seen(on_terminal(run)) == ["one", "two", "a part", "another rank"]


def test_the_panel_stands_below_what_was_printed(on_terminal: Callable[[Callable[[], None]], str]) -> None:
    def run() -> None:
        screen = open_screen(interval_seconds=0.0)
        screen.show(STATUS)
        sys.stdout.plain.write("another rank\n")  # type: ignore[union-attr]
        screen.show(STATUS)

    first, blank, *panel = seen(on_terminal(run))
    assert (first, blank) == ("another rank", "")
    assert panel[0].startswith("╭─ training")
    assert [line[:1] for line in panel] == ["╭", "│", "│", "│", "╰"]


def test_streams_are_given_back(on_terminal: Callable[[Callable[[], None]], str]) -> None:
    def run() -> None:
        before = sys.stdout
        screen = open_screen(interval_seconds=0.0)
        assert sys.stdout is not before
        screen.show(STATUS)
        screen.close()
        assert sys.stdout is before
        screen.close()

    on_terminal(run)


def test_a_panel_is_never_higher_than_the_terminal(
    on_terminal: Callable[[Callable[[], None]], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LINES", "5")
    written = on_terminal(lambda: open_screen(interval_seconds=0.0).show(STATUS))

    assert len(seen(written)) == 1 + 3


@pytest.mark.full
def test_a_program_that_ends_while_a_panel_is_drawn_takes_it_away() -> None:
    program = (
        "import sys\nfrom meshbolt.callbacks.screens import Status, open_screen\n"
        "open_screen(interval_seconds=0).show(Status(activity='training', unit='step', done=1, total=2))\nsys.exit(3)\n"
    )
    reader, writer = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color"}
    ended = subprocess.run([sys.executable, "-c", program], stdout=writer, env=environment, check=False)
    os.close(writer)
    written = read_all(reader)
    os.close(reader)

    assert ended.returncode == 3
    assert "training" in written
    assert seen(written) == []


@pytest.mark.parametrize("columns", [200, 80, 40, 12, 1])
def test_a_panel_is_as_wide_as_the_terminal_is_at_that_moment(columns: int) -> None:
    status = replace(STATUS, metrics=[f"a_metric_with_a_long_name/{number} 1.0" for number in range(4)])
    screen = Console(width=columns, file=io.StringIO(), force_terminal=True, color_system=None)
    screen.print(_Panels([status]))
    lines = screen.file.getvalue().splitlines()  # type: ignore[attr-defined]

    assert all(cell_len(line) <= columns for line in lines)
    assert len(lines) <= 2 + 1 + 2 * MOST_LINES


def test_what_stays_on_the_terminal_is_not_cut_to_its_width(on_terminal: Callable[[Callable[[], None]], str]) -> None:
    def say() -> None:
        screen = open_screen(interval_seconds=0.0)
        screen.say("x" * 300)
        screen.close()

    assert "x" * 300 in on_terminal(say)


def test_items_are_packed_into_lines_whole() -> None:
    assert packed(["a 1", "bb 2", "ccc 3"], width=12, most=5) == ["a 1   bb 2", "ccc 3"]


def test_an_item_that_is_too_long_loses_its_middle_and_keeps_its_value() -> None:
    assert packed(["validation/mean_average_precision 0.51"], width=20, most=5) == ["validation…sion 0.51"]


def test_items_that_have_no_place_are_counted() -> None:
    assert packed([f"m{number} 1" for number in range(9)], width=4, most=3) == ["m0 1", "m1 1", "an…e"]
    assert packed([f"m{number} 1" for number in range(9)], width=12, most=3)[-1] == "and 5 more"


@pytest.mark.parametrize("terminal", ["dumb", "unknown"])
def test_a_terminal_that_cannot_be_redrawn_gets_lines(
    terminal: str, on_terminal: Callable[[Callable[[], None]], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def show() -> None:
        monkeypatch.setenv("TERM", terminal)
        screen = open_screen(interval_seconds=0.0)
        screen.show(STATUS)

    assert "\x1b" not in on_terminal(show)


def test_a_notebook_gets_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stream(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", "xterm-256color")
    with monkeypatch.context() as patch:
        patch.setattr("sys.stdout", Stream())
        assert is_terminal()
        # What rich asks to find out where it is; a kernel is no dependency of ours.
        patch.setattr("rich.console._is_jupyter", lambda: True)
        assert not is_terminal()


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
    """Read until nobody writes any more; a terminal hands it out in pieces."""
    pieces = []
    with contextlib.suppress(OSError):  # nobody is left who could write
        while piece := os.read(descriptor, 4096):
            pieces.append(piece)
    return b"".join(pieces).decode()


def seen(written: str) -> list[str]:
    """Return what a terminal shows after all that: it knows ends of lines, erasing below, and going up."""
    lines, row, column = [""], 0, 0
    for part in re.findall(r"\x1b\[[\d;]*[A-Za-z]|.|\n|\r", written):
        if part == "\x1b[J":
            lines = [*lines[:row], lines[row][:column]]
        elif part.endswith("A") and part.startswith("\x1b"):
            row -= int(part[2:-1])
        elif part == "\r":
            column = 0
        elif part == "\n":
            row += 1
            lines += [""] * (row - len(lines) + 1)
        elif not part.startswith("\x1b"):
            lines[row] = lines[row][:column].ljust(column) + part + lines[row][column + 1 :]
            column += 1
    while lines and not lines[-1]:
        lines.pop()
    return [line.rstrip() for line in lines]
