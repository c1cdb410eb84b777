"""Rows of operations on each element by itself, for every form in which torch has them."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from tests.ranks.tensor.rows import GATHERED, Operand, Row, plain, split
from torch import Tensor

from meshbolt.tensor.layout import Layout

SHAPE = (8, 12, 24)
# Each dim, in as many sections as 4 ranks can share.
LAYOUTS = [Layout(0), Layout(0, 2), Layout(1), Layout(1, 3), Layout(2), Layout(2, 2), Layout(2, 3)]
FEW = [Layout(0), Layout(2, 3)]
PLACES = {"torch": torch, "Tensor": torch.Tensor, "F": F, "nn": torch._C._nn, "special": torch.special}

ANYWHERE = """
abs absolute neg negative positive sign sgn square reciprocal exp exp2 expm1 sin cos tan asin atan sinh cosh tanh sigmoid erf erfc
erfinv relu gelu silu elu selu celu leaky_relu mish softplus hardtanh relu6 hardswish hardsigmoid hardshrink softshrink logsigmoid
softsign tanhshrink nan_to_num isnan isinf isfinite round floor ceil trunc fix frac angle conj resolve_conj resolve_neg
logical_not contiguous clone detach float double half bfloat16 bool long int cpu acos log1p zeros_like ones_like
"""
POSITIVE = "log log2 log10 sqrt rsqrt logit"
BINARY = """
add sub subtract mul multiply div divide true_divide remainder fmod pow maximum minimum fmax fmin rsub atan2 hypot
logaddexp xlogy copysign eq ne lt le gt ge greater less not_equal logical_and logical_or logical_xor isclose __pow__ __eq__ __ne__
__radd__ __rsub__ __rmul__ __rdiv__ __rtruediv__ __rpow__
"""
OF_INTEGERS = "bitwise_and bitwise_or bitwise_xor __and__ __or__ __xor__"
UNARY_IN_PLACE = """
neg_ relu_ sigmoid_ tanh_ exp_ sqrt_ rsqrt_ square_ abs_ zero_ silu_ leaky_relu_ elu_ hardtanh_ celu_ selu_ logical_not_
"""
BINARY_IN_PLACE = """
add_ sub_ mul_ div_ pow_ copy_ remainder_ __iadd__ __isub__ __imul__ __itruediv__ __idiv__ __ipow__
__imod__
"""
INTEGERS_IN_PLACE = "__iand__ __ior__ __ixor__"


def forms(name: str) -> Iterator[tuple[str, Callable[..., Any]]]:
    """Yield a function wherever torch has it."""
    places = {"Tensor": torch.Tensor} if name.startswith("__") else PLACES
    for place, holder in places.items():
        if callable(found := getattr(holder, name, None)):
            yield f"{place}.{name}", found


def in_place(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that changes a copy of its first argument, and returns it beside the result."""

    @functools.wraps(function)
    def changed(first: Any, *others: Any) -> Any:
        target = first * 1
        result = function(target, *others)
        if result is not target:
            raise AssertionError("another tensor was returned")
        return result, target

    return changed


