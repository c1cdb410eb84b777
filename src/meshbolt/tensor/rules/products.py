"""Matrix products, parallel layers among them: which dims meet decides what travels.

| operands | what it is | forward | backward |
|---|---|---|---|
| whole times a weight split by columns (outputs) | column-parallel layer | nothing | sum, once for all layers that read the same |
| split times a weight split by rows (inputs) | row-parallel layer | sum | nothing |
| both split alike in a batch dim | attention by heads | nothing | nothing |

Under sequence parallelism the first gathers what it reads, and the second keeps its part of the sum. Source: Shoeybi et al.
(2019), section 3; Korthikanti et al. (2022), section 4.2.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from meshbolt.tensor.axis import Axis
from meshbolt.tensor.exchange import enter, part, total, total_in_parts, whole_for_parts
from meshbolt.tensor.layout import Layout, SplitLostError
from meshbolt.tensor.rules.elementwise import drawn_noise
from meshbolt.tensor.split import SplitTensor, gathered, like, rule

Product = Callable[[Tensor, Tensor, Tensor | None], Tensor]


@rule("linear")
def linear(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Multiply with a layer's weight, (outputs, inputs)."""
    named = dict(zip(("input", "weight", "bias"), args, strict=False)) | kwargs
    weight = named["weight"]
    if not isinstance(weight, SplitTensor):
        raise SplitLostError("a layer that is not in the plan reads a split activation")
    by_columns = weight.division.dim == 0
    return parallel_layer(named["input"], weight, named.get("bias"), F.linear, by_columns=by_columns)


