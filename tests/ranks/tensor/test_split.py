"""What a split tensor answers, refuses and leaves to wholes, and what is remembered of what layers read."""

from __future__ import annotations

import copy
import math
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from meshbolt.errors import UnsupportedError
from meshbolt.tensor.axis import Axis
from meshbolt.tensor.exchange import enter, joined, own_part, part, total, whole
from meshbolt.tensor.layout import Layout
from meshbolt.tensor.part import StrayError
from meshbolt.tensor.split import SplitTensor, gathered
from meshbolt.testing import run_ranks

DOUBLE = torch.float64


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = DOUBLE) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE).to(dtype)


def split_of(value: Tensor, layout: Layout, axis: Axis, **options: Any) -> SplitTensor:
    return SplitTensor(
        own_part(value, layout, axis).clone().requires_grad_(value.is_floating_point()), layout, axis, **options
    )


def on_two_ranks(job: Callable[[Axis], Any]) -> list[Any]:
    def with_axis() -> Any:
        return job(Axis(dist.group.WORLD))

    return run_ranks(with_axis, 2, timeout=30)


def relative(have: Tensor, want: Any) -> float:
    return ((have - want).abs().max() / want.abs().max()).item()


def error_of(function: Callable[..., Any], *args: Any) -> str:
    try:
        function(*args)
    except Exception as error:
        return type(error).__name__
    return "nothing"


# What it answers ------------------------------------------------------------------------------------------------------


def facts(axis: Axis) -> dict[str, Any]:
    x = split_of(drawn(4, 6, 8), Layout(2), axis)
    return {
        "shape": (x.shape, x.size(), x.size(-1), x.ndim, x.dim(), len(x), x.numel(), torch.numel(x), x.nelement()),
        "kind": (
            x.dtype,
            x.device.type,
            x.is_floating_point(),
            torch.is_complex(x),
            x.is_signed(),
            x.element_size(),
            x.itemsize,
        ),
        "history": (x.requires_grad, x.is_leaf, (x * 2).grad_fn is not None, x.detach().requires_grad, (x * 2).is_leaf),
        "memory": (x.is_contiguous(), x.stride(), x.transpose(0, 2).is_contiguous(), x.transpose(0, 2).stride()),
        "texts": (str(x)[:28], f"{x}"[:28], repr(x)[:28]) if axis.rank == 0 else None,
        "none": (x.grad, x.layout, x.is_sparse, x.is_cuda),
    }


def test_facts_are_those_of_the_whole_and_need_no_message() -> None:
    def job(axis: Axis) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            return facts(axis)

    first, second = on_two_ranks(job)
    assert first["shape"] == ((4, 6, 8), (4, 6, 8), 8, 3, 3, 4, 192, 192, 192)
    assert first["kind"] == (DOUBLE, "cpu", True, False, True, 8, 8)
    assert first["history"] == (True, True, True, False, False)
    assert first["memory"] == (True, (48, 8, 1), False, (1, 8, 48))
    assert first["texts"] == ("SplitTensor((4, 6, 8), Layou",) * 3
    assert first["none"] == (None, torch.strided, False, False)
    assert second == {**first, "texts": None}


def test_a_hook_sees_the_gradient_of_the_whole_and_may_change_it() -> None:
    def job(axis: Axis) -> Any:
        x = split_of(drawn(4, 8), Layout(1), axis)
        y, seen = x * 3, []
        y.register_hook(lambda gradient: seen.append(tuple(gradient.shape)) or gradient * 2)
        y.register_hook(lambda gradient: None)
        y.register_hook(lambda gradient: torch.full((4, 8), 7.0, dtype=DOUBLE) + gathered(gradient) * 0)
        y.retain_grad()
        y.sum().backward()
        return seen, x.grad.shape, x.local.grad, y.grad.local

    for seen, shape, gradient, retained in on_two_ranks(job):
        assert (seen, shape) == ([(4, 8)], (4, 8))
        assert torch.equal(gradient, torch.full((4, 4), 21.0, dtype=DOUBLE))
        assert torch.equal(retained, torch.full((4, 4), 7.0, dtype=DOUBLE))


def test_copies_of_a_split_tensor_are_whole() -> None:
    def job(axis: Axis) -> Any:
        x = split_of(drawn(4, 8), Layout(1), axis).detach()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return copy.deepcopy(x), pickle.loads(pickle.dumps(x)), x.tolist(), x.numpy()

    for rank in on_two_ranks(job):
        assert all(torch.equal(torch.as_tensor(copied, dtype=DOUBLE), drawn(4, 8)) for copied in rank)


