"""Arguments that several commands take."""

from __future__ import annotations

import jsonargparse


def parser_of(command: str, *, usage: str, description: str, example: str) -> jsonargparse.ArgumentParser:
    """Return the parser of a command on checkpoints; with `--json`.

    Args:
        command: its name.
        usage: its arguments in short.
        description: what it does.
        example: arguments of a call, for the help.
    """
    parser = jsonargparse.ArgumentParser(
        prog=f"meshbolt checkpoint {command}",
        usage=f"meshbolt checkpoint {command} {usage}",
        description=description,
        epilog=f"example: meshbolt checkpoint {command} {example}",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of text, and no progress")
    return parser


def add_output(parser: jsonargparse.ArgumentParser, *, what: str) -> None:
    """Add what a command takes that writes something.

    Args:
        parser: of the command.
        what: it writes.
    """
    parser.add_argument("out", help=f"{what} to make")
    parser.add_argument(
        "--force",
        action="store_true",
        help="replace what is at OUT, if it is a file, or a directory of weights or of a checkpoint, once the new is whole",
    )
    add_weights_only(parser)


def add_weights_only(parser: jsonargparse.ArgumentParser) -> None:
    """Add whether objects of any class are built.

    Args:
        parser: of the command.
    """
    parser.add_argument(
        "--weights-only",
        type=bool,
        default=True,
        help="false: build objects of any class, such as hyperparameters, which runs their code; true: plain data only",
    )
