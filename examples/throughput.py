"""How fast a small GPT trains on two ranks, where the time of a step goes, and how near it comes to what this CPU can do.

    python examples/throughput.py

What a GPU can do is known by its name; a CPU's peak is measured here first, by multiplying matrices.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import lightning.pytorch as pl
import torch

import meshbolt  # noqa: F401  # registers the strategies
from meshbolt.callbacks import ThroughputMonitor
from meshbolt.demos import ByteGPT, PydocText
from meshbolt.monitoring import read_records


def peak_of_a_core(size: int = 512, seconds: float = 0.5) -> float:
    """Return the floating-point operations that one core does in a second, multiplying matrices."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    left, right = torch.randn(size, size), torch.randn(size, size)
    times = []
    start = time.perf_counter()
    while time.perf_counter() - start < seconds:
        since = time.perf_counter()
        left @ right
        times.append(time.perf_counter() - since)
    torch.set_num_threads(threads)
    return 2 * size**3 / min(times)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as directory:
        trainer = pl.Trainer(
            strategy="zero2",
            accelerator="cpu",
            devices=2,
            max_steps=20,
            limit_val_batches=0,
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            default_root_dir=directory,
            callbacks=[ThroughputMonitor(every=10, peak_flops=peak_of_a_core(), directory=Path(directory, "records"))],
        )
        trainer.fit(ByteGPT(), PydocText())
        if trainer.is_global_zero:
            *_, last = (record for record in read_records(Path(directory, "records")) if record["rank"] == 0)
            for name, value in last["values"].items():
                print(f"{name:45}", f"{value:.4g}" if isinstance(value, float) else value)
