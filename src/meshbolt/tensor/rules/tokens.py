"""The two ends of a model over tokens: a table of embeddings split by rows, and the loss over logits split by classes."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from meshbolt.tensor.exchange import total
from meshbolt.tensor.layout import SplitLostError
from meshbolt.tensor.rules.products import summed
from meshbolt.tensor.split import SplitTensor, rule


@rule("embedding")
def embedding(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Look rows up where they are; the others count nothing in the sum."""
    names = ("input", "weight", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse")
    if func is torch.embedding:
        raise SplitLostError("it is not torch.nn.functional's")
    named = dict(zip(names, args, strict=False)) | kwargs
    table, tokens = named["weight"], named["input"]
    if not isinstance(table, SplitTensor) or table.division.dim or isinstance(tokens, SplitTensor):
        raise SplitLostError("the table is not split by rows, or the tokens are split")
    if named.get("max_norm") is not None or named.get("scale_grad_by_freq") or named.get("sparse"):
        raise SplitLostError("the table's rows are changed or counted as they are read")
    rows = table.local.shape[0]
    here = tokens - table.axis.rank * rows
    elsewhere = (here < 0) | (here >= rows)
    padding = named.get("padding_idx")
    if padding is not None:
        padding = padding % table.shape[0] - table.axis.rank * rows
    own = padding if padding is not None and 0 <= padding < rows else None
    found = F.embedding(here.masked_fill(elsewhere, 0), table.local, own)
    return summed(found.masked_fill(elsewhere.unsqueeze(-1), 0), table)


@rule("cross_entropy")
def cross_entropy(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return the loss over logits of which every rank has some classes; only a number a sample travels.

    Source: Shoeybi et al. (2019), section 3.
    """
    names = ("input", "target", "weight", "size_average", "ignore_index", "reduce", "reduction", "label_smoothing")
    named = dict(zip(names, args, strict=False)) | kwargs
    logits, target = named["input"], named["target"]
    if not isinstance(logits, SplitTensor) or logits.division != _classes(logits) or isinstance(target, SplitTensor):
        raise SplitLostError("it is not the classes that are split")
    if named.get("weight") is not None or target.is_floating_point():
        raise SplitLostError("classes have weights, or targets are probabilities")
    if named.get("size_average") is not None or named.get("reduce") is not None:
        raise SplitLostError("its arguments are of an old kind")
    losses = _losses(logits, target, named.get("ignore_index", -100), named.get("label_smoothing", 0.0))
    reduction = named.get("reduction", "mean")
    if reduction == "none":
        return losses
    if reduction == "sum":
        return losses.sum()
    return losses.sum() / (target != named.get("ignore_index", -100)).sum()


def _classes(logits: SplitTensor) -> Any:
    return logits.division.moved(min(1, logits.dim() - 1)) if logits.division.sections == 1 else None


def _losses(logits: SplitTensor, target: Tensor, ignored: int, smoothing: float) -> Tensor:
    axis, dim, local = logits.axis, logits.division.dim, logits.local
    highest = axis.largest(local.detach().amax(dim, keepdim=True))
    shifted = local - highest
    here = target - axis.rank * local.shape[dim]
    elsewhere = (here < 0) | (here >= local.shape[dim])
    picked = shifted.gather(dim, here.masked_fill(elsewhere, 0).unsqueeze(dim)).squeeze(dim).masked_fill(elsewhere, 0)
    numbers = [shifted.exp().sum(dim), picked] + ([shifted.sum(dim)] if smoothing else [])
    # One message for all of them.
    sums = total(torch.stack(numbers), axis)
    normaliser = sums[0].log()
    losses = normaliser - sums[1]
    if smoothing:
        losses = (1 - smoothing) * losses + smoothing * (normaliser - sums[2] / logits.shape[dim])
    return losses.masked_fill(target == ignored, 0)
