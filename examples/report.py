"""A small GPT in a pipeline of two ranks, and what its run did as one HTML file: curves, times, memory, a step of the pipeline.

    python examples/report.py

The file is `report/report.html`, beside the records that it was made from: `meshbolt report report` makes it again.
"""

from __future__ import annotations

import lightning.pytorch as pl

from meshbolt import MeshStrategy
from meshbolt.callbacks import MemoryMonitor, RunReport, ThroughputMonitor
from meshbolt.demos import ByteGPT, PydocText

if __name__ == "__main__":
    report = RunReport()
    trainer = pl.Trainer(
        strategy=MeshStrategy(zero=1, pipeline_parallel=2),
        accelerator="cpu",
        devices=2,
        max_steps=40,
        val_check_interval=10,
        limit_val_batches=2,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        default_root_dir="report",
        callbacks=[report, ThroughputMonitor(every=4), MemoryMonitor(every=4)],
    )
    trainer.fit(ByteGPT(), PydocText())
    if trainer.is_global_zero:
        print(f"open {report.path} in a browser")