def _detached(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *tensors: function(*(tensor.detach() for tensor in tensors))


def each(
    name: str, function: Callable[..., Any], *others: Operand, layouts: Any = FEW, **options: Any
) -> Iterator[Row]:
    """Yield a row for each layout of a first operand of the shape of all."""
    result = options.pop("result", "split")
    for layout in layouts:
        alike = [Operand(SHAPE, layout, **options) if other is ALIKE else other for other in (ALIKE, *others)]
        yield Row(f"{name} {layout.dim}/{layout.sections}", function, tuple(alike), result)


ALIKE = plain()
INTEGERS: dict[str, Any] = {"dtype": torch.int64, "below": 9}


def _forms() -> Iterator[Row]:
    for names, options in ((ANYWHERE, {}), (POSITIVE, {"kind": "positive"})):
        for name in names.split():
            for title, form in forms(name):
                yield from each(title, form, **options)
    for name in BINARY.split():
        for title, form in forms(name):
            yield from each(title, form, ALIKE, kind="positive")
    for names, wrapped in ((WITHOUT, _detached), (WITHOUT_IN_PLACE, lambda form: _detached(in_place(form)))):
        for name in names:
            for title, form in forms(name):
                yield from each(title, wrapped(form), plain(12, 24, kind="positive"), kind="positive")
    for name in OF_INTEGERS.split():
        for title, form in forms(name):
            yield from each(title, form, ALIKE, **INTEGERS)
    for name in ("bitwise_not", "__invert__"):
        for title, form in forms(name):
            yield from each(title, form, **INTEGERS)
    for name in UNARY_IN_PLACE.split():
        for title, form in forms(name):
            yield from each(title, in_place(form), kind="positive")
    for name in BINARY_IN_PLACE.split():
        for title, form in forms(name):
            yield from each(title, in_place(form), plain(12, 24, kind="positive"), kind="positive")
    for name in INTEGERS_IN_PLACE.split():
        for title, form in forms(name):
            yield from each(title, in_place(form), plain(12, 24, **INTEGERS), **INTEGERS)
    for name, arguments in WITH_NUMBERS.items():
        for title, form in forms(name):
            called = lambda x, form=form, arguments=arguments: form(x, *arguments)  # noqa: E731
            yield from each(title, in_place(called) if name.endswith("_") else called)
    for name, others in OF_SEVERAL.items():
        for title, form in forms(name):
            yield from each(title, in_place(form) if name.endswith("_") else form, *others, kind="positive")


WITH_NUMBERS: dict[str, tuple[Any, ...]] = {
    "threshold": (0.1, 0.5),
    "clamp": (-0.5, 0.5),
    "clamp_min": (0.1,),
    "clamp_max": (0.1,),
    "clip": (-0.5, 0.5),
    "full_like": (2.0,),
    "clamp_": (-0.5, 0.5),
    "clamp_min_": (0.1,),
    "clamp_max_": (0.1,),
    "fill_": (2.0,),
    "type_as": (torch.zeros(1, dtype=torch.float32),),
    "type": (torch.float32,),
    "to": (torch.float32,),
}
MASK = plain(*SHAPE, dtype=torch.bool)
OF_SEVERAL: dict[str, tuple[Operand, ...]] = {
    "addcmul": (ALIKE, plain(24, kind="positive")),
    "addcdiv": (ALIKE, plain(24, kind="positive")),
    "lerp": (ALIKE, plain(12, 1, kind="positive")),
    "addcmul_": (plain(12, 1), plain(24, kind="positive")),
    "addcdiv_": (ALIKE, plain(24, kind="positive")),
    "lerp_": (ALIKE, plain(12, 1)),
    "masked_fill": (MASK, plain()),
    "masked_fill_": (MASK, plain()),
}
# Without derivatives.
WITHOUT = ("floor_divide", "__floordiv__", "__rfloordiv__", "__rmod__")
WITHOUT_IN_PLACE = ("floor_divide_", "__ifloordiv__")

# What a second operand may look like beside one of SHAPE.
OPERANDS = {
    "alike": ALIKE,
    "whole": plain(*SHAPE),
    "last": plain(24),
    "one": plain(),
    "one in a dim": plain(1),
    "ones": plain(1, 1, 24),
    "ones behind": plain(8, 1, 1),
    "two dims": plain(12, 24),
    "two dims, one": plain(12, 1),
    "more dims": plain(3, 8, 12, 24),
    "more dims, ones": plain(2, 1, 1, 1),
    "float32": plain(12, 1, dtype=torch.float32),
    "integers": plain(24, **INTEGERS),
    "truth": plain(8, 1, 24, dtype=torch.bool),
}


def _operators() -> Iterator[Row]:
    for title, other in OPERANDS.items():
        yield from each(f"x * y, {title}", operator.mul, other, layouts=LAYOUTS)
        yield from each(f"y + x, {title}", lambda x, y: y + x, other, layouts=LAYOUTS)
        yield from each(f"y > x, {title}", lambda x, y: y > x, other, layouts=FEW)
    for name in ("add", "sub", "mul", "truediv", "pow", "mod", "eq", "ne", "lt", "le", "gt", "ge"):
        function = getattr(operator, name)
        yield from each(f"x {name} 2.5", lambda x, f=function: f(x, 2.5), kind="positive")
        if name != "mod":
            yield from each(f"2.5 {name} x", lambda x, f=function: f(2.5, x), kind="positive")
        yield from each(
            f"plain {name} x", lambda x, y, f=function: f(y, x), plain(12, 1, kind="positive"), kind="positive"
        )
    for name in ("iadd", "isub", "imul", "itruediv", "ipow", "imod"):
        function = getattr(operator, name)
        yield from each(f"{name} plain", in_place(function), plain(12, 1, kind="positive"), kind="positive")
        yield from each(f"{name} 2", in_place(lambda x, f=function: f(x, 2)), kind="positive")
    for name in ("and_", "or_", "xor"):
        function = getattr(operator, name)
        yield from each(f"{name} truth", function, plain(12, 24, dtype=torch.bool), dtype=torch.bool)
        yield from each(f"True {name}", lambda x, f=function: f(True, x), dtype=torch.bool)
    yield from each("x // 2, 2 // x, 2 % x", _detached(lambda x: (x // 2, 2 // x, 2 % x)), kind="positive")
    yield from each("-x, +x, abs(x)", lambda x: (-x, +x, abs(x)))
    yield from each("~x", operator.invert, dtype=torch.bool)


def _arguments() -> Iterator[Row]:
    yield from each("gelu tanh", lambda x: F.gelu(x, approximate="tanh"))
    yield from each("add alpha", lambda x, y: torch.add(x, y, alpha=0.3), plain(24))
    yield from each("add by name", lambda x, y: torch.add(input=x, other=y), plain(24))
    yield from each("add by numpy's names", lambda x, y: torch.add(x=y, x2=x), plain(24))
    yield from each("div rounded", lambda x, y: torch.div(x, y, rounding_mode="floor"), plain(24))
    yield from each("round decimals", lambda x: torch.round(x, decimals=1))
    yield from each("clamp by tensors", lambda x, y: x.clamp(min=y), plain(12, 1))
    yield from each("power of a number", lambda x: torch.pow(2.0, x))
    yield from each("where, condition whole", lambda x, m, y: torch.where(m, x, y), MASK, plain(24))
    yield from each("where, condition split", lambda x, y: torch.where(x > 0, x, y), plain(12, 1))
    yield from each("where, numbers", lambda x: torch.where(x > 0, x, 0.0))
    yield from each("where, only numbers", lambda x: torch.where(x > 0, 1.0, 0.0))
    yield from each("where by names", lambda x, y: torch.where(condition=x > 0, input=y, other=x), plain(12, 1))
    yield from each("x.where", lambda x, m, y: x.where(m, y), MASK, plain(24))
    yield from each("where, places", lambda x: torch.where(x > 0), layouts=[Layout(2)], result=GATHERED)
    yield from each("masked_fill number", lambda x, m: x.masked_fill(m, -1e9), plain(12, 24, dtype=torch.bool))
    yield from each("masked_fill by split mask", lambda x, y: y.masked_fill(x > 0, 0.5), plain(24))
    yield from each("float to float32 and back", lambda x: x.float().to(torch.float64))
    yield from each("to a split one", lambda x, y: y.to(x.float()), plain(24), result="whole")
    yield from each("to by name", lambda x, y: x.to(dtype=torch.float32).to(dtype=torch.float64) * y, plain(24))
    yield from each("zeros_like float32", lambda x: torch.zeros_like(x, dtype=torch.float32))
    yield from each("empty_like", lambda x: torch.empty_like(x).fill_(2.0))
    yield from each(
        "x.new",
        lambda x: (x.new_zeros(3), x.new_ones((2, 2)), x.new_full((2,), 1.5), x.new_tensor([1.0])),
        result="whole",
    )
    yield from each("x.new_empty", lambda x: x.new_empty(2).fill_(1.0), result="whole")
    yield from each("no gradient", _without_gradient, plain(24), layouts=LAYOUTS)
    yield from each("constant", lambda x, y: x * y.detach() + y.detach(), plain(24), layouts=LAYOUTS)
    for name in (
        "relu",
        "silu",
        "elu",
        "selu",
        "celu",
        "leaky_relu",
        "hardtanh",
        "relu6",
        "hardswish",
        "hardsigmoid",
        "mish",
    ):
        yield from each(f"F.{name} in place", in_place(lambda x, n=name: getattr(F, n)(x, inplace=True)))
    yield from each("in place on a view", _in_place_on_a_view)
    yield from each("in place, seen through a view", _seen_through_a_view)
    yield from each("square root of the square", lambda x, y: (x.square() + y.square()).sqrt(), plain(24))
    narrow = (split(12, 24, dim=1), split(8, 12, 24, dim=2), plain(12, 24))
    yield Row("fewer dims beside more", lambda x, y, z: x * y + z * x, narrow)
    yield Row("split differently", operator.add, (split(8, 12, dim=0), split(8, 12, dim=1)), GATHERED)
    yield Row("sections differ", operator.add, (split(8, 12, dim=0), split(8, 12, dim=0, sections=2)), GATHERED)
    yield Row("as many as there are ranks", lambda x, y: x * y, (split(4, 4, dim=0), plain(4, 1)))
    parts: dict[str, Any] = {"dtype": torch.complex128}
    yield Row("complex", lambda x, y: (x * y).conj() + x, (split(8, 12, dim=1, **parts), plain(12, **parts)))
    yield Row("real, imag", lambda x: (x.real, x.imag, x.angle()), (split(8, 12, dim=1, **parts),))


def _without_gradient(x: Any, y: Any) -> Any:
    with torch.no_grad():
        noise = x * y
    return x + noise * y


def _in_place_on_a_view(x: Any) -> Any:
    y = x * 1
    y.transpose(0, 1).add_(1.0)
    y.view(x.shape).mul_(x)
    return y


def _seen_through_a_view(x: Any) -> Any:
    y = x * 1
    view = y.transpose(0, 2)
    y.mul_(3.0)
    return view * 2, y


def element_rows() -> list[Row]:
    return [*_forms(), *_operators(), *_arguments()]


def noise_rows() -> list[Row]:
    """Rows in which random numbers are drawn: those of one process."""
    rows: list[Row] = []
    for title, arrange in ARRANGED.items():
        rows += each(f"dropout {title}", lambda x, a=arrange: F.dropout(a(x), 0.3), layouts=LAYOUTS)
    rows.append(
        Row(
            "dropout of turned heads, one a rank",
            lambda x: F.dropout(x.view(3, 5, 4, 2).transpose(1, 2), 0.3),
            (split(3, 5, 8, dim=2),),
        )
    )
    rows += each("torch.dropout", lambda x: torch.dropout(x, 0.5, True))
    rows += each("dropout of all", lambda x: F.dropout(x, 1.0))
    rows += each("dropout of none", lambda x: F.dropout(x, 0.0))
    rows += each("dropout in evaluation", lambda x: F.dropout(x, 0.5, training=False))
    rows += each("dropout in evaluation of torch", lambda x: torch.dropout(x, p=0.5, train=False))
    rows += each("dropout by names", lambda x: F.dropout(input=x, p=0.4, training=True))
    rows += each("dropout in place", in_place(lambda x: F.dropout(x, 0.4, True, True)))
    rows += each(
        "dropout twice, noise between",
        lambda x, y: F.dropout(x, 0.2) + F.dropout(y, 0.2) + F.dropout(x, 0.2),
        plain(24),
    )
    rows += each("rand_like", lambda x: x * torch.rand_like(x), layouts=[Layout(2)], result=GATHERED)
    rows += each("dropout1d", lambda x: F.dropout1d(x, 0.4), layouts=[Layout(1)], result=GATHERED)
    return rows


ARRANGED: dict[str, Callable[[Tensor], Tensor]] = {
    "as it is": lambda x: x,
    "transposed": lambda x: x.transpose(0, 2),
    "transposed inside": lambda x: x.transpose(1, 2),
    "permuted": lambda x: x.permute(2, 0, 1),
    "narrowed": lambda x: torch.stack([x, x], dim=-1).unbind(-1)[0],
    "expanded": lambda x: x.unsqueeze(1).expand(-1, 3, -1, -1),
}
