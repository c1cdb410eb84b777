"""What a run runs on and in: versions, variables, machines."""

from __future__ import annotations

import os
import platform
import re
import shlex
import socket
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import psutil
import torch

from meshbolt.units import format_bytes

_PACKAGES = ("meshbolt", "torch", "lightning", "torchmetrics", "transformers", "numpy")
_VARIABLES = re.compile(
    r"MESHBOLT_|NCCL_|GLOO_|TORCH_|CUDA_VISIBLE_DEVICES$|OMP_NUM_THREADS$|PYTORCH_|SLURM_JOB_ID$|TORCHELASTIC_"
)
# Whatever may be a password is not written down.
_SECRET = re.compile(r"token|secret|passw|api.?key|credential", re.IGNORECASE)


def surroundings() -> list[tuple[str, str]]:
    """Return versions, the command, and the variables that change how a run runs: names and values."""
    rows = [("python", platform.python_version())]
    for package in _PACKAGES:
        try:
            rows.append((package, version(package)))
        except PackageNotFoundError:
            continue
    if torch.version.cuda is not None:
        rows.append(("cuda", torch.version.cuda))
        if torch.cuda.is_available() and torch.distributed.is_nccl_available():
            rows.append(("nccl", ".".join(map(str, torch.cuda.nccl.version()))))
    rows += [
        ("system", platform.platform()),
        ("threads of torch", str(torch.get_num_threads())),
        ("command", shlex.join(_without_secrets(sys.argv))),
        ("directory", str(Path.cwd())),
    ]
    found = sorted(name for name in os.environ if _VARIABLES.match(name))
    return rows + [(name, "(not shown)" if _SECRET.search(name) else os.environ[name]) for name in found]


def machine_of(trainer: pl.Trainer) -> dict[str, Any]:
    """Return what this rank is and runs on.

    Args:
        trainer: with its ranks connected.
    """
    device = trainer.strategy.root_device
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        name, memory = properties.name, properties.total_memory
    else:
        name, memory = f"{platform.machine()}, {os.cpu_count()} cores", psutil.virtual_memory().total
    mesh = getattr(trainer.strategy, "device_mesh", None)
    axes = [] if mesh is None else zip(mesh.mesh_dim_names or (), mesh.shape, mesh.get_coordinate() or (), strict=False)
    place = {axis: number for axis, size, number in axes if size > 1}
    return {
        "host": socket.gethostname(),
        "device": f"{device}: {name}",
        "memory": format_bytes(memory),
        **({"mesh": ", ".join(f"{axis} {number}" for axis, number in place.items())} if place else {}),
        "pid": os.getpid(),
    }


def restarts() -> int:
    """Return how often a scheduler has started this program again."""
    for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"):
        if os.environ.get(name, "").isdigit():
            return int(os.environ[name])
    return 0


def _without_secrets(words: list[str]) -> list[str]:
    shown: list[str] = []
    hide = False
    for word in words:
        name, equals, _ = word.partition("=")
        is_secret = bool(_SECRET.search(name))
        shown.append("(not shown)" if hide else (f"{name}=(not shown)" if is_secret and equals else word))
        hide = is_secret and not equals and word.startswith("-")
    return shown
