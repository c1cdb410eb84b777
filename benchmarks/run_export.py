"""Memory of converting a checkpoint: growth of resident memory over the process before, for each format, both ways.

    python benchmarks/run_export.py --gigabytes 4

A checkpoint of weights and two moments, in tensors of up to 256 MiB, is written once, without ever being in memory whole.
Beside it stands as much as DeepSpeed saves it under ZeRO-3, in the files of eight ranks.
Then each conversion runs in a process of its own, whose memory is sampled every millisecond: RssAnon is what it holds, RSS
counts mapped files as well. The bound for exports is two shards of 512 MiB and the largest tensor. One JSON line each; the
exit code is 1 if an export is over the bound.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

MIB = 2**20
LARGEST_BYTES = 256 * MIB
BOUND_BYTES = 2 * 512 * MIB + LARGEST_BYTES
WIDTH = 8192
RANKS = 8
EXPORTS = {"safetensors": {"everything": True}, "hf": {}, "lightning": {}, "dcp": {}}


def resident_bytes() -> tuple[int, int]:
    """Return this process's anonymous resident memory, and all of its resident memory."""
    lines = Path("/proc/self/status").read_text().splitlines()
    found = {line.split()[0]: int(line.split()[1]) * 1024 for line in lines if line.startswith(("RssAnon", "VmRSS"))}
    return found["RssAnon:"], found["VmRSS:"]


class Sampler(threading.Thread):
    """Samples the memory of this process every millisecond, and keeps the highest values."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peaks = (0, 0)
        self.running = True

    def run(self) -> None:
        while self.running:
            self.peaks = tuple(map(max, self.peaks, resident_bytes()))  # type: ignore[assignment]
            time.sleep(0.001)


def make(folder: Path, num_bytes: int) -> None:
    """Write the checkpoint."""
    import torch

    from meshbolt.checkpoint import TensorInfo, save_directory
    from meshbolt.checkpoint.lazy import LazyTensor
    from meshbolt.checkpoint.tree import split_tensors

    rows = LARGEST_BYTES // 4 // WIDTH
    names = [f"net.layers.{number}.weight" for number in range(-(-num_bytes // (3 * LARGEST_BYTES)))]
    info = TensorInfo(shape=(rows, WIDTH), dtype=torch.float32)

    def lazy(seed: int) -> torch.Tensor:
        def values() -> torch.Tensor:
            return torch.randn(info.shape, generator=torch.Generator().manual_seed(seed))

        return LazyTensor(values, info=info, keeps_parts=False)

    tree = {
        "state_dict": {name: lazy(3 * index) for index, name in enumerate(names)},
        "optimizer_states": [
            {
                "state": {
                    name: {"exp_avg": lazy(3 * index + 1), "exp_avg_sq": lazy(3 * index + 2)}
                    for index, name in enumerate(names)
                },
                "param_groups": [{"lr": 1e-3, "params": names}],
            }
        ],
        "pytorch-lightning_version": "2.6.0",
        "global_step": 1,
        "epoch": 0,
    }
    tensors: dict[str, torch.Tensor] = {}
    objects = {key: split_tensors(value, key, tensors) for key, value in tree.items()}
    save_directory(folder / "run.ckpt", tensors=tensors, objects=objects)


def make_deepspeeds(folder: Path, num_bytes: int) -> None:
    """Write as much as DeepSpeed does under ZeRO-3: of each rank a file with its parts of weights and moments."""
    import torch

    shape = torch.Size((LARGEST_BYTES // 4 // WIDTH, WIDTH))
    names = [f"net.layers.{number}.weight" for number in range(-(-num_bytes // (3 * LARGEST_BYTES)))]
    place = folder / "deepspeed" / "global_step1"
    place.mkdir(parents=True)
    for rank in range(RANKS):
        model = {
            "module": {name: torch.empty(0, dtype=torch.bfloat16) for name in names},
            "buffer_names": [],
            "param_shapes": [dict.fromkeys(names, shape)],
            "global_steps": 1,
            "dp_world_size": RANKS,
        }
        torch.save(model, place / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt")
        flat, first, second = (torch.randn(len(names) * shape.numel() // RANKS) for _ in range(3))
        state = {"state": {0: {"exp_avg": first, "exp_avg_sq": second}}, "param_groups": [{"lr": 1e-3, "params": [0]}]}
        shards = {"zero_stage": 3, "partition_count": RANKS, "optimizer_state_dict": state, "fp32_flat_groups": [flat]}
        torch.save({"optimizer_state_dict": shards}, place / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")


def convert(folder: Path, what: str) -> None:
    """Run one conversion and print what it took."""
    import torch

    from meshbolt.checkpoint.formats import ExportOptions, export_checkpoint, import_checkpoint

    torch.set_num_threads(1)
    direction, name = what.split(":")
    sampler, before, start = Sampler(), resident_bytes(), time.perf_counter()
    sampler.start()
    if direction == "export":
        done = export_checkpoint(folder / "run.ckpt", folder / name, to=name, options=ExportOptions(**EXPORTS[name]))
    else:
        done = import_checkpoint(folder / name, folder / "import.ckpt", overwrite=True)
    seconds = time.perf_counter() - start
    sampler.running = False
    anonymous, resident = (peak - base for peak, base in zip(sampler.peaks, before, strict=True))
    line = {
        "conversion": what,
        "torch": str(torch.__version__),
        "tensors_gib": round(done.num_bytes / 2**30, 2),
        "largest_mib": LARGEST_BYTES // MIB,
        "bound_mib": BOUND_BYTES // MIB,
        "rss_anon_growth_mib": round(anonymous / MIB),
        "rss_growth_mib": round(resident / MIB),
        "seconds": round(seconds, 1),
    }
    print(json.dumps(line), flush=True)
    sys.exit(int(direction == "export" and resident > BOUND_BYTES))


def main() -> int:
    """Run every conversion in a fresh process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=4)
    parser.add_argument("--folder", type=Path, help="where to write; a temporary one, which is removed, if left out")
    parser.add_argument("--step", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.step == "make":
        make(arguments.folder, int(arguments.gigabytes * 10**9))
        make_deepspeeds(arguments.folder, int(arguments.gigabytes * 10**9))
        return 0
    if arguments.step:
        convert(arguments.folder, arguments.step)
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        command = [sys.executable, __file__, "--gigabytes", str(arguments.gigabytes), "--folder", str(folder)]
        # Large blocks go back to the system at once, so that resident memory is what is held.
        environment = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_TRIM_THRESHOLD_": "0"}
        subprocess.run([*command, "--step", "make"], env=environment, check=True)
        steps = [f"{direction}:{name}" for name in EXPORTS for direction in ("export", "import")] + ["import:deepspeed"]
        codes = [subprocess.run([*command, "--step", step], env=environment, check=False).returncode for step in steps]
    return int(any(codes))


if __name__ == "__main__":
    sys.exit(main())
