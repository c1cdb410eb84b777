"""Find the command that is named, and run it."""

from __future__ import annotations

import os
import select
import sys
import traceback
from collections.abc import Mapping
from types import MappingProxyType

import meshbolt
from meshbolt.cli.commands import BAD_USAGE, DONE, NO, READER_IS_GONE, Command, Group, dispatch
from meshbolt.environment import read_environment
from meshbolt.errors import CheckpointError, MeshboltError

COMMANDS: Mapping[str, Command] = MappingProxyType(
    {
        "fit": Command("meshbolt.cli.train", "train a model"),
        "validate": Command("meshbolt.cli.train", "evaluate a model on validation data"),
        "test": Command("meshbolt.cli.train", "evaluate a model on test data"),
        "predict": Command("meshbolt.cli.train", "run a model on data and collect what it returns"),
        "launch": Command("meshbolt.cli.launch", "run a script, a module or one of the commands above on many ranks"),
        "explain": Command(
            "meshbolt.cli.explain", "show the plan a configuration comes to, and where each value is from"
        ),
        "verify": Command(
            "meshbolt.cli.verify", "cut a model into pipeline stages in one process, and compare gradients"
        ),
        "doctor": Command(
            "meshbolt.cli.doctor.main", "look at this machine and its packages, and say what is in the way of training"
        ),
        "report": Command("meshbolt.cli.report", "write a report of a run from the records it left"),
        "checkpoint": Command("meshbolt.cli.checkpoint.main", "list, inspect, verify, export and import checkpoints"),
    }
)


def main() -> int:
    """Run the command line in `sys.argv`, and return the exit code."""
    arguments = sys.argv[1:]
    if arguments[:1] == ["--version"]:
        sys.stdout.write(f"meshbolt {meshbolt.__version__}\n")
        return DONE
    group = Group(
        program="meshbolt",
        about="Train a model that one GPU cannot hold: ZeRO, tensor and pipeline parallelism for any LightningModule.",
        example="meshbolt fit --config configs/gpt_zero2.yaml --trainer.max_steps 100",
        commands=COMMANDS,
    )
    debug = False
    try:
        debug = read_environment().debug
        code = dispatch(group, arguments)
        sys.stdout.flush()
    except BrokenPipeError:
        if not _reader_is_gone():
            raise  # it was another pipe
        return READER_IS_GONE
    except MeshboltError as error:
        sys.last_value = error  # as after any other error, for a launcher that looks for it
        if debug:
            traceback.print_exc()
        sys.stderr.write(f"meshbolt {arguments[0]}: {_rank()}{type(error).__name__}: {error}\n")
        return NO if isinstance(error, CheckpointError) else BAD_USAGE
    return code


def _reader_is_gone() -> bool:
    """Return whether nobody reads what is printed any more, as after `| head`; what is still buffered is dropped then."""
    try:
        output = sys.stdout.fileno()
        poll = select.poll()
    except (AttributeError, OSError):  # a system without it, or a standard output that is no file
        return False
    poll.register(output, select.POLLOUT)
    if not any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), output)
    return True


def _rank() -> str:
    """Return which rank speaks, where it is not the first: an error is raised on all of them."""
    rank = os.environ.get("LOCAL_RANK", "0")
    return "" if rank == "0" else f"[local rank {rank}] "