# What it refuses ------------------------------------------------------------------------------------------------------


class Twice(torch.autograd.Function):
    """A user's own step of autograd."""

    @staticmethod
    def forward(ctx: Any, x: Any) -> Any:
        return x * 2

    @staticmethod
    def backward(ctx: Any, gradient: Any) -> Any:
        return gradient * 2


class Count(torch.autograd.Function):
    """A step of autograd whose result is not split."""

    @staticmethod
    def forward(ctx: Any, x: Any) -> Any:
        ctx.shape = x.shape
        return x.sum()

    @staticmethod
    def backward(ctx: Any, gradient: Any) -> Any:
        return gradient.expand(ctx.shape)


REFUSED: dict[str, Callable[[Any, Any], Any]] = {
    "x[0] = y": lambda x, y: x.__setitem__(0, 1.0),
    "x.data = y": lambda x, y: setattr(x, "data", y),
    "x.grad = None": lambda x, y: setattr(x, "grad", None),
    "x.requires_grad = False": lambda x, y: setattr(x, "requires_grad", False),
    "del x.grad": lambda x, y: delattr(x, "grad"),
    "x.requires_grad_": lambda x, y: x.requires_grad_(False),
    "x.uniform_": lambda x, y: x.uniform_(),
    "x.add_ of what is split otherwise": lambda x, y: x.add_(x.transpose(0, 1)),
    "out=": lambda x, y: torch.add(y, y, out=x),
    "out=, of a function without a rule": lambda x, y: torch.mv(y, y[0], out=x[0]),
    "threshold in place": lambda x, y: F.rrelu(x, 0.1, 0.2, False, True),
    "dropout1d in place": lambda x, y: F.dropout1d(x, 0.5, inplace=True),
    "a hook on the leaf": lambda x, y: x.register_post_accumulate_grad_hook(print),
    "a step of autograd, called": lambda x, y: Twice.apply(x) * 1,
    "a step of autograd, gathered": lambda x, y: gathered(Twice.apply(x)),
    "a step of autograd, returned": lambda x, y: gathered([Twice.apply(x)]),
    "a step of autograd, whole": lambda x, y: Count.apply(x * 1),
    "a step of autograd of a parameter": lambda x, y: Count.apply(x),
    "a checkpoint that is one": lambda x, y: checkpoint(lambda z: (z * 2).sum(), x * 1, use_reentrant=True),
    "torch.tensor": lambda x, y: torch.tensor(x),
}


@pytest.mark.parametrize("written", REFUSED)
def test_what_would_be_lost_is_refused(written: str) -> None:
    def job(axis: Axis) -> str:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return error_of(REFUSED[written], split_of(drawn(8, 8), Layout(1), axis), drawn(8, 8))

    refusals = {UnsupportedError.__name__, StrayError.__name__}
    assert set(on_two_ranks(job)) <= refusals


WRONG: dict[str, Callable[[Any], Any]] = {
    "view": lambda x: x.view(5, -1),
    "view of too many": lambda x: x.view(3, 4, 8),
    "unflatten": lambda x: x.unflatten(2, (3, 4)),
    "transpose": lambda x: x.transpose(0, 3),
    "permute": lambda x: x.permute(0, 1),
    "permute twice": lambda x: x.permute(0, 1, 1),
    "unsqueeze": lambda x: x.unsqueeze(5),
    "expand": lambda x: x.expand(4, 5, 8),
    "softmax": lambda x: x.softmax(3),
    "sum": lambda x: x.sum(-4),
    "x[0, 0, 0, 0]": lambda x: x[0, 0, 0, 0],
    "x[9]": lambda x: x[9],
    "x[::-1]": lambda x: x[::-1],
    "x['a']": lambda x: x["a"],
    "narrow": lambda x: x.narrow(2, 4, 8),
    "narrow another": lambda x: x.narrow(1, 4, 8),
    "chunk": lambda x: x.chunk(2, 3),
    "t": lambda x: x.t(),
    "cat": lambda x: torch.cat([x, torch.zeros(4, 6, 4)], 0),
    "stack": lambda x: torch.stack([x, torch.zeros(4, 6, 4)]),
    "add": lambda x: x + torch.zeros(5),
    "matmul": lambda x: x @ torch.zeros(3, 2, dtype=DOUBLE),
    "bool": lambda x: bool(x),
    "item": lambda x: x.item(),
    "mean of truths": lambda x: (x > 0).mean(2),
    "dropout": lambda x: F.dropout(x, 1.5),
    "reduction": lambda x: F.cross_entropy(x.transpose(1, 2), torch.zeros(4, 6, dtype=torch.long), reduction="average"),
    "target": lambda x: F.cross_entropy(x.transpose(1, 2), torch.full((4, 6), 8)),
    "negative target": lambda x: F.cross_entropy(x.transpose(1, 2), torch.full((4, 6), -1)),
    "token": lambda x: F.embedding(torch.tensor([8]), x.transpose(0, 2).flatten(1)),
    "negative token": lambda x: F.embedding(torch.tensor([-1]), x.transpose(0, 2).flatten(1)),
    "padding": lambda x: F.embedding(torch.tensor([1]), x.transpose(0, 2).flatten(1), padding_idx=8),
    "layer_norm": lambda x: F.layer_norm(x, (5,)),
    "no such argument": lambda x: torch.softmax(x, dimension=1),
}


