"""Floating-point operations of a step, counted while it runs on tensors without values.

What counts: matrix products, convolutions and attention, a multiplication and an addition being two. Two numbers come of it. The
*model's* are what the mathematics of the step needs, forwards and backwards, however it is run: the numerator of MFU. The
*hardware's* are what is really done, with activations that are computed again for the backward pass, and the scores that fused
attention computes again: the numerator of HFU.

Attention is counted whole, over all pairs of positions, as most published figures are; and beside that with half of the pairs
where it is called with `is_causal=True`, as other figures are. Where a mask makes it causal, or it runs as plain products
(written out, or on a CPU with dropout), nobody can tell, and it is counted whole in both.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from meshbolt.compat import TorchDispatchMode, flops_of
from meshbolt.errors import UnsupportedError

_aten = torch.ops.aten
_FUSED = {
    _aten._scaled_dot_product_flash_attention,
    _aten._scaled_dot_product_flash_attention_for_cpu,
    _aten._scaled_dot_product_efficient_attention,
    _aten._scaled_dot_product_cudnn_attention,
    _aten._scaled_dot_product_fused_attention_overrideable,
}
_FUSED_BACKWARD = {
    _aten._scaled_dot_product_flash_attention_backward,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward,
    _aten._scaled_dot_product_efficient_attention_backward,
    _aten._scaled_dot_product_cudnn_attention_backward,
    _aten._scaled_dot_product_fused_attention_overrideable_backward,
}
_COMMUNICATES = ("c10d", "_c10d_functional", "c10d_functional")


@dataclass(frozen=True, kw_only=True)
class Flops:
    """Floating-point operations.

    Attributes:
        model: that the step needs, attention counted whole.
        model_causal: likewise, with half of each attention that is called as causal.
        hardware: that are done, attention counted whole.
    """

    model: float = 0.0
    model_causal: float = 0.0
    hardware: float = 0.0

    def __add__(self, other: Flops) -> Flops:
        """Return the sum of each number."""
        return Flops(
            model=self.model + other.model,
            model_causal=self.model_causal + other.model_causal,
            hardware=self.hardware + other.hardware,
        )

    def __mul__(self, factor: float) -> Flops:
        """Return each number so many times."""
        return Flops(
            model=self.model * factor, model_causal=self.model_causal * factor, hardware=self.hardware * factor
        )


class CountFlops(TorchDispatchMode):
    """Counts all operations inside.

    Attributes:
        counted: until now.
        in_backward: the caller says when the backward pass begins: what is computed with gradients switched on from then on
            is computed again.
    """

    def __init__(self) -> None:
        """Begin with nothing."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.counted = Flops()
        self.in_backward = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and count it.

        Raises:
            UnsupportedError: it would wait for other ranks, which do not count at this moment.
        """
        if func.namespace in _COMMUNICATES:
            raise UnsupportedError(
                f"the step communicates by itself ({func}), which a step that is only looked at cannot do"
            )
        result = func(*args, **(kwargs or {}))
        self._count(func, args, kwargs or {}, result)
        return result

    def _count(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        packet, again = func._overloadpacket, self.in_backward and torch.is_grad_enabled()
        if packet in _FUSED or packet in _FUSED_BACKWARD:
            backward = packet in _FUSED_BACKWARD
            scores, values = _attention(*(args[1:4] if backward else args[:3]))
            needed = (scores + values) * (2 if backward else 1)
            done = needed + (scores if backward else 0)
            halves = needed / 2 if _is_causal(func, args, kwargs) else 0
        else:
            needed = done = flops_of(func, args, kwargs, result)
            halves = 0
        if not done:
            return
        if again:
            self.counted += Flops(hardware=done)
        else:
            self.counted += Flops(model=needed, model_causal=needed - halves, hardware=done)


def _attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[int, int]:
    """Return the operations of queries by keys, and of scores by values, each (..., heads, length, features)."""
    *batch_and_heads, queries, features = query.shape
    pairs = queries * key.shape[-2]
    for size in batch_and_heads:
        pairs *= size
    return 2 * pairs * features, 2 * pairs * value.shape[-1]


def _is_causal(func: Any, args: Any, kwargs: Any) -> bool:
    for position, argument in enumerate(func._schema.arguments):
        if argument.name == "is_causal":
            return bool(args[position] if position < len(args) else kwargs.get("is_causal", argument.default_value))
    return False
