"""`meshbolt checkpoint verify`: whether a checkpoint is what was saved, byte by byte."""

from __future__ import annotations

from collections.abc import Sequence

from meshbolt.callbacks.console import write_line
from meshbolt.checkpoint import is_checkpoint, verify_checkpoint
from meshbolt.checkpoint.deepspeed import is_deepspeed
from meshbolt.cli.checkpoint.arguments import parser_of
from meshbolt.cli.checkpoint.progress import watched
from meshbolt.cli.checkpoint.told import tell_json
from meshbolt.cli.commands import DONE, NO
from meshbolt.errors import UnsupportedError
from meshbolt.units import format_bytes


def run(arguments: Sequence[str]) -> int:
    """Compare a checkpoint with its checksums; return 1 where it is not whole.

    Args:
        arguments: "verify", then the checkpoint and flags.

    Raises:
        UnsupportedError: it is DeepSpeed's, and has no checksums.
    """
    parser = parser_of(
        "verify",
        usage="CKPT [--json]",
        description="Compare every byte of a checkpoint with its checksums. Exit code 1 where it is not what was saved.",
        example="run.ckpt",
    )
    parser.add_argument("checkpoint", help="its directory")
    options = parser.parse_args(list(arguments[1:]))
    if not is_checkpoint(options.checkpoint) and is_deepspeed(options.checkpoint):
        raise UnsupportedError(
            f"{options.checkpoint!r} is DeepSpeed's, whose files have no checksums to compare them with. `meshbolt checkpoint "
            f"inspect {options.checkpoint}` says whether files are missing, cut off or of another save; what `meshbolt "
            f"checkpoint import {options.checkpoint} OUT` makes of it has checksums."
        )
    read = 0
    with watched("verifying", show=not options.json) as watch:

        def on_bytes(num_bytes: int) -> None:
            nonlocal read
            read += num_bytes
            watch.on_bytes(num_bytes)

        faults = verify_checkpoint(options.checkpoint, on_bytes=on_bytes)
    if options.json:
        tell_json({"checkpoint": options.checkpoint, "whole": not faults, "bytes": read, "faults": list(faults)})
    elif faults:
        write_line("\n".join([f"{options.checkpoint} is not whole:", *(f"  {fault}" for fault in faults)]))
    else:
        write_line(f"{options.checkpoint} is whole: {format_bytes(read)} read")
    return NO if faults else DONE
