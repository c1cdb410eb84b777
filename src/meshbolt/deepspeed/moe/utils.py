"""`deepspeed.moe.utils`."""

from __future__ import annotations

from typing import Any

from torch import nn


def is_moe_param(param: nn.Parameter) -> bool:
    """Return False: no parameter belongs to an expert of one rank."""
    return False


def split_params_into_different_moe_groups_for_optimizer(param_groups: Any, max_group_size: int | None = None) -> Any:
    """Return parameter groups as they are: none has parameters of experts, which would need a group of their own.

    Args:
        param_groups: one, or several.
        max_group_size: without effect: groups are not stored as one tensor.
    """
    groups = [param_groups] if isinstance(param_groups, dict) else list(param_groups)
    return [{**group, "params": list(group["params"])} for group in groups]
