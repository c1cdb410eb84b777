"""Activation recompute: drop a block's activations after its forward, and compute them again in backward.

The block's `forward` is replaced on the instance, inside its hooks, so that no wrapper appears in the module tree, names of
parameters stay the user's, and the parameters are gathered once for the recomputation and the backward together.

Source: Chen et al., "Training Deep Nets with Sublinear Memory Cost" (2016); the selective form follows Korthikanti et al.,
"Reducing Activation Recomputation in Large Transformer Models" (2022).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from meshbolt.errors import ConfigError, did_you_mean

RecomputeMode = Literal["none", "full", "selective"]
MODES: tuple[RecomputeMode, ...] = ("none", "full", "selective")


@dataclass(frozen=True)
class Recompute:
    """Which activations are computed again in backward instead of being kept.

    Attributes:
        mode: "none" keeps all; "full" keeps only the input of each block; "selective" also keeps the results of matrix
            products and attention, which cost most to compute.
        every: apply it to every n-th block, counted from the first.
    """

    mode: RecomputeMode = "none"
    every: int = 1

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ConfigError(f"recompute={self.mode!r} is not a mode{did_you_mean(str(self.mode), MODES)}.")
        if isinstance(self.every, bool) or not isinstance(self.every, int) or self.every < 1:
            raise ConfigError(
                f"Recompute(every={self.every!r}): give 1 for every block, 2 for every second one, and so on."
            )


Pack = Callable[[Any], "tuple[list[Any], Callable[[Sequence[Any]], Any]]"]
"""Takes arguments apart into leaves that autograd can save, and what puts them together again."""


def recompute_blocks(blocks: Sequence[nn.Module], setting: Recompute, *, pack: Pack | None = None) -> None:
    """Make the chosen blocks recompute their activations.

    Args:
        blocks: in the order of the model.
        setting: what to recompute.
        pack: takes arguments apart; None where they are ordinary tensors.

    Raises:
        ConfigError: recompute is asked for, but the model has no blocks.
    """
    if setting.mode == "none":
        return
    if not blocks:
        raise ConfigError(
            f"recompute={setting.mode!r} works on the repeated blocks of a model, and none was found. Name them with "
            "zero=Zero(unit=[...]), or set recompute='none'."
        )
    for block in blocks[:: setting.every]:
        _recompute(block, setting.mode, pack)


def _recompute(block: nn.Module, mode: RecomputeMode, pack: Pack | None) -> None:
    forward = block.forward
    options: dict[str, Any] = {"use_reentrant": False}
    if mode == "selective":
        options["context_fn"] = _selective_contexts

    @functools.wraps(forward)
    def recomputed(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        if pack is None:
            return checkpoint(forward, *args, **options, **kwargs)
        leaves, unpack = pack((args, kwargs))

        def again(*leaves: Any) -> Any:
            args, kwargs = unpack(leaves)
            return forward(*args, **kwargs)

        return checkpoint(again, *leaves, **options)

    block.forward = recomputed


def _kept_ops() -> set[Callable[..., Any]]:
    ops = torch.ops.aten
    return {
        ops.mm.default,
        ops.bmm.default,
        ops.addmm.default,
        ops.baddbmm.default,
        ops.convolution.default,
        ops._scaled_dot_product_flash_attention.default,
        ops._scaled_dot_product_efficient_attention.default,
        ops._scaled_dot_product_cudnn_attention.default,
        ops._scaled_dot_product_flash_attention_for_cpu.default,
    }


def _selective_contexts() -> Any:
    kept = _kept_ops()

    def policy(_context: Any, op: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if op in kept else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)
