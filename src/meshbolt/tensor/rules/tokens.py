"""The two ends of a model over tokens: a table of embeddings split by rows, and the loss over logits split by classes."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from meshbolt.tensor.axis import Axis
from meshbolt.tensor.exchange import total
from meshbolt.tensor.layout import Layout, SplitLostError
from meshbolt.tensor.part import Split
from meshbolt.tensor.rules.products import summed
from meshbolt.tensor.split import named, rule


@rule("embedding")
def embedding(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Look rows up where they are; the others count nothing in the sum."""
    names = ("input", "weight", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse")
    if func is torch.embedding:
        raise SplitLostError("it is not torch.nn.functional's")
    given = named(names, args, kwargs)
    table, tokens = given["weight"], given["input"]
    if not isinstance(table, Split) or table.division != Layout(0) or isinstance(tokens, Split):
        raise SplitLostError("the table is not split by rows, or the tokens are split")
    if given.get("max_norm") is not None or given.get("scale_grad_by_freq") or given.get("sparse"):
        raise SplitLostError("the table's rows are changed or counted as they are read")
    padding = given.get("padding_idx")
    if padding is not None and not -table.shape[0] <= padding < table.shape[0]:
        raise SplitLostError("the padding is not in the table")
    rows = table.local.shape[0]
    here, elsewhere = _places(tokens, rows, table.axis)
    if padding is not None:
        padding = padding % table.shape[0] - table.axis.rank * rows
    own = padding if padding is not None and 0 <= padding < rows else None
    found = F.embedding(here.masked_fill(elsewhere, 0), table.local, own)
    return summed(found.masked_fill(elsewhere.unsqueeze(-1), 0), table)


def _places(numbers: Tensor, each: int, axis: Axis) -> tuple[Tensor, Tensor]:
    """Return where numbers stand in this rank's range, and which are in the range of another; the rest torch is to refuse."""
    here = numbers - axis.rank * each
    elsewhere = ((here < 0) & (numbers >= 0)) | ((here >= each) & (numbers < each * axis.size))
    return here, elsewhere


@rule("cross_entropy")
def cross_entropy(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return the loss over logits of which every rank has some classes; only a number a sample travels.

    Source: Shoeybi et al. (2019), section 3.
    """
    names = ("input", "target", "weight", "size_average", "ignore_index", "reduce", "reduction", "label_smoothing")
    given = named(names, args, kwargs)
    logits, target = given["input"], given["target"]
    if not isinstance(logits, Split) or logits.division != _classes(logits) or isinstance(target, Split):
        raise SplitLostError("it is not the classes that are split")
    if given.get("weight") is not None or target.is_floating_point():
        raise SplitLostError("classes have weights, or targets are probabilities")
    if given.get("size_average") is not None or given.get("reduce") is not None:
        raise SplitLostError("its arguments are of an old kind")
    ignored, reduction = given.get("ignore_index", -100), given.get("reduction", "mean")
    smoothing = given.get("label_smoothing", 0.0)
    fits = target.shape == logits.shape[: logits.division.dim] + logits.shape[logits.division.dim + 1 :]
    if reduction not in ("none", "sum", "mean") or not 0 <= smoothing <= 1 or not fits:
        raise SplitLostError("its arguments do not fit together")
    # What torch's own loss is in: autocast has its say there.
    dtype = F.cross_entropy(logits.local.detach().new_zeros((1, 2)), target.new_zeros(1)).dtype
    losses = _losses(logits, target, ignored, smoothing)
    if reduction == "sum":
        losses = losses.sum()
    elif reduction == "mean":
        losses = losses.sum() / (target != ignored).sum()
    return losses.to(dtype)


def _classes(logits: Split) -> Any:
    return logits.division.moved(min(1, logits.dim() - 1)) if logits.division.sections == 1 else None


def _losses(logits: Split, target: Tensor, ignored: int, smoothing: float) -> Tensor:
    axis, dim, local = logits.axis, logits.division.dim, logits.local
    if local.dtype in (torch.float16, torch.bfloat16):
        local = local.float()
    highest = axis.largest(local.detach().amax(dim, keepdim=True))
    shifted = local - highest
    here, elsewhere = _places(target, local.shape[dim], axis)
    elsewhere = elsewhere | (target == ignored)
    picked = shifted.gather(dim, here.masked_fill(elsewhere, 0).unsqueeze(dim)).squeeze(dim).masked_fill(elsewhere, 0)
    numbers = [shifted.exp().sum(dim), picked] + ([shifted.sum(dim)] if smoothing else [])
    # One message for all of them.
    sums = total(torch.stack(numbers), axis)
    normaliser = sums[0].log()
    losses = normaliser - sums[1]
    if smoothing:
        losses = (1 - smoothing) * losses + smoothing * (normaliser - sums[2] / logits.shape[dim])
    return losses.masked_fill(target == ignored, 0)
