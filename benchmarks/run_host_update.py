"""Updates of state that lies in host memory, beside torch's fused AdamW and DeepSpeed's CPUAdam.

    python benchmarks/run_host_update.py --millions 64 --threads 1 2 --rounds 9
    PYTHONPATH=... PATH=...:$PATH python benchmarks/run_host_update.py --deepspeed   # where deepspeed and ninja are

All update as many float32 elements by AdamW, with as many threads. torch and DeepSpeed have one flat tensor each, in memory
as torch allocates it; a second time in huge pages, which they do not do by themselves, to compare the
kernels. Ours has its state in chunks of 64 MiB, and steps as in training (hooks, threads, counts):

- `ours, in place`: the model is on the CPU, one flat parameter; it and its gradient are in memory as torch allocates it.
- `ours, in layers`: likewise, with the parameters of a transformer of that size.
- `ours, masters`: what the host does for a model on a GPU: parameters and gradients lie in host memory of ours as well.

Contenders take turns within a round, forth and back; a ratio is the median over rounds of another one's time over ours within
a round: above 1, ours is faster.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from meshbolt.offload.buffers import aligned_empty
from meshbolt.offload.host import OffloadedOptimizer

WIDTH = 1024


def gradient_of(param: nn.Parameter) -> torch.Tensor:
    return torch.randn(param.shape) * 1e-2


def flat(elements: int, make: Callable[[list[nn.Parameter]], torch.optim.Optimizer]) -> Callable[[], Any]:
    param = nn.Parameter(torch.randn(elements))
    param.grad = gradient_of(param)
    return make([param]).step


def flat_in_huge_pages(elements: int, make: Callable[[list[nn.Parameter]], torch.optim.Optimizer]) -> Callable[[], Any]:
    param = nn.Parameter(in_huge_pages(torch.randn(elements)))
    param.grad = in_huge_pages(gradient_of(param))
    optimizer = make([param])
    optimizer.step()
    state = optimizer.state[param]
    state.update({name: in_huge_pages(value) for name, value in state.items() if name.startswith("exp_avg")})
    return optimizer.step


def in_huge_pages(values: torch.Tensor) -> torch.Tensor:
    return aligned_empty(values.nbytes).view(values.dtype)[: values.numel()].copy_(values)


def fused(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=1e-3, fused=True)


def deepspeed(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    from deepspeed.ops.adam import DeepSpeedCPUAdam  # type: ignore[import-not-found,unused-ignore]

    return DeepSpeedCPUAdam(params, lr=1e-3, weight_decay=1e-2)  # type: ignore[no-any-return,unused-ignore]


def ours(params: list[nn.Parameter], threads: int) -> Callable[[], Any]:
    for param in params:
        param.grad = gradient_of(param)
    optimizer = torch.optim.AdamW(params, lr=1e-3)
    return OffloadedOptimizer(optimizer, units={"all": params}, threads=threads).step


def layer_shapes(elements: int) -> list[tuple[int, ...]]:
    """Return the shapes of the parameters of layers, which have about so many elements together."""
    shapes = [(4 * WIDTH, WIDTH), (4 * WIDTH,), (WIDTH, 4 * WIDTH), (WIDTH,), (WIDTH,), *[(WIDTH, WIDTH)] * 4]
    return shapes * max(1, round(elements / sum(torch.Size(shape).numel() for shape in shapes)))


def ours_in_layers(shapes: Sequence[tuple[int, ...]], threads: int) -> Callable[[], Any]:
    return ours([nn.Parameter(torch.randn(shape)) for shape in shapes], threads)


def ours_with_masters(elements: int, threads: int) -> Callable[[], Any]:
    param = nn.Parameter(in_huge_pages(torch.randn(elements)))
    param.grad = in_huge_pages(gradient_of(param))
    optimizer = torch.optim.AdamW([param], lr=1e-3)
    return OffloadedOptimizer(optimizer, units={"all": [param]}, threads=threads).step


def measure(contenders: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Return the seconds of each contender's steps, round by round, after two that do not count."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds + 2):
        order = list(contenders) if number % 2 else list(reversed(contenders))
        for name in order:
            start = time.perf_counter()
            contenders[name]()
            seconds[name].append(time.perf_counter() - start)
    return {name: values[2:] for name, values in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--millions", type=int, default=64, help="of elements, about")
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--deepspeed", action="store_true", help="measure DeepSpeed's CPUAdam too")
    arguments = parser.parse_args()
    shapes = layer_shapes(arguments.millions * 10**6)
    elements = sum(torch.Size(shape).numel() for shape in shapes)
    others = {
        "torch fused AdamW": flat(elements, fused),
        "torch fused AdamW, huge pages": flat_in_huge_pages(elements, fused),
    }
    if arguments.deepspeed:
        others["DeepSpeed CPUAdam"] = flat(elements, deepspeed)
        others["DeepSpeed CPUAdam, huge pages"] = flat_in_huge_pages(elements, deepspeed)
    print(json.dumps({"python": platform.python_version(), "torch": str(torch.__version__), **vars(arguments)}))
    for threads in arguments.threads:
        torch.set_num_threads(threads)
        own = {
            "ours, in place": ours([nn.Parameter(torch.randn(elements))], threads),
            "ours, in layers": ours_in_layers(shapes, threads),
            "ours, masters": ours_with_masters(elements, threads),
        }
        report(measure({**others, **own}, arguments.rounds), elements=elements, threads=threads)


def report(seconds: Mapping[str, list[float]], *, elements: int, threads: int) -> None:
    for name, values in seconds.items():
        row: dict[str, Any] = {
            "threads": threads,
            "what": name,
            "seconds": round(statistics.median(values), 4),
            "fastest": round(min(values), 4),
            "ns per element": round(statistics.median(values) / elements * 1e9, 3),
        }
        for other in seconds if name.startswith("ours") else ():
            if not other.startswith("ours"):
                ratios = [theirs / own for theirs, own in zip(seconds[other], values, strict=True)]
                row[f"speed over {other}"] = round(statistics.median(ratios), 3)
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
