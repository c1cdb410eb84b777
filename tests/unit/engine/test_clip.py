"""Norms and clipping of plain gradients against torch's; no processes."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from meshbolt.engine.clip import clip_norm_, clip_value_, global_norm
from meshbolt.errors import ConfigError

# Sums of a few dozen numbers in another order: some units in the last place of the dtype.
RTOL = {torch.float64: 2e-15, torch.float32: 1e-6}


def params_with_gradients(dtype: torch.dtype = torch.float64, *, scale: float = 1.0) -> list[nn.Parameter]:
    """Return parameters of all sorts of shapes, one of which has no gradient."""
    generator = torch.Generator().manual_seed(0)
    params = []
    for shape in [(3, 5), (1,), (), (0,), (7, 2, 2), (0, 4)]:
        params.append(nn.Parameter(torch.zeros(shape, dtype=dtype)))
        params[-1].grad = torch.randn(shape, generator=generator, dtype=dtype) * scale
    return [*params, nn.Parameter(torch.zeros(2, dtype=dtype))]


def gradients(params: list[nn.Parameter]) -> list[torch.Tensor]:
    return [param.grad for param in params if param.grad is not None]


@pytest.mark.parametrize("norm_type", [0.5, 1, 2, 3.7, math.inf])
@pytest.mark.parametrize("dtype", RTOL, ids=str)
def test_norm_and_clipped_gradients_equal_those_of_torch(norm_type: float, dtype: torch.dtype) -> None:
    ours, theirs = params_with_gradients(dtype), params_with_gradients(dtype)
    if math.isinf(norm_type):  # torch cannot take this norm of an empty tensor
        theirs = [param for param in theirs if param.numel()]
    norm = global_norm(ours, norm_type=norm_type)
    max_norm = norm.item() / 3
    expected = nn.utils.clip_grad_norm_(theirs, max_norm, norm_type)
    assert norm.dtype is dtype
    assert norm.shape == ()
    torch.testing.assert_close(norm, expected, rtol=RTOL[dtype], atol=0)
    torch.testing.assert_close(clip_norm_(ours, max_norm, norm_type=norm_type), expected, rtol=RTOL[dtype], atol=0)
    clipped = [gradient for gradient in gradients(ours) if gradient.numel() or not math.isinf(norm_type)]
    torch.testing.assert_close(clipped, gradients(theirs), rtol=RTOL[dtype], atol=0)


def test_gradients_below_the_limit_keep_every_bit() -> None:
    params = params_with_gradients()
    before = copy.deepcopy(gradients(params))
    clip_norm_(params, 1e3)
    assert all(map(torch.equal, gradients(params), before))


def test_a_parameter_named_twice_counts_and_is_clipped_once() -> None:
    once, twice = params_with_gradients(), params_with_gradients()
    assert clip_norm_(twice + twice, 1.0) == clip_norm_(once, 1.0)
    assert all(map(torch.equal, gradients(twice), gradients(once)))


def test_a_generator_of_parameters_is_clipped_too() -> None:
    def walk() -> Iterator[nn.Parameter]:
        yield from params

    params = params_with_gradients()
    clip_norm_(walk(), 1.0)
    torch.testing.assert_close(global_norm(walk()).item(), 1.0, rtol=1e-5, atol=0)


def test_no_gradients_have_norm_zero() -> None:
    assert global_norm([]).item() == 0
    assert clip_norm_([nn.Parameter(torch.ones(2))], 1.0).item() == 0
    clip_value_([nn.Parameter(torch.ones(2))], 1.0)


def test_zero_gradients_stay_zero() -> None:
    params = params_with_gradients(scale=0.0)
    assert clip_norm_(params, 1.0).item() == 0
    assert all(not gradient.any() for gradient in gradients(params))


def test_gradients_of_several_dtypes_give_one_norm_in_the_widest() -> None:
    params = [nn.Parameter(torch.zeros(2, dtype=dtype)) for dtype in (torch.bfloat16, torch.float32, torch.float64)]
    for param in params:
        param.grad = torch.full_like(param, 2.0)
    norm = clip_norm_(params, 1.0)
    assert norm.dtype is torch.float64
    # Each tensor's part of the norm is rounded to float32, unless the tensor is float64.
    torch.testing.assert_close(norm.item(), math.sqrt(24), rtol=1e-7, atol=0)
    for gradient in gradients(params):
        expected = 2 / (math.sqrt(24) + 1e-6)
        torch.testing.assert_close(gradient.double().sum().item() / 2, expected, rtol=2**-8, atol=0)


def test_sixteen_bit_gradients_are_summed_in_float32() -> None:
    """In float16 this norm, and in bfloat16 its digits, would be lost."""
    for dtype in (torch.float16, torch.bfloat16):
        param = nn.Parameter(torch.zeros(10_001, dtype=dtype))
        param.grad = torch.full_like(param, 1024.0)
        norm = global_norm([param])
        assert norm.dtype is torch.float32
        torch.testing.assert_close(norm.item(), 1024 * math.sqrt(10_001), rtol=1e-6, atol=0)


@pytest.mark.parametrize("norm_type", [1, 2, math.inf])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_gradient_shows_in_the_norm_and_raises_where_asked(bad: float, norm_type: float) -> None:
    params = params_with_gradients()
    gradients(params)[0][1, 2] = bad
    norm = global_norm(params, norm_type=norm_type).item()
    assert norm == bad or (math.isnan(bad) and math.isnan(norm))
    before = copy.deepcopy(gradients(params)[1:])
    with pytest.raises(RuntimeError, match=r"norm \(order .*\) of (nan|inf).*error_if_nonfinite=False"):
        clip_norm_(params, 1.0, norm_type=norm_type, error_if_nonfinite=True)
    assert all(map(torch.equal, gradients(params)[1:], before)), "a refused clip changes nothing"


def test_values_are_clamped_as_torch_does() -> None:
    ours, theirs = params_with_gradients(), params_with_gradients()
    clip_value_(ours, 0.3)
    nn.utils.clip_grad_value_(theirs, 0.3)
    assert all(map(torch.equal, gradients(ours), gradients(theirs)))
    assert max(gradient.abs().max().item() for gradient in gradients(ours) if gradient.numel()) == 0.3


@pytest.mark.parametrize("limit", [-1.0, math.nan])
def test_a_limit_that_is_no_limit_is_refused(limit: float) -> None:
    with pytest.raises(ConfigError, match=f"norm of {limit}"):
        clip_norm_(params_with_gradients(), limit)
    with pytest.raises(ConfigError, match=f"values of {limit}"):
        clip_value_(params_with_gradients(), limit)


@pytest.mark.parametrize("order", [0, -1, -math.inf, math.nan])
def test_an_order_that_gives_no_norm_is_refused(order: float) -> None:
    with pytest.raises(ConfigError, match=f"order {order}"):
        global_norm(params_with_gradients(), norm_type=order)