def test_what_torch_refuses_is_refused_as_torch_does() -> None:
    def job(axis: Axis) -> dict[str, tuple[str, str]]:
        x = split_of(drawn(4, 6, 8), Layout(2), axis)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return {name: (error_of(call, drawn(4, 6, 8)), error_of(call, x)) for name, call in WRONG.items()}

    for results in on_two_ranks(job):
        # Where torch looks the logit of a target up by itself, its error is an IndexError.
        assert results.pop("target") == results.pop("negative target") == ("IndexError", "RuntimeError")
        assert {name: pair for name, pair in results.items() if pair[0] != pair[1] or pair[0] == "nothing"} == {}


def test_pairs_that_are_split_are_gathered() -> None:
    def job(axis: Axis) -> tuple[Tensor, list[str]]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            made = torch.view_as_complex(split_of(drawn(3, 2), Layout(1), axis))
        return made.detach(), [str(one.message) for one in caught]

    for made, messages in on_two_ranks(job):
        assert torch.equal(torch.view_as_real(made), drawn(3, 2))
        assert ["view_as_complex is computed on whole tensors" in message for message in messages] == [True]


# Sequences ------------------------------------------------------------------------------------------------------------


def sequence_block(axis: Axis) -> dict[str, float]:
    """Run two layers with the sequence left split between them, and an embedding before, against whole ones."""
    shapes = [(16, 6), (6, 16), (8, 6), (6,), (6,)]
    columns, rows, table, bias, norm = (drawn(*shape, seed=seed) for seed, shape in enumerate(shapes))
    wholes = [t.clone().requires_grad_() for t in (columns, rows, table, bias, norm)]
    tokens = torch.arange(12).view(3, 4) % 8

    def forward(columns: Any, rows: Any, table: Any, bias: Any, norm: Any) -> Any:
        x = F.embedding(tokens, table)
        y = F.rms_norm(x, (6,), norm)
        y = F.linear(F.silu(F.linear(y, columns)) * F.linear(y, columns), rows, bias)
        return F.dropout(x + y, 0.3) * norm

    torch.manual_seed(5)
    wanted = forward(*wholes)
    wanted.pow(2).sum().backward()
    split = [
        split_of(columns, Layout(0), axis),
        split_of(rows, Layout(1), axis, sequence_dim=1),
        split_of(table, Layout(0), axis, sequence_dim=1),
        bias.clone().requires_grad_(),
        norm.clone().requires_grad_(),
    ]
    torch.manual_seed(5)
    result = forward(*split)
    if not isinstance(result, SplitTensor) or result.division != Layout(1):
        raise AssertionError(result)
    out = gathered(result)
    out.pow(2).sum().backward()
    off = {"value": relative(out, wanted)}
    for number, (have, want) in enumerate(zip(split, wholes, strict=True)):
        gradient = joined(axis.gather(have.local.grad), have.division) if isinstance(have, SplitTensor) else have.grad
        off[f"gradient {number}"] = relative(gradient, want.grad)
    return off


def test_layers_that_leave_the_sequence_split_compute_what_whole_ones_do() -> None:
    for off in on_two_ranks(sequence_block):
        assert max(off.values()) <= 1e-12, off


# What layers read -----------------------------------------------------------------------------------------------------


