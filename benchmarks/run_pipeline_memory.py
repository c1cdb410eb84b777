"""Memory of a pipeline: of its set-up in each way of building a model, and of microbatches under each schedule.

    python benchmarks/run_pipeline_memory.py --ranks 4 --rounds 3

A GPT is cut into one stage a rank. Of its set-up, the growth over a process that has trained a small model in the same way is
given in units of the largest stage's parameters: of anonymous resident memory, and of blocks that come straight from the system,
which are large tensors and little else; of the rank where it is largest, as the median over rounds; at the peak until training
begins (sampled every millisecond), and at rest then. Then, for each schedule, the most microbatches of which a rank held graphs
at a time, by rank, and as planned.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from run_step_time import _collect, _environment, _rank_environment

MIB = 2**20
HERE = Path(__file__).resolve().parent
WAYS = ("__init__", "configure_model", "init_module", "fit", "load_pretrained")
_PORTS = iter(range(29700, 29900))
SCHEDULES = {"gpipe": 1, "1f1b": 1, "interleaved_1f1b": 2, "looped_bfs": 2, "zbv": 2}


def main() -> int:
    """Run everything in fresh processes and print tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, default=40)
    parser.add_argument("--width", type=int, default=320, help="320 with 40 layers is a model of 191 MiB")
    parser.add_argument("--microbatches", type=int, default=8)
    parser.add_argument("--ways", type=lambda text: text.split(","), default=WAYS)
    parser.add_argument("--schedules", type=lambda text: [x for x in text.split(",") if x], default=SCHEDULES)
    arguments = parser.parse_args()
    print(f"# {_environment()}; {arguments.ranks} stages, fp32, median of {arguments.rounds} rounds")
    failed = _setups(arguments)
    return int(_schedules(arguments) or failed)


def _setups(arguments: argparse.Namespace) -> bool:
    sys.path.insert(0, str(HERE))
    from gpt import build
    from safetensors.torch import save_file

    sizes, failed = {"layers": arguments.layers, "width": arguments.width, "vocabulary": 1024}, False
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        model = build(**sizes)
        save_file(model.state_dict(), path)
        nbytes = [p.numel() * p.element_size() for p in model.parameters()]
        del model
        print(f"# whole model {sum(nbytes) / MIB:.1f} MiB, largest tensor {max(nbytes) / MIB:.1f} MiB")
        print(f"{'':>27} {'resident':>15} {'large blocks':>15}")
        print(f"{'built':>16} {'stage MiB':>10} {'peak':>7} {'at rest':>7} {'peak':>7} {'at rest':>7}")
        for way in arguments.ways:
            job = {"way": way, "sizes": sizes, "path": str(path)}
            rounds = [_launch(job, arguments.ranks) for _ in range(arguments.rounds)]
            done = [ranks for ranks in rounds if ranks]
            failed |= len(done) < len(rounds)
            if done:
                stage = max(rank["own"] for rank in done[0])
                found = [
                    statistics.median(max(rank[key][measure] for rank in ranks) for ranks in done) / stage
                    for measure in (0, 1)
                    for key in ("peak", "rest")
                ]
                print(f"{way:>16} {stage / MIB:10.1f}", *(f"{each:7.2f}" for each in found), flush=True)
    return failed


def _schedules(arguments: argparse.Namespace) -> bool:
    from meshbolt.pipeline import plan_timeline

    failed = False
    print(f"{'schedule':>22} {'live microbatches by rank':>28} {'planned':>16}")
    for schedule in arguments.schedules:
        stages = arguments.ranks * SCHEDULES[schedule]
        job = {"schedule": schedule, "stages": stages, "microbatches": arguments.microbatches}
        found = _launch(job, arguments.ranks)
        failed |= found is None
        timeline = plan_timeline(schedule, [1.0] * stages, ranks=arguments.ranks, microbatches=arguments.microbatches)
        planned = [timeline.live(rank) for rank in range(arguments.ranks)]
        if found:
            print(f"{schedule:>22} {[rank['live'] for rank in found]!s:>28} {planned!s:>16}", flush=True)
            failed |= [rank["live"] for rank in found] != planned
    return failed


def _launch(job: dict[str, Any], ranks: int) -> list[dict[str, Any]] | None:
    started, port = [], next(_PORTS)
    for rank in range(ranks):
        output = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed with the process's results
        command = [sys.executable, str(HERE / "pipeline_memory.py"), json.dumps(job)]
        environment = _rank_environment(rank, ranks, port)
        started.append((subprocess.Popen(command, env=environment, stdout=output, stderr=output), output))
    results = [_collect(str(job), process, output, 300) for process, output in started]
    return None if None in results else results  # type: ignore[return-value]


if __name__ == "__main__":
    raise SystemExit(main())
