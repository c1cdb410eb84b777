"""The largest GPT that trains on this machine's GPUs with each place of parameters and optimizer state.

    python benchmarks/run_largest.py --contenders zero3 zero3_cpu zero3_all_cpu zero3_all_nvme --recompute full

The number of layers is doubled until a run of two steps fails, and then halved in between. Runs are those of `run_gpu.py`, in a
fresh process each. Without a GPU it says so and exits with 0; `--device cpu --memory-gib 4` checks the script itself.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
USUAL = ["zero3", "zero3_cpu", "zero3_all_cpu", "zero3_cpu_nvme", "zero3_all_nvme"]
_LIMIT_SECONDS = 600


def main() -> int:
    """Search for each contender, and print one JSON line each."""
    import torch

    arguments = _parse()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("skipped: this machine has no GPU that torch can use")
        return 0
    lines = [json.dumps(_largest(name, arguments)) for name in arguments.contenders]
    print("\n".join(lines))
    if arguments.output:
        Path(arguments.output).write_text("\n".join(lines) + "\n")
    return 0


def _largest(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    best: dict[str, Any] = {"contender": name, "layers": 0}
    good, bad = 0, None
    layers = arguments.layers
    while bad is None or bad - good > max(1, good // 8):
        result = _run(name, layers, arguments)
        print(f"{name}: {layers} layers {'train' if result else 'do not'}", file=sys.stderr, flush=True)
        if result:
            good, best = layers, {**result, "layers": layers, "parameters": _parameters(layers, arguments)}
        else:
            bad = layers
        layers = 2 * good if bad is None else (good + bad) // 2
        if layers == good:
            break
    return best


def _run(name: str, layers: int, arguments: argparse.Namespace) -> dict[str, Any] | None:
    sizes = {"layers": layers, "width": arguments.width, "heads": arguments.width // 128 or 1, "time": arguments.time}
    command = [
        sys.executable,
        str(HERE / "run_gpu.py"),
        "--contenders",
        name,
        "--rounds",
        "1",
        "--steps",
        "1",
        "--warmup",
        "1",
    ]
    command += ["--device", arguments.device, "--samples", str(arguments.samples), "--recompute", arguments.recompute]
    command += ["--sizes", json.dumps(sizes)]
    limit = arguments.memory_gib * 2**30 if arguments.memory_gib else resource.RLIM_INFINITY

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))

    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_LIMIT_SECONDS, preexec_fn=limited)
    except subprocess.TimeoutExpired:
        return None
    if done.returncode != 0:
        print(done.stderr.strip().splitlines()[-1:], file=sys.stderr)
        return None
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def _parameters(layers: int, arguments: argparse.Namespace) -> int:
    """Return the parameters of the layers, without embeddings."""
    return 12 * layers * arguments.width**2


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--contenders", nargs="+", default=USUAL, help="of run_gpu.py")
    parser.add_argument("--layers", type=int, default=32, help="to begin with")
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--time", type=int, default=1024)
    parser.add_argument("--samples", type=int, default=4, help="of one batch of one rank")
    parser.add_argument("--recompute", choices=("none", "full", "selective"), default="full")
    parser.add_argument("--memory-gib", type=int, default=0, help="of a process; 0: no limit")
    parser.add_argument("--output", help="file for the JSON lines")
    return parser.parse_args()


if __name__ == "__main__":
    raise SystemExit(main())
