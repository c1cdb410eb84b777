"""Tensor parallelism, sharding, and both on one GPU that several ranks share: they train as one process does."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from meshbolt.testing import needs

PROGRAM = Path(__file__).with_name("shared_gpu.py")
LIMIT_SECONDS = 150


def run_ranks_of(setting: str, precision: str, accelerator: str, ranks: int) -> list[str]:
    """Start the ranks as torchrun would on machines with one device each, and return what they print."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    together = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks), "LOCAL_RANK": "0"}
    together |= {"GLOO_SOCKET_IFNAME": "lo", "TORCHELASTIC_RUN_ID": "1", "LOCAL_WORLD_SIZE": "1"}
    command = [sys.executable, str(PROGRAM), setting, precision, accelerator]
    processes = [
        subprocess.Popen(
            command,
            env={**os.environ, **together, "RANK": str(rank), "GROUP_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(ranks)
    ]
    try:
        printed = [process.communicate(timeout=LIMIT_SECONDS)[0].rstrip() for process in processes]
        return [f"{text}\nexit code {each.returncode}" for text, each in zip(printed, processes, strict=True)]
    finally:
        for process in processes:
            process.kill()


@needs(gpus=1)
@pytest.mark.parametrize(
    ("setting", "precision", "ranks"),
    [
        ("tp2", "32-true", 2),
        ("tp2", "bf16-mixed", 2),
        ("tp2", "16-mixed", 2),
        ("tp2_whole_sequences", "32-true", 2),
        ("tp2_zero2", "32-true", 4),
        ("tp2_zero3", "32-true", 4),
        ("pp2", "32-true", 2),
        ("pp2", "bf16-mixed", 2),
        ("pp2_interleaved", "16-mixed", 2),
        ("pp2_zero3", "32-true", 4),
        ("pp2_tp2", "32-true", 4),
        ("zero1", "32-true", 2),
        ("zero3", "bf16-mixed", 2),
    ],
)
def test_ranks_that_share_one_gpu_train_as_one_process_does(setting: str, precision: str, ranks: int) -> None:
    word = "equal" if precision == "32-true" else "near"
    for printed in run_ranks_of(setting, precision, "gpu", ranks):
        assert printed.endswith(f"{word}\nexit code 0"), printed[-4000:]
