"""Matrix products, parallel layers among them: which dims meet decides what travels.

| operands | what it is | forward | backward |
|---|---|---|---|
| whole times a weight split by columns (outputs) | column-parallel layer | nothing | sum, once for all that read the same |
| split times a weight split by rows (inputs) | row-parallel layer | sum | nothing |
| both split alike in a batch dim | attention by heads | nothing | nothing |

Under sequence parallelism the first gathers what it reads, and the second keeps its part of the sum. Source: Shoeybi et al.
(2019), section 3; Korthikanti et al. (2022), section 4.2.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from meshbolt.tensor.axis import Axis
from meshbolt.tensor.exchange import enter, part, total, total_in_parts, whole_for_parts
from meshbolt.tensor.layout import Layout, SplitLostError
from meshbolt.tensor.part import Split
from meshbolt.tensor.rules.elementwise import drawn_noise
from meshbolt.tensor.split import gathered, like, named, rule, split_of

Product = Callable[[Tensor, Tensor, Tensor | None], Tensor]


@rule("linear")
def linear(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Multiply with a layer's weight, (outputs, inputs)."""
    given = named(("input", "weight", "bias"), args, kwargs)
    read, weight, bias = given["input"], given["weight"], given.get("bias")
    if not isinstance(weight, Split):
        if not isinstance(read, Split) or read.division.dim == read.dim() - 1:
            raise SplitLostError("a layer that is not in the plan reads a split activation")
        # The end of what is divided along the sequence: such a layer is every rank's own.
        return func(gathered(read), weight, gathered(bias))
    if weight.dim() != 2:
        raise SplitLostError("its weight is not a matrix")
    return parallel_layer(read, weight, bias, F.linear, by_columns=weight.division.dim == 0)