@rule("addmm")
def addmm(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Multiply with a layer's weight, (inputs, outputs), as layers of GPT-2's kind do."""
    if len(args) != 3 or kwargs or not isinstance(args[2], SplitTensor):
        raise SplitLostError("it is not the product of a layer in the plan")
    bias, read, weight = args

    def product(read: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return torch.mm(read, weight) if bias is None else torch.addmm(bias, read, weight)

    return parallel_layer(read, weight, bias, product, by_columns=weight.division.dim == 1)


def parallel_layer(read: Any, weight: SplitTensor, bias: Any, product: Product, *, by_columns: bool) -> Any:
    """Return what a parallel layer computes.

    Args:
        read: its input, whole or split, (..., inputs).
        weight: split by outputs or by inputs.
        bias: split like the outputs, or whole.
        product: of an input, a weight and a bias or None.
        by_columns: the weight is split by outputs.
    """
    axis, sections = weight.axis, weight.division.sections
    if by_columns:
        mine = bias.local if isinstance(bias, SplitTensor) else bias
        if mine is not None and not isinstance(bias, SplitTensor):
            mine = part(mine, Layout(0, sections), axis)
        out = product(entered(read, axis), weight.local, mine)
        return SplitTensor(out, Layout(out.dim() - 1, sections), axis, sources=weight.sources)
    last = read.dim() - 1
    if isinstance(read, SplitTensor) and read.division.dim != last:
        read = gathered(read)
    if not isinstance(read, SplitTensor):
        read = SplitTensor(part(read, Layout(last, sections), axis), Layout(last, sections), axis)
    if read.division.sections != sections:
        raise SplitLostError(
            f"it reads an activation in {read.division.sections} sections, and its weight has {sections}"
        )
    return summed(product(read.local, weight.local, None), weight, gathered(bias))


def summed(addend: Tensor, weight: SplitTensor, bias: Tensor | None = None) -> Any:
    """Return the sum over the ranks of what each computed, left split along the sequence where the layer is to do that."""
    dim = weight.sequence_dim
    if dim is not None and addend.dim() == 3 and addend.shape[dim] % weight.axis.size == 0:
        layout = Layout(dim)
        out = total_in_parts(addend, layout, weight.axis)
        if bias is not None:
            out = out + enter(weight.axis, bias)[0]
        return SplitTensor(out, layout, weight.axis)
    out = total(addend, weight.axis)
    return out if bias is None else out + bias


def entered(read: Any, axis: Axis) -> Tensor:
    """Return a layer's whole input for a computation of which every rank does a part; once for all layers that read it."""
    version = read._version if isinstance(read, Tensor) and not isinstance(read, SplitTensor) else 0
    if isinstance(read, SplitTensor):
        version = read.local._version
    elif not (read.requires_grad and torch.is_grad_enabled()):
        return read
    if (known := axis.remembered(read, version)) is not None:
        return known
    made = whole_for_parts(read.local, read.division, axis) if isinstance(read, SplitTensor) else enter(axis, read)[0]
    axis.remember(read, version, made)
    return made


@rule("matmul", "bmm", "mm", "__rmatmul__", "baddbmm")
def matmul(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Multiply matrices of a batch."""
    name = getattr(func, "__name__", "")
    addend, first, second = args if name == "baddbmm" else (None, *args)
    if name == "__rmatmul__":
        first, second = second, first
    if kwargs:
        raise SplitLostError("it has factors")
    if min(first.dim(), second.dim()) < 2:
        raise SplitLostError("it multiplies vectors")
    product = _product(first, second)
    return product if addend is None else product + addend


def _product(first: Any, second: Any) -> Any:
    split = first if isinstance(first, SplitTensor) else second
    behind = split.dim() - split.division.dim
    if behind <= 2:
        raise SplitLostError("the matrices themselves are split")
    parts = [_batch_part(operand, split, behind) for operand in (first, second)]
    out = torch.matmul(*parts)
    return like(
        split,
        out,
        split.division.moved(out.dim() - behind),
        of=[t for t in (first, second) if isinstance(t, SplitTensor)],
    )


def _batch_part(operand: Any, split: SplitTensor, behind: int) -> Tensor:
    """Return this rank's part of an operand whose batch dim meets the split one."""
    if isinstance(operand, SplitTensor):
        same = (operand.dim() - operand.division.dim, operand.division.sections) == (behind, split.division.sections)
        if not same or operand.shape[operand.division.dim] != split.shape[split.division.dim]:
            raise SplitLostError("its operands are split differently")
        return operand.local
    if operand.dim() < behind or operand.shape[operand.dim() - behind] == 1:
        return enter(split.axis, operand)[0]
    return part(operand, Layout(operand.dim() - behind, split.division.sections), split.axis)


@rule("einsum")
def einsum(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Multiply along named dims; the split one has to be kept."""
    equation, *operands = args
    operands = list(operands[0]) if len(operands) == 1 and isinstance(operands[0], (tuple, list)) else operands
    if not isinstance(equation, str) or "->" not in equation or "." in equation:
        raise SplitLostError("its equation does not name the dims of the result")
    terms, result = equation.replace(" ", "").split("->")
    named = list(zip(terms.split(","), operands, strict=True))
    splits = [
        (letters[operand.division.dim], operand) for letters, operand in named if isinstance(operand, SplitTensor)
    ]
    letter, first = splits[0]
    if letter not in result or any(
        other != letter or t.division.sections != first.division.sections for other, t in splits
    ):
        raise SplitLostError("the split dim is summed over, or its operands are split differently")
    parts = []
    for letters, operand in named:
        if isinstance(operand, SplitTensor):
            parts.append(operand.local)
        elif letter in letters:
            parts.append(part(operand, Layout(letters.index(letter), first.division.sections), first.axis))
        else:
            parts.append(enter(first.axis, operand)[0])
    layout = Layout(result.index(letter), first.division.sections)
    return like(first, torch.einsum(equation, *parts), layout, of=[t for _, t in splits])


@rule("scaled_dot_product_attention")
def attention(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Attend, every rank with its heads (or its samples)."""
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    named = dict(zip(names, args, strict=False)) | kwargs
    query, key, value = (named[name] for name in ("query", "key", "value"))
    split = next(t for t in (query, key, value) if isinstance(t, SplitTensor))
    behind = split.dim() - split.division.dim
    if behind <= 2 or split.division.sections != 1:
        raise SplitLostError("positions or features are split, not heads")
    _check_heads(query, key, value, behind, grouped=bool(named.get("enable_gqa")))
    parts = [_heads(tensor, split.axis, behind) for tensor in (query, key, value)]
    mask = named.get("attn_mask")
    if isinstance(mask, SplitTensor) or (isinstance(mask, Tensor) and mask.dim() >= behind):
        mask = _heads(mask, split.axis, behind)
    elif isinstance(mask, Tensor):
        mask = enter(split.axis, mask)[0]
    probability = named.get("dropout_p", 0.0)
    options = {key: value for key, value in named.items() if key in ("is_causal", "scale", "enable_gqa")}
    layout = split.division
    if probability:
        out = _attention_with_dropout(*parts, mask, split, query, probability, **options)
    else:
        out = F.scaled_dot_product_attention(*parts, attn_mask=mask, **options)
    sources = [t for t in (query, key, value) if isinstance(t, SplitTensor)]
    return like(split, out, layout.moved(out.dim() - behind), of=sources)


def _check_heads(query: Any, key: Any, value: Any, behind: int, *, grouped: bool) -> None:
    tensors = [t for t in (query, key, value) if isinstance(t, SplitTensor)]
    if any(t.dim() - t.division.dim != behind or t.division.sections != 1 for t in tensors):
        raise SplitLostError("queries, keys and values are split differently")
    sizes = {t.shape[t.dim() - behind] for t in (query, key, value)}
    if len(sizes) > 1 and not (grouped and behind == 3):
        raise SplitLostError("queries, keys and values have different numbers of heads")


def _heads(tensor: Any, axis: Axis, behind: int) -> Tensor:
    if isinstance(tensor, SplitTensor):
        if tensor.dim() - tensor.division.dim != behind or tensor.division.sections != 1:
            raise SplitLostError("queries, keys, values and mask are split differently")
        return tensor.local
    if tensor.shape[tensor.dim() - behind] == 1:
        return enter(axis, tensor)[0]
    return part(tensor, Layout(tensor.dim() - behind), axis)


def _attention_with_dropout(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    split: SplitTensor,
    whole_query: Any,
    probability: float,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Attend as torch's plain path does; what is dropped is drawn for all heads."""
    if enable_gqa:
        repeats = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(repeats, -3), value.repeat_interleave(repeats, -3)
    root = math.sqrt(scale if scale is not None else 1 / math.sqrt(query.shape[-1]))
    scores = (query * root) @ (key * root).transpose(-2, -1)
    if is_causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    weights = scores.softmax(dim=-1)
    behind = split.dim() - split.division.dim
    layout = Layout(weights.dim() - behind)
    noise = drawn_noise(SplitTensor(weights.detach(), layout, split.axis), probability)
    out: Tensor = (weights * noise) @ value
    return out