def reads(axis: Axis) -> dict[str, Any]:
    """Let two layers read one activation in ways in which what is remembered might be out of date."""
    weight = split_of(drawn(8, 6, seed=1), Layout(0), axis)
    x = split_of(drawn(2, 4, 6), Layout(1), axis)
    found: dict[str, Any] = {}
    with torch.no_grad():
        F.linear(x, weight)
    found["after no_grad"] = F.linear(x, weight).requires_grad and axis._entered[2].requires_grad
    F.linear(x, weight).sum().backward()
    found["gradient"] = x.local.grad is not None
    found["after backward"] = axis._entered
    y = x.detach() * 1
    before = gathered(F.linear(y, weight)).detach()
    y.mul_(2)
    found["after a change in place"] = (gathered(F.linear(y, weight)) - 2 * before).abs().max().item()
    z = drawn(2, 4, 6).requires_grad_()
    leaf = z * 1
    first = gathered(F.linear(leaf, weight)).detach()
    leaf.mul_(3)
    found["after a change of a whole one"] = (gathered(F.linear(leaf, weight)) - 3 * first).abs().max().item()
    axis.forget()
    with torch.inference_mode():
        other = SplitTensor(own_part(drawn(2, 4, 6), Layout(1), axis).clone(), Layout(1), axis)
        first = gathered(F.linear(other, weight))
        other.mul_(2)
        found["in inference mode"] = (gathered(F.linear(other, weight)) - 2 * first).abs().max().item()
        found["plain in inference mode"] = F.linear(drawn(2, 4, 6), weight).shape
    found["nothing of inference mode"] = axis._entered
    return found


def test_what_is_remembered_of_an_input_is_never_out_of_date() -> None:
    for found in on_two_ranks(reads):
        assert [found.pop("after no_grad"), found.pop("gradient")] == [True, True]
        assert [found.pop("after backward"), found.pop("nothing of inference mode")] == [None, None]
        assert found.pop("plain in inference mode") == (2, 4, 8)
        assert max(found.values()) < 1e-12


def test_layers_that_read_the_same_send_one_message_backward() -> None:
    def job(axis: Axis) -> int:
        sums: list[int] = []
        original = axis.sum
        axis.sum = lambda tensor: sums.append(tensor.numel()) or original(tensor)  # type: ignore[method-assign]
        weights = [split_of(drawn(8, 6, seed=n), Layout(0), axis) for n in range(3)]
        x = drawn(2, 4, 6).requires_grad_()
        y = x * 2
        (F.linear(y, weights[0]) * F.linear(y, weights[1]) + F.linear(y, weights[2])).local.sum().backward()
        return sums

    assert on_two_ranks(job) == [[48]] * 2


def test_a_block_that_is_recomputed_computes_the_same() -> None:
    first, second, third = drawn(8, 6, seed=1), drawn(8, 6, seed=2), drawn(6, 8, seed=3)

    def block(x: Any, first: Any, second: Any, third: Any) -> Any:
        return x + F.linear(F.dropout(F.linear(x, first).tanh() * F.linear(x, second), 0.3), third)

    def job(axis: Axis, sequence_dim: int | None) -> list[float]:
        wholes = [value.clone().requires_grad_() for value in (first, second, third)]
        parts = [split_of(first, Layout(0), axis), split_of(second, Layout(0), axis)]
        parts.append(split_of(third, Layout(1), axis, sequence_dim=sequence_dim))
        leaf, same = drawn(2, 4, 6).requires_grad_(), drawn(2, 4, 6).requires_grad_()
        torch.manual_seed(2)
        want = block(block(leaf * 1, *wholes), *wholes)
        want.pow(2).sum().backward()
        torch.manual_seed(2)
        x: Any = same * 1 if sequence_dim is None else SplitTensor(part(same * 1, Layout(1), axis), Layout(1), axis)
        for _ in range(2):
            x = checkpoint(block, x, *parts, use_reentrant=False)
        have = gathered(x)
        have.pow(2).sum().backward()
        off = [relative(have, want), relative(same.grad, leaf.grad)]
        off += [
            relative(joined(axis.gather(p.local.grad), p.division), w.grad) for p, w in zip(parts, wholes, strict=True)
        ]
        return [*off, float(axis._entered is not None)]

    for sequence_dim in (None, 1):
        for off in on_two_ranks(lambda axis, dim=sequence_dim: job(axis, dim)):
            assert max(off) < 1e-12


# Gradients of gradients -----------------------------------------------------------------------------------------------


