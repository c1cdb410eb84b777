"""`meshbolt doctor`: what of this machine and its packages is in the way of training, and the command that mends it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from meshbolt.cli.commands import DONE, NO
from meshbolt.cli.doctor.checks import all_checks
from meshbolt.cli.doctor.rows import run_checks
from meshbolt.cli.doctor.show import Progress, as_json, print_rows
from meshbolt.errors import ConfigError


def run(arguments: Sequence[str]) -> int:
    """Look at this machine; return 1 where something is red.

    Args:
        arguments: "doctor", then flags.

    Raises:
        ConfigError: a number of ranks below zero.
    """
    options = _parser().parse_args(arguments[1:])
    if options.ranks < 0:
        raise ConfigError(f"--ranks {options.ranks} is no number of ranks. Give 2 or more, or 0 to measure nothing.")
    with Progress(show=not options.json) as progress:
        rows = list(run_checks(all_checks(path=options.path, ranks=options.ranks), before=progress.before))
    if options.json:
        sys.stdout.write(as_json(rows) + "\n")
    else:
        print_rows(rows)
    return NO if any(row.status == "red" for row in rows) else DONE


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="meshbolt doctor",
        description="Look at what training stands on: versions that fit together, backends, GPUs, shared memory, limits, host "
        "memory, the network, the speed of a disk, and that of exchange between ranks. Each row is green, yellow or red, with "
        "what was found; for what is not green there is a command. It works where torch or Lightning cannot be imported. "
        "Exit code 1 where something is red.",
        epilog="It writes a nameless file of up to 512 MiB to the disk, which is gone afterwards, and takes some 10 seconds. "
        "example: meshbolt doctor --path scratch --ranks 4",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--path", metavar="DIR", help="folder for offloaded state, whose disk is measured; else this one"
    )
    parser.add_argument(
        "--ranks", type=int, default=2, metavar="N", help="processes that exchange (2); 0 leaves it out"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table, and no progress")
    return parser
