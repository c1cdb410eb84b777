"""A step outside of the model is the optimizer's own step: to the bit where it runs the same kernel, else to rounding."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from tests.unit.offload.hosts import FUSED, OWN_CLASS, Make, assert_same, give_gradients, offloaded, parameters, train
from torch import nn
from torch.optim import Optimizer

from meshbolt.offload.tiers import MemoryTier


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("name", FUSED)
def test_the_fused_kernels_give_the_same_bits_on_chunks(name: str, threads: int) -> None:
    # torch's own fused SGD fails where some parameters have no momentum yet.
    assert_same(*train(FUSED[name], threads=threads, late="sgd" not in name))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("threads", [1, 3])
def test_several_threads_share_a_chunk_and_its_parameters(threads: int, dtype: torch.dtype) -> None:
    shapes = [(50_001,), (77,), (33_333, 3), *[(n,) for n in range(1, 40)], (70_007,)]
    mine = FUSED["adamw"](parameters(dtype, shapes))
    params = mine.param_groups[0]["params"]
    theirs = FUSED["adamw"]([nn.Parameter(param.detach().float()) for param in params])
    with offloaded(mine, threads=threads, chunk_bytes=2**21) as host:
        for step in range(2):
            give_gradients(params, step)
            for param, whole in zip(params, theirs.param_groups[0]["params"], strict=True):
                whole.grad = param.grad.float()
            host.step()
            theirs.step()
        for param, whole in zip(params, theirs.param_groups[0]["params"], strict=True):
            master = param if dtype == torch.float32 else host.master_of(param)
            torch.testing.assert_close(master.detach(), whole.detach(), rtol=0, atol=0)


def test_a_momentum_that_starts_late_begins_with_its_first_gradient() -> None:
    assert_same(*train(lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9, dampening=0.3)), exactly=False)


@pytest.mark.parametrize("name", OWN_CLASS)
def test_other_optimizers_step_by_their_own_class(name: str) -> None:
    assert_same(*train(OWN_CLASS[name]))


@pytest.mark.parametrize("name", ["adamw", "sgd momentum", "adagrad"])
def test_the_default_kernels_differ_by_rounding_only(name: str) -> None:
    plain: dict[str, Make] = {
        "adamw": lambda ps: torch.optim.AdamW(ps, lr=0.01),
        "sgd momentum": lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9),
        "adagrad": lambda ps: torch.optim.Adagrad(ps, lr=0.1),
    }
    assert_same(*train(plain[name]), exactly=False)


@pytest.mark.parametrize("name", ["adamw", "adagrad", "sgd momentum"])
def test_float64_is_updated_as_it_is(name: str) -> None:
    assert_same(*train(FUSED[name], dtype=torch.float64, late=False))


@pytest.mark.parametrize("fraction", [0.0, 0.5])
def test_what_stays_on_the_device_is_updated_alike(fraction: float) -> None:
    assert_same(*train(FUSED["adamw"], fraction=fraction))


def test_groups_have_their_own_settings_and_change_them_between_steps() -> None:
    def make(params: Sequence[nn.Parameter]) -> Optimizer:
        groups = [
            {"params": params[::2], "lr": 0.1, "weight_decay": 0.0},
            {"params": params[1::2], "betas": (0.5, 0.6), "eps": 1e-3},
        ]
        return torch.optim.AdamW(groups, lr=0.01, fused=True)

    mine, theirs = make(parameters()), make(parameters())
    schedulers = [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5) for optimizer in (mine, theirs)]
    with offloaded(mine) as host:
        for step in range(3):
            for optimizer in (mine, theirs):
                give_gradients([p for group in optimizer.param_groups for p in group["params"]], step)
            host.step()
            theirs.step()
            for scheduler in schedulers:
                scheduler.step()
    assert mine.param_groups[0]["lr"] == pytest.approx(0.1 / 8)
    assert_same(mine, theirs)


def test_parameters_may_be_submitted_before_the_step_and_are_updated_once() -> None:
    mine, theirs = (FUSED["adamw"](parameters()) for _ in range(2))
    params = mine.param_groups[0]["params"]
    with offloaded(mine) as host:
        for step in range(3):
            for optimizer in (mine, theirs):
                give_gradients(optimizer.param_groups[0]["params"], step)
            host.submit(params[30:])
            host.submit(params[3:6])  # of a chunk, whose other parameters follow with the step
            host.wait(params[30:])
            for number in (33, 40):
                assert mine.state[params[number]]["step"] == step + 1
            host.step()
            theirs.step()
            assert all(param.grad is not None for param in params)
    assert_same(mine, theirs)


def test_gradients_are_scaled_in_their_place() -> None:
    mine, theirs = (FUSED["adamw"](parameters()) for _ in range(2))
    params, others = (optimizer.param_groups[0]["params"] for optimizer in (mine, theirs))
    with offloaded(mine) as host:
        for step in range(3):
            give_gradients(params, step)
            give_gradients(others, step)
            coefficient = torch.tensor(0.37)
            torch._foreach_mul_([other.grad for other in others], coefficient)
            host.submit(scale=coefficient)
            host.step()
            theirs.step()
            for param, other in zip(params, others, strict=True):
                torch.testing.assert_close(param.grad, other.grad, rtol=0, atol=0)
    assert_same(mine, theirs)


@pytest.mark.parametrize("found_inf", [True, torch.tensor(1.0)], ids=["bool", "tensor"])
def test_a_skipped_step_leaves_everything_as_it_is(found_inf: bool | torch.Tensor) -> None:
    mine, theirs = (FUSED["adamw"](parameters()) for _ in range(2))
    params = mine.param_groups[0]["params"]
    with offloaded(mine) as host:
        for step in range(3):
            give_gradients(params, step)
            host.submit(found_inf=found_inf if step != 1 else torch.tensor(0.0))
            host.wait(params[:3])
            host.step()
            assert (len(mine.state) == 0) is (step == 0)
        give_gradients(theirs.param_groups[0]["params"], 1)
        theirs.step()
    assert_same(mine, theirs)


def test_the_scaler_of_torch_skips_and_unscales() -> None:
    mine, theirs = (FUSED["adamw"](parameters()) for _ in range(2))
    with offloaded(mine) as host:
        for step in range(4):
            for optimizer, take in ((mine, host.step), (theirs, theirs.step)):
                give_gradients(optimizer.param_groups[0]["params"], step)
                # What torch.amp.GradScaler.step leaves to an optimizer with a fused step.
                optimizer.grad_scale = torch.tensor(8.0)  # type: ignore[attr-defined]
                optimizer.found_inf = torch.tensor(1.0 if step == 1 else 0.0)  # type: ignore[attr-defined]
                take()
                del optimizer.grad_scale, optimizer.found_inf  # type: ignore[attr-defined]
    assert_same(mine, theirs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gradient_dtype", [None, torch.float32], ids=["own", "float32"])
def test_16_bit_parameters_are_updated_in_float32(dtype: torch.dtype, gradient_dtype: torch.dtype | None) -> None:
    mine = FUSED["adamw"](parameters(dtype))
    params = mine.param_groups[0]["params"]
    master = [nn.Parameter(param.detach().float()) for param in params]
    theirs = FUSED["adamw"](master)
    with offloaded(mine) as host:
        for step in range(3):
            give_gradients(params, step)
            for param, whole in zip(params, master, strict=True):
                whole.grad = param.grad.float()
                if gradient_dtype is not None:
                    param.grad_dtype = None
                    param.grad = whole.grad.clone()
            host.step()
            theirs.step()
        for param, whole in zip(params, master, strict=True):
            torch.testing.assert_close(host.master_of(param), whole.detach(), rtol=0, atol=0)
            torch.testing.assert_close(param.detach(), whole.detach().to(dtype), rtol=0, atol=0)
            assert mine.state[param]["exp_avg"].dtype == torch.float32
    assert sum(host.layout.bytes_of(stays=stays) for stays in (True, False)) >= 3 * 4 * sum(p.numel() for p in params)


def test_16_bit_parameters_may_keep_their_own_bits() -> None:
    assert_same(*train(FUSED["adamw"], dtype=torch.bfloat16, full_precision=False))


def test_an_edit_of_16_bit_parameters_reaches_the_master_and_leaves_other_elements_their_bits() -> None:
    mine = FUSED["sgd"](parameters(torch.bfloat16, [(100,)]))
    (param,) = mine.param_groups[0]["params"]
    with offloaded(mine) as host:
        param.grad = torch.full((100,), 1e-3, dtype=torch.bfloat16)
        host.step()
        before = host.master_of(param)
        with torch.no_grad():
            param[:10] = 7.0
        host.step()
        after = host.master_of(param)
    assert before is not None
    assert after is not None
    small = 0.1 * float(torch.tensor(1e-3, dtype=torch.bfloat16)) + 0.01 * before[10:]
    torch.testing.assert_close(after[10:], before[10:] - small, rtol=1e-6, atol=1e-7)
    assert (after[:10] - 7.0).abs().max() < 0.08


@pytest.mark.parametrize("order", [(3, 2, 1, 0), (0, 2, 3, 1)], ids=["reversed", "channels last"])
def test_memory_in_another_order_than_the_dims_is_updated_alike(order: tuple[int, ...]) -> None:
    def make() -> Optimizer:
        contiguous = torch.randn(2, 5, 3, 7, generator=torch.Generator().manual_seed(2))
        # Not the fused one, which takes elements in the order of memory, whatever that of their gradients is.
        return torch.optim.AdamW([nn.Parameter(contiguous.permute(order))], lr=0.01)

    mine, theirs = make(), make()
    with offloaded(mine) as host:
        for step in range(3):
            for optimizer in (mine, theirs):
                give_gradients(optimizer.param_groups[0]["params"], step)  # contiguous, as backward may make them
            host.step()
            theirs.step()
    assert_same(mine, theirs, exactly=False)


def test_a_gradient_that_is_one_number_everywhere_is_taken_as_it_is() -> None:
    mine, theirs = (FUSED["adamw"](parameters(shapes=[(6, 5)])) for _ in range(2))
    with offloaded(mine) as host:
        for optimizer in (mine, theirs):
            (param,) = optimizer.param_groups[0]["params"]
            param.sum().backward()
        host.submit(scale=0.5)
        host.step()
        theirs.param_groups[0]["params"][0].grad = torch.full((6, 5), 0.5)
        theirs.step()
    assert_same(mine, theirs)


def test_hooks_closures_and_schedulers_see_the_optimizers_own_step() -> None:
    mine = FUSED["adamw"](parameters())
    params = mine.param_groups[0]["params"]
    seen: list[str] = []
    mine.register_step_pre_hook(lambda *_: seen.append(f"before {params[0].grad is None} {params[0].sum():.4f}"))
    mine.register_step_post_hook(lambda *_: seen.append(f"after {params[0].sum():.4f}"))
    scheduler = torch.optim.lr_scheduler.StepLR(mine, 1)
    start = params[0].sum()

    def closure() -> float:
        seen.append("closure")
        give_gradients(params, 0)
        return 1.5

    with offloaded(mine) as host:
        assert host.step(closure) == 1.5
    scheduler.step()  # warns where no step came before it
    assert seen == [f"before True {start:.4f}", "closure", f"after {params[0].sum():.4f}"]
    assert params[0].sum() != start
    assert params[0].grad is not None


@pytest.mark.parametrize("change", ["in place", "data", "foreach", "numpy"])
def test_however_a_parameter_is_changed_its_copy_follows(change: str) -> None:
    params = parameters(torch.bfloat16)
    optimizer = torch.optim.AdamW(params, lr=1e-6, fused=True)
    with offloaded(optimizer) as host:
        for step in range(2):
            give_gradients(params, step)
            host.step()
        with torch.no_grad():
            if change == "in place":
                params[1].add_(1.0)
            elif change == "data":
                params[1].data.add_(1.0)
            elif change == "foreach":
                torch._foreach_add_([p.data for p in params], 1.0)
            else:
                params[1].data.view(torch.int16).numpy()[:] = params[1].detach().add(1.0).view(torch.int16).numpy()
        expected = params[1].detach().float()
        give_gradients(params, 2)
        host.step()
        master = host.master_of(params[1])
        assert master is not None
        # One step moves it by the learning rate.
        torch.testing.assert_close(master, expected, rtol=0.0, atol=2e-6)


@pytest.mark.parametrize("more", [0, 1])
def test_a_step_that_is_waited_for_runs_in_the_callers_thread_if_that_has_as_many_as_asked(more: int) -> None:
    seen: list[tuple[str, int]] = []

    class Looks(MemoryTier):
        def visit(self, *args: Any, **kwargs: Any) -> None:
            seen.append((threading.current_thread().name, torch.get_num_threads()))
            super().visit(*args, **kwargs)

    mine, before, caller = FUSED["adamw"](parameters()), torch.get_num_threads(), threading.current_thread().name
    with offloaded(mine, make_tier=lambda _: Looks(), threads=before + more) as host:
        give_gradients(mine.param_groups[0]["params"], 0)
        host.step()
        host.step(waits=False)
        host.wait()
        assert torch.get_num_threads() == before
    assert (seen[0][0] == caller) == (more == 0)
    assert seen[1][0].startswith("meshbolt-update")
    assert [count for _, count in seen] == [before + more] * 2
