"""A script for a process of its own: import modules, ask torch what it finds, and print each answer as a line of JSON.

It knows nothing of meshbolt, and its output is whole up to where it crashes or hangs: the module that was begun last is to blame.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_PINNED_BYTES = 256 * 2**20


def main(names: Sequence[str]) -> None:
    """Import modules, and describe torch.

    Args:
        names: of the modules.
    """
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what modules print is no answer

    def tell(what: str, **facts: Any) -> None:
        out.write(json.dumps({"what": what, **facts}, default=str) + "\n")

    warnings.simplefilter("ignore")
    for name in names:
        tell("begin", name=name)
        start = time.monotonic()
        try:
            module = importlib.import_module(name)
        except BaseException as error:  # a broken module raises what it likes
            tell("failed", name=name, error=f"{type(error).__name__}: {error}")
        else:
            tell("imported", name=name, seconds=time.monotonic() - start, file=getattr(module, "__file__", None))
    tell("begin", name="torch (what it finds)")
    if "torch" in sys.modules:
        tell("driver", **driver())
        tell("torch", **torch_facts())
    tell("end")


def torch_facts() -> dict[str, Any]:
    """Return what torch was built for and finds here."""
    torch: Any = sys.modules["torch"]
    facts: dict[str, Any] = {"version": torch.__version__, "cuda": torch.version.cuda, "hip": torch.version.hip}
    facts["distributed"] = _asked(lambda: torch.distributed.is_available(), False)
    if facts["distributed"]:
        facts["backends"] = {
            name: bool(_asked(getattr(torch.distributed, f"is_{name}_available"), False))
            for name in ("gloo", "nccl", "mpi")
        }
    facts["gpus"] = []
    if torch.version.cuda is None and torch.version.hip is None:
        return facts
    facts["nccl_version"] = _asked(lambda: ".".join(map(str, torch.cuda.nccl.version())), None)
    try:
        torch.cuda.init()
    except Exception as error:
        return {**facts, "cuda_error": str(error)}
    return {**facts, **gpu_facts(torch)}


def gpu_facts(torch: Any) -> dict[str, Any]:
    """Return what is known of each GPU, which of them reach each other, and how fast memory is pinned."""
    count = torch.cuda.device_count()
    gpus = []
    for number in range(count):
        properties = torch.cuda.get_device_properties(number)
        free, total = torch.cuda.mem_get_info(number)
        capability = f"{properties.major}{properties.minor}"
        gpus.append({"name": properties.name, "capability": capability, "free_bytes": free, "total_bytes": total})
    pairs = [(a, b) for a in range(count) for b in range(count) if a != b]
    apart = [[a, b] for a, b in pairs if not torch.cuda.can_device_access_peer(a, b)]
    return {"gpus": gpus, "apart": apart, "architectures": torch.cuda.get_arch_list(), **_pinned(torch)}


def _pinned(torch: Any) -> dict[str, Any]:
    if not torch.cuda.device_count():
        return {}
    start = time.monotonic()
    try:
        torch.empty(_PINNED_BYTES, dtype=torch.uint8, pin_memory=True)
    except RuntimeError as error:
        return {"pinned_error": str(error).splitlines()[0]}
    return {"pinned_bytes": _PINNED_BYTES, "pinned_seconds": time.monotonic() - start}


def driver() -> dict[str, Any]:
    """Return the version of NVIDIA's driver, and of CUDA that it can run; nothing where there is none."""
    facts: dict[str, Any] = {}
    described = Path("/proc/driver/nvidia/version")
    if described.exists():
        facts["driver"] = next(
            (word for word in described.read_text().split() if word[:1].isdigit() and "." in word), ""
        )
    try:
        version = ctypes.c_int()
        if ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version)) == 0:
            facts["cuda"] = f"{version.value // 1000}.{version.value % 1000 // 10}"
    except OSError:
        pass
    return facts


def _asked(question: Any, otherwise: Any) -> Any:
    try:
        return question()
    except Exception:  # a part that this torch was built without
        return otherwise


if __name__ == "__main__":
    # Not this script's folder, whose files are no modules of anybody's; and meshbolt where it is only on the parent's path.
    sys.path[0:1] = []
    sys.path.append(str(Path(__file__).parents[3]))
    main(sys.argv[1:])
