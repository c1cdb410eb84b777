"""`nn.MultiheadAttention`, whose forward is one function of torch: projections, attention and output, by heads.

It is written out here in steps that have rules of their own, since torch's function asks for sizes of single heads that a
rank's part of the weights does not have.
"""

from __future__ import annotations

import inspect
import math
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from meshbolt.tensor.layout import SplitLostError
from meshbolt.tensor.part import Split
from meshbolt.tensor.split import TENSORS, rule

_SIGNATURE = inspect.signature(F.multi_head_attention_forward)


@rule("multi_head_attention_forward")
def multi_head_attention(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Attend, every rank with its heads; inputs are (length, batch, width), or without the batch."""
    bound = _SIGNATURE.bind(*args, **kwargs)
    bound.apply_defaults()
    given = SimpleNamespace(**bound.arguments)
    _check(given)
    query, key, value = given.query, given.key, given.value
    is_batched = query.dim() == 3
    if not is_batched:
        same_keys, same_values = key is query, value is key
        query = query.unsqueeze(1)
        key = query if same_keys else key.unsqueeze(1)
        value = key if same_values else value.unsqueeze(1)
    mask, is_causal = _mask(given, query, key)
    queries, keys, values = (_by_heads(tensor, given.num_heads) for tensor in _projected(given, query, key, value))
    dropout = given.dropout_p if given.training else 0.0
    if given.need_weights:
        mixed, weights = _with_weights(queries, keys, values, mask, dropout)
        weights = weights.mean(dim=1) if given.average_attn_weights else weights
    else:
        mixed = F.scaled_dot_product_attention(
            queries, keys, values, attn_mask=mask, dropout_p=dropout, is_causal=is_causal
        )
        weights = None
    out = F.linear(mixed.permute(2, 0, 1, 3).flatten(2), given.out_proj_weight, given.out_proj_bias)
    if is_batched:
        return out, weights
    return out.squeeze(1), weights if weights is None else weights.squeeze(0)


def _check(given: SimpleNamespace) -> None:
    weights = [
        given.in_proj_weight,
        given.q_proj_weight,
        given.k_proj_weight,
        given.v_proj_weight,
        given.out_proj_weight,
    ]
    if any(isinstance(weight, TENSORS) and not isinstance(weight, Split) for weight in weights):
        raise SplitLostError("it is an attention that is not in the plan")
    added = (given.bias_k, given.bias_v, given.static_k, given.static_v)
    if given.add_zero_attn or any(tensor is not None for tensor in added):
        raise SplitLostError("it adds keys and values of its own")
    if given.is_causal and given.attn_mask is None:
        raise RuntimeError("Need attn_mask if specifying the is_causal hint.")  # torch's own words


def _projected(given: SimpleNamespace, query: Any, key: Any, value: Any) -> tuple[Any, Any, Any]:
    weight, bias = given.in_proj_weight, given.in_proj_bias
    if given.use_separate_proj_weight:
        weights = (given.q_proj_weight, given.k_proj_weight, given.v_proj_weight)
    elif query is key and key is value:
        first, second, third = F.linear(query, weight, bias).chunk(3, dim=-1)
        return first, second, third
    else:
        weights = weight.chunk(3)
    biases = (None, None, None) if bias is None else bias.chunk(3)
    first, second, third = map(F.linear, (query, key, value), weights, biases)
    return first, second, third


def _by_heads(projected: Any, heads: int) -> Any:
    """Return (batch, heads, length, size of a head) of (length, batch, width)."""
    return projected.unflatten(-1, (heads, -1)).permute(1, 2, 0, 3)


def _mask(given: SimpleNamespace, query: Any, key: Any) -> tuple[Tensor | None, bool]:
    """Return one mask that is added to the scores, (batch or 1, heads or 1, length, length), and whether to mask the future."""
    padding, mask = given.key_padding_mask, given.attn_mask
    if given.is_causal and padding is None and not given.need_weights:
        return None, True
    mask = _added(mask, query.dtype)
    if mask is not None:
        mask = mask[None, None] if mask.dim() == 2 else mask.unflatten(0, (query.shape[1], given.num_heads))
    if padding is not None:
        padding = _added(padding, query.dtype).view(query.shape[1], 1, 1, key.shape[0])
        mask = padding if mask is None else mask + padding
    return mask, False


def _added(mask: Tensor | None, dtype: torch.dtype) -> Any:
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, -math.inf)


def _with_weights(query: Any, key: Any, value: Any, mask: Tensor | None, dropout: float) -> tuple[Any, Any]:
    scores = (query * math.sqrt(1.0 / query.shape[-1])) @ key.transpose(-2, -1)
    weights = F.softmax(scores if mask is None else scores + mask, dim=-1)
    weights = F.dropout(weights, dropout) if dropout > 0.0 else weights
    return weights @ value, weights
