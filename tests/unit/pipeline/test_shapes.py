"""What is remembered of an operation on tensors without values is what torch finds out about it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from meshbolt.pipeline import Foreign, shapes

CPU = torch.device("cpu")
Operation = Callable[[Tensor, Tensor], Any]
OPERATIONS: dict[str, Operation] = {
    "add": lambda x, y: x + y,
    "by number": lambda x, y: (x * 2, x * 2.0, x * True),
    "other dtypes": lambda x, y: (x.half(), x.to(torch.int64), x.int() / 3, x > y),
    "product": lambda x, y: x @ y.T,
    "linear": lambda x, y: F.linear(x, y),
    "norm": lambda x, y: F.layer_norm(x, x.shape[-1:]),
    "several": lambda x, y: (x.max(dim=0), torch.topk(x, 2), x.sort()),
    "views": lambda x, y: (
        x.T,
        x[1:],
        x[0],
        x[:, None],
        x.expand(2, *x.shape),
        x.view(-1),
        x.detach(),
        x.permute(1, 0),
    ),
    "views of views": lambda x, y: (x.T[1:].unsqueeze(0), x.T.transpose(0, 1)[::2, 1]),
    "parts": lambda x, y: (*x.split(2), *x.chunk(2, dim=1), *x.unbind()),
    "laid out otherwise": lambda x, y: (x.T + y.T, x.T.contiguous(), x.T.clone(), torch.empty_like(x.T)),
    "joined": lambda x, y: (torch.cat([x, y]), torch.stack([x, y], dim=1)),
    "reduced": lambda x, y: (x.sum(), x.mean(dim=0), x.mean(dim=0, keepdim=True), x.var()),
    "attention": lambda x, y: F.scaled_dot_product_attention(x[None, None], y[None, None], x[None, None]),
    "in place": lambda x, y: (x.clone().add_(y), x.clone().relu_()),
    "chosen": lambda x, y: torch.where(x > y, x, 0.0),
    "complex": lambda x, y: (torch.view_as_real(torch.complex(x, y)), torch.complex(x, y).conj()),
    "real values": lambda x, y: x * torch.arange(6.0),
    "random": lambda x, y: (torch.rand_like(x), F.dropout(x, 0.5)),
    "no copy": lambda x, y: (x.contiguous(), x.float(), x.reshape(-1, 2)),
}


def facts(result: Any) -> Any:
    tensors = result if isinstance(result, (tuple, list)) else (result,)
    flat = [leaf for each in tensors for leaf in (each if isinstance(each, (tuple, list)) else (each,))]
    return [
        (leaf.shape, leaf.stride(), leaf.dtype, leaf.device, leaf.storage_offset(), leaf.is_conj()) for leaf in flat
    ]


def expected(operation: Operation, *sizes: tuple[int, ...]) -> Any:
    with FakeTensorMode(allow_non_fake_inputs=True):
        return facts(operation(*(torch.empty(size) for size in sizes)))


def found(operation: Operation, *sizes: tuple[int, ...], trained: bool = False) -> Any:
    mode = Foreign()
    given = [mode.like(torch.empty(size), device=CPU).requires_grad_(trained) for size in sizes]
    return operation(*given)


@pytest.mark.parametrize("name", OPERATIONS)
def test_what_is_remembered_is_what_torch_finds(name: str) -> None:
    shapes._known.clear()
    for size in ((4, 6), (4, 6), (6, 6), (4, 6)):
        assert facts(found(OPERATIONS[name], size, size)) == expected(OPERATIONS[name], size, size)
        assert facts(found(OPERATIONS[name], size, size, trained=True)) == expected(OPERATIONS[name], size, size)


def test_layers_that_repeat_are_looked_up() -> None:
    shapes._known.clear()
    found(OPERATIONS["linear"], (4, 6), (5, 6))
    known = len(shapes._known)
    assert known > 0
    found(OPERATIONS["linear"], (4, 6), (5, 6))
    assert len(shapes._known) == known


def test_the_default_dtype_counts() -> None:
    def divided(x: Tensor, y: Tensor) -> Tensor:
        return x.int() / y.int()

    assert found(divided, (2,), (2,)).dtype == torch.float32
    torch.set_default_dtype(torch.float64)
    try:
        assert found(divided, (2,), (2,)).dtype == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_view_shares_the_memory_of_its_base() -> None:
    x = found(lambda x, _y: x, (4, 6), (1,))
    assert x.T.untyped_storage()._cdata == x.untyped_storage()._cdata
    assert (x + 1).untyped_storage()._cdata != x.untyped_storage()._cdata
    part = (x + 1)[1:]
    part.add_(1)
    assert part._version == part._base._version == 1  # type: ignore[union-attr]


def test_a_result_that_is_an_argument_is_not_remembered() -> None:
    for _ in range(2):
        x = found(lambda x, _y: x, (4, 6), (1,))
        assert x.view(4, 6)._base is x
        assert x.contiguous() is x


def test_wrong_shapes_fail_as_they_do_without_it() -> None:
    for _ in range(2):
        with pytest.raises(RuntimeError, match="reduction dim"):
            found(lambda x, y: x @ y, (4, 6), (4, 6))
        with pytest.raises(RuntimeError, match="is invalid for input of size"):
            found(lambda x, _y: x.view(5), (4, 6), (1,))


def test_graphs_are_made_as_without_it() -> None:
    result = found(lambda x, y: F.linear(x, y).relu().T[1:], (4, 6), (5, 6), trained=True)
    assert result.requires_grad
    assert result.grad_fn is not None
    result.sum().backward()
