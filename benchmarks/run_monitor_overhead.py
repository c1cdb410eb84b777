"""What monitors cost: steps with and without them, in turn, and the time that their own code takes in a step.

    python benchmarks/run_monitor_overhead.py --ranks 2 --rounds 8 --monitors ThroughputMonitor

Each round fits the same model with monitors and without, in one process a rank; odd rounds the other way round, so that a
machine that slows down or speeds up favours nobody. A ratio is the median over rounds of the ratio of median steps: of time on
the wall, which spreads by more than monitors cost where ranks wait for each other, and of the processor's time of the thread
that trains. The last figure is the time inside of hooks of monitors, the mean over steps.

The C library keeps what is freed (`mallopt`): else it gives the top of the heap back to the system in one fit and not in the
next, by chance, and steps differ by up to 3000 page faults, which is five times what monitors cost.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import statistics
import tempfile
import time
from typing import Any

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader, TensorDataset

from meshbolt import MeshStrategy, callbacks
from meshbolt.demos import ByteGPT
from meshbolt.testing import run_ranks

WARMUP = 5
# glibc's options, and values with which it neither gives memory back nor maps each large piece by itself.
KEEP_FREED = {-1: 2**31 - 1, -3: 32 * 2**20}


class Steps(pl.Callback):
    """Takes the time of each step, and how much of it was spent in hooks of monitors."""

    def __init__(self) -> None:
        self.ends: list[tuple[float, float]] = []
        self.hooks: list[float] = []
        self.spent = 0.0

    def on_train_batch_end(self, *_: Any) -> None:
        self.ends.append((time.perf_counter(), time.thread_time()))
        self.hooks.append(self.spent)
        self.spent = 0.0

    def surround(self, monitor: pl.Callback) -> None:
        """Take the time of a monitor's hooks."""
        for name in dir(pl.Callback):
            if name.startswith("on_") and getattr(type(monitor), name) is not getattr(pl.Callback, name):
                setattr(monitor, name, self._timed(getattr(monitor, name)))

    def _timed(self, hook: Any) -> Any:
        @functools.wraps(hook)
        def timed(*args: Any, **kwargs: Any) -> Any:
            since = time.perf_counter()
            try:
                return hook(*args, **kwargs)
            finally:
                self.spent += time.perf_counter() - since

        return timed


def fit(arguments: argparse.Namespace, directory: str, monitors: list[pl.Callback]) -> tuple[float, float, float]:
    """Return the median step on the wall and on the processor, and the mean time in hooks, in seconds."""
    steps = Steps()
    for monitor in monitors:
        steps.surround(monitor)
    inputs = torch.randint(0, 256, (arguments.batch * arguments.steps * arguments.ranks, 128))
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=arguments.ranks,
        strategy=MeshStrategy(zero=arguments.zero),
        max_steps=arguments.steps,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=directory,
        callbacks=[*monitors, steps],
        limit_val_batches=0,
    )
    trainer.fit(ByteGPT(), DataLoader(TensorDataset(inputs, inputs), batch_size=arguments.batch))
    pairs = list(zip(steps.ends[WARMUP:], steps.ends[WARMUP + 1 :], strict=False))
    wall, processor = (statistics.median(after[i] - before[i] for before, after in pairs) for i in range(2))
    return wall, processor, statistics.fmean(steps.hooks[WARMUP:])


def rank(arguments: argparse.Namespace, directory: str) -> list[dict[bool, tuple[float, float, float]]]:
    """Return what each round has measured, without monitors and with them."""
    torch.set_num_threads(1)
    for option, value in KEEP_FREED.items():
        ctypes.CDLL(None).mallopt(option, value)
    names = arguments.monitors.split(",")
    rounds = []
    for number in range(arguments.rounds):
        found = {}
        for watched in (False, True) if number % 2 else (True, False):
            monitors = [getattr(callbacks, name)() for name in names] if watched else []
            found[watched] = fit(arguments, directory, monitors)
        rounds.append(found)
    return rounds


def main() -> None:
    """Print both figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--zero", type=int, default=2)
    parser.add_argument("--monitors", default="ThroughputMonitor", help="classes of meshbolt.callbacks, by comma")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        rounds = run_ranks(rank, arguments.ranks, arguments, directory, timeout=1800)[0]
    plain = statistics.median(each[False][0] for each in rounds)
    hooks = statistics.median(each[True][2] for each in rounds)
    print(f"step without monitors: {1e3 * plain:.2f} ms (median of {arguments.rounds} rounds)")
    for index, clock in enumerate(("wall", "processor")):
        ratios = [each[True][index] / each[False][index] for each in rounds]
        print(f"with / without, {clock}: {statistics.median(ratios):.4f} ({min(ratios):.4f} to {max(ratios):.4f})")
        print("  of each round:", *(f"{ratio:.4f}" for ratio in ratios))
    print(f"inside of hooks: {1e6 * hooks:.0f} us a step, {hooks / plain:.2%} of it")


if __name__ == "__main__":
    main()