@rule("addmm")
def addmm(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Multiply with a layer's weight, (inputs, outputs), as layers of GPT-2's kind do."""
    given = named(("input", "mat1", "mat2"), args, kwargs)
    bias, read, weight = (given[name] for name in ("input", "mat1", "mat2"))
    if not isinstance(weight, Split) or bias.dim() != 1:
        raise SplitLostError("it is not the product of a layer in the plan")

    def product(read: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return torch.mm(read, weight) if bias is None else torch.addmm(bias, read, weight)

    return parallel_layer(read, weight, bias, product, by_columns=weight.division.dim == 1)


def parallel_layer(read: Any, weight: Split, bias: Any, product: Product, *, by_columns: bool) -> Any:
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
        mine = _bias_part(bias, weight)
        out = product(entered(read, axis), weight.local, mine)
        return split_of(out, Layout(out.dim() - 1, sections), axis, sources=weight.sources)
    last = read.dim() - 1
    if isinstance(read, Split) and read.division.dim != last:
        read = gathered(read)
    if not isinstance(read, Split):
        read = split_of(part(read, Layout(last, sections), axis), Layout(last, sections), axis)
    if read.division.sections != sections:
        raise SplitLostError(
            f"it reads an activation in {read.division.sections} sections, and its weight has {sections}"
        )
    return summed(product(read.local, weight.local, None), weight, gathered(bias))


def _bias_part(bias: Any, weight: Split) -> Tensor | None:
    if bias is None:
        return None
    layout = Layout(0, weight.division.sections)
    if not isinstance(bias, Split):
        return part(bias, layout, weight.axis)
    if bias.division != layout:
        raise SplitLostError("its weight and its bias are split differently")
    return bias.local


def summed(addend: Tensor, weight: Split, bias: Tensor | None = None) -> Any:
    """Return the sum over the ranks of what each computed, left split along the sequence where the layer is to do that."""
    dim = weight.sequence_dim
    if dim is not None and _has_sequence(addend, dim) and addend.shape[dim] % (weight.axis.size * weight.samples):
        weight.axis.report_length(addend.shape[dim] // weight.samples)
    elif dim is not None and _has_sequence(addend, dim):
        layout = Layout(dim, weight.samples)
        out = total_in_parts(addend, layout, weight.axis)
        if bias is not None:
            out = out + enter(weight.axis, bias)[0]
        return split_of(out, layout, weight.axis, along_sequence=True)
    out = total(addend, weight.axis)
    return out if bias is None else out + bias


def _has_sequence(addend: Tensor, dim: int) -> bool:
    return addend.dim() in (2, 3) and dim < addend.dim() - 1


def entered(read: Any, axis: Axis) -> Tensor:
    """Return a layer's whole input for a computation of which every rank does a part; once for all layers that read it.

    Args:
        read: whole or split.
        axis: the ranks.
    """
    graded = torch.is_grad_enabled()
    local = read.local if isinstance(read, Split) else read
    if not isinstance(read, Split) and not (graded and read.requires_grad):
        return local
    # Tensors of inference mode do not count how often they were written to.
    if torch.compiler.is_compiling():
        state: Any = (graded, local.requires_grad)
    else:
        state = None if local.is_inference() else (graded, local.requires_grad, local._version)
    if state is not None and (known := axis.remembered(read, state)) is not None:
        found: Tensor = known
        return found
    made = whole_for_parts(local, read.division, axis) if isinstance(read, Split) else enter(axis, local)[0]
    if state is not None:
        axis.remember(read, state, made)
    return made


@rule("matmul", "bmm", "mm", "__rmatmul__")
def matmul(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Multiply matrices of a batch."""
    name = getattr(func, "__name__", "")
    given = named(("input", "other" if "matmul" in name else "mat2"), args, kwargs)
    first, second = given.values()
    if name == "__rmatmul__":
        first, second = second, first
    return _product(first, second)


@rule("baddbmm")
def baddbmm(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Multiply matrices of a batch, and add."""
    given = named(("input", "batch1", "batch2", "beta", "alpha"), args, kwargs)
    product, beta = _product(given["batch1"], given["batch2"]), given.get("beta", 1)
    product = product * given["alpha"] if given.get("alpha", 1) != 1 else product
    # Where nothing of it counts, what is added may be anything, NaN too.
    return product if beta == 0 else torch.add(product, given["input"], alpha=beta)


def _product(first: Any, second: Any) -> Any:
    split = first if isinstance(first, Split) else second
    if min(first.dim(), second.dim()) < 2:
        raise SplitLostError("it multiplies vectors")
    if not isinstance(split, Split):
        raise SplitLostError("it is what is added that is split")
    behind = split.dim() - split.division.dim
    if behind <= 2:
        raise SplitLostError("the matrices themselves are split")
    out = torch.matmul(*(_batch_part(operand, split, behind) for operand in (first, second)))
    return like(split, out, split.division.moved(out.dim() - behind))


def _batch_part(operand: Any, split: Split, behind: int) -> Tensor:
    """Return this rank's part of an operand whose batch dim meets the split one."""
    if isinstance(operand, Split):
        same = (operand.dim() - operand.division.dim, operand.division.sections) == (behind, split.division.sections)
        if not same or operand.shape[operand.division.dim] != split.shape[split.division.dim]:
            raise SplitLostError("its operands are split differently")
        return operand.local
    if operand.dim() < behind or operand.shape[-behind] == 1:
        return enter(split.axis, operand)[0]
    if operand.shape[-behind] != split.shape[split.division.dim]:
        raise SplitLostError("its operands have different sizes at the split dim")
    return part(operand, Layout(operand.dim() - behind, split.division.sections), split.axis)


@rule("einsum")
def einsum(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Multiply along named dims; the split one has to be kept."""
    if not args or kwargs or not isinstance(args[0], str):
        raise SplitLostError("its equation is not written in letters")
    equation, *operands = args
    operands = list(operands[0]) if len(operands) == 1 and isinstance(operands[0], (tuple, list)) else operands
    terms, arrow, result = equation.replace(" ", "").partition("->")
    letters = terms.split(",")
    if not arrow or "." in equation or len(letters) != len(operands):
        raise SplitLostError("its equation does not name all dims")
    pairs = list(zip(letters, operands, strict=True))
    splits = [(own[operand.division.dim], operand) for own, operand in pairs if isinstance(operand, Split)]
    letter, first = splits[0]
    alike = all(own == letter and t.division.sections == first.division.sections for own, t in splits)
    if letter not in result or not alike or any(own.count(letter) > 1 for own in letters):
        raise SplitLostError("the split dim is summed over, or its operands are split differently")
    parts = [_letter_part(own, operand, letter, first) for own, operand in pairs]
    layout = Layout(result.index(letter), first.division.sections)
    return like(first, torch.einsum(equation, *parts), layout)


def _letter_part(letters: str, operand: Any, letter: str, first: Split) -> Tensor:
    """Return this rank's part of an operand along the dim of a letter."""
    size = first.shape[first.division.dim]
    dim = letters.find(letter)
    if not isinstance(operand, Split) and (dim < 0 or operand.shape[dim] == 1):
        return enter(first.axis, operand)[0]
    if operand.shape[dim] != size:
        raise SplitLostError("its operands have different sizes at the split dim")
    return (
        operand.local if isinstance(operand, Split) else part(operand, Layout(dim, first.division.sections), first.axis)
    )


@rule("scaled_dot_product_attention")
def attention(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Attend, every rank with its heads (or its samples)."""
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
    given = named(names, args, kwargs)
    tensors = [given[name] for name in ("query", "key", "value")]
    splits = [t for t in tensors if isinstance(t, Split)]
    if not splits:
        raise SplitLostError("only its mask is split")
    behind = splits[0].dim() - splits[0].division.dim
    _check_heads(tensors, behind, grouped=bool(given.get("enable_gqa")))
    axis, mask, probability = splits[0].axis, given.get("attn_mask"), given.get("dropout_p", 0.0)
    parts = dict(zip(("query", "key", "value"), (_heads(tensor, axis, behind) for tensor in tensors), strict=True))
    if mask is not None:
        parts["attn_mask"] = _mask(mask, tensors[0], axis, behind)
    given = {key: value for key, value in given.items() if key != "dropout_p"} | parts
    if not probability:
        out = F.scaled_dot_product_attention(**given)
    elif probability < 0 or probability > 1 or (mask is not None and given.get("is_causal")):
        raise SplitLostError("its arguments do not fit together")
    else:
        out = _attention_with_dropout(given, probability, behind, axis)
    return like(splits[0], out, Layout(out.dim() - behind))


def _check_heads(tensors: Sequence[Any], behind: int, *, grouped: bool) -> None:
    splits = [t for t in tensors if isinstance(t, Split)]
    if behind <= 2:
        raise SplitLostError("positions or features are split, not heads")
    if any(t.dim() - t.division.dim != behind or t.division.sections != 1 for t in splits):
        raise SplitLostError("queries, keys and values are split differently")
    if any(t.dim() < behind for t in tensors):
        raise SplitLostError("queries, keys and values have different numbers of dims")
    if len({t.shape[-behind] for t in tensors}) > 1 and not (grouped and behind == 3):
        raise SplitLostError("queries, keys and values have different numbers of heads")


def _heads(tensor: Any, axis: Axis, behind: int) -> Tensor:
    if isinstance(tensor, Split):
        return tensor.local
    if tensor.shape[-behind] == 1:
        return enter(axis, tensor)[0]
    return part(tensor, Layout(tensor.dim() - behind), axis)


def _mask(mask: Any, query: Any, axis: Axis, behind: int) -> Tensor:
    if isinstance(mask, Split):
        if mask.division != Layout(mask.dim() - behind):
            raise SplitLostError("its mask is split differently")
        return mask.local
    if mask.dim() < behind or mask.shape[-behind] == 1:
        return enter(axis, mask)[0]
    if mask.shape[-behind] != query.shape[-behind]:
        raise SplitLostError("its mask is of another number of heads")
    return part(mask, Layout(mask.dim() - behind), axis)


def _attention_with_dropout(given: Mapping[str, Any], probability: float, behind: int, axis: Axis) -> Tensor:
    """Attend as torch's plain path does on a CPU; what is dropped is drawn for all heads."""
    query, key, value = (given[name] for name in ("query", "key", "value"))
    mask, kind = given.get("attn_mask"), query.device.type
    is_cast = torch.is_autocast_enabled(kind) and query.dtype != torch.float64
    dtype = torch.get_autocast_dtype(kind) if is_cast else query.dtype
    exact = torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
    with torch.autocast(kind, enabled=False):
        query, key, value = (tensor.to(dtype).to(exact) for tensor in (query, key, value))
        if given.get("enable_gqa"):
            key, value = (t.repeat_interleave(query.shape[-3] // t.shape[-3], -3) for t in (key, value))
        scores = _scores(query, key, given.get("scale"))
        if given.get("is_causal"):
            mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        if mask is not None:
            scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
        # Who attends to nothing gets zeros, not 0 / 0.
        nothing = (scores == -math.inf).all(dim=-1, keepdim=True)
        weights = scores.masked_fill(nothing, 0).softmax(dim=-1).masked_fill(nothing, 0)
        noise = drawn_noise(weights.detach(), Layout(weights.dim() - behind), axis, probability)
        out: Tensor = (weights * noise) @ value
    return out.to(dtype)


def _scores(query: Tensor, key: Tensor, scale: float | None) -> Tensor:
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    root = math.sqrt(abs(scale))
    return (query * math.copysign(root, scale)) @ (key.transpose(-2, -1) * root)