def penalty(axis: Axis | None, first: Any, second: Any, scale: Any, x: Tensor) -> Tensor:
    hidden = torch.tanh(F.linear(x, first)) * scale
    out = F.linear(hidden, second)
    middle = hidden.sum(-1)
    (gradient,) = torch.autograd.grad((out.pow(3).sum() + middle.pow(2).sum()), x, create_graph=True)
    return gradient.pow(2).sum()


def test_gradients_of_gradients_are_those_of_the_whole() -> None:
    values = [drawn(8, 6, seed=1), drawn(6, 8, seed=2), drawn(8, seed=3), drawn(2, 6, seed=4)]

    def job(axis: Axis) -> list[float]:
        wholes = [value.clone().requires_grad_() for value in values]
        penalty(None, *wholes).backward()
        first, second = split_of(values[0], Layout(0), axis), split_of(values[1], Layout(1), axis)
        scale, x = (value.clone().requires_grad_() for value in values[2:])
        penalty(axis, first, second, scale, x).backward()
        pairs = [
            (joined(axis.gather(first.local.grad), Layout(0)), wholes[0]),
            (joined(axis.gather(second.local.grad), Layout(1)), wholes[1]),
            (scale.grad, wholes[2]),
            (x.grad, wholes[3]),
        ]
        return [relative(have, want.grad) for have, want in pairs]

    for off in on_two_ranks(job):
        assert max(off) < 1e-12


def test_every_exchange_is_the_mirror_image_of_its_backward() -> None:
    def job(axis: Axis) -> bool:
        x = drawn(4, 6).requires_grad_()
        checks = [
            lambda t: whole(part(t, Layout(1), axis), Layout(1), axis),
            lambda t: whole(part(t, Layout(0, 2), axis).sin(), Layout(0, 2), axis),
            lambda t: total(enter(axis, t)[0] * (axis.rank + 1), axis),
        ]
        return all(torch.autograd.gradcheck(f, x) and torch.autograd.gradgradcheck(f, x) for f in checks)

    assert on_two_ranks(job) == [True, True]


# Mixed precision ------------------------------------------------------------------------------------------------------

SDPA = F.scaled_dot_product_attention
CAST: dict[str, Callable[..., Any]] = {
    "gelu": lambda x, w: F.gelu(x) * 2,
    "matmul": lambda x, w: x @ x.transpose(-1, -2),
    "attention": lambda x, w: SDPA(x, x, x, is_causal=True),
    "attention with dropout": lambda x, w: SDPA(x, x, x, dropout_p=0.3),
    "softmax": lambda x, w: F.softmax(x @ x.mT, dim=-1),
    "layer_norm": lambda x, w: F.layer_norm(x, (4,), w),
    "rms_norm": lambda x, w: F.rms_norm(x, (4,), w),
    "sum": lambda x, w: (x @ x.mT).sum(1),
    "mean": lambda x, w: (x @ x.mT).mean((1, 2)),
    "cross_entropy": lambda x, w: F.cross_entropy(x @ x.mT, torch.ones(2, 6, 6, dtype=torch.long)),
    "cross_entropy of float32": lambda x, w: F.cross_entropy(
        x, torch.ones(2, 6, 4, dtype=torch.long), reduction="none"
    ),
    "dropout": lambda x, w: F.dropout(x @ x.mT, 0.5),
    "mixed dtypes": lambda x, w: x.bfloat16() * w + x,
}


@pytest.mark.parametrize("autocast", [True, False])
def test_dtypes_are_those_of_the_whole(autocast: bool) -> None:
    def job(axis: Axis) -> dict[str, Any]:
        value, weight = drawn(2, 8, 6, 4, dtype=torch.float32), drawn(4, dtype=torch.float32)
        value, weight = (value, weight) if autocast else (value.bfloat16(), weight.bfloat16())
        found = {}
        for name, function in CAST.items():
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                torch.manual_seed(1)
                want = function(value, weight)
                torch.manual_seed(1)
                have = gathered(function(split_of(value, Layout(1), axis), weight))
            off = (have.float() - want.float()).abs().max() / want.float().abs().max()
            found[name] = (have.dtype == want.dtype, off.item())
        return found

    for found in on_two_ranks(job):
        # bfloat16 keeps 8 bits, and a sum may be rounded in another order.
        assert {name: result for name, result in found.items() if not result[0] or result[1] > 2**-7} == {}
        assert not any(math.isnan(off) for _, off in found.values())
