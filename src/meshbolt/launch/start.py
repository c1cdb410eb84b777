"""Runs a program as one rank, and records what it fails with where torchrun looks for it.

It is called by its path and imports neither torch nor meshbolt: what the program itself sets before it imports them counts.
"""

from __future__ import annotations

import ctypes
import json
import os
import runpy
import signal
import sys
import time
import traceback
from pathlib import Path
from types import TracebackType

_PR_SET_PDEATHSIG = 1
_FILE = "TORCHELASTIC_ERROR_FILE"


def end_with_parent() -> None:
    """Ask the system to kill this process when the one that started it dies, however it does."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def record(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Write an error as torch's launchers read it; where nobody looks for it, do nothing.

    Args:
        kind: its class.
        error: what ends this process.
        trace: where it was raised.
    """
    place = os.environ.get(_FILE)
    if not place:
        return
    now = time.time()
    content = {
        "message": {
            "message": f"{kind.__name__}: {error}",
            "extraInfo": {
                "py_callstack": "".join(traceback.format_exception(kind, error, trace)),
                "timestamp": str(int(now)),
                "seconds": now,
                # Errors of this family say that another rank has failed.
                "is_of_another": any(each.__name__ == "RankError" for each in kind.__mro__),
            },
        }
    }
    # Whoever reads the file, which is also looked for while this process still writes, sees all of it or none.
    written = Path(f"{place}.part")
    written.parent.mkdir(parents=True, exist_ok=True)
    written.write_text(json.dumps(content))
    written.replace(place)


def run(kind: str, name: str, arguments: list[str]) -> None:
    """Run a program as if Python had been called with it.

    Args:
        kind: "script", "module" or "command".
        name: of it.
        arguments: of it.
    """
    if kind == "script":
        sys.argv = [name, *arguments]
        sys.path[0] = str(Path(name).resolve().parent)
        runpy.run_path(name, run_name="__main__")
        return
    sys.path[0] = str(Path.cwd())
    if kind == "command":
        # The launcher has decided how many ranks there are, and on a restart perhaps anew.
        devices, nodes = os.environ.get("LOCAL_WORLD_SIZE"), os.environ.get("GROUP_WORLD_SIZE")
        told = [f"--trainer.devices={devices}", f"--trainer.num_nodes={nodes}"] if devices and nodes else []
        arguments = [name, *arguments, *told]
        name = "meshbolt"
    sys.argv = [name, *arguments]
    runpy.run_module(name, run_name="__main__", alter_sys=True)


def main() -> None:
    """Run what the arguments name."""
    end_with_parent()
    show = sys.excepthook

    def show_and_record(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        record(kind, error, trace)
        show(kind, error, trace)

    # What a program puts in its place later calls it, as hooks do: an error may become that of another rank on the way.
    sys.excepthook = show_and_record
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True, write_through=False)  # type: ignore[union-attr]
    try:
        run(sys.argv[1], sys.argv[2], sys.argv[3:])
    except SystemExit as ended:
        error = getattr(sys, "last_value", None)
        if ended.code not in (None, 0) and isinstance(error, BaseException):
            record(type(error), error, error.__traceback__)
        raise
    except BaseException as error:
        trace = _without_this_file(error.__traceback__)
        sys.excepthook(type(error), error.with_traceback(trace), trace)
        if not Path(os.environ.get(_FILE, os.devnull)).exists():
            record(type(error), error, trace)  # a hook of the program's own has called nobody
        sys.exit(128 + signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1)


def _without_this_file(trace: TracebackType | None) -> TracebackType | None:
    own = (__file__, runpy.__file__, "<frozen runpy>")
    while trace is not None and trace.tb_next is not None and trace.tb_frame.f_code.co_filename in own:
        trace = trace.tb_next
    return trace


if __name__ == "__main__":
    main()
