"""What the memory of each rank holds while a small GPT trains on two of them, and when it is at its peak.

    python examples/memory.py

The same numbers come with any other strategy: more of them are whole with "zero0", fewer with "zero3".
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import lightning.pytorch as pl

import meshbolt  # noqa: F401  # registers the strategies
from meshbolt.callbacks import MemoryMonitor
from meshbolt.demos import ByteGPT, PydocText
from meshbolt.monitoring import read_records
from meshbolt.units import format_bytes

if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as directory:
        trainer = pl.Trainer(
            strategy="zero2",
            accelerator="cpu",
            devices=2,
            max_steps=10,
            limit_val_batches=0,
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            default_root_dir=directory,
            callbacks=[MemoryMonitor(every=5, directory=Path(directory, "records"))],
        )
        trainer.fit(ByteGPT(), PydocText())
        if trainer.is_global_zero:
            found = [record for record in read_records(Path(directory, "records")) if record["kind"] == "memory"]
            values = {
                name: value for record in found for name, value in record["values"].items() if record["rank"] == 0
            }
            for name, value in values.items():
                print(f"{name:35}", format_bytes(value) if name.endswith("_bytes") else value)
