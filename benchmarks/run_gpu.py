"""Tokens per second and peak memory on GPUs: Lightning's own strategy beside every ZeRO stage, each in a fresh process.

    python benchmarks/run_gpu.py --rounds 3 --output benchmarks/results/step_time_h200.jsonl

    python benchmarks/run_gpu.py --contenders zero1 zero1_cpu zero1_cpu_in_step --accumulate 2 --recompute full

Runs on all GPUs of this machine (one is enough) in bf16-mixed; speeds are compared with the first contender's. Without a GPU it
says so and exits with 0; `--device cpu` checks the script itself on a tiny model.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
# Arguments of MeshStrategy; None is Lightning's own choice.
CONTENDERS: dict[str, dict[str, Any] | None] = {
    "lightning": None,
    **{f"zero{stage}": {"zero": stage} for stage in (0, 1, 2, 3)},
    **{f"zero{stage}_cpu": {"zero": stage, "offload": {"optimizer": "cpu"}} for stage in (1, 3)},
    "zero1_cpu_in_step": {"zero": 1, "offload": {"optimizer": "cpu", "overlap": False}},
    "zero1_cpu_half": {"zero": 1, "offload": {"optimizer": "cpu", "fraction": 0.5}},
    "zero1_cpu_auto": {"zero": 1, "offload": {"optimizer": "cpu", "fraction": "auto"}},
    "zero1_nvme": {"zero": 1, "offload": {"optimizer": "nvme", "path": "/tmp"}},
    "zero3_all_cpu": {"zero": 3, "offload": {"optimizer": "cpu", "parameters": "cpu"}},
    "zero3_cpu_nvme": {"zero": 3, "offload": {"optimizer": "nvme", "parameters": "cpu", "path": "/tmp"}},
    "zero3_all_nvme": {"zero": 3, "offload": {"optimizer": "nvme", "parameters": "nvme", "path": "/tmp"}},
}
USUAL = ["lightning", "zero0", "zero1", "zero2", "zero3"]


def main() -> int:
    """Run the rounds and print one JSON line a contender; 1 if one failed."""
    arguments = _parse()
    if arguments.worker:
        _work(arguments)
    import torch

    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("skipped: this machine has no GPU that torch can use")
        return 0
    runs: dict[str, list[dict[str, Any] | None]] = {name: [] for name in arguments.contenders}
    for index in range(arguments.rounds):
        for name in arguments.contenders if index % 2 == 0 else reversed(arguments.contenders):
            runs[name].append(_run(name))
    lines = [json.dumps({**_environment(arguments), **_summary(name, runs)}) for name in arguments.contenders]
    print("\n".join(lines))
    if arguments.output:
        Path(arguments.output).write_text("\n".join(lines) + "\n")
    return int(any(None in results for results in runs.values()))


def _summary(name: str, runs: dict[str, list[dict[str, Any] | None]]) -> dict[str, Any]:
    speeds = [result and round(result["tokens_per_second"]) for result in runs[name]]
    first = next(iter(runs))
    pairs = [(own, base) for own, base in zip(runs[name], runs[first], strict=True) if own and base]
    if not pairs:
        return {"contender": name, "failed": True}
    ratio = statistics.median(own["tokens_per_second"] / base["tokens_per_second"] for own, base in pairs)
    keys = ("tokens_per_second", "peak_memory_gib", "loss")
    medians = {key: statistics.median(own[key] for own, _ in pairs) for key in keys}
    return {"contender": name, **medians, f"speed_over_{first}": ratio, "tokens_per_second_of_rounds": speeds}


def _run(name: str) -> dict[str, Any] | None:
    command = [sys.executable, __file__, *sys.argv[1:], "--worker", name]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    for line in done.stdout.splitlines():
        if line.startswith("RESULT "):
            return json.loads(line.removeprefix("RESULT "))  # type: ignore[no-any-return]
    print(f"{name} failed:\n{done.stdout[-1500:]}\n{done.stderr[-3000:]}", file=sys.stderr)
    return None


def _environment(arguments: argparse.Namespace) -> dict[str, Any]:
    import lightning
    import torch

    device = torch.cuda.get_device_name() if arguments.device == "cuda" else "cpu"
    return {"device": device, "torch": torch.__version__, "lightning": lightning.__version__, "sizes": arguments.sizes}


def _work(arguments: argparse.Namespace) -> None:
    """Train one contender and print its result; the process ends here."""
    sys.path.insert(0, str(HERE))
    import gpt
    import lightning.pytorch as pl
    import torch

    import meshbolt  # noqa: F401 - registers the names

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = gpt.build(**arguments.sizes)

        def training_step(self, batch: Any, index: int) -> torch.Tensor:
            # Not in a hook: what looks at a run between two steps may not find updates that are still under way.
            if index == arguments.warmup * arguments.accumulate:
                _synchronise(arguments.device)
                clock.start = time.perf_counter()
            loss = gpt.loss_of(self.net, *batch)
            clock.loss = loss.detach()
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=1e-4, fused=True)

    class Batches(torch.utils.data.IterableDataset):
        def __iter__(self) -> Iterator[Any]:
            for index in range((arguments.warmup + arguments.steps) * arguments.accumulate):
                yield gpt.batch(index, 0, samples=arguments.samples, time=arguments.sizes["time"])

    class Clock(pl.Callback):
        start = 0.0
        loss = torch.zeros(())

        def on_train_end(self, *_: Any) -> None:
            _synchronise(arguments.device)  # what comes after is no step: Lightning moves the module to the host
            self.seconds = time.perf_counter() - self.start

    clock = Clock()
    trainer = pl.Trainer(
        accelerator=arguments.device,
        devices=1 if arguments.device == "cpu" else -1,
        strategy=_strategy(arguments),
        precision="bf16-mixed",
        accumulate_grad_batches=arguments.accumulate,
        max_steps=arguments.warmup + arguments.steps,
        callbacks=[clock],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Module(), torch.utils.data.DataLoader(Batches(), batch_size=None))
    tokens = arguments.steps * arguments.accumulate * arguments.samples * arguments.sizes["time"] * trainer.world_size
    peak_bytes = torch.cuda.max_memory_allocated() if arguments.device == "cuda" else 0
    result = {
        "tokens_per_second": tokens / clock.seconds,
        "peak_memory_gib": peak_bytes / 2**30,
        "loss": float(clock.loss),
    }
    if trainer.is_global_zero:
        print("RESULT " + json.dumps(result), flush=True)
    os._exit(0)


def _strategy(arguments: argparse.Namespace) -> Any:
    from meshbolt import MeshStrategy, Offload

    chosen = CONTENDERS[arguments.worker]
    if chosen is None:
        return "auto"
    options = dict(chosen)
    if "offload" in options:
        options["offload"] = Offload(**options["offload"])
    return MeshStrategy(**options, recompute=arguments.recompute)


def _synchronise(device: str) -> None:
    import torch

    if device == "cuda":
        torch.cuda.synchronize()


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=USUAL, help="the first is compared with")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument("--samples", type=int, default=8, help="of one batch of one rank")
    parser.add_argument("--accumulate", type=int, default=1, help="batches of a step")
    parser.add_argument("--recompute", choices=("none", "full", "selective"), default="none", help="under meshbolt")
    parser.add_argument("--output", help="file for the JSON lines")
    sizes = {"layers": 12, "width": 1536, "heads": 16, "time": 1024}
    parser.add_argument("--sizes", type=json.loads, default=sizes, help="of the model, as JSON")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    raise SystemExit(main())
