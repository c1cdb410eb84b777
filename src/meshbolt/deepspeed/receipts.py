"""What became of every key of a file, where the engine's loop reads it: the same rows, in the words of that loop."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType

from meshbolt.deepspeed.run import CLIP, Run
from meshbolt.deepspeed_json import Receipt
from meshbolt.deepspeed_json.batch import EACH, STEPS, TOTAL
from meshbolt.deepspeed_json.key import HONOURED, IGNORED
from meshbolt.deepspeed_json.receipt import Row

_MONITORS: Mapping[str, str] = MappingProxyType(
    {
        "tensorboard": "log from your loop, with torch.utils.tensorboard",
        "csv_monitor": "log from your loop",
        "wandb": "log from your loop, with wandb.log",
        "comet": "log from your loop, with comet's own client",
        "flops_profiler": "nothing is profiled in this loop: use torch.profiler",
        "comms_logger": "nothing is profiled in this loop: use torch.profiler",
        "timers": "nothing is timed, and nothing waits for a timer",
        "wall_clock_breakdown": "nothing is timed in this loop: use torch.profiler",
        "memory_breakdown": "use deepspeed.utils.see_memory_usage",
    }
)


def in_a_loop(run: Run, *, optimizer: str, scheduler: str) -> Receipt:
    """Return a receipt in the words of the engine's loop.

    Args:
        run: what the file comes to.
        optimizer: what becomes of the block; empty: it is used.
        scheduler: likewise.
    """
    receipt = run.translation.receipt
    rows = [_reworded(row, run, unused={"optimizer": optimizer, "scheduler": scheduler}) for row in receipt.rows]
    return Receipt(source=receipt.source, rows=tuple(rows))


def _reworded(row: Row, run: Run, *, unused: Mapping[str, str]) -> Row:
    block = row.key.partition(".")[0]
    sizes = run.sizes
    numbers = {TOTAL: sizes.total, EACH: sizes.micro, STEPS: sizes.steps}
    if row.key in numbers:
        why = f"data-parallel ranks: {sizes.ranks}" if row.given else "follows from the other sizes"
        return _with(row, outcome=HONOURED, becomes=f"engine: {numbers[row.key]}", why=why)
    if row.key == CLIP:
        said = f"engine.step() clips to a norm of {run.clip}" if run.clip else "no clipping"
        why = row.why.replace("Trainer", "engine") if not row.given else "by the norm over all ranks"
        return _with(row, outcome=HONOURED if row.given else row.outcome, becomes=said, why=why)
    if instead := unused.get(block):
        return _with(row, outcome=IGNORED, becomes="", why=instead)
    if block in unused:
        why = row.why.replace("used where the module's own returns None", "").replace(
            "used where the module gives no scheduler", ""
        )
        return _with(row, becomes=row.becomes.replace("configure_optimizers", f"engine.{block}"), why=why.strip("; "))
    if row.key == "dataloader_drop_last":
        return _with(row, outcome=HONOURED, becomes="deepspeed_io, training_data", why="")
    if row.key == "bf16.check_grad_overflow":
        said = "engine.step() skips" if run.skips_nonfinite else "engine.step() skips no update"
        return _with(row, outcome=HONOURED, becomes=said, why="an update whose gradients are not finite")
    if row.key == "steps_per_print":
        return _with(row, outcome=HONOURED, becomes="the logger 'meshbolt.deepspeed.engine', at INFO", why="")
    if block in _MONITORS:
        return _with(row, becomes="", why=_MONITORS[block])
    becomes = row.becomes.replace("Trainer(precision=", "the engine's precision (")
    return _with(row, becomes=becomes, why=row.why.replace("Trainer decides", "engine takes float32"))


def _with(row: Row, **changes: str) -> Row:
    return dataclasses.replace(row, **changes)  # type: ignore[arg-type]
