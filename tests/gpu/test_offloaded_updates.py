"""Updates on the host of a model on a GPU: gradients and parameters travel, and the result is the GPU's own step."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

from meshbolt.offload import StateFile
from meshbolt.offload.host import OffloadedOptimizer
from meshbolt.offload.layout import PAGE_BYTES
from meshbolt.offload.tiers import FileTier
from meshbolt.testing import needs

pytestmark = needs(gpus=1)

# One that is larger than the small chunks of these tests, one without elements, odd sizes, and many tiny ones.
SHAPES: list[tuple[int, ...]] = [(257, 65), (5000,), (0, 4), (1,), (64, 64), *[(n,) for n in range(1, 300, 3)]]
MAKES: dict[str, Callable[[Sequence[nn.Parameter]], Optimizer]] = {
    "adamw": lambda ps: torch.optim.AdamW(ps, lr=0.01, fused=True),
    "sgd": lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9),
    "adagrad": lambda ps: torch.optim.Adagrad(ps, lr=0.1),
    "nadam": lambda ps: torch.optim.NAdam(ps, lr=0.01),
}


def parameters(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    return [nn.Parameter(torch.randn(shape, generator=generator).to("cuda", dtype)) for shape in SHAPES]


def give_gradients(params: Sequence[nn.Parameter], step: int) -> None:
    generator = torch.Generator("cuda").manual_seed(100 + step)
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator, device="cuda").to(param.dtype)


def offloaded(optimizer: Optimizer, **options: Any) -> closing[OffloadedOptimizer]:
    params = [p for group in optimizer.param_groups for p in group["params"]]
    units = {"first": params[:3], "second": params[3:]}
    return closing(OffloadedOptimizer(optimizer, units=units, **{"chunk_bytes": PAGE_BYTES, "threads": 4, **options}))


def assert_close(mine: Optimizer, theirs: Optimizer) -> None:
    torch.cuda.synchronize()
    for a, b in zip(mine.param_groups[0]["params"], theirs.param_groups[0]["params"], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
        for key, value in theirs.state[b].items():
            own = mine.state[a][key]
            if isinstance(value, torch.Tensor):
                torch.testing.assert_close(own.cpu(), value.cpu(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("chunk_bytes", [PAGE_BYTES, 2**26])
@pytest.mark.parametrize("fraction", [1.0, 0.5, 0.0])
@pytest.mark.parametrize("name", MAKES)
def test_steps_are_those_of_the_gpu(name: str, fraction: float, chunk_bytes: int) -> None:
    mine, theirs = MAKES[name](parameters()), MAKES[name](parameters())
    with offloaded(mine, fraction=fraction, chunk_bytes=chunk_bytes) as host:
        for step in range(4):
            for optimizer in (mine, theirs):
                give_gradients(optimizer.param_groups[0]["params"], step)
            host.step()
            theirs.step()
        assert_close(mine, theirs)
        devices = {state["exp_avg"].device.type for state in mine.state.values() if "exp_avg" in state}
        expected = {1.0: {"cpu"}, 0.5: {"cpu", "cuda"}, 0.0: {"cuda"}}[fraction]
        assert name not in ("adamw", "nadam") or devices - {"cpu"} == expected - {"cpu"}


def test_gradients_may_be_freed_and_training_goes_on_while_updates_run() -> None:
    mine, theirs = MAKES["adamw"](parameters()), MAKES["adamw"](parameters())
    params = mine.param_groups[0]["params"]
    busy = torch.randn(2048, 2048, device="cuda")
    with offloaded(mine, fraction=0.7) as host:
        for step in range(5):
            for optimizer in (mine, theirs):
                give_gradients(optimizer.param_groups[0]["params"], step)
            for part in (params[40:], params[3:40], params[:3]):
                busy = (busy @ busy).tanh()
                host.submit(part, scale=torch.tensor(0.5, device="cuda"), found_inf=torch.tensor(0.0, device="cuda"))
                for param in part:
                    param.grad = None
                torch.full((257, 65), float("nan"), device="cuda")  # takes the memory that was freed
            host.wait(params[:3])
            host.step()
            for param in theirs.param_groups[0]["params"]:
                param.grad.mul_(0.5)
            theirs.step()
        assert_close(mine, theirs)


def test_a_gradient_that_another_stream_makes_is_waited_for() -> None:
    mine, theirs = MAKES["adamw"](parameters()), MAKES["adamw"](parameters())
    other = torch.cuda.Stream()
    with offloaded(mine) as host:
        for step in range(3):
            with torch.cuda.stream(other):
                torch.cuda._sleep(20_000_000)
                give_gradients(mine.param_groups[0]["params"], step)
                ready = torch.cuda.Event()
                ready.record()
            give_gradients(theirs.param_groups[0]["params"], step)
            host.submit(ready=ready)
            host.step()
            theirs.step()
        assert_close(mine, theirs)


def test_a_step_that_is_skipped_leaves_everything_as_it_is() -> None:
    optimizer = MAKES["adamw"](parameters())
    params = optimizer.param_groups[0]["params"]
    before = [param.detach().clone() for param in params]
    with offloaded(optimizer, fraction=0.5) as host:
        give_gradients(params, 0)
        host.submit(found_inf=torch.tensor(1.0, device="cuda"))
        host.step()
        assert not optimizer.state
    for param, value in zip(params, before, strict=True):
        assert torch.equal(param, value)


@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_bf16_parameters_have_masters_in_float32(fraction: float) -> None:
    mine = MAKES["adamw"](parameters(torch.bfloat16))
    params = mine.param_groups[0]["params"]
    theirs = MAKES["adamw"]([nn.Parameter(param.detach().float()) for param in params])
    with offloaded(mine, fraction=fraction) as host:
        for step in range(3):
            give_gradients(params, step)
            for param, whole in zip(params, theirs.param_groups[0]["params"], strict=True):
                whole.grad = param.grad.float()
            if step == 2:
                for param, whole in zip(params, theirs.param_groups[0]["params"], strict=True):
                    with torch.no_grad():
                        param[:1].fill_(3.0)
                        whole[:1].fill_(3.0)
            host.step()
            theirs.step()
        for param, whole in zip(params, theirs.param_groups[0]["params"], strict=True):
            master = host.master_of(param)
            assert master is not None
            torch.testing.assert_close(master.cpu(), whole.detach().cpu(), rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(param.detach().float(), master.to("cuda").bfloat16().float(), rtol=0, atol=0)


@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_a_loaded_state_is_taken(fraction: float) -> None:
    mine, theirs = MAKES["adamw"](parameters()), MAKES["adamw"](parameters())
    for step in range(2):
        give_gradients(theirs.param_groups[0]["params"], step)
        theirs.step()
    with offloaded(mine, fraction=fraction) as host:
        mine.load_state_dict(theirs.state_dict())
        for param, other in zip(mine.param_groups[0]["params"], theirs.param_groups[0]["params"], strict=True):
            with torch.no_grad():
                param.copy_(other)
        for step in range(2, 4):
            for optimizer in (mine, theirs):
                give_gradients(optimizer.param_groups[0]["params"], step)
            host.step()
            theirs.step()
        assert_close(mine, theirs)


def test_state_in_a_file_is_updated_alike(tmp_path: Path) -> None:
    mine, theirs = MAKES["adamw"](parameters()), MAKES["adamw"](parameters())

    def make_tier(layout: Any) -> FileTier:
        return FileTier(layout, lambda num_bytes: StateFile(tmp_path, num_bytes, say=lambda text: None))

    with offloaded(mine, make_tier=make_tier) as host:
        for step in range(3):
            for optimizer in (mine, theirs):
                give_gradients(optimizer.param_groups[0]["params"], step)
            host.step()
            theirs.step()
        with host.state_shown():
            assert_close(mine, theirs)


def test_bytes_travel_in_locked_memory_and_at_a_rate() -> None:
    elements = 2 * 10**8
    param = nn.Parameter(torch.randn(elements, device="cuda"))
    param.grad = torch.randn_like(param) * 1e-2
    optimizer = torch.optim.AdamW([param], lr=1e-3)
    free = torch.cuda.mem_get_info()[0]
    with closing(OffloadedOptimizer(optimizer, units={"all": [param]}, threads=8)) as host:
        host.step()
        # torch 2.11 tells of its own allocations only whether they are locked.
        assert host._tiers[False]._pinned  # type: ignore[attr-defined]
        seconds = []
        for _ in range(5):
            torch.cuda.synchronize()
            start = time.perf_counter()
            host.step()
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
        # Nothing of the size of the model lies on the GPU for it.
        assert free - torch.cuda.mem_get_info()[0] < 400 * 2**20
    print({"elements": elements, "seconds": [round(value, 4) for value in seconds], **vars(host.counters)})
    assert min(seconds) < 5.0


@pytest.mark.parametrize("change", ["in place", "data", "foreach"])
def test_what_somebody_changes_on_the_gpu_is_trained_on(change: str) -> None:
    params, others = parameters(), parameters()
    mine, theirs = (torch.optim.AdamW(each, lr=0.01, fused=True) for each in (params, others))
    with offloaded(mine) as host:
        for step in range(4):
            for each in (params, others):
                give_gradients(each, step)
            host.step()
            theirs.step()
            for each in (params, others) if step == 1 else ():
                with torch.no_grad():
                    if change == "in place":
                        each[1].mul_(0.5)
                    elif change == "data":
                        each[1].data.mul_(0.5)
                    else:
                        torch._foreach_mul_(list(each), 0.5)
        assert_close(mine, theirs)
